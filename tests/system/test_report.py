"""Reports of benchmark suites: which evaluation stands in which column."""

import json
from pathlib import Path
from typing import Any

import pytest

from o2o.report.scores import keep
from o2o.report.stats import Point
from o2o.report.suite import BenchTask, Suite, Variant
from o2o.report.suite_report import stages, write_report


def evaluations(*steps: tuple[str, int, int]) -> list[Point]:
    return [Point(phase, env_steps, updates, {0: 0.5}) for phase, env_steps, updates in steps]


@pytest.mark.parametrize(
    ("initial", "steps", "early"),
    [
        # 5000 critic-only updates in the first online step, then 4 a step: 200 + 5000 at step 1050, 1000 + 5000 at 1250
        (5000, [("warmup", 1000, 0), ("online", 1050, 5200), ("online", 1250, 6000), ("online", 2000, 9000)], 1250),
        (5000, [("offline", 0, 300), ("online", 251, 6292), ("online", 1000, 9288)], 251),  # two steps of windows late
        (0, [("offline", 0, 300), ("online", 500, 1270), ("online", 1000, 1300)], 1000),
        (5000, [("warmup", 10, 0), ("online", 100, 5900)], None),
    ],
)
def test_early_column(initial: int, steps: list[tuple[str, int, int]], early: int | None) -> None:
    """The early column counts updates after the initial ones."""
    found = stages(evaluations(*steps), initial)["early"]
    assert (found and found.env_steps) == early


@pytest.mark.parametrize(("initial", "column"), [(0, "20 %"), (1000, "90 %")])
def test_initial_updates_from_config(tmp_path: Path, initial: int, column: str) -> None:
    """A report takes the initial updates from the run's config."""
    tasks = (BenchTask("demo/pen-v0"), BenchTask("demo/door-v0"))
    suite = Suite("tiny", "One method.", tasks, (Variant("residual", "residual"),), seeds=1, online_steps=500)
    config: dict[str, Any] = {"config": {"online": {"initial_updates": initial}}}
    for cell in suite.cells():
        run = tmp_path / "runs/tiny" / cell.name
        run.mkdir(parents=True)
        rows = [("warmup", 100, 0, 0), ("online", 200, 1400, 2), ("online", 400, 2000, 9), ("online", 500, 2400, 10)]
        keys = ("phase", "env_steps", "gradient_steps", "success", "seed", "return")
        lines = [
            json.dumps(dict(zip(keys, (*place, episode < hits, 0, 0.0), strict=True)))
            for *place, hits in rows
            for episode in range(10)
        ]
        (run / "episodes.jsonl").write_text("\n".join(lines) + "\n")
        (run / "config.json").write_text(json.dumps(config))
        keep(tmp_path / "tiny", cell, run)
    text = write_report(suite, tmp_path).read_text()
    for which in ("`demo/pen-v0` | -", "2 tasks | -"):
        count = 2 if which.startswith("2") else 1
        row = next(line for line in text.splitlines() if line.startswith(f"| {which} | residual | {count} | - |"))
        assert [cell.strip() for cell in row.split("|")][6:9] == ["0 %", column, "100 %"]
    assert "without those in one go before the first of them\n(`initial_updates`)" in text
