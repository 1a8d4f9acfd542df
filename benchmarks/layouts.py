"""What each choice of `o2o.layout` is worth on this CPU: the comparison's cases, laid out in other ways, in turns.

    python benchmarks/layouts.py [CASE ...]

CASE: `sac-utd1`, `sac-utd20`, `iql`, `cql` (`throughput_peers.CASES`). Results go to `benchmarks/results/layouts/`; a
case that is measured anew replaces its rows. Run it alone on the machine.
"""

import json
import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from parts import measure_parts
from peers import serve
from throughput_peers import CASES, PAUSE, READY_SECONDS, Worker

from o2o.startup import NO_YNN

ROUNDS, SECONDS = 6, 2.0
SHIPPED, YNN = "as shipped", "XLA's YNN fusion on"
EVERY: dict[str, dict[str, Any]] = {
    SHIPPED: {},
    "sums over rows and means as XLA makes them": {"sums": True},
    YNN: {},
}
WIDE: dict[str, dict[str, Any]] = {f"pieces of {size or 'all'} states": {"pieces": size} for size in (64, 128, None)}
VARIANTS = {"sac-utd1": EVERY, "sac-utd20": EVERY, "iql": EVERY, "cql": {**EVERY, **WIDE}}


def lay_out(sums: bool = False, pieces: int | None = 32) -> None:
    """Change `o2o.layout` in this process."""
    from o2o import layout  # noqa: PLC0415

    layout.PIECE_ROWS = pieces  # type: ignore[assignment]
    if sums:
        layout.sums_as_products = lambda: False


def measured(name: str) -> dict[str, list[float]]:
    """Return the rates of every variant of a case, of rounds in which all take turns."""
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"
    rates: dict[str, list[float]] = {}
    workers: dict[str, Worker] = {}
    flags = os.environ["XLA_FLAGS"]
    try:
        for label, about in VARIANTS[name].items():
            os.environ["XLA_FLAGS"] = flags.replace(NO_YNN, "") if label == YNN else flags
            script = (str(Path(__file__).resolve()), "--serve", json.dumps(about))
            workers[label] = Worker("ours", CASES[name], Path(sys.executable), False, script)
            workers[label].answer(READY_SECONDS)
            rates[label] = []
        for i in range(ROUNDS):
            for label in list(workers) if i % 2 == 0 else reversed(list(workers)):
                time.sleep(PAUSE)
                rates[label].append(workers[label].rate("as run", SECONDS))
    finally:
        os.environ["XLA_FLAGS"] = flags
        for worker in workers.values():
            worker.close()
    return rates


def report(rows: dict[str, Any]) -> str:
    """Return the report in Markdown."""
    lines = [
        "# Layouts", "",
        "Made by `python benchmarks/layouts.py`; raw: `rows.json`. What each choice of `o2o/layout.py` is worth: the "
        f"cases of the comparison with other libraries, {ROUNDS} rounds in turns. Ratio: to the layout that is "
        f"shipped, the median over rounds, least and most in brackets; below 1, the shipped one is faster. Machine: "
        f"{rows['machine']}.", "",
        "| case | layout | updates/s | ratio |", "| --- | --- | --: | --: |",
    ]  # fmt: skip
    for name in [name for name in VARIANTS if name in rows]:
        rates = rows[name]
        for label, each in rates.items():
            ratios = [a / b for a, b in zip(each, rates[SHIPPED], strict=True)]
            spread = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
            lines.append(
                f"| {CASES[name].title} | {label} | {statistics.median(each):.3g} | "
                f"{'1' if label == SHIPPED else spread} |"
            )
    return "\n".join([*lines, ""])


def main(args: list[str]) -> int:
    """Measure the cases that are named, all where none is; or be the process of one layout."""
    if args and args[0] == "--serve":
        lay_out(**json.loads(args[1]))
        from throughput_agents import ours  # noqa: PLC0415

        serve(ours, json.loads(args[2]))
        return 0
    return measure_parts(args, {name: partial(measured, name) for name in VARIANTS}, report, "layouts", "cases")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
