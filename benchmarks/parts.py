"""Benchmarks of several parts: measure those that are named, keep the rows of the others, write the report anew."""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from o2o.startup import prepare_process

if TYPE_CHECKING:
    from throughput_peers import Case

HERE = Path(__file__).resolve().parent


def machine_here() -> dict[str, Any]:
    """Return what `throughput_machine.machine` says of this CPU; this process itself starts no JAX back end."""
    code = "import json, throughput_machine; print(json.dumps(throughput_machine.machine()))"
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, stdout=subprocess.PIPE, check=True, env=env)
    return json.loads(done.stdout)


def process_megabytes(field: str) -> float | None:
    """Return a size that Linux states of this process, such as "VmHWM", its peak; None where there is none."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{field}:")), None)


def process_peak() -> float:
    """Return the peak memory of this process in MB."""
    found = process_megabytes("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6 if found is None else found


def measure_parts(
    args: Sequence[str],
    parts: Mapping[str, Callable[[], Any]],
    report: Callable[[dict[str, Any]], str],
    name: str,
    called: str = "parts",
) -> int:
    """Measure the parts that `args` name, all where none is, into `results/NAME`; return the exit code.

    `rows.json` holds what each part returned, by its name, and the `machine`; `report` makes Markdown of that.
    """
    unknown = [arg for arg in args if arg not in parts]
    if unknown:
        print(f"{name}.py does not know {unknown[0]!r}; {called}: {', '.join(parts)}", file=sys.stderr)
        return 2
    prepare_process()
    folder = HERE / "results" / name
    path = folder / "rows.json"
    rows = json.loads(path.read_text()) if path.exists() else {}
    machine = machine_here()["device"]
    rows = {"machine": machine, **(rows if rows.get("machine") == machine else {})}  # a table is of one machine
    for part in args or parts:
        rows[part] = parts[part]()
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows, indent=1) + "\n")
        (folder / "README.md").write_text(report(rows))
    print(report(rows))
    return 0


def rates_in_turns(
    case: "Case", ways: Mapping[str, tuple[Sequence[str], str]], rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Return the rates of a case in every way, each the script's arguments and the `XLA_FLAGS` of its process."""
    from throughput_peers import PAUSE, READY_SECONDS, Worker  # noqa: PLC0415  # start-up is measured without it

    rates: dict[str, list[float]] = {label: [] for label in ways}
    workers: dict[str, Worker] = {}
    flags = os.environ["XLA_FLAGS"]
    try:
        for label, (script, own_flags) in ways.items():
            os.environ["XLA_FLAGS"] = own_flags  # read by the process that starts
            workers[label] = Worker("ours", case, Path(sys.executable), False, script)
            workers[label].answer(READY_SECONDS)
        for i in range(rounds):
            for label in list(workers) if i % 2 == 0 else reversed(list(workers)):
                time.sleep(PAUSE)
                rates[label].append(workers[label].rate("as run", seconds))
    finally:
        os.environ["XLA_FLAGS"] = flags
        for worker in workers.values():
            worker.close()
    return rates


def spread(values: Sequence[float], form: str = ".3g") -> str:
    """Return the median, with least and most in brackets."""
    return f"{statistics.median(values):{form}} [{min(values):{form}}, {max(values):{form}}]"


def ratio_table(ways: str, titles: Mapping[str, str], rows: Mapping[str, Mapping[str, Sequence[float]]]) -> list[str]:
    """Return a table of the cases with these `titles` that `rows` has, the `ways` in which each ran in one column.

    A line per way: median rate, and the rates' ratio to those of the case's first way, round by round.
    """
    lines = [f"| case | {ways} | updates/s | ratio |", "| --- | --- | --: | --: |"]
    for name, title in titles.items():
        rates = rows.get(name, {})
        for i, (label, each) in enumerate(rates.items()):
            ratios = [a / b for a, b in zip(each, next(iter(rates.values())), strict=True)]
            ratio = spread(ratios, ".2f") if i else "1"
            lines.append(f"| {title} | {label} | {statistics.median(each):.3g} | {ratio} |")
    return lines
