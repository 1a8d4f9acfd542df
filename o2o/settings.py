"""Settings: every value has its type and its range once, at its declaration, whichever door it comes through.

A dataclass that derives from `Settings` reads each of its fields by the annotation: `Rate` is
`Annotated[float, Range(least=0, most=1)]`. Python, JSON and the command line all end in that constructor.
"""

import contextlib
import dataclasses
import functools
import inspect
import math
import operator
import os
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real as AnyReal
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from o2o.errors import ConfigError, suggest

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

LARGEST = 2**31 - 1
"""Largest count and seed: counters and keys are 32-bit integers."""


class SettingError(ConfigError):
    """A setting whose value cannot be used. `path` leads to it from `root`, a class or where the values come from."""

    def __init__(self, said: str, path: tuple[str, ...] = (), root: str = "") -> None:
        self.said, self.path, self.root = said, path, root
        place = "".join(part if part.startswith("[") else f".{part}" for part in (root, *path) if part)
        super().__init__((place.removeprefix(".") + said).removeprefix(": "))

    def within(self, *outer: str, root: str = "") -> "SettingError":
        """Return the same error, seen from outside of `outer`."""
        return SettingError(self.said, (*outer, *self.path), root)


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may be. They are finite, unless `least` or `most` is infinite."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def problem(self, value: Any) -> str | None:
        """Return what was expected instead of `value`, None if it is in range."""
        finite = isinstance(value, int) or math.isfinite(value)
        ends = (
            ("at least", self.least, operator.ge),
            ("above", self.above, operator.gt),
            ("at most", self.most, operator.le),
            ("below", self.below, operator.lt),
        )
        broken = [(word, end) for word, end, holds in ends if end is not None and not holds(value, end)]
        if not broken and (finite or value in (self.least, self.most)):
            return None
        if self.most == LARGEST:  # not worth a word unless it is what is wrong
            return f"{broken[0][0]} {broken[0][1]}"
        if self.least is not None and self.most is not None:
            return f"{self.least:g} to {self.most:g}"
        words = [f"{word} {end:g}" for word, end, _ in ends if end is not None and math.isfinite(end)]
        return ", ".join(words if words and finite else ["a finite number", *words])


@dataclass(frozen=True)
class NotZero:
    """Any finite number but 0."""

    def problem(self, value: float) -> str | None:
        """Return what was expected instead of `value`."""
        return None if value and math.isfinite(value) else "a finite number other than 0"


@dataclass(frozen=True)
class Ordered:
    """Two numbers, the lower first; `equal`: they may be the same."""

    equal: bool = False

    def problem(self, value: tuple[float, float]) -> str | None:
        """Return what was expected instead of `value`."""
        low, high = value
        if low < high or (self.equal and low == high):
            return None
        return "two finite numbers, the lower first" + (" or both the same" if self.equal else "")


Count = Annotated[int, Range(least=1, most=LARGEST)]
Amount = Annotated[int, Range(least=0, most=LARGEST)]
Seed = Annotated[int, Range(least=0, most=LARGEST)]
Widths = tuple[Annotated[int, Range(least=1, most=65536)], ...]
Width = Annotated[int, Range(least=1, most=65536)]
Share = Annotated[float, Range(least=0, most=1)]
Rate = Annotated[float, Range(least=0, most=1)]
"""A learning rate; 0 keeps the network as it is."""
Average = Annotated[float, Range(above=0, most=1)]
"""Weight of the new value in a moving average."""
Dropout = Annotated[float, Range(least=0, below=1)]
Between = Annotated[float, Range(above=0, below=1)]
Real = Annotated[float, Range()]
"""Any finite number."""
Portion = Annotated[float, Range(above=0, most=1)]
"""A share that is not nothing."""
AboveZero = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(least=0)]
Interval = Annotated[tuple[float, float], Ordered()]


class Settings:
    """Base of every dataclass of settings: reads its fields by their annotations, whoever constructs it."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` for a value of another type or out of range. Lists become tuples, 1e5 an int."""
        kinds = _hints(type(self))
        for name in _names(type(self)):
            value = getattr(self, name)
            try:
                read_value = read(value, kinds.get(name, Any))
            except SettingError as error:
                raise error.within(name, root=type(self).__name__) from None
            if read_value is not value:
                object.__setattr__(self, name, read_value)

    def refuse(self, name: str, expected: str) -> SettingError:
        """Return the error for field `name`, whose value does not go with the others."""
        return SettingError(f" is {getattr(self, name)!r}; expected {expected}", (name,), type(self).__name__)


def short(value: Any) -> str:
    """Return a text of settings with what differs from their defaults alone; that of other values is their `repr`."""
    if not isinstance(value, Settings) or not dataclasses.is_dataclass(value):
        return repr(value)
    parts = []
    for field in dataclasses.fields(value):
        made = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if (own := getattr(value, field.name)) != made:
            parts.append(f"{field.name}={short(own)}")
    return f"{type(value).__name__}({', '.join(parts)})"


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Return the function with its arguments read by their annotations, as `Settings` reads its fields."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        kinds, bound = _hints(function), signature.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            try:
                bound.arguments[name] = read(value, kinds.get(name, Any))
            except SettingError as error:
                raise error.within(name) from None
        return function(*bound.args, **bound.kwargs)

    return call


def read(value: Any, kind: Any) -> Any:
    """Return `value` as a setting of type `kind`.

    A whole float is an int (1e5), an int a float, a list a tuple, a path a text, an object a dataclass: of a union the
    one with its literal field `kind`, otherwise the one with the most alike fields. Raises `SettingError`.
    """
    origin = get_origin(kind)
    if origin is Annotated:
        inner, *rules = get_args(kind)
        rules = [rule for rule in rules if hasattr(rule, "problem")]
        found = _number(value, inner) if inner in (int, float) else read(value, inner)
        for rule in rules or (_FINITE,) * (inner is float):
            if expected := rule.problem(found):
                raise _wrong(value, expected)
        return found
    if origin is Literal:
        return _literal(value, get_args(kind))
    if origin is tuple:
        return _tuple(value, get_args(kind))
    if origin in (Union, types.UnionType):
        return _union(value, get_args(kind))
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _table(value, kind)
    if kind in (int, float):
        return read(value, Annotated[kind, _FINITE])
    return _plain(value, kind) if kind in (bool, str) else value


_FINITE = Range()


def _wrong(value: Any, expected: str) -> SettingError:
    shown = repr(value)
    return SettingError(f" is {shown if len(shown) < 80 else shown[:60] + '...'}; expected {expected}")


def _hints(owner: Any) -> dict[str, Any]:
    """Return the annotations of a class or function; none if they name what cannot be found."""
    try:
        return _all_hints(owner)
    except NameError:  # texts that name the locals of a function
        return {}


@functools.cache
def _all_hints(owner: Any) -> dict[str, Any]:
    return get_type_hints(owner, include_extras=True)


def _names(cls: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(cls) if field.init]


def _number(value: Any, kind: type) -> int | float:
    number = None if isinstance(value, bool) else value
    if isinstance(number, AnyReal) and (kind is float or isinstance(number, Integral) or float(number).is_integer()):
        with contextlib.suppress(OverflowError):  # an int beyond all floats
            return kind(number)
    raise _wrong(value, kind.__name__)


def _plain(value: Any, kind: type) -> Any:
    if kind is str and isinstance(value, str | os.PathLike):
        return value if type(value) is str else str(os.fspath(value))  # a path, or NumPy's text
    if kind is bool and type(value).__name__ in ("bool_", "bool") and getattr(value, "shape", ()) == ():
        return bool(value)  # NumPy's too
    raise _wrong(value, kind.__name__)


def _literal(value: Any, options: tuple[Any, ...]) -> Any:
    for option in options:
        texts = isinstance(value, str) and isinstance(option, str)  # NumPy's too
        if value == option and (texts or type(value) is type(option)):
            return option
    close = suggest(str(value), map(str, options), "")
    raise _wrong(value, " or ".join(map(str, options)) + f"; {close}" * bool(close))


def _tuple(value: Any, kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):  # a text is no list of letters
        raise _wrong(value, "a list")
    if kinds[1:] == (...,):
        kinds = kinds[:1] * len(value)
    if len(kinds) != len(value):
        raise _wrong(value, f"{len(kinds)} values")
    found = []
    for index, (item, kind) in enumerate(zip(value, kinds, strict=True)):
        try:
            found.append(read(item, kind))
        except SettingError as error:
            raise error.within(f"[{index}]") from None
    return tuple(found)


def _table(value: Any, cls: Any) -> Any:
    if isinstance(value, cls):
        return value
    if not isinstance(value, Mapping):
        raise _wrong(value, f"an object with the fields of {cls.__name__}")
    kinds, known, found = _hints(cls), _names(cls), {}
    for name, entry in value.items():
        if name not in known:
            raise SettingError(f": {cls.__name__} has no field {name!r}; {suggest(str(name), known)}")
        try:
            found[name] = read(entry, kinds.get(name, Any))
        except SettingError as error:
            raise error.within(name) from None
    for field in dataclasses.fields(cls):
        if field.init and field.name not in found and field.default is field.default_factory is dataclasses.MISSING:
            raise SettingError(": this field is missing", (field.name,))
    try:
        return cls(**found)
    except SettingError as error:
        raise error.within() from None
    except ConfigError as error:
        raise SettingError(f": {error}") from None


def _union(value: Any, members: tuple[Any, ...]) -> Any:
    kinds = [kind for kind in members if kind is not type(None)]
    if value is None and len(kinds) < len(members):
        return None
    if len(kinds) == 1:
        return read(value, kinds[0])
    if all(get_origin(kind) is Literal for kind in kinds):
        return _literal(value, tuple(option for kind in kinds for option in get_args(kind)))
    tables: list[Any] = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
    if isinstance(value, Mapping) and tables:
        return _table(value, _member(value, tables))
    for kind in kinds:
        try:
            return read(value, kind) if kind not in tables or isinstance(value, kind) else _table(value, kind)
        except SettingError:
            continue
    raise _wrong(value, f"one of {', '.join(getattr(kind, '__name__', str(kind)) for kind in kinds)}")


def _member(value: Mapping[str, Any], tables: list[Any]) -> Any:
    """Return the dataclass of a union that `value` belongs to."""
    tags = {tag: table for table in tables for tag in get_args(_hints(table).get("kind"))}
    if "kind" in value and tags:
        if value["kind"] not in tags:
            raise SettingError(f" is {value['kind']!r}; {suggest(str(value['kind']), map(str, tags))}", ("kind",))
        return tags[value["kind"]]
    return min(tables, key=lambda table: len(set(value) ^ set(_names(table))))
