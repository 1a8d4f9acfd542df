"""How fast every agent learns and plays, and how fast other libraries do.

    python benchmarks/throughput.py [--peers] [--quick] [WORD ...]

Without a flag our agents are measured; `--peers` measures the comparison with other libraries as well, which go into an
environment of their own. Words select: an agent (`iql`), a shape (`pen` 45/24, `cheetah` 17/6, `pixels`), seeds
(`1seed`, `5seeds`, `10seeds`), a form (`offline`, `utd1`, `utd4`, `utd20`, `online`); of the comparison, a case
(`sac-utd1`, `sac-utd20`, `iql`, `cql`, `loop`) or a library (`sbx`, `sb3`, `d3rlpy`); `agents` and `comparison` for
all of either. Words of one kind are alternatives; words of several kinds must all fit, and what does not know a word is
left out. `--quick` runs a few tiny ones to show that every path works, and writes to `runs/throughput-quick`.

Results go to `benchmarks/results/throughput/`, row by row: what is measured anew replaces what was there. A case of the
comparison is replaced as a whole: with `--peers comparison sbx` the other libraries' rows are gone. Run it alone on the
machine.
"""

import difflib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parts import machine_here
from throughput_peers import CASES, PEERS, PeersError, contest
from throughput_report import Results, Row, middle, number

from o2o.agents import AGENTS
from o2o.startup import prepare_process

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "throughput"
QUICK_RESULTS = HERE.parent / "runs" / "throughput-quick"
CELL_SECONDS = 3600.0
"""A process that takes longer is ended; the rows it has given stay."""
SEEDS = {"1seed": 1, "5seeds": 5, "10seeds": 10}
RATIOS = ("utd1", "utd4", "utd20")
FORMS = ("offline", *RATIOS, "online")
FLAGS = ("--peers", "--quick")


class UsageError(Exception):
    """The command line cannot be understood."""


@dataclass(frozen=True)
class Cell:
    """What one process measures."""

    agent: str
    shape: str
    seeds: int
    forms: tuple[str, ...]


def forms_of(agent: Any) -> tuple[str, ...]:
    """Return the forms of an agent class: on-policy agents, and those that only act online, have no update ratio."""
    own = agent.preset("locomotion", "paper").config.online.replay in ("none", "rollout")
    return ("offline", "online") if own else ("offline", *RATIOS)


def shapes_of(agent: Any) -> tuple[str, ...]:
    """Return the shapes that an agent class takes."""
    images = hasattr(agent.preset("locomotion", "paper").config, "encoder")
    return ("pen", "cheetah", "pixels") if images else ("pen", "cheetah")


def all_cells() -> list[Cell]:
    """Return the whole table, one seed first."""
    return [
        Cell(name, shape, seeds, forms_of(agent))
        for seeds in SEEDS.values()
        for name, agent in AGENTS.items()
        for shape in shapes_of(agent)
    ]


QUICK_CELLS = [
    Cell("iql", "cheetah", 1, ("offline", "utd4")),
    Cell("bc", "pen", 1, ("offline", "online")),
    Cell("sac", "cheetah", 2, ("utd1",)),
    Cell("ppo", "cheetah", 1, ("online",)),
    Cell("residual", "pixels", 1, ("utd1",)),
]
KINDS: dict[str, Sequence[str]] = {
    "agent": tuple(AGENTS), "shape": ("pen", "cheetah", "pixels"), "seeds": tuple(SEEDS), "form": FORMS,
    "all agents": ("agents",), "case": tuple(CASES), "library": PEERS, "all cases": ("comparison",),
}  # fmt: skip
OF_AGENTS, OF_CASES = ("agent", "shape", "seeds", "form", "all agents"), ("case", "library", "all cases")


def selected(words: Sequence[str], kinds: Sequence[str]) -> dict[str, tuple[str, ...]] | None:
    """Return the words of each of these kinds, all that there are where none is given; None if one is unknown here."""
    known = {word for kind in kinds for word in KINDS[kind]}
    if any(word not in known for word in words):
        return None
    return {kind: tuple(word for word in KINDS[kind] if word in words) or tuple(KINDS[kind]) for kind in kinds}


def chosen_cells(words: Sequence[str], quick: bool) -> list[Cell]:
    """Return the cells, and of each the forms, that the words select."""
    chosen = selected(words, OF_AGENTS)
    if chosen is None:
        return []
    narrow = any(word not in KINDS["all agents"] for word in words)
    cells, seeds = QUICK_CELLS if quick and not narrow else all_cells(), [SEEDS[word] for word in chosen["seeds"]]
    if not narrow:
        return cells
    fitting = [c for c in cells if c.agent in chosen["agent"] and c.shape in chosen["shape"] and c.seeds in seeds]
    kept = [Cell(c.agent, c.shape, c.seeds, tuple(f for f in c.forms if f in chosen["form"])) for c in fitting]
    return [cell for cell in kept if cell.forms]


def chosen_cases(words: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    """Return the cases of the comparison that the words select, each with the libraries that take part."""
    chosen = selected(words, OF_CASES)
    return [] if chosen is None else [(case, chosen["library"]) for case in chosen["case"]]


def arguments(args: Sequence[str]) -> tuple[set[str], list[str]]:
    """Return flags and words; raises `UsageError` for what is neither."""
    flags, words = {arg for arg in args if arg.startswith("-")}, [arg for arg in args if not arg.startswith("-")]
    known = {word for kind in KINDS.values() for word in kind}
    for arg in (*sorted(flags - set(FLAGS)), *(word for word in words if word not in known)):
        near = difflib.get_close_matches(arg, [*FLAGS, *known], n=1)
        hint = f"did you mean {near[0]}?" if near else f"flags: {', '.join(FLAGS)}; words: {', '.join(sorted(known))}"
        raise UsageError(f"throughput.py does not know {arg!r}; {hint}")
    return flags, words


def run_cell(cell: Cell, quick: bool, results: Results, folder: Path) -> bool:
    """Measure a cell in its own process, taking and showing its rows as they come; False if it failed."""
    about = {"agent": cell.agent, "shape": cell.shape, "seeds": cell.seeds, "quick": quick, "forms": cell.forms}
    command = [sys.executable, str(HERE / "throughput_agents.py"), "cell", json.dumps(about)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    timer = threading.Timer(CELL_SECONDS, process.kill)
    timer.start()
    assert process.stdout is not None
    try:
        for line in process.stdout:
            found = json.loads(line)
            if "machine" in found:
                results.machines[found["machine"]["device"]] = found["machine"]
                continue
            row = Row(**found)
            results.add(rows=[row])
            show(row)
        code = process.wait()
    finally:
        timer.cancel()
        process.kill()
    results.save(folder, CASES, quick)
    if code:
        why = f"ended after {CELL_SECONDS:g} s" if code < 0 else "see above"
        print(f"{cell.agent} {cell.shape} {cell.seeds} seeds: not measured to the end, {why}", flush=True)
    return code == 0


def show(row: Row) -> None:
    """Print one line."""
    updates, steps, share = number(middle(row.updates)), number(middle(row.steps)), row.share("small")
    print(
        f"{row.agent:<12} {row.shape:<8} {row.seeds:>2} {row.form:<16} {updates:>9} updates/s {steps:>8} steps/s "
        f"{'' if share is None else f'{100 * share:.0f} % of its matmuls'}",
        flush=True,
    )


def run_case(name: str, libraries: tuple[str, ...], device: str, quick: bool, results: Results, folder: Path) -> bool:
    """Measure a case of the comparison; False if a library failed, whose case is then left as it was."""
    try:
        found = contest(name, libraries, device, quick)
    except PeersError as error:
        print(f"{name}: {error}", flush=True)
        return False
    results.add(contests=found)
    results.save(folder, CASES, quick)
    for row in found:
        print(f"{name:<10} {row.who:<7} {row.form:<13} {number(middle(row.rates)) or row.note:>9}", flush=True)
    return True


def main(args: Sequence[str]) -> int:
    """Measure what the arguments select; return the exit code."""
    try:
        flags, words = arguments(args)
        quick, peers = "--quick" in flags, "--peers" in flags
        cells, cases = chosen_cells(words, quick), chosen_cases(words) if peers else []
        if not cells and not cases:
            hint = "" if peers or not chosen_cases(words) else " without --peers"
            raise UsageError(f"nothing fits {' '.join(words)}{hint}; give fewer words")
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    prepare_process()  # what is measured inherits what the command line sets, but compiles anew
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"
    folder = QUICK_RESULTS if quick else RESULTS
    results = Results.load(folder)
    fine = [run_cell(cell, quick, results, folder) for cell in cells]
    if cases:
        about = machine_here()
        results.machines[about["device"]] = about
        fine += [run_case(name, libraries, about["device"], quick, results, folder) for name, libraries in cases]
    print(f"written to {folder}")
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
