"""The kept results of a benchmark suite, two files in `benchmarks/results/<suite>/`.

`scores.csv` has a row per dataset, method, seed and evaluation: the mean over that evaluation's episodes. `cells.jsonl`
has a line per finished cell: its settings and what a report says about its run. A cell is finished once its line is
there, so its scores are written first.
"""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from o2o.errors import RunError
from o2o.files import read_object, write_atomically
from o2o.report.plots import read_rows
from o2o.report.stats import PHASES
from o2o.report.suite import Cell

SCORES, CELLS = "scores.csv", "cells.jsonl"
COUNTS = ("seed", "env_steps", "gradient_steps", "episodes")
METRICS = ("return", "success", "success_last", "normalized", "score", "length")
COLUMNS = ("dataset", "method", "seed", "phase", "env_steps", "gradient_steps", "episodes", *METRICS)

Row = dict[str, Any]


@dataclass(frozen=True)
class FinishedCell:
    """A cell whose run has finished."""

    cell: dict[str, Any]
    """Fields of its `Cell` when it ran."""
    initial_updates: int
    """Updates in one go before the first online one (`OnlineConfig.initial_updates`)."""
    dataset_means: dict[str, float | None]
    """Metric to the dataset's own mean."""
    fingerprint: str | None
    """Of the dataset's files."""
    versions: dict[str, str]
    """Packages, Python and machine."""

    @property
    def method(self) -> tuple[str, str]:
        """Dataset and label."""
        return self.cell["dataset"], self.cell["label"]

    @property
    def seeds(self) -> tuple[int, int]:
        """First and last seed."""
        return self.cell["seed"], self.cell["seed"] + self.cell["seeds"] - 1


def read_cells(folder: Path) -> list[FinishedCell]:
    """Return the finished cells of a suite's folder; none if it has no `cells.jsonl`. Raises `RunError`."""
    path = folder / CELLS
    try:
        return [FinishedCell(**row) for row in read_rows(path)] if path.exists() else []
    except TypeError as error:
        raise RunError(f"{path}: a line has other fields than expected ({error}); restore the file from git") from error


def read_scores(folder: Path) -> list[Row]:
    """Return the rows of `scores.csv`; none without the file. Metrics are float, or None where not measured."""
    path = folder / SCORES
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise RunError(f"{path}: columns {reader.fieldnames}, expected {list(COLUMNS)}; restore the file from git")
        try:
            return [_parsed(row) for row in reader]
        except (TypeError, ValueError) as error:
            raise RunError(f"{path}, line {reader.line_num}: {error}; restore the file from git") from error


def _parsed(row: dict[str, str]) -> Row:
    numbers = {name: int(row[name]) for name in COUNTS}
    return {**row, **numbers, **{name: float(row[name]) if row[name] else None for name in METRICS}}


def keep(folder: Path, cell: Cell, run: Path) -> None:
    """Add the evaluations of a finished run folder to the results, in place of what they had of this cell.

    Several processes may do so at once. Raises `RunError` if the run lacks a file or evaluations of a seed.
    """
    scores = evaluations(read_rows(run / "episodes.jsonl"), cell, run)
    config = read_object(run / "config.json")
    online = config.get("config", {}).get("online") or {}
    finished = FinishedCell(
        cell=json.loads(json.dumps(asdict(cell))),
        initial_updates=int(online.get("initial_updates", 0)),
        dataset_means=config.get("dataset_summary", {}),
        fingerprint=config.get("fingerprint"),
        versions=config.get("versions", {}),
    )
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        first, last = finished.seeds
        others = [
            row
            for row in read_scores(folder)
            if (row["dataset"], row["method"]) != finished.method or not first <= row["seed"] <= last
        ]
        cells = [c for c in read_cells(folder) if (c.method, c.seeds) != (finished.method, finished.seeds)]
        write(folder, [*cells, finished], [*others, *scores])


def merge(folder: Path, other: Path) -> None:
    """Add to a suite's results those of another folder, in place of what they had of the same cells."""
    added = read_cells(other)
    taken = {(cell.method, seed) for cell in added for seed in range(cell.seeds[0], cell.seeds[1] + 1)}
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        cells = [cell for cell in read_cells(folder) if (cell.method, cell.seeds[0]) not in taken]
        rows = [r for r in read_scores(folder) if ((r["dataset"], r["method"]), r["seed"]) not in taken]
        write(folder, [*cells, *added], [*rows, *read_scores(other)])


def write(folder: Path, cells: Iterable[FinishedCell], scores: Iterable[Row]) -> None:
    """Write both files, sorted by dataset, method and seed, the evaluations of a seed in the order of the run."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in sorted(scores, key=lambda row: (row["dataset"], row["method"], row["seed"], *place(row))):
        writer.writerow([row[name] for name in COLUMNS])
    write_atomically(folder / SCORES, text.getvalue())
    lines = [json.dumps(asdict(cell)) + "\n" for cell in sorted(cells, key=lambda cell: (cell.method, cell.seeds))]
    write_atomically(folder / CELLS, "".join(lines))


def place(row: Row) -> tuple[int, int]:
    """Return which phase, and which step in it: evaluations offline differ in gradient steps, later ones in env steps.

    It is the key by which `o2o.report.stats.aggregate` tells evaluations apart.
    """
    phase = PHASES.index(row["phase"])
    return phase, row["gradient_steps"] if phase == 0 else row["env_steps"]


def evaluations(episodes: Sequence[Row], cell: Cell, run: Path) -> list[Row]:
    """Return one row per seed and evaluation, with the means over its episodes, from the episode rows of `run`.

    Episodes without a metric do not count for it. Raises `RunError` if the rows are not of as many seeds as the cell's.
    """
    members = sorted({row["seed"] for row in episodes})
    if len(members) != cell.seeds:
        raise RunError(f"{run}: {len(members)} seeds in episodes.jsonl, expected {cell.seeds}; run it again")
    groups: dict[tuple[int, tuple[int, int]], list[Row]] = {}
    for row in episodes:
        groups.setdefault((cell.seed + members.index(row["seed"]), place(row)), []).append(row)
    return [
        {
            "dataset": cell.dataset,
            "method": cell.label,
            "seed": seed,
            "phase": rows[0]["phase"],
            "env_steps": max(row["env_steps"] for row in rows),
            "gradient_steps": max(row["gradient_steps"] for row in rows),
            "episodes": len(rows),
            **{metric: _mean([row.get(metric) for row in rows]) for metric in METRICS},
        }
        for (seed, _), rows in sorted(groups.items(), key=lambda item: item[0])
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [float(value) for value in values if value is not None]
    return float(np.mean(known)) if known else None
