"""Turn the boxed error messages of tyro into one line.

tyro's hook for errors (`tyro._errors.on_parse_error`) is private and may change in any release, so the text is read.
"""

import io
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

from o2o.errors import ConfigError

RULE = re.compile(r"[─━-]{6,}")
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
        raise ConfigError(f"{complaint(printed.getvalue())}; `{prog} --help` explains every option") from None
    sys.stderr.write(printed.getvalue())


def complaint(text: str) -> str:
    """Return the first part of a boxed message, and the option that tyro suggests."""
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
    for part in parts[1:]:
        options = [word for line in part[1:] for word in line.split() if word.startswith("--")]
        if part and not part[0].startswith(HELP) and options:
            said += f"; did you mean {options[0]}?"
            break
    return said
