"""Run folders, checkpoints and row files that people break: names, races, broken files, full disks, signals."""

import errno
import gc
import json
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from o2o import cli
from o2o.data import recorder
from o2o.errors import CheckpointError, ConfigError, RunError
from o2o.files import JsonLines, read_object, read_rows
from o2o.report.plots import pool
from o2o.report.tables import end, print_rows
from o2o.runs import folder, session
from o2o.runs.folder import RunFolder, StopFlag, check_name, guarded, read_status
from o2o.runs.loggers import Sent, make_loggers
from o2o.train import checkpoint, memory
from o2o.train.trainer import Pace


@pytest.mark.parametrize(
    "name", ["../escape", "/etc/x", "..", "", " ", "a/../../b", "x" * 300, "a\nb", "a\0b", "\udcff"]
)
def test_bad_name_refused(name: str) -> None:
    """A name that leaves the folder of runs, or that no folder can have, is refused."""
    with pytest.raises(ConfigError) as caught:
        check_name(name)
    assert "\n" not in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["lr=0.1[3]", "sweep/a", "[/bold]", "what*ever?", "ünï", "a b"])
def test_odd_name_allowed(name: str, tmp_path: Path) -> None:
    """Sweeps make names with brackets; they are folders like others, also on the screen."""
    check_name(name)
    RunFolder.create(tmp_path / name, {"agent": "bc"}).close()
    assert read_object(tmp_path / name / "config.json")["agent"] == "bc"
    with (tmp_path / "printed").open("w") as file:
        print_rows([], name, Console(file=file))
        assert end(Path(name), False, Console(file=file, width=200)) == 0
    assert name in (tmp_path / "printed").read_text()


def test_name_stays_inside_runs(embedded: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`o2o train --name ../escape` is one line and exit code 2; nothing is made."""
    arguments = ["train", "bc", "--dataset", embedded, "--preset", "small", "--runs", str(tmp_path / "runs")]
    for name in ("../escape", "x" * 300):
        with pytest.raises(SystemExit) as ended:
            cli.main([*arguments, "--name", name])
        error = capsys.readouterr().err
        assert ended.value.code == 2 and error.count("\n") == 1 and "name" in error
    assert list(tmp_path.iterdir()) == []


def test_one_of_several_creators(tmp_path: Path) -> None:
    """Of jobs that begin one run in the same moment exactly one gets it, with its settings on disk."""
    jobs = 4
    for trial in range(10):
        path, barrier = tmp_path / str(trial), Barrier(jobs)

        def job(seed: int, path: Path = path, barrier: Barrier = barrier) -> tuple[int, RunFolder | str]:
            barrier.wait()
            try:
                return seed, RunFolder.create(path, {"seed": seed}).lock()
            except RunError as error:
                return seed, str(error)

        with ThreadPoolExecutor(jobs) as pool:
            found = dict(pool.map(job, range(jobs)))
        (winner,) = [seed for seed, run in found.items() if isinstance(run, RunFolder)]
        assert read_object(path / "config.json")["seed"] == winner
        for run in found.values():
            if isinstance(run, RunFolder):
                run.close()
            else:
                assert "is being trained by another process" in run or "exists already" in run
    assert sorted(os.listdir(tmp_path / "0")) == ["config.json", "episodes.jsonl", "lock", "metrics.jsonl"]


def test_deleted_lock_unlocks_nothing(tmp_path: Path) -> None:
    """Deleting the lock's file does not let a second process train the run; closing it does."""
    run = RunFolder.create(tmp_path / "run", {"agent": "bc"})
    (tmp_path / "run/lock").unlink()
    with pytest.raises(RunError, match="is being trained by another process"):
        RunFolder(tmp_path / "run").lock()
    run.close()
    RunFolder(tmp_path / "run").lock().close()


def test_replaced_folder_gets_no_checkpoint(tmp_path: Path) -> None:
    """A run whose folder was moved away, or replaced by that of another run, saves nothing there."""
    run = RunFolder.create(tmp_path / "run", {"agent": "bc"})
    (tmp_path / "run").rename(tmp_path / "moved")
    for _ in range(2):
        with pytest.raises(RunError, match="moved, deleted or replaced"):
            run.save(None)  # pyright: ignore[reportArgumentType]
        (tmp_path / "run").mkdir(exist_ok=True)
    assert list((tmp_path / "run").iterdir()) == []
    run.close()


@pytest.mark.parametrize(
    ("edit", "kept"),
    [
        (lambda text: text, [1, 2]),
        (lambda text: text.replace('"a": 1', '"a": 100000'), [100000, 2]),
        (lambda text: text.replace('{"a": 1}', '{ "a" : 1 }'), [1, 2]),
        (lambda text: text.replace('"a": 22', '"a": 2'), [1, 2]),
        (lambda text: text[:9] + '{"a": 2', [1]),
        (lambda text: "", []),
    ],
    ids=["intact", "longer", "spaced", "shorter", "half", "empty"],
)
def test_edited_rows_cut_whole(edit: Callable[[str], str], kept: list[int], tmp_path: Path) -> None:
    """A resume cuts behind the rows of its checkpoint, whatever an edit did to their lengths; never within a line."""
    rows = JsonLines(tmp_path / "rows.jsonl")
    rows.write({"a": 1})
    rows.write({"a": 22})
    offset, count = rows.offset(), rows.rows()
    rows.write({"a": 3})
    rows.close()
    text = (tmp_path / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(edit(text))
    rows.truncate(offset, count)
    rows.write({"a": 4})
    rows.close()
    found = [row["a"] for row in read_rows(tmp_path / "rows.jsonl")]
    assert found == [*(22 if value == 2 and edit(text).count("22") else value for value in kept), 4]


def test_deleted_rows_begin_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A row file that somebody deletes during the run begins anew, and a warning says so."""
    rows = JsonLines(tmp_path / "rows.jsonl")
    rows.write({"a": 1})
    rows.path.unlink()
    assert rows.offset() == 0 and "was deleted" in caplog.text
    rows.write({"a": 2})
    assert read_rows(rows.path) == [{"a": 2}]
    rows.close()


GOOD = {"format": 3, "agent": "bc", "config": {}, "dataset": ["x"]}
BROKEN: dict[str, Any] = {
    "not UTF-8": b'{"agent": "\xff"}',
    "no JSON": b"{",
    "a list": b"[]",
    "nested": b"[" * 100_000,
    "digits": b'{"format": ' + b"9" * 5000 + b"}",
    "another format": {**GOOD, "format": "x", "versions": [1]},
    "no agent": {"format": 3},
    "agent is a list": {**GOOD, "agent": ["bc"]},
    "seeds is text": {**GOOD, "seeds": "x"},
    "discount is true": {**GOOD, "config": {"discount": True}},
    "config is a number": {**GOOD, "config": 3},
    "dataset is text": {**GOOD, "dataset": "x"},
    "loop is null": {**GOOD, "loop": None},
    "no dataset": {key: value for key, value in GOOD.items() if key != "dataset"},
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_config_one_line(what: str, tmp_path: Path) -> None:
    """A config.json with anything else in it is one clear line."""
    content = BROKEN[what]
    (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises((RunError, ConfigError)) as caught:
        session.load_config(tmp_path)
    assert "\n" not in str(caught.value) and "config.json" in str(caught.value) or what == "another format"


@pytest.mark.parametrize("line", ["[1]", "3", '"x"', "null", "{}", '{"seed": "x"}', "[" * 100_000])
def test_rows_without_objects_one_line(line: str, tmp_path: Path) -> None:
    """Rows that are no objects, or lack what every evaluation has, are one line for the plots."""
    good = '{"seed": 0, "phase": "online", "env_steps": 3, "gradient_steps": 0}'
    (tmp_path / "episodes.jsonl").write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(RunError, match="line 2"):
        pool([tmp_path])
    (tmp_path / "episodes.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(RunError, match="UTF-8"):
        pool([tmp_path])


def test_stray_files_are_no_episodes(tmp_path: Path) -> None:
    """Other files among the recorded episodes are left alone."""
    episodes = tmp_path / recorder.EPISODES
    episodes.mkdir()
    for name in ("notes.npz", "0-0-0-x.npz", "copy of 0-0-0-1.npz", "-.npz"):
        (episodes / name).touch()
    assert not recorder.recorded(tmp_path) and recorder.next_number(episodes, (0, 0, 0)) == 0
    recorder.forget(tmp_path, {})
    assert len(list(episodes.iterdir())) == 4
    with pytest.raises(RunError, match="no recorded episode"):
        recorder.export(tmp_path)


@pytest.mark.parametrize("status", [b"[1]", b"\xff", b'{"status": 3}', b"{", b""])
def test_broken_status_is_none(status: bytes, tmp_path: Path) -> None:
    """A status.json with something else in it is as good as none."""
    (tmp_path / "status.json").write_bytes(status)
    assert read_status(tmp_path) is None


TREE = {"agent": {"w": np.arange(6.0, dtype=np.float32)}, "loop": {"n": np.ones(2, np.int32)}}


@pytest.mark.parametrize(
    "name", ["lr=0.1[3]", "[a,b]", "what*ever", "q?", "a\\b", "gs:/b", "a:b", "{x}", "$HOME", "#1"]
)
def test_any_path_holds_checkpoints(name: str, tmp_path: Path) -> None:
    """Characters that mean something to orbax mean nothing in the path of a run."""
    where = tmp_path / name / "checkpoints"
    checkpoint.save(where, 1, TREE, {"a": 1}, 0.5, 1)
    checkpoint.save(where, 2, TREE, {"a": 2}, 0.1, 1)
    assert checkpoint.steps(where) == [1, 2] and checkpoint.best_step(where) == 1
    assert checkpoint.load_state(where)[1] == {"a": 2}
    loaded = checkpoint.load_arrays(where, 2, TREE)
    np.testing.assert_array_equal(loaded["agent"]["w"], TREE["agent"]["w"])
    assert sorted(os.listdir(where)) == ["1", "2"]


def test_unwritable_checkpoints_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be written is said before orbax is asked: a stray folder, missing rights, a file in its place."""
    (tmp_path / "c/7").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="c/7 is in the way and no checkpoint"):
        checkpoint.save(tmp_path / "c", 2, TREE, {}, None, 1)
    assert checkpoint.steps(tmp_path / "c") == []
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot save checkpoint 2"):
        checkpoint.save(tmp_path / "file", 2, TREE, {}, None, 1)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(checkpoint.tempfile, "TemporaryFile", refuse)
    with pytest.raises(CheckpointError, match=r"no right .*earlier checkpoints are intact"):
        checkpoint.save(tmp_path / "d", 2, TREE, {}, None, 1)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "too little memory"),
        (ValueError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), "too little memory"),
        (PermissionError(errno.EACCES, "Permission denied"), "no right"),
        (OSError(errno.EMFILE, "Too many open files"), "too many files"),
        (ValueError("zarr.json is corrupt"), "move .* elsewhere"),
    ],
)
def test_real_cause_of_unreadable(error: Exception, words: str, tmp_path: Path, monkeypatch: Any) -> None:
    """What is not the files' fault is not called broken, and nobody is told to delete a checkpoint."""
    checkpoint.save(tmp_path, 1, TREE, {}, None, 1)

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(checkpoint.ocp.training.Checkpointer, "load_checkpointables", fail)
    with pytest.raises(CheckpointError, match=words) as caught:
        checkpoint.load_state(tmp_path)
    assert "delete" not in str(caught.value) and "\n" not in str(caught.value)


def test_loading_leaves_nothing_behind(tmp_path: Path) -> None:
    """Loading the same checkpoint again and again, random keys too, keeps next to no objects in memory."""
    tree = {"agent": {str(i): jax.random.key(i) for i in range(20)}}
    checkpoint.save(tmp_path, 1, tree, {}, None, 1)

    def load(times: int) -> int:
        for _ in range(times):
            loaded = checkpoint.load_arrays(tmp_path, 1, tree)["agent"]["7"]
            assert jax.random.key_data(loaded).tolist() == jax.random.key_data(jax.random.key(7)).tolist()
        gc.collect()
        return len(gc.get_objects())

    before = load(3)
    assert (load(5) - before) / 5 < 100  # a trace for each of the 20 keys were above 300


def test_status_on_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk the status is written over the old one, so a dead run is not called running."""
    run = RunFolder.create(tmp_path / "run", {"agent": "bc"})

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def work() -> bool:
        monkeypatch.setattr(folder, "write_atomically", full)
        raise CheckpointError("cannot save checkpoint 3")

    with pytest.raises(CheckpointError):
        guarded(run, None, work)  # pyright: ignore[reportArgumentType]
    assert read_object(tmp_path / "run/status.json") == {
        "status": "failed",
        "error": "CheckpointError: cannot save checkpoint 3",
    }
    run.close()


def test_foreign_handler_put_back() -> None:
    """An environment that takes Ctrl-C or SIGTERM for itself does not keep them from the run."""
    stop, seen = StopFlag(), []
    before = signal.getsignal(signal.SIGTERM)
    with stop:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: seen.append(1))
        assert not stop()
        signal.raise_signal(signal.SIGTERM)
        assert stop() and not stop.forced and not seen
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.forced
    assert signal.getsignal(signal.SIGTERM) == before and stop()


def test_calls_stay_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Updates of 0.3 s go to the device three at a time, those of 1 ms by the thousand; compilation does not count."""
    for each, most in ((0.3, 3), (0.001, 1000), (5.0, 1)):
        now = iter([0.0, 20.0 + each, 20.0 + 2 * each])
        monkeypatch.setattr("o2o.train.trainer.time", SimpleNamespace(perf_counter=lambda now=now: next(now)))
        pace = Pace()
        for _ in range(2):
            assert pace.most == 1
            pace.sent(1, np.zeros(1))
        assert pace.most == pytest.approx(most, abs=1)


def test_memory_refused_in_numbers() -> None:
    """What cannot fit is refused with how much is needed for what, and how much is free."""
    memory.refuse({"replay": 2**30}, 2**30)
    memory.refuse({"replay": 2**60}, None)
    with pytest.raises(ConfigError, match=r"3\.0 GiB more memory \(replay 1\.0 GiB, an update 2\.0 GiB\), .* 2\.5"):
        memory.refuse({"replay": 2**30, "an update": 2**31}, 5 * 2**29)
    free = memory.free_bytes()
    assert free is None or 2**20 < free < 2**50


def position(phase: str, env_steps: int, gradient_steps: int, **more: Any) -> dict[str, Any]:
    return {"phase": phase, "env_steps": env_steps, "gradient_steps": gradient_steps, "seed": 0, **more}


def test_sent_rows_known_after_resumes(tmp_path: Path) -> None:
    """A logger has what earlier processes wrote, also behind the checkpoint, and after a second resume."""
    update, episode = {"critic/loss": 1.0}, {"train/return": 2.0}
    lines = [position("offline", 0, 50, **update), position("online", 30, 60, **episode)]
    lines += [position("online", 40, 70, **update)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    for _ in range(2):  # the second time the rows are cut off already
        sent = Sent(tmp_path)
        assert position("offline", 0, 50, **update) in sent and position("online", 40, 70, **update) in sent
        assert position("online", 30, 60, **episode) in sent and position("online", 31, 60, **episode) not in sent
        assert position("online", 41, 71, **update) not in sent
        assert position("online", 40, 70, **{"eval/return": 1.0}) not in sent
        assert {**position("online", 40, 70, **update), "seed": 1} not in sent
        (tmp_path / "metrics.jsonl").write_text("")


def test_wandb_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B's own variables count, its files are in the run, and `env_steps` is the axis."""
    begun: list[dict[str, Any]] = []
    axes: list[tuple[str, str]] = []

    class Wandb:
        @staticmethod
        def init(**options: Any) -> Any:
            begun.append(options)
            return SimpleNamespace(define_metric=lambda name, step_metric: axes.append((name, step_metric)))

    monkeypatch.setitem(__import__("sys").modules, "wandb", Wandb)
    make_loggers(("wandb",), tmp_path, {})
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_ENTITY", "lab")
    make_loggers(("wandb",), tmp_path, {})
    assert [options["project"] for options in begun] == ["o2o", "mine"]
    assert begun[0]["dir"] == str(tmp_path) and "entity" not in begun[1] and begun[0]["id"] == begun[1]["id"]
    assert axes[:2] == [("*", "env_steps"), ("offline/*", "gradient_steps")]
