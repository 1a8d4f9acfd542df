"""The settings of a run: everything that defines it, as frozen dataclasses; `o2o.runs.session` acts on them."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from o2o.errors import ConfigError, suggest


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


@dataclass(frozen=True)
class TaskConfig:
    """Changes to the task's own conventions; what is None stays as the preset, or else the task table, has it."""

    binary: bool | None = None
    """Adroit: replace the dense reward by the sparse -1/0 success reward of the papers."""
    reward_scale: float | None = None
    """Multiplies every raw reward, in the dataset and in the environment."""
    reward_bias: float | None = None
    """Added to every scaled reward."""
    normalize_returns: float | None = None
    """Set `reward_scale`, which must be None, so that the dataset's best and worst return lie this far apart (IQL's
    paper: 1000)."""
    terminate_on_success: bool | None = None
    """End a training episode at its first success."""
    only_successes: bool | None = None
    """Leave episodes without a success out of the dataset (the WSRL paper's Adroit data)."""
    achieved_goal: bool = False
    """Keep `achieved_goal` of Dict observations."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that defines a run; saved as config.json."""

    agent: str
    """Name in o2o.agents.AGENTS."""
    config: Any
    """The agent's config."""
    dataset: tuple[str, ...]
    """Minari ids or paths, mixed by `weights`."""
    weights: tuple[float, ...] = ()
    """Share of each dataset in a batch; empty for the share of its rows."""
    clip_actions: bool = False
    """Clip actions of the dataset that lie outside its action space, instead of refusing it."""
    env: str | None = None
    """Gymnasium id of the environment; None for the dataset's own."""
    task: TaskConfig = field(default_factory=TaskConfig)
    """Changes to the task's conventions."""
    history: int = 1
    """Observations that a policy sees at once: the present one and those before it (`o2o.data.history`)."""
    cameras: tuple[str, ...] = ()
    """MuJoCo cameras rendered into the observation (`free` is always there); empty for those that the dataset has."""
    image_size: int = 64
    """Height and width of the images of `cameras`; those of the dataset's cameras are the dataset's."""
    normalize: bool = False
    """Normalise observations with the dataset's statistics, stored with the agent."""
    std_floor: float | None = None
    """Normalise by max(std, std_floor); None for std + 0.001, and by 1 where nothing varies."""
    action_range: Literal["space", "data"] = "space"
    """What [-1, 1] stands for: the action space, or the range of the dataset's actions and the agent's margin on it."""
    base: str | None = None
    """Residual agents: the frozen policy to correct: a run folder, a .onnx or .pt (TorchScript) file, module:name."""
    base_member: int = 0
    """Which of the base run's seeds."""
    base_sample: bool = False
    """Draw from the base run's policy instead of taking its mode."""
    base_labels: Literal["policy", "demo"] = "policy"
    """Base actions of the dataset: the base's own, or the dataset's actions, so that the residual of its rows is 0."""
    base_timeout_s: float | None = 1.0
    """Seconds that an action of the base may take, before the run or three times in a row in it; None for no limit."""
    seed: int = 0
    """Every random draw of the run comes from it."""
    seeds: int = 1
    """Agents trained side by side in one program."""
    offline_steps: int = 10_000
    """Gradient steps of pre-training."""
    online_steps: int = 10_000
    """Environment steps of the online phase per seed, warm-up included."""
    init_from: str | None = None
    """WSRL only: a run of BC, IQL, CQL, Cal-QL, SAC, RLPD or WSRL, its pre-training finished, to start from instead of
    pre-training; the policy keeps its `log_std_range`."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """How often to log, evaluate and checkpoint."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept, at least one (two outlast a power cut during a save); the best of those taken where the
    run was evaluated is kept besides."""
    record: bool = False
    """Write every finished training episode to disk; at the run's end they become a Minari dataset, RUN/recorded."""
    loggers: tuple[str, ...] = ()
    """`tensorboard`, `wandb`: besides metrics.jsonl."""
    preset: str = "paper"
    """Which preset the agent's config started from (for the record)."""


def with_fields(config: Any, changes: Iterable[tuple[str, Any]]) -> Any:
    """Return a dataclass with fields replaced by dotted name (`online.utd_ratio`); unknown ones raise `ConfigError`.

    All at once, as what the changes amount to may be usable where a part of them is not; of one field the last counts.
    """
    values: dict[str, Any] = {}
    inside: dict[str, list[tuple[str, Any]]] = {}
    known = [f.name for f in dataclasses.fields(config)]
    for name, value in changes:
        head, _, rest = name.partition(".")
        if head not in known:
            raise ConfigError(f"{type(config).__name__} has no field {head!r}; {suggest(head, known)}")
        if rest:
            inside.setdefault(head, []).append((rest, value))
        else:
            values[head] = value
            inside.pop(head, None)
    for head, parts in inside.items():
        values[head] = with_fields(values.get(head, getattr(config, head)), parts)
    return dataclasses.replace(config, **values) if values else config
