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

FORMAT = 2
"""Format of a run folder's config.json. It is raised when folders of before can no longer be opened."""

T = TypeVar("T")


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
