"""What becomes what: which columns of a source are observations, action, reward and success, and how gaps are filled.

The rules for what a format lacks are the same for all formats:

- No reward: 1 in steps that succeed and 0 elsewhere; 0 everywhere if success is not known either.
- No word on what ended an episode: a success in its last step is terminal; otherwise it was cut off (truncated).
- No observation after the last step: if the last step is terminal, its own observation is repeated there (no learner
  looks at it, since the mask is 0); otherwise the last step is left out, and its observation is the last one.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

from o2o.data.files import Episode
from o2o.data.importers.source import Description, Field, Raw, Size, Source, check_values
from o2o.data.spaces import SMALLEST_HALF_RANGE, STATE, ActionMap, ObservationSpec, not_finite
from o2o.errors import ConfigError, DatasetError, EnvironmentMismatchError, suggest

CAMERA = "cam:"
LAST, ZERO, SUCCESS = "last", "zero", "success"


class FaultyEpisodeError(DatasetError):
    """An episode that training would refuse; `drop_bad` leaves it out."""


@dataclass(frozen=True)
class Options:
    """What the user says of an import."""

    keys: tuple[str, ...] = ()
    """Observations as `SOURCE`, `NAME=SOURCE`, `SOURCE@HxW` or `cam:NAME@HxW`; none: those of the format."""
    action: str | None = None
    """The column of actions; None: the format's."""
    reward: str | None = None
    """The column of rewards, `zero`, or `success` (1 in steps that succeed); None: by rule."""
    success: str | None = None
    """The column that is above 0 in steps that succeed, or `last`: each episode's last step; None: the format's."""
    episode_steps: int | None = None
    """Cut an episode after so many rows, where the source does not say where it ends."""
    licence: str | None = None
    """Text of the licence, where the source has none."""
    drop_bad: bool = False
    """Leave faulty episodes out and count them; without it they are refused."""


@dataclass(frozen=True)
class Environment:
    """The environment that the data are for."""

    observation_space: gym.Space
    action_space: gym.Space
    spec: EnvSpec | None


@dataclass(frozen=True)
class Entry:
    """An observation of the new dataset."""

    name: str
    source: str
    field: Field
    size: Size | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of one observation."""
        if self.size is not None:
            return (*self.size, self.field.shape[-1])
        return self.field.shape or (1,)


@dataclass(frozen=True, eq=False)
class Plan:
    """All that an import will do."""

    about: Description
    entries: tuple[Entry, ...]
    action: str
    reward: str | None
    """A column, or None: made from success, or zero."""
    success: str | None
    """A column, `last`, or None."""
    observation_space: gym.Space
    action_space: spaces.Box
    spec: EnvSpec | None
    rules: tuple[str, ...]
    """Every decision in one sentence."""
    zero: bool = False
    """Rewards are 0 everywhere."""

    @property
    def keys(self) -> list[str]:
        """Return the columns that the import reads."""
        more = (self.action, self.reward, None if self.success == LAST else self.success)
        return list(dict.fromkeys([*(entry.source for entry in self.entries), *(key for key in more if key)]))

    @property
    def sizes(self) -> dict[str, Size]:
        """Return the sizes of the images that are resized."""
        return {entry.source: entry.size for entry in self.entries if entry.size is not None}

    def table(self) -> list[tuple[str, str, str]]:
        """Return rows (column of the source, what it is, what it becomes)."""
        used: dict[str, list[str]] = {}
        single = not isinstance(self.observation_space, spaces.Dict)
        for entry in self.entries:
            kind = "uint8 image" if entry.field.image else "float32"
            name = "observation" if single else f"observation {entry.name!r}"
            used.setdefault(entry.source, []).append(f"{name}: {kind}[{'x'.join(map(str, entry.shape))}]")
        used.setdefault(self.action, []).append(f"action: {self.action_space}")
        if self.reward is not None:
            used.setdefault(self.reward, []).append("reward: float64")
        if self.success not in (None, LAST):
            used.setdefault(str(self.success), []).append("success: above 0")
        rows = [(name, str(self.about.fields[name]), "; ".join(what)) for name, what in used.items()]
        rest = [(name, str(found), "left out") for name, found in self.about.fields.items() if name not in used]
        return rows + rest

    def episode(self, raw: Raw) -> Episode | str:
        """Return an episode in Minari's terms, or why there is none.

        Raises `DatasetError` if columns do not fit, `FaultyEpisodeError` if it is not known where the episode succeeds.
        """
        columns = raw.columns
        steps = len(columns[self.action])
        for key, values in columns.items():
            if len(values) != steps:
                raise DatasetError(f"{key!r} has {len(values)} rows and {self.action!r} {steps}")
            check_values(values, key, self.about.fields[key], self.sizes.get(key))
        for key, value in (raw.last or {}).items():
            check_values(value[None], f"next_{key}", self.about.fields[key], self.sizes.get(key))
        if steps == 0:
            return "it has no rows"
        success = self._success(columns, steps)
        if raw.terminated is None:
            terminal = bool(success is not None and success[-1])
        else:
            terminal = raw.terminated
        last = raw.last if raw.last is not None and all(e.source in raw.last for e in self.entries) else None
        kept = steps if last is not None or terminal else steps - 1
        if kept == 0:
            return "its only row has no observation after it"
        observed = {}
        for entry in self.entries:
            rows = columns[entry.source]
            after = rows[kept : kept + 1] if kept < steps else rows[-1:] if last is None else last[entry.source][None]
            joined = np.concatenate([rows[:kept], after])
            joined = joined if entry.field.image else _float32(joined)
            observed[entry.name] = joined.reshape(kept + 1, *entry.shape)
        if self.reward is not None:
            rewards = np.asarray(columns[self.reward], np.float64).reshape(steps)
        else:
            rewards = np.zeros(steps) if success is None or self.zero else success.astype(np.float64)
        ends = np.arange(kept) == kept - 1
        single = not isinstance(self.observation_space, spaces.Dict)
        return Episode(
            observations=observed[self.entries[0].name] if single else observed,
            actions=_float32(columns[self.action][:kept]).reshape(kept, *(self.action_space.shape or (1,))),
            rewards=rewards[:kept],
            terminations=ends & terminal,
            truncations=ends & (not terminal),
            success=None if success is None else success[:kept],
        )

    def _success(self, columns: Mapping[str, np.ndarray], steps: int) -> np.ndarray | None:
        if self.success is None:
            return None
        if self.success == LAST:
            return np.arange(steps) == steps - 1
        flags = columns[self.success].reshape(steps)
        if len(bad := np.flatnonzero(not_finite(flags))):
            raise FaultyEpisodeError(f"step {bad[0]}: {self.success!r} has {flags[bad[0]]}, so success is not known")
        return flags > 0


def make_plan(source: Source, options: Options, env: Environment | None = None) -> Plan:
    """Return what an import of `source` will do: it reads actions, not images. Raises `O2OError` for what cannot be."""
    about = source.describe()
    entries = _entries(about, options.keys)
    action = _column(about, options.action or about.action, "action", "action")
    if (kind := about.fields[action].dtype.kind) != "f":
        raise DatasetError(
            f"{source.path}: actions {action!r} are {about.fields[action].dtype}, expected floats: o2o's agents act in "
            f"continuous spaces{'' if kind in 'iub' else '; name another column with `action`'}"
        )
    for name in (action, *(entry.source for entry in entries)):
        if 0 in about.fields[name].shape:
            raise DatasetError(f"{source.path}: {name!r} is {about.fields[name]}: its rows have no numbers")
    rules = list(about.rules)
    success = LAST if options.success == LAST else options.success or about.success
    if success not in (None, LAST):
        success = _column(about, success, "success", "success")
    reward = None if options.reward in (ZERO, SUCCESS) else options.reward or about.reward
    if reward is not None:
        reward = _column(about, reward, "reward", "reward")
    if options.reward == SUCCESS and success is None:
        raise ConfigError("`reward` success needs to know of success: give `success` last, or `success` COLUMN")
    for name in (reward, None if success == LAST else success):
        if name is not None and int(np.prod(about.fields[name].shape)) != 1:
            raise DatasetError(f"{source.path}: {name!r} is {about.fields[name]}, expected one number per step")
    rules.append(_reward_rule(reward, success, options.reward == ZERO))
    rules.append(_success_rule(success))
    rules.append("of what ended an episode: what the source says; else a success in its last step is terminal")
    rules.append(
        "of the observation after the last step: what the source has; else a terminal step repeats its own, and "
        "another last step is left out"
    )
    if any(entry.field.dtype == np.float64 for entry in entries) or about.fields[action].dtype == np.float64:
        rules.append("float64 observations and actions become float32")
    box, space = _action_space(source, action, about, env, rules), _observation_space(entries)
    if env is not None:
        space = _checked(source, space, env)
    zero = options.reward == ZERO
    return Plan(
        about, entries, action, reward, success, space, box, env.spec if env else None, tuple(rules), zero
    )  # fmt: skip


def _reward_rule(reward: str | None, success: str | None, zero: bool) -> str:
    if reward is not None:
        return f"rewards are those of {reward!r}"
    if success is not None and not zero:
        return "there is no reward: it is 1 in steps that succeed and 0 elsewhere"
    return (
        "there is no reward: it is 0 everywhere, so only imitation can learn (where demonstrations succeed: "
        "`success` last)"
    )


def _success_rule(success: str | None) -> str:
    if success == LAST:
        return "the last step of every episode is a success (`success` last)"
    return "success is not known" if success is None else f"a step succeeds where {success!r} is above 0"


def _column(about: Description, name: str | None, what: str, option: str) -> str:
    """Return a column's name. Raises `DatasetError` naming those that exist if there is none such."""
    if name in about.fields:
        return str(name)
    hint = suggest(str(name), about.fields, "") if name else ""
    raise DatasetError(
        f"{about.format}: no column {name or what!r} for the {what}{f'; {hint}' if hint else ''}; there are "
        f"{', '.join(about.fields)} (choose with `{option}`)"
    )


def _entries(about: Description, keys: Sequence[str]) -> tuple[Entry, ...]:
    """Return the observations of an import. Raises `ConfigError` or `DatasetError` for keys that do not fit."""
    found = []
    for key in keys:
        name, _, rest = key.rpartition("=")
        text, _, size = rest.partition("@")
        column = _camera(about, text) if text.startswith(CAMERA) else _column(about, text, "observation", "keys")
        given = name or (
            text.removeprefix(CAMERA) if text.startswith(CAMERA) else about.observations.get(column, column)
        )
        if not given or key.startswith("="):
            raise ConfigError(f"`keys` {key!r}: the observation has no name; give NAME=SOURCE")
        found.append(Entry(_valid(given), column, about.fields[column], _size(key, size, about.fields[column])))
    if not keys:
        if unnamed := [column for column, name in about.observations.items() if not name]:
            raise DatasetError(f"{about.format}: the observation {unnamed[0]!r} has no name; give `keys` NAME=SOURCE")
        maps = [column for column, field in about.fields.items() if len(field.shape) > 2 and not field.image]
        named = {column: name for column, name in about.observations.items() if column not in maps}  # no depth maps
        found = [Entry(_valid(name), column, about.fields[column]) for column, name in named.items()]
    if not found:
        raise DatasetError(
            f"{about.format}: nothing to observe; there are {', '.join(about.fields)} (name them with `keys`)"
        )
    names = [entry.name for entry in found]
    if (twice := {name for name in names if names.count(name) > 1}) or (
        twice := {entry.name for entry in found if entry.field.image and entry.name == STATE}
    ):
        raise ConfigError(f"two observations, or an image, are called {min(twice)!r}: rename one, `keys` NAME=SOURCE")
    return tuple(found)


def _float32(values: np.ndarray) -> np.ndarray:
    """Return numbers as float32; those beyond its range become infinite, which is refused later with their place."""
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def _valid(name: str) -> str:
    """Return a name as a Dict space can have it: `/` would be a level of its own."""
    return name.replace("/", "_").replace(".", "_")


def _camera(about: Description, text: str) -> str:
    name = text.removeprefix(CAMERA)
    images = [column for column, found in about.fields.items() if found.image]
    fits = [column for column in images if name in (column, *re.split(r"[./]", column), about.observations.get(column))]
    fits = fits or [column for column in images if name in re.split(r"[./_]", column)]
    if len(fits) != 1:
        raise ConfigError(f"`keys` {text}: {len(fits)} cameras fit; there are {', '.join(images) or 'none'}")
    return fits[0]


def _size(key: str, text: str, found: Field) -> Size | None:
    if not text:
        return None
    parts = re.fullmatch(r"(\d+)x(\d+)", text)
    if not parts or not found.image or "0" in parts.groups():
        raise ConfigError(f"`keys` {key}: expected a size as HEIGHTxWIDTH, such as @96x96, and only for images")
    return int(parts[1]), int(parts[2])


def _observation_space(entries: Sequence[Entry]) -> gym.Space:
    boxes: dict[str, gym.Space] = {
        entry.name: spaces.Box(0, 255, entry.shape, np.uint8)
        if entry.field.image
        else spaces.Box(-np.inf, np.inf, entry.shape, np.float32)
        for entry in entries
    }
    return boxes[entries[0].name] if len(entries) == 1 and not entries[0].field.image else spaces.Dict(boxes)


def _action_space(
    source: Source, action: str, about: Description, env: Environment | None, rules: list[str]
) -> spaces.Box:
    """Return the environment's actions, [-1, 1] if all actions of the source are within, else their range."""
    shape = about.fields[action].shape or (1,)
    if env is not None:
        if not isinstance(env.action_space, spaces.Box) or env.action_space.shape != shape:
            raise EnvironmentMismatchError(
                f"{source.path} has actions of shape {shape}, the environment takes {env.action_space}"
            )
        ActionMap.from_space(env.action_space)
        rules.append("the range of actions is that of the environment")
        return env.action_space
    low, high = np.full(shape, np.inf, np.float32), np.full(shape, -np.inf, np.float32)
    for number, raw in enumerate(source.episodes([action], {})):
        try:
            check_values(raw.columns[action], action, about.fields[action])
        except DatasetError as error:
            raise DatasetError(f"{source.path}: {error} (episode {number})") from error
        values = _float32(raw.columns[action]).reshape(-1, *shape)
        values = np.where(np.isfinite(values), values, np.float32(np.nan))
        if len(values):
            low, high = np.fmin(low, np.fmin.reduce(values)), np.fmax(high, np.fmax.reduce(values))
    if np.all(low >= -1) and np.all(high <= 1):
        rules.append("all actions lie in [-1, 1], so that is their range")
        return spaces.Box(-1.0, 1.0, shape, np.float32)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise DatasetError(f"{source.path}: {action!r} has no finite number in some entry")
    flat = high - low < 2e-6
    rules.append(
        "some actions lie outside [-1, 1], so their range is from the least to the greatest of the data (or `env`)"
    )
    margin = np.where(flat, np.float32(SMALLEST_HALF_RANGE), np.float32(0))
    return spaces.Box(low - margin, high + margin, shape, np.float32)


def _checked(source: Source, space: gym.Space, env: Environment) -> gym.Space:
    """Return the environment's observation space. Raises `EnvironmentMismatchError` if the data do not fit it."""
    theirs, ours = ObservationSpec.from_space(env.observation_space, True), ObservationSpec.from_space(space, True)
    if theirs != ours:
        raise EnvironmentMismatchError(
            f"{source.path} gives observations {ours}, the environment has {theirs}; choose and rename them with `keys`"
        )
    return env.observation_space


def as_json(options: Options) -> dict[str, Any]:
    """Return options as plain JSON types."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(options).items()}


def spoken(plan: Plan) -> Iterator[str]:
    """Yield what there is to say of a plan beside its table, one line each."""
    yield f"{plan.about.format}: {plan.about.episodes} episodes, {plan.about.rows} rows"
    yield from plan.rules
