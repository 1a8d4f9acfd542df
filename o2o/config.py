"""The settings of a run: frozen dataclasses, their defaults, and how they become JSON and are read back."""

import dataclasses
import json
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from cattrs import Converter, transform_error
from cattrs.errors import ClassValidationError, ForbiddenExtraKeysError
from cattrs.gen import make_dict_structure_fn

from o2o.errors import ConfigError, suggest


@dataclass(frozen=True)
class LoopConfig:
    """How often a run logs, evaluates and checkpoints, in which processes it works, and how much it stores.

    Most of these settings do not change what is learnt. The exceptions are `overlap`, and `replay_capacity` once a run
    exceeds it. In environments that cannot be replayed, an evaluation ends the training episode, so its times matter.
    Uni-O4 chooses the policy to fine-tune by evaluation, so `eval_episodes` matters.
    """

    eval_every: int = 5_000
    """Environment steps between two evaluations; 0: none. More evaluations follow at the end of the warm-up, 1000
    updates later, and at the end of the run."""
    offline_eval_every: int = 0
    """Gradient steps between two evaluations in pre-training; 0: one at its end only, of offline estimates 20."""
    eval_episodes: int = 20
    """Episodes of one evaluation, per seed."""
    log_every: int = 1_000
    """Gradient steps (offline) or environment steps (online) between two rows of metrics."""
    checkpoint_every: int = 10_000
    """Gradient steps (offline) or environment steps (online) between two checkpoints. Each phase also ends with one."""
    updates_per_dispatch: int = 200
    """Gradient steps of pre-training in one call to the device."""
    replay_capacity: int = 2_000_000
    """Most transitions of its own that a run stores. The buffer is never larger than the run can fill."""
    device_bytes: int | None = None
    """Device memory for dataset and replay, in bytes. If they need more, their observations stay in host memory and on
    disk (RUN/replay), which is slower and draws the same rows. None: half of the device's memory, 8 GiB on a CPU. 0:
    always on the host."""
    deterministic_eval: bool = True
    """Evaluate the mode of the policy; False: sample its actions."""
    eval_process: bool = False
    """Evaluate in a separate process, on one CPU core, while training goes on. A stop, the end of a phase and a later
    checkpoint wait for it; a checkpoint of the same step gets its score later. On a CPU the numbers are the same."""
    env_processes: int = 0
    """Number of processes that step the training environments; 0: the main process steps them. Useful for several
    environments (`seeds`, `num_envs`) with slow steps. The numbers are the same. At the end each process has 30 s to
    close its environments before it is killed."""
    overlap: bool = False
    """Learn while the environments step. Each action is then chosen before the update of its step, not after it. Meant
    for slow environments such as robots. Runs are reproducible but differ from those without it. On-policy agents
    ignore it."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` if a number is too small."""
        least = dict.fromkeys(
            ("eval_episodes", "log_every", "checkpoint_every", "updates_per_dispatch", "replay_capacity"), 1
        ) | dict.fromkeys(("eval_every", "offline_eval_every", "env_processes", "device_bytes"), 0)
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise ConfigError(f"loop.{name} is {value}; expected at least {smallest}")


FORMAT = 3
"""Format of a run folder's config.json. It is raised when folders of before can no longer be opened."""

T = TypeVar("T")


@dataclass(frozen=True)
class TaskConfig:
    """Changes to the conventions of the task. None keeps the value of the preset or of the task table."""

    binary: bool | None = None
    """Adroit: replace the dense reward by the sparse -1/0 success reward of the papers."""
    reward_scale: float | None = None
    """Multiplies every raw reward, in the dataset and in the environment."""
    reward_bias: float | None = None
    """Added to every scaled reward."""
    normalize_returns: float | None = None
    """Distance between the dataset's best and worst return after scaling (IQL's paper: 1000). Sets `reward_scale`,
    which must be None."""
    terminate_on_success: bool | None = None
    """End a training episode at its first success."""
    only_successes: bool | None = None
    """Use only the episodes of the dataset that succeed (the WSRL paper's Adroit data)."""
    achieved_goal: bool = False
    """Keep `achieved_goal` of Dict observations."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that defines a run. It is saved as config.json in the run folder."""

    agent: str
    """Name in o2o.agents.AGENTS."""
    config: Any
    """The agent's config."""
    dataset: tuple[str, ...]
    """Minari ids or paths. Several datasets are mixed by `weights`."""
    weights: tuple[float, ...] = ()
    """Share of each dataset in a batch; empty: in proportion to their rows."""
    clip_actions: bool = False
    """Clip the dataset's actions to its action space. Without this, a dataset with actions outside is refused."""
    env: str | None = None
    """Gymnasium id of the environment; None for the dataset's own."""
    task: TaskConfig = field(default_factory=TaskConfig)
    """Changes to the conventions of the task."""
    history: int = 1
    """Number of observations that the policy sees: the current one and those before it (`o2o.data.history`)."""
    cameras: tuple[str, ...] = ()
    """MuJoCo cameras to render into the observation; `free` exists always. Empty: the cameras of the dataset."""
    image_size: int = 64
    """Height and width of the images of `cameras`. The dataset's own cameras keep the size of the dataset."""
    normalize: bool = False
    """Normalise observations with the dataset's statistics, stored with the agent."""
    std_floor: float | None = None
    """Divide by max(std, std_floor). None: divide by std + 0.001, or by 1 where nothing varies."""
    action_range: Literal["space", "data"] = "space"
    """What [-1, 1] stands for: the action space, or the range of the dataset's actions plus the agent's margin."""
    base: str | None = None
    """Frozen policy that a residual agent corrects: a run folder, a .onnx or .pt (TorchScript) file, or module:name."""
    base_seed_index: int = 0
    """Which seed of the base run to take, counted from 0."""
    base_sample: bool = False
    """Sample from the base run's policy. Without this its mode acts."""
    base_labels: Literal["policy", "demo"] = "policy"
    """Base actions of the dataset's rows: `policy`: the base's own; `demo`: the recorded actions (residual 0)."""
    base_timeout_s: float | None = 1.0
    """Longest time for an action of the base, in s; None: no limit. It is tested once before the run. In the run, three
    slow actions in a row are an error."""
    seed: int = 0
    """All random numbers of the run derive from it."""
    seeds: int = 1
    """Number of agents that are trained side by side, each with a seed of its own."""
    offline_steps: int = 10_000
    """Gradient steps of pre-training."""
    online_steps: int = 10_000
    """Environment steps of the online phase per seed, warm-up included."""
    offline_estimate: bool = False
    """Judge pre-training by estimates on held-out episodes and make no environment; needs `online_steps` 0. With
    `online_steps` 0 it is always so where neither the dataset nor `env` names an environment."""
    holdout: float = 0.1
    """Share of the episodes that an offline estimate keeps from training; 0: it looks at the training data."""
    init_from: str | None = None
    """WSRL only: a pre-trained run (BC, IQL, CQL, Cal-QL, SAC, RLPD or WSRL) to start from in place of pre-training.
    The policy keeps its `log_std_range`."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """How often to log, evaluate and checkpoint."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints to keep, at least 1; 2 survive a power cut during a save. The best checkpoint
    with an evaluation is kept as well."""
    record: bool = False
    """Write every finished training episode to disk. At the end they become the Minari dataset RUN/recorded."""
    loggers: tuple[str, ...] = ()
    """Loggers in addition to metrics.jsonl: `tensorboard`, `wandb`."""
    preset: str = "paper"
    """The preset that the settings started from; only a note."""


def with_fields(config: Any, changes: Iterable[tuple[str, Any]]) -> Any:
    """Return a dataclass with fields replaced by dotted name, such as `online.utd_ratio`.

    All changes are made together, since a part of them may be invalid by itself. If a field is named twice, the last
    value counts. Raises `ConfigError` for an unknown field.
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


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config dataclass as plain JSON types: nested dataclasses become objects, tuples become lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type[T], values: Mapping[str, Any], where: str = "config") -> T:
    """Return the config dataclass that `to_dict` wrote as `values`; missing fields take their defaults.

    A union of dataclasses is resolved by the literal field `kind` where they have one, otherwise by the names of the
    fields. Raises `ConfigError` for an unknown field, a value of another type (an int is also a float), a value that is
    none of a `Literal`, and what the dataclass itself refuses. The message begins with `where` and the dotted path.
    """
    try:
        return _converter.structure(values, cls)
    except ClassValidationError as error:
        message, _, place = transform_error(error, where, _explain)[0].rpartition(" @ ")
        raise ConfigError(f"{place}: {message}") from None
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _explain(error: BaseException, _: type | None) -> str:
    """Return an error of cattrs, or of a hook below, in our words."""
    if isinstance(error, ForbiddenExtraKeysError):
        name = min(error.extra_fields)
        return f"{error.cl.__name__} has no field {name!r}; {suggest(name, _names(error.cl))}"
    return "this field is missing" if isinstance(error, KeyError) else str(error)


def _names(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _scalar(value: Any, kind: type) -> Any:
    """Return a bool, int, float or str as it is. cattrs itself would convert: "3" to 3, True to 1.0."""
    if type(value) is kind or (kind is float and type(value) is int):
        return value
    raise ConfigError(f"got {value!r}; expected {kind.__name__}")


def _literal(value: Any, kind: Any) -> Any:
    options = get_args(kind)
    if any(value == option and type(value) is type(option) for option in options):
        return value
    raise ConfigError(f"got {value!r}; {suggest(str(value), map(str, options))}")


def _tuple(value: Any, kind: Any) -> tuple[Any, ...]:
    """Return a tuple of a JSON list. cattrs itself would take a string for a list of letters."""
    if not isinstance(value, list | tuple):
        raise ConfigError(f"got {value!r}; expected a list")
    kinds = get_args(kind)
    if kinds[1:] == (...,):
        kinds = kinds[:1] * len(value)
    if len(kinds) != len(value):
        raise ConfigError(f"got {len(value)} values; expected {len(kinds)}")
    return tuple(_converter.structure(item, kind) for item, kind in zip(value, kinds, strict=True))


def _table(cls: Any) -> Callable[[Any, Any], Any]:
    structure = make_dict_structure_fn(cls, _converter, _cattrs_forbid_extra_keys=True)

    def hook(value: Any, kind: Any) -> Any:
        if not isinstance(value, Mapping):
            raise ConfigError(f"got {value!r}; expected an object with the fields of {cls.__name__}")
        return structure(dict(value), kind)

    return hook


def _union(value: Any, union: Any) -> Any:
    kinds = [kind for kind in get_args(union) if kind is not type(None)]
    if value is None and len(kinds) < len(get_args(union)):
        return None
    tables = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
    if isinstance(value, Mapping) and tables:
        return _converter.structure(value, _member(value, tables))
    for kind in kinds[:-1]:
        try:
            return _converter.structure(value, kind)
        except (ConfigError, ClassValidationError):
            continue
    try:
        return _converter.structure(value, kinds[-1])
    except ConfigError as error:
        if len(kinds) == 1:
            raise
        raise ConfigError(f"got {value!r}; expected one of {', '.join(map(_word, kinds))}") from error


def _word(kind: Any) -> str:
    return ", ".join(map(repr, get_args(kind))) if get_origin(kind) is Literal else getattr(kind, "__name__", str(kind))


def _member(value: Mapping[str, Any], tables: list[Any]) -> Any:
    """Return the dataclass of a union that `value` belongs to. cattrs itself needs a field of its own in each."""
    tags = {tag: table for table in tables for tag in get_args(get_type_hints(table).get("kind"))}
    if "kind" in value and tags:
        if value["kind"] not in tags:
            raise ConfigError(f"kind is {value['kind']!r}; {suggest(str(value['kind']), map(str, tags))}")
        return tags[value["kind"]]
    return min(tables, key=lambda table: len(set(value) ^ set(_names(table))))


_converter = Converter()
for _kind in (bool, int, float, str):
    _converter.register_structure_hook(_kind, _scalar)
_converter.register_structure_hook_factory(dataclasses.is_dataclass, _table)
_converter.register_structure_hook_func(lambda kind: get_origin(kind) is Literal, _literal)
_converter.register_structure_hook_func(lambda kind: get_origin(kind) is tuple, _tuple)
_converter.register_structure_hook_func(lambda kind: get_origin(kind) in (Union, types.UnionType), _union)
