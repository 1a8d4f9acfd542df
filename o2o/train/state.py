"""What a run is at one instant: device arrays and host values, which a checkpoint holds, and who listens to it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from o2o.config import LoopConfig
from o2o.data.normalizer import Normalizer
from o2o.types import Agent, Array, Carry, Info, OnlineConfig


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
    unlogged_updates: int = 0
    """Update calls whose metrics are summed but not yet written."""
    score: float | None = None
    """Mean over seeds of the last reported evaluation's success rate; of its return where the task knows no success."""
    scored_at: int | None = None
    """The `point` of that evaluation."""
    asked_at: int | None = None
    """The `point` of the last evaluation that was begun; it is still to be reported while `scored_at` is another."""

    @property
    def unscored(self) -> bool:
        """Whether an evaluation was begun and is not reported yet."""
        return self.asked_at is not None and self.asked_at != self.scored_at

    @property
    def point(self) -> int:
        """Steps of both phases: the number of a checkpoint taken here."""
        return self.offline_steps + self.env_steps


@dataclass
class RunState:
    """Everything that a run is, but its replay and its environments, which keep their own state.

    Only the `Trainer` that owns it writes it. `save` and `load` of `o2o.train.trainer` turn it into a checkpoint and
    back. Device arrays lead with the seed axis `[S]`.
    """

    agent: Agent
    """The agents of all seeds, leaves `[S, ...]`."""
    normalizer: Normalizer | None = None
    """Stands between raw observations and the agents."""
    counters: Counters = field(default_factory=Counters)
    totals: Info = field(default_factory=dict)
    """Metrics summed since the last log row; empty if nothing was summed."""
    carry: Carry = None
    """What the training policies remember, leaves `[S, N, ...]`."""
    action: Array | None = None
    """The next actions `[S, N, A]`, chosen and not yet played."""
    environments: dict[str, Any] | None = None
    """Where the environments stood in the checkpoint, until they are put back there."""
    observations: Any = None
    """What the policies see there, leaves `[S * N, ...]`."""


def evaluation_steps(loop: LoopConfig, online: OnlineConfig, steps: int) -> set[int]:
    """Return the online steps to evaluate at: every `eval_every`, the warm-up's end, after 1000 updates, the end.

    On-policy agents have no warm-up, and their updates are not counted so.
    """
    points = {*(range(loop.eval_every, steps, loop.eval_every) if loop.eval_every else ()), steps}
    if online.replay != "rollout":
        points |= {max(online.warmup_steps, online.random_steps), online.first_update() + -(-1000 // online.utd_ratio)}
    return {point for point in points if 0 < point <= steps}
