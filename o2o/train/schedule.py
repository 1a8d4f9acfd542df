"""When a run logs, evaluates and checkpoints, who listens, and where it stands."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from o2o.errors import ConfigError
from o2o.types import OnlineConfig


@dataclass(frozen=True)
class LoopConfig:
    """How often the loops log, evaluate and checkpoint, where what they do runs, and how much they keep.

    What is learnt depends only on `overlap`, on `replay_capacity` once a run exceeds it, on when they evaluate where
    environments cannot be replayed, as that ends the training episode, and in Uni-O4, which chooses the policy to
    fine-tune by evaluating several, on `eval_episodes`.
    """

    eval_every: int = 5_000
    """Environment steps between two evaluations, 0 for none; others: the warm-up's end, 1000 updates later, the end."""
    offline_eval_every: int = 0
    """Gradient steps between two evaluations offline; 0 for one at the end only."""
    eval_episodes: int = 20
    """Episodes of one evaluation, per seed."""
    log_every: int = 1_000
    """Gradient steps (offline) or environment steps (online) between two rows of metrics."""
    checkpoint_every: int = 10_000
    """Gradient steps (offline) or environment steps (online) between two checkpoints; one more at each phase's end."""
    updates_per_dispatch: int = 200
    """Offline updates in one call to the device."""
    replay_capacity: int = 2_000_000
    """Most transitions of its own that a run keeps; the buffer is no larger than the run can fill."""
    device_bytes: int | None = None
    """Dataset and replay may take so many bytes of the device; beyond, their observations stay in host memory and on
    disk (RUN/replay): slower, the same draws. None: half the device's memory, 8 GiB on a CPU; 0 forces it."""
    deterministic_eval: bool = True
    """Evaluate the mode of the policy; False samples."""
    eval_process: bool = False
    """Evaluate in a process of its own, on the CPU and one core, while training goes on. A stop, the end of a phase and
    a checkpoint of a later step wait for it; one of the same step has its score later. On a CPU the same numbers."""
    env_processes: int = 0
    """Processes that step the training environments, each its share of them; 0 steps them in this one. Worth it where
    there are several (`seeds`, `num_envs`) and a step takes long, of simulation or of waiting. The same numbers. At the
    end each has 30 s to close its environments, one after the other; then it is killed."""
    overlap: bool = False
    """Learn while the environments step: each action is chosen just before the update of its step, not just after.
    For environments that take long, robots above all; reproducible, but other numbers. On-policy agents, which learn
    between roll-outs, are not concerned."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` for a number that is too small, before anything is made or played."""
        least = dict.fromkeys(
            ("eval_episodes", "log_every", "checkpoint_every", "updates_per_dispatch", "replay_capacity"), 1
        ) | dict.fromkeys(("eval_every", "offline_eval_every", "env_processes", "device_bytes"), 0)
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise ConfigError(f"loop.{name} is {value}; expected at least {smallest}")


def _ignore(*_: Any) -> None:
    return None


@dataclass
class Hooks:
    """Where a run folder, a progress bar or a notebook listens."""

    metrics: Callable[[dict[str, Any]], None] = _ignore
    episodes: Callable[[list[dict[str, Any]]], None] = _ignore
    checkpoint: Callable[[Any], None] = _ignore
    scored: Callable[[int, float], None] = _ignore
    """(where the run stood in steps of both phases, the score of an evaluation there)."""
    progress: Callable[[str, int, int, dict[str, float]], None] = _ignore
    """(phase, done, total, newest metrics)."""
    should_stop: Callable[[], bool] = lambda: False


@dataclass
class Counters:
    """Where a run stands."""

    phase: str = "offline"
    offline_steps: int = 0
    """Gradient steps of the offline phase."""
    offline_total: int = 0
    """Gradient steps that the offline phase was begun for."""
    gradient_steps: int = 0
    """Critic updates of both phases."""
    online_updates: int = 0
    """Update calls of the online phase, `initial_updates` not counted."""
    env_steps: int = 0
    """Environment steps of the online phase, per seed."""
    episodes: list[int] = field(default_factory=list)
    """Finished training episodes of each seed."""
    elapsed: float = 0.0
    """Seconds of training so far, evaluation included."""
    logged_at: int = 0
    """Step of the last metrics row in this phase."""
    score: float | None = None
    """Mean over seeds of the last reported evaluation's success rate; of its return where the task knows no success."""
    scored_at: int | None = None
    """The `point` of that evaluation."""

    @property
    def point(self) -> int:
        """Steps of both phases: the number of a checkpoint taken here."""
        return self.offline_steps + self.env_steps


def evaluation_steps(loop: LoopConfig, online: OnlineConfig, steps: int) -> set[int]:
    """Return the online steps to evaluate at: every `eval_every`, the warm-up's end, after 1000 updates, the end.

    On-policy agents have no warm-up, and their updates are not counted so.
    """
    points = {*(range(loop.eval_every, steps, loop.eval_every) if loop.eval_every else ()), steps}
    if online.replay != "rollout":
        points |= {max(online.warmup_steps, online.random_steps), online.first_update() + -(-1000 // online.utd_ratio)}
    return {point for point in points if 0 < point <= steps}
