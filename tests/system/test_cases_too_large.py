"""Runs that cannot fit are refused before anything is made; runs whose process died are told from those that run."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from o2o.errors import ConfigError
from o2o.runs import session
from o2o.runs.folder import RunFolder
from o2o.train import memory

Maker = Callable[..., session.RunConfig]
GIB = 2**30


def test_long_history_refused(tiny_run: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A history whose joined observations cannot be held is refused by name, and nothing is made."""
    run = tiny_run("bc", history=100_000)
    monkeypatch.setattr(memory, "free_on_host", lambda: GIB)
    with pytest.raises(ConfigError, match=r"joined observations [\d.]+ GiB.* 1.0 GiB are free .*`history`, which is 1"):
        session.train(run, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert session.load_data(tiny_run("bc", history=3)).size > 0


def test_many_seeds_refused(tiny_run: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many seeds that their agents cannot be held are refused, and nothing is made."""
    monkeypatch.setattr(memory, "free_bytes", lambda: 50 * 2**20)
    with pytest.raises(ConfigError, match=r"the run needs about .*agents .*seeds"):
        session.train(tiny_run("td3bc", seeds=100_000), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_many_environments_refused(tiny_run: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Environments that main memory cannot hold are refused after a few, by what those took."""
    sizes = iter([0, 7 * GIB])
    monkeypatch.setattr(memory, "of_process", lambda: next(sizes))
    monkeypatch.setattr(memory, "free_on_host", lambda: 10 * GIB)
    with pytest.raises(ConfigError, match=r"32 more environments 32.0 GiB.* 10.0 GiB are free"):
        session.train(tiny_run("td3bc", seeds=20), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_death_without_a_word(tiny_run: Maker, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A run whose process ended without a word says so when it is opened or resumed; one that trains does not."""
    path = tmp_path / "run"
    assert session.train(tiny_run("bc", offline_steps=10, online_steps=0), path)
    words = f"the process that trained run {path} ended without a word"
    caplog.set_level(logging.WARNING)
    _ = session.evaluate_run(path, 1)
    assert words not in caplog.text
    folder = RunFolder.open(path)
    folder.status("running", pid=os.getpid())
    with_lock = RunFolder.open(path).lock()
    session.load_policy(path)
    assert words not in caplog.text, "somebody trains it"
    with_lock.close()
    session.load_policy(path)
    assert words in caplog.text
    caplog.clear()
    assert session.resume(path) and words in caplog.text
    caplog.clear()
    session.load_policy(path)
    assert words not in caplog.text
