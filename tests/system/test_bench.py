"""Benchmark bookkeeping and reports, on row files whose numbers are known."""

import csv
import json
import os
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from o2o.errors import CheckpointError, ConfigError, RunError
from o2o.report.jobs import in_turn, jobs, pending, run_suite
from o2o.report.scores import keep, read_cells, read_scores
from o2o.report.suite import BenchTask, Suite, Variant, load_suite
from o2o.report.suite_report import write_report
from o2o.user_code import run_file

ROOT = Path(__file__).resolve().parents[2]
PEN, DOOR = "demo/pen-v0", "demo/door-v0"


@pytest.fixture
def suite():
    return Suite(
        name="tiny",
        description="Two tasks, two methods.",
        tasks=(BenchTask(PEN, (("binary", True),)), BenchTask(DOOR)),
        variants=(Variant("wsrl", "wsrl"), Variant("sac", "wsrl", (("online.warmup_steps", 0),))),
        seeds=3,
        offline_steps=1000,
        online_steps=500,
    )


def offset(label):
    return 0.0 if label == "wsrl" else -0.1


def write_run(cell, run, status="finished"):
    """Write what a run leaves: ten episodes per seed and evaluation, success .4/.4/.2/.7 plus .1 per seed."""
    run.mkdir(parents=True, exist_ok=True)
    stages = [
        ("offline", 0, 1000, 0.4),
        ("warmup", 50, 1000, 0.4),
        ("online", 300, 2000, 0.2),
        ("online", 500, 2800, 0.7),
    ]
    rows = []
    for phase, env_steps, gradient_steps, share in stages:
        for member in range(cell.seeds):
            hits = round(10 * (share + 0.1 * (cell.seed + member) + offset(cell.label)))
            for episode in range(10):
                row = {"phase": phase, "env_steps": env_steps, "gradient_steps": gradient_steps, "seed": member}
                rows.append({**row, "episode": episode, "return": 100.0 * hits, "success": episode < hits})
    (run / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {"success": 0.42, "return": 250.0}
    (run / "config.json").write_text(
        json.dumps({"versions": {"machine": "test bench x 2"}, "dataset_summary": summary})
    )
    (run / "metrics.jsonl").write_text("")
    set_status(run, status)


def begin(cell, run, status, **more):
    """Leave a run folder with its status and, beside it, the cell that it began as."""
    set_status(run, status, **more)
    run.with_name(f"{run.name}.json").write_text(json.dumps(asdict(cell)))


def set_status(run, status, **more):
    run.mkdir(parents=True, exist_ok=True)
    (run / "status.json").write_text(json.dumps({"status": status, **more}))


class Runner:
    """Stands in for the command line's `train` and `resume`: records the calls and writes the files of a run."""

    def __init__(self, tmp_path, **status):
        self.calls, self.status, self.said = [], status, []
        self.dirs = {"results_dir": tmp_path / "results", "runs_dir": tmp_path / "runs"}

    def train(self, cell, run):
        self.calls.append(("train", cell.name))
        write_run(cell, run, self.status.get(cell.name, "finished"))

    def resume(self, run):
        self.calls.append(("resume", run.name))
        write_run(next(job.cell for job in jobs(self.suite, self.suite.cells(), **self.dirs) if job.run == run), run)

    def __call__(self, suite, train=None, **kwargs):
        """Run the suite and return the states of all its cells."""
        self.calls.clear()
        self.suite = suite
        out, runs = self.dirs["results_dir"], self.dirs["runs_dir"]
        work = in_turn(train or self.train, self.resume, self.said.append)
        run_suite(suite, work, out=out, runs=runs, say=self.said.append, **kwargs)
        return [job.state for job in jobs(suite, suite.cells(), **self.dirs)]

    def report(self, suite):
        """Write the report and return its text."""
        return write_report(suite, self.dirs["results_dir"], self.dirs["runs_dir"]).read_text()


def names(*parts):
    return [f"demo-{task}-v0--{label}--seeds{seeds}" for task, label, seeds in parts]


ALL = names(("pen", "wsrl", "0-2"), ("pen", "sac", "0-2"), ("door", "wsrl", "0-2"), ("door", "sac", "0-2"))


def test_cell_runs_once(suite, tmp_path):
    """A cell runs once."""
    runner = Runner(tmp_path)
    assert len(pending(suite, **runner.dirs)) == 4
    nothing = in_turn(lambda *_: None, lambda *_: None, lambda _: None)
    assert run_suite(suite, nothing, out=tmp_path, runs=tmp_path, say=lambda _: None) == 1
    done = runner(suite)
    assert runner.calls == [("train", name) for name in ALL]
    assert done == ["finished"] * 4
    folder = tmp_path / "results/tiny"
    assert [(c.method, c.seeds) for c in read_cells(folder)] == [
        ((task, label), (0, 2)) for task in (DOOR, PEN) for label in ("sac", "wsrl")
    ]
    assert len(read_scores(folder)) == 4 * 3 * 4, "cells x seeds x evaluations"
    assert pending(suite, **runner.dirs) == []
    out, runs = runner.dirs["results_dir"], runner.dirs["runs_dir"]
    work = in_turn(runner.train, runner.resume, runner.said.append)
    assert run_suite(suite, work, out=out, runs=runs, say=runner.said.append) == 0
    assert len(runner.calls) == 4, "no further call"
    assert runner.said[-1].endswith("finished already")


def test_results_suffice_to_finish(suite, tmp_path):
    """Results alone are enough for a cell to be finished."""
    runner = Runner(tmp_path)
    runner(suite, agents=["wsrl"])
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    runner(suite, agents=["wsrl"])
    assert runner.calls == []


def test_interrupted_cell_resumed(suite, tmp_path):
    """An interrupted cell is resumed and a finished one collected."""
    runner = Runner(tmp_path)
    runs, cells = tmp_path / "runs/tiny", suite.cells()
    for cell, status in zip(cells, ("running", "", "failed", "finished"), strict=True):
        begin(cell, runs / cell.name, status)
    (runs / ALL[1] / "status.json").rename(runs / ALL[1] / "config.json")  # killed before its first status
    write_run(cells[3], runs / ALL[3])  # killed before its results were kept
    done = runner(suite)
    assert runner.calls == [("resume", name) for name in ALL[:3]]
    assert done == ["finished"] * 4
    copied = runs / ALL[3]
    assert runner.said[0] == f"{ALL[3]}: results taken from {copied}, which has the same settings"
    kept = [c.cell for c in read_cells(tmp_path / "results/tiny") if c.method == (DOOR, "sac")]
    assert kept == [json.loads(json.dumps(asdict(cells[3])))]


def test_live_run_left_alone(suite, tmp_path):
    """A run of a live process is left alone."""
    runner = Runner(tmp_path)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        run = tmp_path / "runs/tiny" / ALL[0]
        begin(suite.cells()[0], run, "running", pid=other.pid, host=socket.gethostname())
        states = runner(suite, agents=["wsrl"], tasks=[PEN])[:1]
        other.communicate(b"\n")
    assert states == ["active"] and runner.calls == []
    set_status(run, "running", pid=other.pid, host=socket.gethostname())
    runner(suite, agents=["wsrl"], tasks=[PEN])
    assert runner.calls == [("resume", ALL[0])], "its process is gone"
    assert os.getpid() != other.pid


def test_stopped_cell_stops_suite(suite, tmp_path):
    """A stopped cell stops the suite."""
    runner = Runner(tmp_path, **{ALL[1]: "stopped"})
    done = runner(suite)
    assert runner.calls == [("train", name) for name in ALL[:2]]
    assert done == ["finished", "interrupted", "missing", "missing"]
    runner(suite)
    assert runner.calls == [("resume", ALL[1]), ("train", ALL[2]), ("train", ALL[3])]


def test_failing_cell_spares_others(suite, tmp_path):
    """A failing cell does not keep the others from running."""
    runner = Runner(tmp_path)

    def train(cell, run):
        if cell.name == ALL[0]:
            set_status(run, "failed")
            raise CheckpointError("disk full")
        runner.train(cell, run)

    done = runner(suite, train)
    assert done == ["interrupted", "finished", "finished", "finished"]
    assert any(line.endswith("failed: disk full") for line in runner.said)


def test_added_seeds(suite, tmp_path):
    """More seeds are added to those already run."""
    runner = Runner(tmp_path)
    runner(suite, agents=["wsrl"], tasks=[PEN], seeds=1)
    runner(suite, agents=["wsrl"], tasks=[PEN], seeds=4)
    assert runner.calls == [("train", names(("pen", "wsrl", "1-3"))[0])]
    planned = jobs(suite, suite.cells(seeds=6), **runner.dirs)
    assert [(job.cell.seed, job.cell.seeds, job.state) for job in planned[:3]] == [
        (0, 1, "finished"),
        (1, 3, "finished"),
        (4, 2, "missing"),
    ]
    # seeds 0..3 score .4 .5 .6 .7 offline: mean .55
    assert "| 4 | 55 % [" in runner.report(suite)


@pytest.mark.parametrize("order", [(3, 5), (5, 3)])
def test_report_seed_order(order, suite, tmp_path):
    """A report has all seeds, in whichever order they were run."""
    runner = Runner(tmp_path)
    for seeds in order:
        runner(suite, agents=["wsrl"], tasks=[PEN], seeds=seeds)
    text = runner.report(suite)
    # seeds 0..4 score .4 .5 .6 .7 .8 offline; sac, not run, is listed with the suite's own three
    assert "| `demo/pen-v0` | 42 % | wsrl | 5 | 60 % [" in text and f"- `{ALL[1]}` (missing)" in text


def test_other_settings_not_mixed(suite, tmp_path):
    """Results of other settings are never mixed."""
    runner = Runner(tmp_path)
    runner(suite, agents=["sac"], tasks=[PEN])
    changed = replace(suite, online_steps=900)
    with pytest.raises(RunError, match="online_steps: 500 then, 900 now"):
        runner(changed)
    with pytest.raises(RunError, match="other settings"):
        runner.report(changed)


@pytest.mark.parametrize("status", ["finished", "stopped"])
def test_run_of_other_settings_refused(status, suite, tmp_path):
    """A run of other settings is neither collected nor resumed."""
    runner = Runner(tmp_path, **{ALL[0]: status})
    one = {"agents": ["wsrl"], "tasks": [PEN]}
    runner(suite, **one)
    shutil.rmtree(tmp_path / "results", ignore_errors=True)
    with pytest.raises(RunError, match=r"begun with other settings \(online_steps: 500 then, 900 now\); .* remove it"):
        runner(replace(suite, online_steps=900), **one)
    assert runner.calls == [] and not (tmp_path / "results").exists()
    record = (tmp_path / "runs/tiny" / ALL[0]).with_name(f"{ALL[0]}.json")
    kept = record.rename(tmp_path / "kept.json")
    with pytest.raises(RunError, match="settings that are not on record"):
        runner(suite, **one)
    shutil.rmtree(tmp_path / "runs/tiny" / ALL[0])
    kept.rename(record)
    runner.status.clear()
    assert runner(replace(suite, online_steps=900), **one)[0] == "finished", "the record of a run that is gone is void"
    assert json.loads(record.read_text())["online_steps"] == 900


def test_new_folder_trains_again(suite, tmp_path, monkeypatch):
    """Measuring again into another folder trains again."""
    monkeypatch.chdir(tmp_path)
    runner = Runner(tmp_path)
    for out, root in ((None, "runs/bench"), (Path("benchmarks/results/"), None), (Path("again"), "again/runs")):
        runner.calls.clear()
        work = in_turn(runner.train, runner.resume, runner.said.append)
        assert run_suite(suite, work, out=out, say=runner.said.append) == 0
        assert runner.calls == ([("train", name) for name in ALL] if root else [])
        assert root is None or Path(root, "tiny", ALL[0], "status.json").exists()
    assert Path("benchmarks/results/tiny/scores.csv").exists()
    assert "Not run" not in write_report(suite, Path("again")).read_text()


def test_report_matches_rows(suite, tmp_path):
    """A report says what the rows say."""
    runner = Runner(tmp_path)
    runner(suite, agents=["wsrl"], tasks=[PEN])
    runner(suite, agents=["sac"], tasks=[PEN])
    text = runner.report(suite)
    head, pen_wsrl, pen_sac, door_wsrl, door_sac = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.split("## Success rate")[1].split("##")[0].splitlines()
        if line.startswith("|") and "---" not in line
    ]
    assert head[:4] == ["dataset", "dataset's mean", "method", "n"]
    assert head[4:] == ["offline", "end of warm-up", "after the first 1000 updates", "end"]
    # Seeds 0..2 score .4 .5 .6 offline; the interval over three seeds is their range.
    assert pen_wsrl[:4] == ["`demo/pen-v0`", "42 %", "wsrl", "3"]
    assert pen_wsrl[4:8] == ["50 % [40 %, 60 %]", "50 % [40 %, 60 %]", "30 % [20 %, 40 %]", "80 % [70 %, 90 %]"]
    assert pen_sac[2:5] == ["sac", "3", "40 % [30 %, 50 %]"]
    assert door_wsrl[2:5] == ["wsrl", "0", "not run"] and door_sac[4] == "not run"
    returns = text.split("## Return")[1]
    assert "| 250 | wsrl | 3 | 500 [400, 600] |" in returns
    assert "Machine: test bench x 2." in text
    assert f"- `{ALL[2]}` (missing)" in text.split("## Not run")[1]
    folder = tmp_path / "results/tiny"
    assert (folder / "README.md").read_text() == text
    assert (folder / "demo-pen-v0.png").stat().st_size > 10_000 and "(demo-pen-v0.png)" in text


def table(text, title):
    """Return the cells of a section's table, head first."""
    lines = text.split(f"## {title}\n")[1].split("\n## ")[0].splitlines()
    return [[c.strip() for c in x.strip("|").split("|")] for x in lines if x.startswith("|") and "---" not in x]


def is_of(row, dataset, method):
    return (row["dataset"], row["method"]) == (dataset, method)


def change_scores(folder, change):
    """Rewrite `scores.csv`: each row as `change` returns it, left out where that is None."""
    with (folder / "scores.csv").open(newline="") as file:
        rows = [row for row in map(change, csv.DictReader(file)) if row is not None]
    with (folder / "scores.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def test_method_comparison(suite, tmp_path):
    """Methods are compared with the first and over the tasks."""
    runner = Runner(tmp_path)
    runner(suite)
    always = {"success": "1.0"}
    change_scores(tmp_path / "results/tiny", lambda row: row | always if is_of(row, DOOR, "wsrl") else row)
    text = runner.report(suite)
    wsrl, sac = [row for row in table(text, "Success rate") if row[0] == "2 tasks"]
    # pen .4 .5 .6, door 1: resampled within pen alone, whose seeds are half of all
    assert wsrl[:5] == ["2 tasks", "-", "wsrl", "6", "75 % [70 %, 80 %]"]
    assert sac[2:5] == ["sac", "6", "40 % [33 %, 47 %]"], "1.96 standard errors of six seeds are 6.5 %"
    assert "2 tasks" not in text.split("## Return")[1].split("##")[0], "returns of two tasks have no unit in common"
    assert "2 tasks: `demo/pen-v0`, `demo/door-v0`; their seeds together" in text
    head, pen, door, both = table(text, "Probability of improvement on wsrl")
    assert head == ["dataset", "metric", "method", "n", "n of the first", "probability"]
    # at the end sac .6 .7 .8 against wsrl .7 .8 .9: one pair won, two ties, of nine
    assert pen[:5] == ["`demo/pen-v0`", "success rate", "sac", "3", "3"] and pen[5].startswith("0.22 [0.00, ")
    assert door[0] == "`demo/door-v0`" and door[5] == "0.00 [0.00, 0.00]"
    assert both[:5] == ["2 tasks", "success rate", "sac", "6", "6"] and both[5].startswith("0.11 [0.00, ")


def test_incomparable_left_out(suite, tmp_path):
    """What does not compare is left out."""
    runner = Runner(tmp_path)
    runner(suite, seeds=1)
    text = runner.report(replace(suite, seeds=1))
    assert table(text, "Success rate")[-1][:5] == ["2 tasks", "-", "sac", "2", "30 %"], "no interval of one seed"
    runner(suite, agents=["sac"], seeds=3)
    assert "Probability" not in runner.report(suite), "one seed of the first"
    runner(suite, agents=["wsrl"], tasks=[PEN])
    assert [row[0] for row in table(runner.report(suite), "Probability of improvement on wsrl")[1:]] == [f"`{PEN}`"]


def test_offline_report_columns(suite, tmp_path):
    """An offline suite has no online columns."""
    runner = Runner(tmp_path)
    offline = replace(suite, online_steps=0)
    text = runner.report(offline)
    assert "warm-up" not in text and "Machine" not in text and text.count("(missing)") == 4


def test_rows_lacking_seeds_refused(suite, tmp_path):
    """Rows that lack seeds are refused."""
    runner = Runner(tmp_path)
    runner(suite, agents=["wsrl"], tasks=[PEN])
    change_scores(tmp_path / "results/tiny", lambda row: row if row["seed"] != "1" else None)
    with pytest.raises(RunError, match="lacks seed 1 of wsrl on demo/pen-v0, which is finished"):
        runner.report(suite)


def test_run_lacking_seeds_not_kept(suite, tmp_path):
    """A run that lacks seeds is not kept."""
    cell = suite.cells()[0]
    write_run(replace(cell, seeds=2), tmp_path / "run")
    with pytest.raises(RunError, match="2 seeds in episodes.jsonl, expected 3"):
        keep(tmp_path / "results", cell, tmp_path / "run")
    assert not (tmp_path / "results").exists()


def test_scores_are_episode_means(suite, tmp_path):
    """Scores are the means over an evaluation's episodes.

    Seeds count on from the cell's first; a metric counts the episodes that have it; floats stay exact.
    """
    cell = replace(suite.cells()[0], seed=5, seeds=2)
    write_run(cell, tmp_path)
    place = {"phase": "online", "env_steps": 500, "gradient_steps": 2800}
    values = [(0.1, None, 7), (0.2, None, 8), (0.4, 1 / 3, 9)]
    rows = [
        {**place, "seed": seed, "episode": i, "return": r + seed, "success": i == 0, "normalized": n, "length": length}
        for seed in (0, 1)
        for i, (r, n, length) in enumerate(values)
    ]
    (tmp_path / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keep(tmp_path / "results", cell, tmp_path)
    found = read_scores(tmp_path / "results")
    assert [(row["seed"], row["episodes"], row["env_steps"], row["gradient_steps"]) for row in found] == [
        (5, 3, 500, 2800),
        (6, 3, 500, 2800),
    ]
    assert found[0]["return"] == float(np.mean([0.1, 0.2, 0.4])) and found[0]["normalized"] == 1 / 3
    assert (found[0]["success"], found[0]["length"], found[0]["score"]) == (1 / 3, 8.0, None)
    (kept,) = read_cells(tmp_path / "results")
    assert kept.seeds == (5, 6) and kept.dataset_means == {"success": 0.42, "return": 250.0}


def test_kill_between_scores_and_cells(suite, tmp_path):
    """A kill between scores and cells costs nothing.

    Scores are written before the cell's line; without that line the cell is not finished and is kept again.
    """
    runner = Runner(tmp_path)
    runner(suite)
    folder = tmp_path / "results/tiny"
    whole, scores = runner.report(suite), (folder / "scores.csv").read_text()
    lines = (folder / "cells.jsonl").read_text().splitlines(keepends=True)
    (folder / "cells.jsonl").write_text("".join(lines[1:]))
    assert f"- `{ALL[3]}` (interrupted)" in runner.report(suite)
    assert runner(suite) == ["finished"] * 4 and runner.calls == []
    assert runner.report(suite) == whole and (folder / "scores.csv").read_text() == scores


def test_cells_kept_concurrently(suite, tmp_path):
    """Cells kept by several writers at once are all there."""
    cells = [replace(suite.cells()[0], seed=seed, seeds=1) for seed in range(8)]
    for cell in cells:
        write_run(cell, tmp_path / cell.name)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda cell: keep(tmp_path / "results", cell, tmp_path / cell.name), cells))
    assert [cell.seeds for cell in read_cells(tmp_path / "results")] == [(seed, seed) for seed in range(8)]
    assert len(read_scores(tmp_path / "results")) == 8 * 4


@pytest.mark.parametrize("text", ["dataset,method\n", "HEAD\nd,m,x,offline,0,1,1,0.5,,,,,\n", "HEAD\nd,m,0,offline\n"])
def test_broken_results_named(text, suite, tmp_path):
    """Broken results are named."""
    runner = Runner(tmp_path)
    runner(suite, agents=["wsrl"], tasks=[PEN])
    path = tmp_path / "results/tiny/scores.csv"
    path.write_text(text.replace("HEAD", path.read_text().splitlines()[0]))
    with pytest.raises(RunError, match=r"scores.csv.*restore the file"):
        runner.report(suite)


def test_unknown_name_suggestions(suite, tmp_path):
    """Unknown names are refused, with the likely one suggested."""
    with pytest.raises(ConfigError, match="no method 'wsrll'; did you mean 'wsrl'"):
        suite.cells(agents=["wsrll"])
    with pytest.raises(ConfigError, match="no dataset"):
        suite.cells(tasks=["other/data-v0"])
    with pytest.raises(ConfigError, match="expected at least 1"):
        suite.cells(seeds=0)
    with pytest.raises(ConfigError, match="did you mean 'offline'"):
        load_suite("ofline", ROOT / "benchmarks")
    with pytest.raises(ConfigError, match="run from a checkout"):
        load_suite("wsrl", tmp_path)


def test_suite_from_user_file(tmp_path):
    """A user's own file is a suite."""
    mine, empty, broken = (tmp_path / f"{name}.py" for name in ("mine", "empty", "broken"))
    mine.write_text("from o2o.report.suite import Suite\n\nSUITE = Suite('mine', 'My own.', (), ())\n")
    assert load_suite(str(mine)).name == "mine"
    empty.write_text("x = 1\n")
    with pytest.raises(ConfigError, match="defines no `SUITE`"):
        load_suite(str(empty))
    broken.write_text("import no_such_thing\n")
    with pytest.raises(ConfigError, match=r"broken.py' cannot be imported \(ModuleNotFoundError: No module named"):
        load_suite(str(broken))
    with pytest.raises(ConfigError, match="missing.py' cannot be imported"):
        load_suite(str(tmp_path / "missing.py"))


SUITES = run_file(ROOT / "benchmarks/suites.py").SUITES
COMMITTED = [name for name in SUITES if (ROOT / "benchmarks/results" / name).exists()]


@pytest.mark.parametrize("name", SUITES)
def test_suites_load(name):
    """Every suite loads, and its cells are distinct."""
    suite = load_suite(name, ROOT / "benchmarks")
    assert suite.name == name
    cells = suite.cells()
    each = sum(suite.seeds if variant.base else 1 for variant in suite.variants)  # a base's seeds run one by one
    assert len({cell.name for cell in cells}) == len(cells) == len(suite.tasks) * each


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_reports_match_scores(name, tmp_path):
    """Committed reports are what the committed scores say.

    Every README and picture of a suite is made anew, from its two files alone.
    """
    committed = ROOT / "benchmarks/results" / name
    shutil.copytree(committed, tmp_path / name, ignore=shutil.ignore_patterns("README.md", "*.png"))
    report = write_report(SUITES[name], tmp_path)
    assert report.read_text() == (committed / "README.md").read_text()
    assert {path.name for path in report.parent.glob("*.png")} == {
        path.name for path in committed.glob("*.png") if path.name != "balance.png"
    }


def test_variant_base_splits_seeds(suite, tmp_path):
    """A base of an earlier variant gives one run per seed."""
    corrected = replace(suite, variants=(Variant("bc", "bc"), Variant("residual", "residual", base="bc")), seeds=3)
    cells = corrected.cells(tasks=[PEN])
    assert [(cell.label, cell.seed, cell.seeds) for cell in cells] == [
        ("bc", 0, 3), ("residual", 0, 1), ("residual", 1, 1), ("residual", 2, 1),
    ]  # fmt: skip
    root = tmp_path / "tiny"
    with pytest.raises(RunError, match="corrects bc, whose seed 1 has no finished run .* o2o bench run tiny"):
        cells[2].base_of(root / cells[2].name)
    write_run(cells[0], root / cells[0].name, status="running")
    with pytest.raises(RunError, match="no finished run"):
        cells[2].base_of(root / cells[2].name)
    set_status(root / cells[0].name, "finished")
    assert cells[2].base_of(root / cells[2].name) == (str(root / cells[0].name), 1)
    other = replace(cells[2], suite="other", base="tiny/bc")
    assert other.base_of(tmp_path / "other" / other.name) == (str(root / cells[0].name), 1)
    assert cells[0].base_of(root / cells[0].name) is None


def test_external_base_shares_run(suite, tmp_path):
    """A base that is no variant serves all seeds in one run."""
    for base in ("robot:act", "policy.onnx"):
        (cell,) = replace(suite, variants=(Variant("residual", "residual", base=base),)).cells(tasks=[PEN])
        assert cell.seeds == 3 and cell.base_of(tmp_path / cell.name) == (base, 0)


def test_throughput_measurement(tmp_path):
    """A rate is measured through the public interface.

    `benchmarks/throughput.py` in a process of its own: a dataset, a run's settings, a trainer, two rates.
    """
    code = (
        "import os, sys, throughput as t; sys.path.insert(0, str(t.CHECKOUT)); name = 'bc/cheetah/1/offline'\n"
        "with t.datasets(True, ['cheetah']) as data:\n"
        "    worker = t.worker_of(t.case_of(name, True, data), t.CHECKOUT)\n"
        "    ready = worker.answer(); rates = t.in_turns([worker], [['offline']], True); worker.close()\n"
        "print(ready['forms'], len(rates[0]), min(rates[0]) > 0)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks"), "JAX_ENABLE_COMPILATION_CACHE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.stdout.splitlines()[-1:] == ["['offline'] 2 True"], done.stderr
