"""Runs and results of cells at an address: what is brought there and back, on this disk and on an S3 server."""

import json
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from o2o.errors import ConfigError, RunError
from o2o.report.jobs import in_turn, plan, run_jobs
from o2o.report.scores import read_cells, read_scores
from o2o.report.suite import BenchTask, Cell, Suite, Variant
from o2o.runs import store as stores
from o2o.runs.store import Store
from tests.helpers.command_line import run
from tests.helpers.s3 import bucket

SUITE = Suite("s", "", (BenchTask("d"),), (Variant("one", "bc"), Variant("two", "bc", starts_from="one")), seeds=1)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep scratch folders apart, and look often."""
    monkeypatch.setenv("O2O_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(stores, "LOOK_S", 0.02)


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """Return a store in a folder, and one in a bucket of an S3 server that really runs."""
    if request.param == "folder":
        yield Store.checked(str(tmp_path / "far"))
        return
    with bucket() as address:
        yield Store.checked(f"{address}/grids")


def checkpoint(path: Path, step: int) -> None:
    """Write what a run leaves at a checkpoint; only the latest stays."""
    (path / "metrics.jsonl").open("a").write(json.dumps({"gradient_steps": step, "env_steps": 0}) + "\n")
    made = path / "checkpoints" / f"{step}.tmp"
    made.mkdir(parents=True)
    (made / "state.json").write_text(str(step))
    made.rename(path / "checkpoints" / str(step))
    for old in (path / "checkpoints").iterdir():
        if old.name != str(step):
            (old / "state.json").unlink()
            old.rmdir()


class Machine:
    """Trains cells of 30 steps, and is killed at `dies`: then it never comes back from there."""

    def __init__(self, dies: int = 100) -> None:
        self.dies, self.made = dies, list[int]()
        self.saw: dict[str, str] = {}

    def train(self, cell: Cell, path: Path) -> None:
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps({"dataset_summary": {}}))
        source = cell.source(path)
        self.saw[cell.label] = (source / "checkpoints/30/state.json").read_text() if source else ""
        self.go_on(path, 0)

    def resume(self, path: Path) -> None:
        self.go_on(path, max(int(entry.name) for entry in (path / "checkpoints").iterdir()))

    def go_on(self, path: Path, begun: int) -> None:
        for step in range(begun + 10, 40, 10):
            if step >= self.dies:
                time.sleep(0.5)  # the thread has brought the last checkpoint
                raise SystemExit
            self.made.append(step)
            checkpoint(path, step)
        row = {"seed": 0, "phase": "offline", "env_steps": 0, "gradient_steps": 30, "return": 1.0, "length": 3}
        (path / "episodes.jsonl").write_text(json.dumps(row) + "\n")
        (path / "status.json").write_text('{"status": "finished"}')

    def work(self, store: Store, out: Path) -> int:
        """Do all cells as one command does."""
        store.mirror("s", out, out / "runs")
        planned = plan(SUITE, out=out)
        return run_jobs(planned, store.around(in_turn(self.train, self.resume, print, store.here)), print)


def test_another_machine_goes_on(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine dies after step 20: another one goes on there; a third does nothing, and has all results.

    A cell that starts from another one's run finds it on the machine that does it.
    """
    first, second, third = Machine(dies=30), Machine(), Machine()
    with pytest.raises(SystemExit):
        first.work(store, tmp_path / "a")
    assert first.made == [10, 20] and not read_cells(tmp_path / "a/s")
    names = store.names("runs/s/d--one--seeds0-0")
    assert "checkpoints/20/state.json" in names and not any("10" in name or "tmp" in name for name in names)
    monkeypatch.setenv("O2O_CACHE", str(tmp_path / "other"))
    assert second.work(store, tmp_path / "b") == 0
    assert second.made == [30, 10, 20, 30] and second.saw == {"two": "30"}
    assert store.names("s") == {"scores.csv", "cells.jsonl"}
    assert third.work(store, tmp_path / "c") == 0 and third.made == []
    assert [cell.method[1] for cell in read_cells(tmp_path / "c/s")] == ["one", "two"]
    assert [row["return"] for row in read_scores(tmp_path / "c/s")] == [1.0, 1.0]
    assert not list((tmp_path / "other").glob("cells/*/s/d--two*")), "scratch is gone"
    runs = tmp_path / "c/runs/s/d--one--seeds0-0"
    assert {path.name for path in runs.iterdir()} == {"status.json", "config.json", "metrics.jsonl", "episodes.jsonl"}


def test_half_a_push_is_no_run(store: Store, tmp_path: Path) -> None:
    """Files without a list, as a kill leaves them, are no run; an older list is still whole."""
    run_folder, back = tmp_path / "run", tmp_path / "back"
    run_folder.mkdir()
    checkpoint(run_folder, 10)
    store.put(run_folder / "metrics.jsonl", "runs/s/x/metrics.jsonl")
    assert not store.pull("runs/s/x", back) and not back.exists()
    store.push(run_folder, "runs/s/x")
    checkpoint(run_folder, 20)
    store.put(run_folder / "checkpoints/20/state.json", "runs/s/x/checkpoints/20/state.json")
    assert store.pull("runs/s/x", back)
    assert [path.name for path in (back / "checkpoints").iterdir()] == ["10"]
    store.remove(["runs/s/x/checkpoints/10/state.json"])
    with pytest.raises(RunError, match="has no runs/s/x/checkpoints/10/state.json"):
        store.pull("runs/s/x", tmp_path / "again")


def test_results_of_here_stay(tmp_path: Path) -> None:
    """Results that only this folder has stay, those of the address win; runs of here are never written over."""
    far = Store.checked(str(tmp_path / "far"))
    assert Machine().work(far, tmp_path / "a") == 0
    other = replace(SUITE, variants=(Variant("mine", "bc"),))
    machine = Machine()
    assert run_jobs(plan(other, out=tmp_path / "b"), in_turn(machine.train, machine.resume, print), print) == 0
    with pytest.raises(RunError, match="was trained without the store .*another folder"):
        far.mirror("s", tmp_path / "b", tmp_path / "b/runs")
    far.mirror("s", tmp_path / "b", tmp_path / "elsewhere")
    assert [cell.method[1] for cell in read_cells(tmp_path / "b/s")] == ["mine", "one", "two"]


def test_bad_addresses(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An address that cannot be used is one line and exit code 2, before anything is trained."""
    (tmp_path / "file").write_text("")
    file = tmp_path / "sweep.toml"
    file.write_text("agents = ['bc']\ndatasets = ['a/b-v0']\n")
    for address, said in (
        (str(tmp_path / "file/x"), "cannot be used"),
        ("nowhere://x/y", "is no address of fsspec"),
        ("s3://", "names no place"),
    ):
        assert run("sweep", str(file), "--store", address, "--out", str(tmp_path / "out")) == 2
        shown = " ".join(capsys.readouterr().err.split())
        assert said in shown, shown
    assert not (tmp_path / "out").exists()
    monkeypatch.chdir(tmp_path)
    for command in (("sweep", str(file)), ("bench", "run", str(file))):
        assert run(*command, "--out", "s3://bucket/x") == 2
        assert "s3://bucket/x; expected a folder" in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.glob("s3*"))
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(ConfigError, match=r"pip install 'o2o\[cloud\]'"):
        Store.checked("memory://x")


def test_bad_s3_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket that does not exist, and a server that nobody answers for, are refused within seconds."""
    with bucket():
        with pytest.raises(ConfigError, match="the store s3://no-such-bucket cannot be used"):
            Store.checked("s3://no-such-bucket")
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        began = time.monotonic()
        with pytest.raises(ConfigError, match="cannot be used"):
            Store.checked("s3://nobody/x")
        assert time.monotonic() - began < 30


def test_thread_survives_a_failing_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An address that fails for a while does not stop the run: the next checkpoint, or the end, brings all."""
    far, failing, tried = Store(str(tmp_path / "far")), threading.Event(), threading.Event()
    failing.set()
    put = Store.put

    def sometimes(self: Store, path: Path, key: str) -> None:
        if failing.is_set():
            tried.set()
            raise RunError("no network")
        put(self, path, key)

    monkeypatch.setattr(Store, "put", sometimes)
    (tmp_path / "run").mkdir()
    with far.following(tmp_path / "run", "r"):
        checkpoint(tmp_path / "run", 10)
        assert tried.wait(5.0)
        failing.clear()
    assert far.pull("r", tmp_path / "back") and (tmp_path / "back/checkpoints/10").is_dir()
