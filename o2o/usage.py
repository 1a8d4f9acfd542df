"""What the command line says: its overview, near words, and the argument parser's complaints as one line."""

import difflib
import io
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from typing import Any

from o2o.errors import ConfigError

USAGE = """usage: o2o COMMAND ...

  train AGENT --dataset ID   pre-train on a dataset, then fine-tune in its environment
                             (residual: --base RUN|FILE.onnx|FILE.pt|module:function)
  resume RUN                 continue a stopped or killed run
  eval RUN                   evaluate a run's policy anew
  play RUN                   watch a run's policy (window, or --out FILE.mp4)
  plot RUN...                learning curves of one or several runs
  balance RUN                a FamO2O run's balance coefficient over the states of its dataset
  data list|describe|make|check|export
  bench run|report SUITE     tables and curves of a benchmark suite
  demo                       the whole way on a small dataset that is made on the spot

`o2o COMMAND --help` explains every option; `o2o train --help` lists the agents."""
RULE = re.compile(r"[─━-]{6,}")
HELP = ("For full helptext", "Argument helptext")


def lookup(word: str, commands: Mapping[str, Any], where: str) -> Any:
    """Return the command called `word`; raises `ConfigError` with the near ones."""
    if word in commands:
        return commands[word]
    near = difflib.get_close_matches(word, commands, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(commands)}"
    raise ConfigError(f"{where} has no command {word!r}; {hint}")


@contextmanager
def one_line(prog: str) -> Iterator[None]:
    """Turn an exit with a printed complaint into a `ConfigError` of one line that names the help of `prog`.

    Warnings printed on the way stay what they are; so do exits without an error, such as those of `--help`.
    """
    printed = io.StringIO()
    try:
        with redirect_stderr(printed):
            yield
    except SystemExit as ended:
        if not ended.code or not printed.getvalue().strip():
            sys.stderr.write(printed.getvalue())
            raise
        raise ConfigError(f"{complaint(printed.getvalue())}; `{prog} --help` explains every option") from None
    sys.stderr.write(printed.getvalue())


def complaint(text: str) -> str:
    """Return what a boxed message says: its first part, and the option that it thinks was meant."""
    framed = "│" in text  # plain dashes where the terminal has no such character
    parts: list[list[str]] = [[]]
    for line in text.splitlines():
        if framed and not line.startswith("│"):
            continue  # the frame, with a title that the message repeats
        line = line.strip("│ ")
        if RULE.fullmatch(line):
            parts.append([])
        elif line:
            parts[-1].append(line)
    if not framed and len(parts) > 1:
        parts = parts[1:]  # what stands above the first rule is the title
    said = " ".join(" ".join(parts[0]).split()).rstrip(".") or " ".join(text.split())
    for part in parts[1:]:
        options = [word for line in part[1:] for word in line.split() if word.startswith("--")]
        if part and not part[0].startswith(HELP) and options:
            said += f"; did you mean {options[0]}?"
            break
    return said
