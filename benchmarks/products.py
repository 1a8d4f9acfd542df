"""How fast an update could be if its products were all it did: every product timed alone, in its very shape, added up.

    python benchmarks/products.py [CASE ...]

CASE: `sac-utd1`, `sac-utd20`, `iql`, `cql`, `loop` (`throughput_peers.CASES`). Results go to
`benchmarks/results/products/`; a case that is measured anew replaces its rows. Run it alone on the machine.
"""

import json
import os
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from parts import measure_parts, spread
from throughput_peers import CASES

ROUNDS, SECONDS, PRODUCT_SECONDS = 5, 2.0, 0.1
SHOWN = 6
"""Kinds of products that the report shows of each case, those that take longest."""


def case_alone(name: str) -> dict[str, Any]:
    """Return the times of a case's update and of its products, in this process, in turns."""
    from peers import Contender  # noqa: PLC0415
    from throughput_agents import AS_RUN, prepared  # noqa: PLC0415
    from throughput_machine import alone, kinds_of  # noqa: PLC0415

    case = CASES[name].settings(quick=False)
    (adapter, forms), utd = prepared(case), case["utd"]
    kinds = kinds_of(adapter.traced(utd)[0])
    whole = Contender("", {"update": forms[AS_RUN]}, utd)
    parts = Contender("", {str(kind): (alone(*kind), "") for kind in kinds})
    for contender in (whole, parts):
        for form in contender.forms:
            contender.measure(form, 0.0)  # compiles
    found: dict[str, Any] = {"update": [], "products": [], "gflop": sum(a * b for a, b in kinds.values()) / utd / 1e9}
    each: dict[Any, list[float]] = {kind: [] for kind in kinds}
    for _ in range(ROUNDS):
        found["update"].append(1e3 / whole.measure("update", SECONDS))
        for kind, times in each.items():
            times.append(1e3 / parts.measure(str(kind), PRODUCT_SECONDS) * kinds[kind][0] / utd)
        found["products"].append(sum(times[-1] for times in each.values()))
    found["kinds"] = [
        {"product": label(kind), "count": count / utd, "ms": statistics.median(each[kind]),
         "gflops": count / utd * flops / statistics.median(each[kind]) / 1e6}
        for kind, (count, flops) in kinds.items()
    ]  # fmt: skip
    return found


def label(kind: Any) -> str:
    """Name a product by its operands' shapes, a mark behind the one that comes transposed."""
    (first, second), ((left, right), (batch, _)) = kind
    marks = (
        "'" if left[0] == len(batch) and len(first) > len(batch) + 1 else "",
        "" if right[0] == len(batch) else "'",
    )
    return " . ".join("x".join(map(str, shape)) + mark for shape, mark in zip((first, second), marks, strict=True))


def measured(name: str) -> dict[str, Any]:
    """Return what a process of its own measures of a case."""
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"
    command = [sys.executable, str(Path(__file__).resolve()), "--case", name]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def report(rows: dict[str, Any]) -> str:
    """Return the report in Markdown."""
    lines = [
        "# Products", "",
        "Made by `python benchmarks/products.py`; raw: `rows.json`. One critic update of the comparison's cases, of "
        "the last one a whole step with its update, and its matrix products (sums and means that are laid out as "
        "products included), each timed alone in its very shape in a loop of its own, added up; "
        f"{ROUNDS} rounds in turns, median, least and most in brackets. Alone, operands stay in the cache, but "
        "each product waits for the one before; an update may run several side by side. A prime marks an operand that "
        "comes transposed. "
        f"Machine: {rows['machine']}.", "",
        "| case | GFLOP | update, ms | its products alone, ms | share |", "| --- | --: | --: | --: | --: |",
    ]  # fmt: skip
    for name in CASES:
        if name in rows:
            row = rows[name]
            shares = [100 * a / b for a, b in zip(row["products"], row["update"], strict=True)]
            lines.append(
                f"| {CASES[name].title} | {row['gflop']:.2f} | {spread(row['update'])} | {spread(row['products'])} | "
                f"{spread(shares)} % |"
            )
    for name in CASES:
        if name in rows:
            largest = sorted(rows[name]["kinds"], key=lambda kind: -kind["ms"])
            lines += ["", f"## {CASES[name].title}", "", "| product | times an update | ms | GFLOP/s |"]
            lines += ["| --- | --: | --: | --: |"]
            for kind in largest[:SHOWN]:
                lines.append(f"| {kind['product']} | {kind['count']:g} | {kind['ms']:.3f} | {kind['gflops']:.0f} |")
            rest = largest[SHOWN:]
            count, took = (sum(kind[key] for kind in rest) for key in ("count", "ms"))
            lines.append(f"| {len(rest)} other kinds | {count:g} | {took:.3f} |  |")
    return "\n".join([*lines, ""])


def main(args: list[str]) -> int:
    """Measure the cases that are named, all where none is; or be the process of one."""
    if args and args[0] == "--case":
        print(json.dumps(case_alone(args[1])))
        return 0
    return measure_parts(args, {name: partial(measured, name) for name in CASES}, report, "products", "cases")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
