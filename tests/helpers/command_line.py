"""The command line in this process, and options that make a run tiny."""

import pytest

from o2o import cli

TINY = [
    *("--preset", "small", "--offline-steps", "20", "--online-steps", "40", "--loop.eval-episodes", "1"),
    *(
        arg
        for part in ("cql", "finetune")
        for network in ("actor", "critic")
        for arg in (f"--config.{part}.{network}-hidden-dims", "8", "8")
    ),
    *("--config.batch-size", "8"),
    *("--config.online.warmup-steps", "10", "--config.online.min-rows", "0"),
]


def run(*args: str) -> int:
    """Return the exit code of `o2o ARGS`."""
    with pytest.raises(SystemExit) as ended:
        cli.main(args)
    return int(ended.value.code or 0)
