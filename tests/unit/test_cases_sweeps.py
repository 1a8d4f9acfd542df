"""Sweeps as files, their combinations, and Ray's addresses, versions and times: nothing is trained."""

import io
import json
import math
import socket
import sys
import threading
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from o2o.errors import ConfigError, RunError
from o2o.report import jobs
from o2o.report.jobs import Ended, Job, run_jobs
from o2o.report.scores import COLUMNS
from o2o.report.suite import BenchTask, Cell, Suite, Variant, load_suite
from o2o.report.suite_report import write_report
from o2o.report.sweep import Between, Sweep, label_of, load_sweep, table
from o2o.runs.on_ray import Board, Resources, check_answers, check_versions, on_ray, share_done, time_left

TOML = """
agents = ["iql", "bc"]
datasets = ["a/b-v0", "c/d-v0"]
seeds = 5
seeds_per_cell = 2
[settings]
config.beta = [1, 3.0]
config.hidden_dims = [[16, 16], [32]]
[fixed]
loop.log_every = 10
"""
ONE = Sweep(agents=("iql",), datasets=("a/b-v0",), settings={"config.beta": [1.0, 2.0]})


def written(tmp_path: Path, text: str, name: str = "mine.toml") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def test_toml_is_a_suite(tmp_path: Path) -> None:
    """A TOML file is all combinations of agents, settings and datasets, with seeds in cells of their own."""
    path = written(tmp_path, TOML)
    suite = load_suite(str(path))
    assert suite.name == "mine" and len(suite.variants) == 2 * 2 * 2 and len(suite.tasks) == 2
    first = suite.variants[0]
    assert first.label.startswith("iql beta=1 hidden_dims=16,16 ")
    assert first.fields == (("loop.log_every", 10), ("config.beta", 1), ("config.hidden_dims", (16, 16)))
    planned = jobs.jobs(suite, suite.cells(), tmp_path, tmp_path)
    assert len({job.cell.name for job in planned}) == len(planned) == 16 * 3
    assert [(job.cell.seed, job.cell.seeds) for job in planned[:3]] == [(0, 2), (2, 2), (4, 1)]


def test_python_is_the_same_sweep(tmp_path: Path) -> None:
    """The same sweep as Python has the same cells; numbers that are equal have one label."""
    text = (
        "from o2o.report.sweep import Sweep\n"
        "SWEEP = Sweep(agents=('iql', 'bc'), datasets=('a/b-v0', 'c/d-v0'), seeds=5, seeds_per_cell=2,\n"
        "  settings={'config.beta': [1.0, 3], 'config.hidden_dims': [(16, 16), (32,)]}, fixed={'loop.log_every': 10})\n"
    )
    one, other = load_suite(str(written(tmp_path, TOML))), load_suite(str(written(tmp_path, text, "mine.py")))
    assert [cell.name for cell in one.cells()] == [cell.name for cell in other.cells()]


def test_larger_pieces_spare_finished(tmp_path: Path) -> None:
    """Seeds that have run side by side are not cut up by a later `seeds_per_cell`."""
    suite = replace(ONE, seeds=3).suite()
    run = tmp_path / suite.name / suite.cells()[0].name
    run.mkdir(parents=True)
    cut = replace(suite, seeds_per_cell=1)
    found = [(job.cell.label, job.cell.seed, job.cell.seeds) for job in jobs.jobs(cut, cut.cells(), tmp_path, tmp_path)]
    assert found == [("iql beta=1", 0, 3), *(("iql beta=2", seed, 1) for seed in range(3))]


def test_labels_never_meet() -> None:
    """Values whose folder names would be the same get different ones, and long labels stay short."""
    values = [-1, 1, "a/b", "a-b", "a b", (1, 1), "1,1", 1e-5, "x" * 300, "x" * 301]
    labels = [label_of("iql", {"config.beta": value}) for value in values]
    suites = Suite("s", "", (BenchTask("d"),), tuple(Variant(label, "iql") for label in dict.fromkeys(labels)))
    names = {cell.name for cell in suites.cells()}
    assert len(names) == len(set(map(str, values[:5]))) + 4, "1,1 as text and as numbers is written alike"
    assert max(map(len, names)) < 120
    assert label_of("iql", {"config.beta": 3.0}) == label_of("iql", {"config.beta": 3}) == "iql beta=3"


def test_random_combinations() -> None:
    """A random sweep has as many different combinations as asked for, within the ranges, the same each time."""
    ranges = {"config.rate": Between(1e-5, 1e-2, log=True), "config.width": {"low": 8, "high": 64, "whole": True}}
    drawn = replace(ONE, settings={**ranges, "config.beta": [1, 2]}, samples=200).combinations()
    assert drawn == replace(ONE, settings={**ranges, "config.beta": [1, 2]}, samples=200).combinations()
    assert len({repr(values) for values in drawn}) == 200
    rates = [values["config.rate"] for values in drawn]
    assert all(1e-5 <= rate <= 1e-2 for rate in rates)
    middle = math.exp(sum(map(math.log, rates)) / len(rates))
    assert 1e-4 < middle < 1e-3, "the geometric middle is 3e-4"
    assert {values["config.beta"] for values in drawn} == {1, 2}
    assert all(isinstance(values["config.width"], int) and 8 <= values["config.width"] <= 64 for values in drawn)
    few = replace(ONE, settings={"config.a": [1, 2, 3], "config.b": [1, 2]}, samples=4).combinations()
    assert len({repr(values) for values in few}) == 4
    assert len(replace(ONE, settings={"config.a": [1, 2]}, samples=9).combinations()) == 2, "there are no more"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("agents = [", "is no TOML"),
        ("datasets = ['a/b-v0']", "agents: this field is missing"),
        ("agents = ['iql']\ndatasets = []", "datasets is ()"),
        ("agents = ['iql', 'iql']\ndatasets = ['a']", "each of them once"),
        ("agents = ['iql']\ndatasets = ['a']\nsettigns = 1", "did you mean 'settings'"),
        ("agents = ['iql']\ndatasets = ['a']\nseeds = 0", "seeds is 0; expected at least 1"),
        ("agents = ['iql']\ndatasets = ['a']\nsettings.config.beta = 3", "expected a list of values"),
        ("agents = ['iql']\ndatasets = ['a']\nsettings.config.beta = []", "expected a list of values"),
        ("agents = ['iql']\ndatasets = ['a']\nsettings.config.beta = [1, 1.0]", "has a value twice"),
        ("agents = ['iql']\ndatasets = ['a']\nsettings.config.beta = {low = 1, high = 2}", "set `samples`"),
        (
            "agents = ['iql']\ndatasets = ['a']\nsamples = 2\nsettings.config.beta = {low = 2, high = 1}",
            "more than low",
        ),
        (
            "agents = ['iql']\ndatasets = ['a']\nsamples = 2\nsettings.config.beta = {low = 0, high = 1, log = true}",
            "above 0 with log",
        ),
        ("agents = ['iql']\ndatasets = ['a']\nsettings.seed = [1, 2]", "seed is a field of the sweep itself"),
        ("agents = ['iql']\ndatasets = ['a']\nfixed.config.b = 1\nsettings.config.b = [1, 2]", "give one of them"),
        ("agents = ['iql']\ndatasets = ['a']\nname = '../b'", "name is '../b'; expected the name of a folder"),
        ("agents = ['iql']\ndatasets = ['a']\nsettings = 3", "expected settings by name"),
    ],
)
def test_bad_sweeps_refused(text: str, said: str, tmp_path: Path) -> None:
    """A sweep that cannot be read is refused in a line that says what was wrong."""
    with pytest.raises(ConfigError) as refused:
        load_sweep(written(tmp_path, text))
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_files_without_sweep_refused(tmp_path: Path) -> None:
    """A missing file, a file without a sweep and a suite are refused."""
    with pytest.raises(ConfigError, match="cannot be read"):
        load_sweep(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="no `SWEEP`"):
        load_sweep(written(tmp_path, "", "empty.py"))
    suite = "from o2o.report.suite import *\nSUITE = Suite('a', '', (), ())"
    with pytest.raises(ConfigError, match="o2o bench run"):
        load_sweep(written(tmp_path, suite, "suite.py"))


def scored(*rows: dict[str, Any]) -> str:
    """Return the text of a scores.csv."""
    lines = [",".join(str(row.get(name, "")) for name in COLUMNS) for row in rows]
    return "\n".join([",".join(COLUMNS), *lines]) + "\n"


def test_table_sorted_by_metric(tmp_path: Path) -> None:
    """The table has the last evaluation of each seed, the best first, and nothing that the sweep no longer has."""
    suite = replace(ONE, seeds=2, name="s").suite()
    rows = []
    for label, last in (("iql beta=1", (0.2, 0.4)), ("iql beta=2", (0.5, 0.9)), ("iql beta=7", (1.0, 1.0))):
        for seed, success in enumerate(last):
            place = {"dataset": "a/b-v0", "method": label, "seed": seed, "gradient_steps": 10, "episodes": 1}
            rows.append({**place, "phase": "offline", "env_steps": 0, "success": 1.0, "return": 9})
            rows.append({**place, "phase": "online", "env_steps": 50, "success": success, "return": -success})
    (tmp_path / "s").mkdir()
    (tmp_path / "s/scores.csv").write_text(scored(*rows))
    metric, lines = table(suite, tmp_path)
    assert metric == "success" and [line.label for line in lines] == ["iql beta=2", "iql beta=1"]
    assert [line.mean for line in lines] == pytest.approx([0.7, 0.3]) and lines[0].interval == (0.5, 0.9)
    assert [line.label for line in table(suite, tmp_path, "return")[1]] == ["iql beta=1", "iql beta=2"]


def test_failure_in_report(tmp_path: Path) -> None:
    """A cell that fails leaves its traceback in the report, the others still run, and the end is not 0."""
    suite = replace(ONE, seeds=1, name="s").suite()

    def train(cell: Cell, run: Path) -> None:
        run.mkdir(parents=True)
        (run / "status.json").write_text(json.dumps({"status": "failed"}))
        raise ZeroDivisionError(f"beta of {cell.label}")

    said: list[str] = []
    planned = jobs.plan(suite, out=tmp_path)
    assert run_jobs(planned, jobs.in_turn(train, lambda run: None, said.append), said.append) == 1
    failures = [line for line in said if "failed: ZeroDivisionError: beta of iql" in line]
    assert len(failures) == 2
    report = write_report(suite, tmp_path).read_text()
    assert report.count("Traceback (most recent call last)") == 2 and "beta of iql beta=2" in report
    assert run_jobs(jobs.plan(suite, out=tmp_path), lambda todo: map(Ended, todo), said.append) == 1
    assert "Traceback" not in write_report(suite, tmp_path).read_text(), "a new attempt makes it void"


def test_unwritable_folder_refused(tmp_path: Path) -> None:
    """A folder that cannot be written is refused before anything runs."""
    (tmp_path / "out").write_text("")
    with pytest.raises(RunError, match="give another folder with `out`"):
        run_jobs(jobs.plan(ONE.suite(), out=tmp_path / "out"), lambda todo: pytest.fail("it ran"))


def test_no_ray_says_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Ray the message names the extra."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'o2o\[ray\]'"):
        on_ray(None, Resources(), print)


def reply_once(server: socket.socket, reply: bytes) -> None:
    """Answer the next caller once it has said something."""
    caller, _ = server.accept()
    with caller:
        caller.recv(100)
        caller.sendall(reply)


def test_silent_address_refused() -> None:
    """An address that nobody answers at, that another service answers at, or that is none, is refused at once."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and nobody listens
        with pytest.raises(ConfigError, match="nobody answers at the address of Ray, 127.0.0.1"):
            check_answers(f"127.0.0.1:{taken.getsockname()[1]}")
        taken.listen()
        with pytest.raises(ConfigError, match=r"nobody answers .* \(timed out\)"):
            check_answers(f"ray://127.0.0.1:{taken.getsockname()[1]}", 0.2)
        taken.accept()[0].close()
        for reply, fits in ((b"HTTP/1.1 400 Bad Request\r\n", False), (b"", False), (b"\0\0\x12\4" + bytes(23), True)):
            speaker = threading.Thread(target=reply_once, args=(taken, reply))
            with nullcontext() if fits else pytest.raises(ConfigError, match="is no Ray|reset"):
                speaker.start()
                check_answers(f"127.0.0.1:{taken.getsockname()[1]}")
            speaker.join()
    for address in ("somewhere", "host:", "host:port", ":6379", "host:70000"):
        with pytest.raises(ConfigError, match="expected host:port"):
            check_answers(address)


def test_other_versions_refused() -> None:
    """A node with another o2o or JAX is refused; what one of them does not know is not compared."""
    here = {"o2o": "1.0", "commit": "abc", "jax": "0.10", "machine": "a"}
    check_versions(here, {"o2o": "1.0", "jax": "0.10", "machine": "b"})
    with pytest.raises(ConfigError, match=r"o2o 1\.1 for 1\.0, commit abd for abc; install the same"):
        check_versions(here, {**here, "o2o": "1.1", "commit": "abd"})


def test_resources() -> None:
    """What a cell is given is what Ray is asked for, and amounts are checked."""
    options = Resources(2, 0.5, 1.5, 7).options()
    assert options["num_cpus"] == 2 and options["num_gpus"] == 0.5 and options["memory"] == 3 * 2**29
    assert options["max_retries"] == 7 and "memory" not in Resources().options()
    for bad in ({"cpus": 0}, {"gpus": -1}, {"retries": -1}):
        with pytest.raises(ConfigError):
            Resources(**bad)


def test_time_left(tmp_path: Path) -> None:
    """The time left follows from the steps that were made since the start."""
    assert time_left(10.0, 0.0, 3.0) is None
    assert time_left(10.0, 0.5, 2.5) == 50.0
    cell = replace(ONE, offline_steps=100, online_steps=300).suite().cells()[0]
    job = Job(cell, "missing", tmp_path / "run", tmp_path)
    assert share_done(job) == 0.0
    job.run.mkdir()
    (job.run / "metrics.jsonl").write_text('{"gradient_steps": 180, "env_steps": 100}\n')
    assert share_done(job) == 0.5
    (job.run / "status.json").write_text('{"status": "finished"}')
    assert share_done(job) == 1.0


def test_board(tmp_path: Path) -> None:
    """The live table shows what is trained, where and how far it is, and counts the rest."""
    cell = replace(ONE, offline_steps=100).suite().cells()[0]
    todo = [Job(replace(cell, seed=i, seeds=1), "missing", tmp_path / str(i), tmp_path) for i in range(3)]
    board = Board(todo)
    board.began -= 100.0
    for job, status, steps in zip(todo, ("running", "failed", ""), (50, 10, 0), strict=True):
        if status:
            job.run.mkdir()
            (job.run / "status.json").write_text(json.dumps({"status": status, "host": "north"}))
            (job.run / "metrics.jsonl").write_text(json.dumps({"gradient_steps": steps, "env_steps": 0}) + "\n")
    todo[1].failure.write_text("Traceback")
    console = Console(width=100, file=io.StringIO())
    console.print(board())
    shown = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "north" in shown and "50 %" in shown and "10 %" not in shown
    assert "0 finished, 1 running, 1 failed, 1 waiting; about 0:04:10 left" in shown


def test_order_of_cells() -> None:
    """A cell waits for those that it starts from or corrects, of the same dataset and seeds, and for no others."""
    variants = (Variant("bc", "bc"), Variant("fast", "wsrl", starts_from="bc"), Variant("fix", "residual", base="bc"))
    suite = Suite("s", "", (BenchTask("a"), BenchTask("b")), variants, seeds=2)
    cells = {cell.name: cell for cell in suite.cells()}
    needed = {name: [other for other in cells if cell.needs(cells[other])] for name, cell in cells.items()}
    assert needed["a--fast--seeds0-1"] == ["a--bc--seeds0-1"] == needed["a--fix--seeds1-1"]
    assert needed["a--bc--seeds0-1"] == [] and needed["b--fix--seeds0-0"] == ["b--bc--seeds0-1"]
