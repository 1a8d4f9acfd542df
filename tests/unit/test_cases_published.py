"""Published figures beside a suite's own: which rows meet, what lies within their spread, and what is refused."""

import math
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from o2o.errors import ConfigError, RunError
from o2o.report import scores
from o2o.report.plots import plot_curves
from o2o.report.published import COLUMNS, published_curves, read_published
from o2o.report.scores import METRICS, FinishedCell
from o2o.report.stats import curve, statistic_of
from o2o.report.suite import BenchTask, Published, Suite, Variant
from o2o.report.suite_report import write_report
from o2o.user_code import run_file

ROOT = Path(__file__).resolve().parents[2]
TASK = "ogbench/scene-play-singletask-task1-sparse-v0"
FILE = "\n".join(
    [
        ",".join(COLUMNS),
        f"{TASK},fql,FQL,offline,50000,16,8,12,,,arXiv A",
        f"{TASK},fql,FQL,offline,100000,20,9,12,,,arXiv A",
        f"{TASK},rlpd,RLPD,online,50000,100,0,12,,,arXiv A",
        f"{TASK},qc,QC,offline,50000,98.5,,,98,99.5,arXiv B",
        "",
    ]
)


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    (tmp_path / "published.csv").write_text(FILE)
    variants = (
        Variant("fql", "fql"),
        Variant("qc", "qc"),
        Variant("rlpd", "rlpd", offline_steps=0, online_steps=50_000),
    )
    published = Published(tmp_path / "published.csv", same_data=True)
    return Suite("tiny", "A suite.", (BenchTask(TASK),), variants, seeds=2, offline_steps=50_000, published=published)


def results(suite: Suite, folder: Path, found: dict[str, tuple[float, float]]) -> None:
    """Keep the success of two seeds of some methods at 50,000 steps."""
    cells, rows = [], []
    for cell in suite.cells():
        online = cell.label == "rlpd"
        for seed, value in enumerate(found[cell.label]):
            place = {"env_steps": 50_000 if online else 0, "gradient_steps": 45_000 if online else 50_000}
            phase = "online" if online else "offline"
            row = {"dataset": TASK, "method": cell.label, "seed": seed, "phase": phase, **place, "episodes": 50}
            rows.append({**row, **dict.fromkeys(METRICS), "success": value})
        cells.append(FinishedCell(asdict(cell), 0, {}, "f", {"machine": "m"}))
    (folder / suite.name).mkdir(parents=True)
    scores.write(folder / suite.name, cells, rows)


def test_beside_published(suite, tmp_path):
    """Each score meets the published one of its step and phase; the rule is two standard errors of both."""
    results(suite, tmp_path / "out", {"fql": (0.26, 0.30), "qc": (0.96, 0.98), "rlpd": (0.98, 1.0)})
    text = write_report(suite, tmp_path / "out").read_text()
    part = text.split("## Beside published figures")[1].split("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("| `")
    ]
    allowed = 200 * 0.08 * math.sqrt(1 / 2 + 1 / 12)
    assert rows == [
        [f"`{TASK}`", "fql", "offline 50,000", "28 (2)", "FQL 16 +- 8 (12)", "+12", f"{allowed:.0f}", "yes", "arXiv A"],
        [f"`{TASK}`", "qc", "offline 50,000", "97 (2)", "QC 98 [98, 100]", "-2", "-", "not known", "arXiv B"],
        [f"`{TASK}`", "rlpd", "online 50,000", "99 (2)", "RLPD 100 +- 0 (12)", "-1", "0", "**no**", "arXiv A"],
    ]
    assert 12 < allowed < 13


def test_outside_the_spread(suite, tmp_path):
    """One more point than two standard errors is outside."""
    results(suite, tmp_path / "out", {"fql": (0.28, 0.30), "qc": (1.0, 1.0), "rlpd": (1.0, 1.0)})
    text = write_report(suite, tmp_path / "out").read_text()
    assert re.search(r"\| fql \|.*\| \+13 \| 12 \| \*\*no\*\* \|", text) and re.search(r"\| rlpd \|.*\| yes \|", text)


def test_published_curves_drawn(suite, tmp_path):
    """The picture has the published curve as far as ours goes, and none for a method without one."""
    rows = [
        {"phase": "offline", "env_steps": 0, "gradient_steps": step, "seed": seed, "success": 0.2}
        for step in (50_000, 60_000)
        for seed in (0, 1)
    ]
    ours = {"fql": curve(rows, "success", statistic_of("mean")), "bc": curve(rows, "success", statistic_of("mean"))}
    theirs = published_curves(read_published(suite.published), TASK, ours)
    assert set(theirs) == {"fql"} and theirs["fql"].offline.steps.tolist() == [50_000] and theirs["fql"].seeds == 12
    assert theirs["fql"].offline.low == pytest.approx([0.08]) and theirs["fql"].offline.high == pytest.approx([0.24])
    figure = plot_curves(ours, metric="success", published=theirs)
    labels = {line.get_label() for axes in figure.axes for line in axes.get_lines()}
    assert {"fql (n=2)", "fql, published (n=12)", "bc (n=2)"} == labels


def test_other_data_refused(tmp_path):
    """A figure on other data stands beside none of ours."""
    with pytest.raises(ConfigError, match="only where the data are the same; say `same_data=True`"):
        Published(tmp_path / "published.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n", "columns"),
        (FILE.replace(",16,", ",sixteen,"), "no number where one should be"),
        (None, "cannot be read"),
    ],
)
def test_broken_file(text, message, suite, tmp_path):
    """A file of figures that cannot be read is one line."""
    path = tmp_path / "published.csv"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(RunError, match=message):
        read_published(suite.published)


def test_committed_figures():
    """The committed figures are those of the suites' cells, each once, with a source; other suites have none."""
    suites = run_file(ROOT / "benchmarks/suites.py").SUITES
    with_figures = [suite for suite in suites.values() if suite.published is not None]
    longer = {f"ogbench_{count}k" for count in (100, 200, 500, 1000)}
    assert {suite.name for suite in with_figures} == {"ogbench", "ogbench_k2", *longer}
    cells = {(cell.dataset, cell.label) for suite in with_figures for cell in suite.cells()}
    rows = read_published(suites["ogbench"].published)
    assert {(row.dataset, row.method) for row in rows} == cells
    keys = [(row.dataset, row.method, row.phase, row.step) for row in rows]
    assert len(set(keys)) == len(keys) and all(row.source in ("arXiv 2601.14234", "arXiv 2507.07969") for row in rows)
    assert all(0 <= row.low <= row.mean <= row.high <= 1 for row in rows)
    found = {
        (row.dataset.split("ogbench/")[1].split("-play")[0], row.dataset[-11:-3], row.method, row.step): row
        for row in rows
    }
    assert not any("puzzle-4x4" in row.dataset for row in rows), "theirs are of a larger set"
    assert found["scene", "1-sparse", "fql", 50_000].mean == pytest.approx(0.16, abs=0.005)
    assert found["puzzle-3x3", "5-sparse", "ifql", 100_000].mean == pytest.approx(0.98, abs=0.005)
    assert found["scene", "2-sparse", "qam_e_k2", 50_000].mean == pytest.approx(0.91, abs=0.005)


def test_cells_judge_as_published():
    """Cells of these suites are judged in 50 episodes at 50,000 steps, at full size."""
    suites = run_file(ROOT / "benchmarks/suites.py").SUITES
    for name in ("ogbench", "ogbench_k2"):
        for cell in suites[name].cells():
            assert (cell.preset, cell.eval_episodes, cell.eval_every, cell.seeds) == ("paper", 50, 50_000, 1)
            assert (cell.offline_steps, cell.online_steps) == ((0, 50_000) if cell.label == "rlpd" else (50_000, 0))
            assert cell.dataset.endswith("-sparse-v0") != ("cube" in cell.dataset)
    assert replace(suites["ogbench"], seeds=2).cells()[0].seeds == 2
