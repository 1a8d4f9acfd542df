"""The argument parser's boxes become one line; help and the commands' own output do not change."""

import sys
from dataclasses import dataclass, field

import pytest
import tyro

from o2o.errors import ConfigError
from o2o.usage import one_line


@dataclass
class Inner:
    learning_rate: float = 1e-3
    """Step size."""


@dataclass
class Args:
    name: str
    """Who."""
    count: int = 1
    """How often."""
    inner: Inner = field(default_factory=Inner)


def message(args: list[str]) -> str:
    with pytest.raises(ConfigError) as caught, one_line("o2o thing"):
        tyro.cli(Args, args=args, prog="o2o thing")
    text = str(caught.value)
    assert "\n" not in text and "│" not in text and text.endswith("`o2o thing --help` explains every option")
    return text


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--name", "a", "--inner.learning-rat", "3"], "--inner.learning-rat, 3; did you mean --inner.learning-rate?"),
        (["--name", "a", "--bogus"], "--bogus;"),
        (["--name", "a", "--count", "two"], "--count: invalid literal for int() with base 10: 'two';"),
        (["--count", "2"], "--name"),
        (["--name"], "--name"),
    ],
)
def test_complaint_is_one_line(args: list[str], words: str) -> None:
    """A complaint of the parser is one line."""
    assert words in message(args)


def test_complaint_without_box_characters(capsys: pytest.CaptureFixture[str]) -> None:
    """A complaint without box characters is one line too."""
    text = message(["--name", "a", "--inner.learning-rat", "3"])  # capsys names its encoding so that tyro draws none
    assert text.startswith("Unrecognized options: --inner.learning-rat, 3; did you mean --inner.learning-rate?;")


def test_help_and_values_pass(capsys: pytest.CaptureFixture[str]) -> None:
    """Help, parsed values and the command's own output pass unchanged."""
    with pytest.raises(SystemExit) as ended, one_line("o2o thing"):
        tyro.cli(Args, args=["--help"], prog="o2o thing")
    assert not ended.value.code and "How often." in capsys.readouterr().out
    with one_line("o2o thing"):
        print("careful", file=sys.stderr)
        parsed = tyro.cli(Args, args=["--name", "a"], prog="o2o thing")
    assert parsed.count == 1 and capsys.readouterr().err == "careful\n"


def test_silent_exit_left_alone() -> None:
    """An exit without a word is left alone."""
    with pytest.raises(SystemExit), one_line("o2o thing"):
        sys.exit(3)
