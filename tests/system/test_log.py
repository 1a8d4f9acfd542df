"""Where numbers go: rows on disk, event files where TensorBoard is installed, one clear line where it is not."""

import dataclasses
import errno
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, ClassVar

import gymnasium
import numpy as np
import pytest
from rich.console import Console

from o2o import cli
from o2o.data.recorder import Recorder
from o2o.data.task import Task
from o2o.errors import ConfigError, RunError
from o2o.files import JsonLines, write_atomically
from o2o.report.plots import read_rows
from o2o.runs import session
from o2o.runs.folder import RunFolder
from o2o.runs.loggers import Screen, evaluation_rows, make_loggers

ROWS: list[dict[str, Any]] = [
    {"phase": "offline", "env_steps": 0, "gradient_steps": 500, "time_s": 1.0, "seed": 0, "critic/loss": 0.5},
    {"phase": "online", "env_steps": 40, "gradient_steps": 540, "time_s": 2.0, "seed": 1, "train/return": 3.0},
]


def test_rows_flushed_and_truncated(tmp_path: Path) -> None:
    """Rows are flushed, and those behind a checkpoint are forgotten."""
    rows = JsonLines(tmp_path / "rows.jsonl")
    rows.write({"a": 1.5})
    length = rows.offset()
    rows.write({"a": float("nan"), "b": float("inf")})
    assert json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[1]) == {"a": None, "b": None}
    rows.truncate(length)
    rows.write({"a": 2})
    rows.close()
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == [{"a": 1.5}, {"a": 2}]


def test_viewing_opens_no_file(tmp_path: Path) -> None:
    """Looking at rows opens no file."""
    rows = JsonLines(tmp_path / "rows.jsonl")
    rows.truncate(0)
    rows.close()
    assert not (tmp_path / "rows.jsonl").exists()


def test_rows_after_power_cut(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Rows that a power cut took are reported, and a half one is cut off."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2')
    rows = JsonLines(path)
    rows.truncate(500)
    rows.write({"a": 3})
    rows.close()
    assert read_rows(path) == [{"a": 1}, {"a": 3}]
    (warning,) = caplog.messages
    assert "rows.jsonl has 16 bytes but its checkpoint was taken at 500: rows are missing" in warning


def test_synced_before_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is renamed or counted is on the disk before."""
    done: list[tuple[str, str]] = []
    synced: set[str] = set()
    fsync, replace = os.fsync, os.replace

    def syncing(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        synced.add(path)
        if not path.endswith(".tmp"):
            done.append(("sync", Path(path).name))
        fsync(descriptor)

    def replacing(source: Any, target: Any) -> None:
        assert os.path.realpath(source) in synced and Path(source).parent == Path(target).parent
        done.append(("rename", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", replacing)
    write_atomically(tmp_path / "status.json", "{}")
    Recorder(gymnasium.make("InvertedPendulum-v5"), tmp_path / "episodes", Task("pole")).close()
    assert done == [("rename", "status.json"), ("rename", "environment.json")]
    RunFolder.create(tmp_path / "run", {"agent": "bc"})
    assert done[2:] == [("rename", "config.json")]
    rows = JsonLines(tmp_path / "rows.jsonl")
    rows.write({"a": 1})
    assert rows.offset() == 9 and done[3:] == [("sync", "rows.jsonl")]
    rows.close()


def test_concurrent_writes(tmp_path: Path) -> None:
    """Two writers do not share a temporary file.

    The second write of a path ends while the first is under way; the file then holds what the first one wrote.
    """

    def slowly(file: IO[bytes]) -> None:
        file.write(b"first ")
        write_atomically(tmp_path / "x.bin", b"second")
        assert (tmp_path / "x.bin").read_bytes() == b"second"
        file.write(b"writer")

    write_atomically(tmp_path / "x.bin", slowly)
    assert (tmp_path / "x.bin").read_bytes() == b"first writer"
    assert os.listdir(tmp_path) == ["x.bin"]


def test_failed_write_keeps_file(tmp_path: Path) -> None:
    """A write that fails leaves the old file."""

    def full(file: IO[bytes]) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    write_atomically(tmp_path / "a.json", "old")
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "a.json", full)
    assert (tmp_path / "a.json").read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("code", ["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def test_file_system_without_locks(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks stops no run."""
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_: Any) -> None:
        raise OSError(getattr(errno, code), "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    first, second = RunFolder(tmp_path).lock(), RunFolder(tmp_path).lock()
    first.close()
    second.close()
    monkeypatch.undo()
    holder = RunFolder(tmp_path).lock()
    with pytest.raises(RunError, match="is being trained by another process"):
        RunFolder(tmp_path).lock()
    holder.close()
    RunFolder(tmp_path).lock().close()


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_missing_logger(name: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A logger that is not installed says what to install."""
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"logger '{name}' needs {module}: pip install 'o2o\[log\]'"):
        make_loggers((name,), tmp_path, {})


def test_unknown_logger(embedded: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown logger is refused before the run exists."""
    arguments = ["train", "bc", "--dataset", embedded, "--preset", "small", "--runs", str(tmp_path), "--name", "run"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "--loggers", "tensorbord"])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    assert "no logger 'tensorbord'; did you mean 'tensorboard'?" in error
    assert not (tmp_path / "run").exists()


def test_wandb_start_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wandb that cannot start is a one-line error."""

    class Wandb:
        @staticmethod
        def init(**_: Any) -> None:
            raise RuntimeError("api_key not configured (no-tty).\nCall wandb.login")

    monkeypatch.setitem(sys.modules, "wandb", Wandb())
    with pytest.raises(ConfigError, match="logger 'wandb' cannot start .*no-tty.*WANDB_MODE=offline") as caught:
        make_loggers(("wandb",), tmp_path, {})
    assert "\n" not in str(caught.value)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put a stand-in for wandb in its place and return it: `begun` has its runs' arguments, `logged` their rows."""

    class Wandb:
        begun: ClassVar[list[dict[str, Any]]] = []
        logged: ClassVar[list[dict[str, Any]]] = []

        @classmethod
        def init(cls, **options: Any) -> Any:
            cls.begun.append(options)
            ignore = lambda *_, **__: None  # noqa: E731
            return SimpleNamespace(log=cls.logged.append, finish=lambda: cls.logged.append({}), define_metric=ignore)

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    return Wandb


def test_wandb_numbers_per_seed(tmp_path: Path, wandb: Any) -> None:
    """`wandb` gets every number under its seed."""
    (logger,) = make_loggers(("wandb",), tmp_path, {})
    for row in ROWS:
        logger.metrics(row)
    logger.close()
    assert wandb.logged == [
        {"offline/seed0/critic/loss": 0.5, "env_steps": 0, "gradient_steps": 500},
        {"seed1/train/return": 3.0, "env_steps": 40, "gradient_steps": 540},
        {},
    ]


def test_evaluation_row_means() -> None:
    """An evaluation is a row of means per seed."""
    position = {"phase": "warmup", "env_steps": 40, "gradient_steps": 500}
    rows = [
        {**position, "seed": seed, "episode": i, "return": 2.0 * i + seed, "success": i == 0, "length": 7 + i, **score}
        for seed, score in ((0, {"normalized": 50.0}), (1, {"normalized": None}))
        for i in range(2)
    ]
    assert evaluation_rows(rows) == [
        {**position, "seed": 0, "eval/success": 0.5, "eval/return": 1.0, "eval/normalized": 50.0, "eval/length": 7.5},
        {**position, "seed": 1, "eval/success": 0.5, "eval/return": 2.0, "eval/length": 7.5},
    ]


def test_lost_terminal() -> None:
    """A terminal that has gone ends no run."""

    class Gone(io.StringIO):
        def write(self, _: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

    row = {"phase": "online", "env_steps": 40, "gradient_steps": 500, "return": 1.0, "success": None}
    with Screen(Console(file=Gone(), force_terminal=False)) as screen:
        screen.episodes([row])


@pytest.mark.parametrize("beside", [False, True])
def test_evaluations_reach_loggers(
    beside: bool, tiny_run: Callable[..., session.RunConfig], tmp_path: Path, wandb: Any
) -> None:
    """Evaluations reach the loggers, and a resume goes on with the same run."""
    run = tiny_run("bc", offline_steps=20, online_steps=60, seeds=2, loggers=("wandb",))
    run = dataclasses.replace(run, loop=dataclasses.replace(run.loop, eval_process=beside, eval_episodes=2))
    assert session.train(run, tmp_path / "run")
    played = read_rows(tmp_path / "run" / "episodes.jsonl")
    points = [(0, 20), (50, 20), (60, 20)]
    assert sorted({(row["env_steps"], row["gradient_steps"]) for row in played}) == points
    for seed in range(2):
        logged = [{key.removeprefix("offline/"): value for key, value in row.items()} for row in wandb.logged]
        mine = [row for row in logged if f"seed{seed}/eval/return" in row]
        assert [(row["env_steps"], row["gradient_steps"]) for row in mine] == points
        for row in mine:
            episodes = [e for e in played if e["seed"] == seed and e["env_steps"] == row["env_steps"]]
            assert len(episodes) == 2
            for key in ("success", "return", "length"):
                assert row[f"seed{seed}/eval/{key}"] == np.mean([episode[key] for episode in episodes])
    assert session.resume(tmp_path / "run")
    assert session.train(run, tmp_path / "other")
    first, resumed, other = (options["id"] for options in wandb.begun)
    assert first == resumed != other


def test_tensorboard_file_per_seed(tmp_path: Path) -> None:
    """TensorBoard's logger writes an event file per seed."""
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed; pip install 'o2o[log]'")
    (logger,) = make_loggers(("tensorboard",), tmp_path, {})
    for row in ROWS:
        logger.metrics(row)
    logger.close()
    first, second = ((tmp_path / "tensorboard" / f"seed{seed}").glob("events.out.tfevents.*") for seed in (0, 1))
    texts = [path.read_bytes() for path in (*first, *second)]
    assert len(texts) == 2
    assert b"offline/critic/loss" in texts[0] and b"online/train/return" in texts[1]
    assert b"time_s" not in texts[0] + texts[1]
