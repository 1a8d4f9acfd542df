"""The settings of a run: frozen dataclasses, their defaults, and how they become JSON and are read back."""

import ast
import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from o2o.errors import ConfigError, suggest
from o2o.settings import (
    LARGEST,
    AboveZero,
    Amount,
    Count,
    NotNegative,
    NotZero,
    Portion,
    Range,
    Real,
    Seed,
    SettingError,
    Settings,
    read,
    short,
)

if TYPE_CHECKING:
    from o2o.types import AgentConfig
else:  # its module imports JAX; the fields of every agent's config are read by its own class
    AgentConfig = Any


@dataclass(frozen=True)
class LoopConfig(Settings):
    """How often a run logs, evaluates and checkpoints, in which processes it works, and how much it stores.

    Most of these settings do not change what is learnt. The exceptions are `overlap`, and `replay_capacity` once a run
    exceeds it. In environments that cannot be replayed, an evaluation ends the training episode, so its times matter.
    Uni-O4 chooses the policy to fine-tune by evaluation, so `eval_episodes` matters.
    """

    eval_every: Amount = 5_000
    """Environment steps between two evaluations; 0: none. More evaluations follow at the end of the warm-up, 1000
    updates later, and at the end of the run."""
    offline_eval_every: Amount = 0
    """Gradient steps between two evaluations in pre-training; 0: one at its end only, of offline estimates 20."""
    eval_episodes: Count = 20
    """Episodes of one evaluation, per seed."""
    eval_envs: Amount = 5
    """Environments per seed in which they are played side by side; 1 for a simulator that is large or costly. 0: the
    training environment itself, where no second one can run; then an evaluation ends the training episode."""
    log_every: Count = 1_000
    """Gradient steps (offline) or environment steps (online) between two rows of metrics."""
    checkpoint_every: Count = 10_000
    """Gradient steps (offline) or environment steps (online) between two checkpoints. Each phase also ends with one."""
    updates_per_dispatch: Count = 200
    """Gradient steps of pre-training in one call to the device."""
    replay_capacity: Count = 2_000_000
    """Most transitions of its own that a run stores. The buffer is never larger than the run can fill."""
    device_bytes: Annotated[int, Range(least=0)] | None = None
    """Device memory for dataset and replay, in bytes. If they need more, their observations stay in host memory and on
    disk (RUN/replay), which is slower and draws the same rows. None: half of the device's memory, 8 GiB on a CPU. 0:
    always on the host."""
    deterministic_eval: bool = True
    """Evaluate the mode of the policy; False: sample its actions."""
    fresh_eval_starts: bool = False
    """Begin the episodes of every evaluation at other states. False: all evaluations of a run have the same reset
    seeds, so that their scores are compared on the same starts."""
    eval_process: bool = False
    """Evaluate in a separate process, on one CPU core, while training goes on. A stop, the end of a phase and a later
    checkpoint wait for it; a checkpoint of the same step gets its score later. On a CPU the numbers are the same."""
    env_processes: Annotated[int, Range(least=0, most=1024)] = 0
    """Number of processes that step the training environments; 0: the main process steps them. Useful for several
    environments (`seeds`, `num_envs`) with slow steps. The numbers are the same. At the end each process has 30 s to
    close its environments before it is killed."""
    devices: Annotated[int, Range(least=1, most=4096)] = 1
    """Devices that learn together: seeds are spread over them first, then the rows of each minibatch. The numbers are
    the same, to rounding."""
    overlap: bool = False
    """Learn while the environments step. Each action is then chosen before the update of its step, not after it. Meant
    for slow environments such as robots. Runs are reproducible but differ from those without it. On-policy agents
    ignore it."""


FORMAT = 3
"""Format of a run folder's config.json. It is raised when folders of before can no longer be opened."""

PRESET = "preset.json"
"""File in a run folder: the settings of the preset that the run's settings are compared with."""
ABOUT = ("format", "versions", "fingerprint", "dataset_summary", "base_fingerprint", "base_source", "vouched")
"""Entries of a run folder's config.json that are no settings."""

T = TypeVar("T")


@dataclass(frozen=True)
class TaskConfig(Settings):
    """Changes to the conventions of the task. None keeps the value of the preset or of the task table."""

    binary: bool | None = None
    """Adroit: replace the dense reward by the sparse -1/0 success reward of the papers."""
    reward_scale: Annotated[float, NotZero()] | None = None
    """Multiplies every raw reward, in the dataset and in the environment."""
    reward_bias: Real | None = None
    """Added to every scaled reward."""
    normalize_returns: AboveZero | None = None
    """Distance between the dataset's best and worst return after scaling (IQL's paper: 1000). Sets `reward_scale`,
    which must be None."""
    terminate_on_success: bool | None = None
    """End a training episode at its first success."""
    only_successes: bool | None = None
    """Use only the episodes of the dataset that succeed (the WSRL paper's Adroit data)."""
    data_share: Portion | None = None
    """Use only this share of each dataset's episodes, the first ones (RLPD's Adroit: 0.9)."""
    achieved_goal: bool | None = None
    """Keep `achieved_goal` of Dict observations."""
    success_key: str | None = None
    """Entry of the environment's infos that says whether a step succeeds; it is looked at before `success` and
    `is_success`."""


@dataclass(frozen=True)
class RunConfig(Settings):
    """Everything that defines a run. It is saved as config.json in the run folder."""

    agent: str
    """Name in o2o.agents.AGENTS."""
    config: AgentConfig
    """The agent's config, of its own class."""
    dataset: tuple[str, ...]
    """Minari ids or paths. Several datasets are mixed by `weights`."""
    weights: tuple[NotNegative, ...] = ()
    """Share of each dataset in a batch; empty: in proportion to their rows."""
    clip_actions: bool = False
    """Clip the dataset's actions to its action space. Without this, a dataset with actions outside is refused."""
    skip_bad_episodes: bool = False
    """Leave faulty episodes out of the dataset, and say how many. Without this, a dataset that has one is refused."""
    env: str | None = None
    """Gymnasium id of the environment; None for the dataset's own. Datasets of different environments need it."""
    env_kwargs: tuple[str, ...] = ()
    """Arguments of the environment, NAME=VALUE each, over those of the dataset; values are JSON or plain words."""
    episode_limit: Count | None = None
    """Steps after which an episode is cut. None: the environment's own limit; where it has none, ten times the
    dataset's mean episode, at least 1000."""
    task: TaskConfig = field(default_factory=TaskConfig)
    """Changes to the conventions of the task."""
    history: Count = 1
    """Number of observations that the policy sees: the current one and those before it (`o2o.data.history`)."""
    cameras: tuple[str, ...] = ()
    """MuJoCo cameras to render into the observation; `free` exists always. Empty: the cameras of the dataset."""
    image_size: Annotated[int, Range(least=1, most=4096)] = 64
    """Height and width of the images of `cameras`. The dataset's own cameras keep the size of the dataset."""
    normalize: bool = False
    """Normalise observations with the dataset's statistics, stored with the agent."""
    std_floor: AboveZero | None = None
    """Divide by max(std, std_floor). None: divide by std + 0.001, or by 1 where nothing varies."""
    action_range: Literal["space", "data"] = "space"
    """What [-1, 1] stands for: the action space, or the range of the dataset's actions plus the agent's margin."""
    base: str | None = None
    """Frozen policy that a residual agent corrects: a run folder, a .onnx or .pt (TorchScript) file, or module:name."""
    base_seed_index: Amount = 0
    """Which seed of the base run to take, counted from 0."""
    base_sample: bool = False
    """Sample from the base run's policy. Without this its mode acts."""
    base_labels: Literal["policy", "demo"] = "policy"
    """Base actions of the dataset's rows: `policy`: the base's own; `demo`: the recorded actions (residual 0)."""
    base_timeout_s: AboveZero | None = 1.0
    """Longest time for an action of the base, in s; None: no limit. It is tested once before the run. In the run, three
    slow actions in a row are an error."""
    seed: Seed = 0
    """All random numbers of the run derive from it."""
    seeds: Count = 1
    """Number of agents that are trained side by side, each with a seed of its own."""
    offline_steps: Amount = 10_000
    """Gradient steps of pre-training."""
    online_steps: Amount = 10_000
    """Environment steps of the online phase per seed, warm-up included."""
    offline_estimate: bool = False
    """Judge pre-training by estimates on held-out episodes and make no environment; needs `online_steps` 0, or
    robots elsewhere that play the online phase (`o2o learner`). It is always so there, and with `online_steps` 0, where
    neither the dataset nor `env` names an environment."""
    holdout: Annotated[float, Range(least=0, below=1)] = 0.1
    """Share of the episodes that an offline estimate keeps from training; 0: it looks at the training data."""
    init_from: str | None = None
    """A pre-trained run to start from in place of pre-training. WSRL: a run of BC, IQL, CQL, Cal-QL, SAC, RLPD or WSRL;
    the policy keeps its `log_std_range`. DSRL: a run whose flow or diffusion it steers, such as one of `flow_bc`."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """How often to log, evaluate and checkpoint."""
    keep_checkpoints: Count = 2
    """How many of the newest checkpoints to keep, at least 1; 2 survive a power cut during a save. The best checkpoint
    with an evaluation is kept as well."""
    record: bool = False
    """Write every finished training episode to disk. At the end they become the Minari dataset RUN/recorded."""
    loggers: tuple[str, ...] = ()
    """Loggers in addition to metrics.jsonl: `tensorboard`, `wandb`."""
    preset: str = "paper"
    """The preset that the settings started from; only a note."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` for a value of another type or out of range, or values that do not go together."""
        super().__post_init__()
        if not self.dataset or "" in self.dataset:
            raise self.refuse("dataset", "one or more Minari ids or paths")
        if self.seed + self.seeds - 1 > LARGEST:
            raise self.refuse("seed", f"at most {LARGEST - self.seeds + 1} with seeds={self.seeds}")
        self.environment_arguments()
        if self.weights and (len(self.weights) != len(self.dataset) or not any(self.weights)):
            raise self.refuse("weights", f"a weight for each of the {len(self.dataset)} datasets, not all of them 0")

        several = {
            "seeds": self.seeds > 1,
            "config.online.num_envs": self.config is not None and self.config.online.num_envs > 1,
            "loop.env_processes": self.loop.env_processes > 0,
            "loop.eval_process": self.loop.eval_process,
        }
        if self.loop.eval_envs == 0 and any(several.values()):
            names = " and ".join(f"`{name}`" for name, given in several.items() if given)
            said = f" is 0, one environment for everything, and {names} asks for more; expected at least 1 with that"
            raise SettingError(said, ("loop", "eval_envs"), type(self).__name__)

    def __repr__(self) -> str:
        return short(self)

    def environment_arguments(self) -> dict[str, Any]:
        """Return `env_kwargs` by name. Raises `ConfigError` for an entry that is not NAME=VALUE."""
        return keyword_arguments(self.env_kwargs)


def keyword_arguments(entries: Iterable[str]) -> dict[str, Any]:
    """Return the arguments of an environment that are written as NAME=VALUE.

    A value is JSON, or a Python literal such as True; all else is a word. Raises `ConfigError` for another entry.
    """
    found: dict[str, Any] = {}
    for entry in entries:
        name, equals, text = entry.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(f"env_kwargs has {entry!r}; expected NAME=VALUE, such as reward_type=dense")
        found[name] = text
        for parse in (json.loads, ast.literal_eval):
            with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                found[name] = parse(text)
                break
    return found


def with_fields(config: T, changes: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> T:
    """Return a dataclass with fields replaced by dotted name, such as `online.utd_ratio`, or by nested dicts.

    All changes are made together, since a part of them may be invalid by itself. If a field is named twice, the last
    value counts. Raises `ConfigError` for an unknown field and for a value that the field cannot have.
    """
    values: dict[str, Any] = {}
    inside: dict[str, list[tuple[str, Any]]] = {}
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise ConfigError(f"{config!r} is no group of settings: it has no fields to change")
    known = [f.name for f in dataclasses.fields(config)]
    pairs: Any = changes.items() if isinstance(changes, Mapping) else changes
    for name, value in pairs:
        head, _, rest = name.partition(".")
        if head not in known:
            raise ConfigError(f"{type(config).__name__} has no field {head!r}; {suggest(head, known)}")
        if rest:
            inside.setdefault(head, []).append((rest, value))
        elif isinstance(value, Mapping) and dataclasses.is_dataclass(values.get(head, getattr(config, head))):
            inside.setdefault(head, []).extend(value.items())
        else:
            values[head] = value
            inside.pop(head, None)
    for head, parts in inside.items():
        values[head] = with_fields(values.get(head, getattr(config, head)), parts)
    return dataclasses.replace(config, **values) if values else config


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config dataclass as plain JSON types: nested dataclasses become objects, tuples become lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the settings that `to_dict` wrote by dotted name."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def from_dict(cls: type[T], values: Mapping[str, Any], where: str = "config") -> T:
    """Return the config dataclass that `to_dict` wrote as `values`; missing fields take their defaults.

    A union of dataclasses is resolved by the literal field `kind` where they have one, otherwise by the names of the
    fields. Raises `ConfigError` for an unknown field, a value of another type (an int is also a float), a value that is
    none of a `Literal`, and what the dataclass itself refuses. The message begins with `where` and the dotted path.
    """
    try:
        return read(values, cls)
    except SettingError as error:
        raise error.within(root=where) from None
