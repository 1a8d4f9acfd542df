"""How the command line reads words: whole numbers such as 1e5, one syntax of booleans, errors of one line.

tyro's hook for errors (`tyro._errors.on_parse_error`) is private and may change in any release, so the text is read.
"""

import dataclasses
import inspect
import io
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from decimal import Decimal, InvalidOperation
from typing import Any, get_args, get_type_hints

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from o2o.errors import ConfigError
from o2o.settings import SettingError

BOOLEANS = {
    **dict.fromkeys(("true", "yes", "on", "1"), "True"),
    **dict.fromkeys(("false", "no", "off", "0"), "False"),
    "none": "None",
}
WORDS = ConstructorRegistry()
"""tyro's rules for single words, with ours first."""


@WORDS.primitive_rule
def _whole(kind: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    if kind.type is not int:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=lambda words: whole(words[0]),
        is_instance=lambda value: isinstance(value, int) and not isinstance(value, bool),
        str_from_instance=lambda value: [str(value)],
    )


def whole(word: str) -> int:
    """Return the integer of a word such as 100000, 100_000 or 1e5; raises `ValueError`."""
    try:
        number = Decimal(word)
        if number.is_finite() and number.adjusted() < 40 and number == number.to_integral_value():
            return int(number)
    except InvalidOperation:
        pass
    raise ValueError(f"expected a whole number, such as 10 or 1e5, not {word!r}")


def booleans(kinds: Mapping[str, Any], prefix: str = "") -> set[str]:
    """Return the dotted names of all settings that are true or false, also those inside of dataclasses."""
    found: set[str] = set()
    for name, kind in kinds.items():
        for member in (kind, *get_args(kind)):
            if member is bool:
                found.add(prefix + name)
            elif inspect.isclass(member) and dataclasses.is_dataclass(member):
                found |= booleans(get_type_hints(member), f"{prefix}{name}.")
    return found


def spelled_out(args: Sequence[str], names: Iterable[str]) -> list[str]:
    """Return the arguments with one word after each boolean: `--x` is `--x True`, `--no-x` is `--x False`."""
    known, found = set(names), []
    for index, arg in enumerate(args):
        option, equals, value = arg.partition("=")
        name = option.removeprefix("--").replace("-", "_")
        negated = re.sub(r"(^|\.)no_(?=[^.]*$)", r"\1", name.removeprefix("no_") if "." in name else name)
        given = value if equals else args[index + 1] if index + 1 < len(args) else ""
        if not option.startswith("--"):
            before = found[-1].removeprefix("--").replace("-", "_") if found else ""
            found.append(BOOLEANS.get(arg.lower(), arg) if before in known else arg)
        elif name in known and equals:
            found += [option, BOOLEANS.get(value.lower(), value)]
        elif name in known:
            found += [option] if given.lower() in BOOLEANS else [option, "True"]
        elif negated in known and not equals:
            found += [f"--{negated.replace('_', '-')}", "False"]
        else:
            found.append(arg)
    return found


RULE = re.compile(r"[─━-]{6,}")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
HELP = ("For full helptext", "Argument helptext", "Available subcommands")


@contextmanager
def one_line(prog: str) -> Iterator[None]:
    """Turn an exit of tyro with an error message into a `ConfigError` of one line that names the help of `prog`.

    Other text on standard error is passed on. Exits without an error, such as those of `--help`, stay exits.
    """
    printed = io.StringIO()
    try:
        with redirect_stderr(printed):
            yield
    except SystemExit as ended:
        if not ended.code or not printed.getvalue().strip():
            sys.stderr.write(printed.getvalue())
            raise
        if refused := _refused(ended):
            raise refused from None
        raise ConfigError(f"{complaint(printed.getvalue())}; `{prog} --help` explains every option") from None
    sys.stderr.write(printed.getvalue())


def complaint(text: str) -> str:
    """Return the first part of a boxed message, without colours, and the option that tyro suggests."""
    text = COLOUR.sub("", text)  # a terminal's
    framed = "│" in text  # a terminal without this character gets plain dashes
    parts: list[list[str]] = [[]]
    for line in text.splitlines():
        if framed and not line.startswith("│"):
            continue  # the frame; the message repeats its title
        line = line.strip("│ ")
        if RULE.fullmatch(line):
            parts.append([])
        elif line:
            parts[-1].append(line)
    if not framed and len(parts) > 1:
        parts = parts[1:]  # the text above the first rule is the title
    said = " ".join(" ".join(parts[0]).split()).rstrip(".") or " ".join(text.split())
    said = re.sub(r"^Unrecognized options: (?=[^-])", "unexpected argument: ", said)
    for part in parts[1:]:
        options = [word for line in part[1:] for word in line.split() if word.startswith("--")]
        if part and not part[0].startswith(HELP) and options:
            said += f"; did you mean {options[0]}?"
            break
    return said


def _refused(ended: SystemExit) -> ConfigError | None:
    """Return what a dataclass of settings raised before tyro ended, with the prefix of its options."""
    error, prefix = ended.__context__, ""
    while error is not None and not isinstance(error, ConfigError):
        prefix = getattr(error, "arg", prefix)
        error = error.__context__
    if isinstance(error, SettingError):
        return error.within(*filter(None, str(prefix).split(".")))
    return error


OPTION = re.compile(r"`([a-z_]+(?:\.[a-z_]+)*)`")


def as_options(message: str, names: Iterable[str]) -> str:
    """Return a message with the settings that it names in backticks as options: `loop.eval_every` to --loop.eval-every.

    Other words in backticks stay. `names`: the settings, of which the first part decides.
    """
    known = set(names)

    def option(match: re.Match[str]) -> str:
        name = match.group(1)
        return f"--{name.replace('_', '-')}" if name.partition(".")[0] in known else match.group()

    return OPTION.sub(option, message)


def in_options(error: Exception, names: Iterable[str]) -> str:
    """Return an error in the words of the command line."""
    if isinstance(error, SettingError) and error.root in ("", "RunConfig") and error.path:
        path = [part for part in error.path if not part.startswith("[")]
        return f"--{'.'.join(path).replace('_', '-')}{error.said}"
    return as_options(str(error), names)
