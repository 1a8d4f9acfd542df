"""Checkpoints that changed on the disk are not loaded: the one before is, with a warning, and the run goes on."""

import json
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from o2o.errors import CheckpointError
from o2o.report.plots import read_rows
from o2o.runs import session
from o2o.runs.session import RunConfig
from o2o.train import checkpoint
from tests.system.test_checkpoint import arrays, assert_bitwise, save
from tests.system.test_runs import assert_same_runs

Maker = Callable[..., RunConfig]


def flip(path: Path, bit: int) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def files_of(folder: Path) -> list[Path]:
    """Return the files of a checkpoint that are not empty."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]


def test_every_flip_is_seen(tmp_path: Path) -> None:
    """One flipped bit anywhere in a checkpoint is an error that names it; the latest falls back to the one before."""
    first, second = save(tmp_path, 1, value=2.0, keep_last=2), save(tmp_path, 2, value=3.0, keep_last=2)
    draw = np.random.default_rng(0)
    for path in files_of(tmp_path / "2"):
        content = path.read_bytes()
        for bit in draw.integers(8 * len(content), size=4):
            flip(path, int(bit))
            wrong = re.escape(path.name) if path.name != checkpoint.CHECKSUMS else ""
            with pytest.raises(CheckpointError, match=rf"(?s)checkpoint 2 in .* is damaged: .*{wrong}"):
                checkpoint.load_arrays(tmp_path, 2, arrays())
            assert checkpoint.load_state(tmp_path)[:2] == (1, {"counters": {"env_steps": 1}, "value": 2.0})
            path.write_bytes(content)
    assert_bitwise(checkpoint.load_arrays(tmp_path, 1, arrays()), first)
    assert_bitwise(checkpoint.load_arrays(tmp_path, checkpoint.load_state(tmp_path)[0], arrays()), second)


def test_no_sound_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With every checkpoint damaged the error names the latest; without checksums, as of before, nothing is claimed."""
    save(tmp_path, 1, keep_last=2)
    save(tmp_path, 2, keep_last=2)
    (tmp_path / "2" / "agent" / "_METADATA").unlink()
    with caplog.at_level(logging.WARNING, "o2o"):
        assert checkpoint.load_state(tmp_path)[0] == 1
        assert checkpoint.load_state(tmp_path)[0] == 1
    assert [row.message.count("checkpoint 2 in") for row in caplog.records if "damaged" in row.message] == [1]
    flip(tmp_path / "1" / "state" / "_strings.json", 400)
    with pytest.raises(CheckpointError, match="checkpoint 2 in .* is damaged: its file agent/_METADATA.*no sound one"):
        checkpoint.load_state(tmp_path)
    save(tmp_path / "old", 1)
    (tmp_path / "old" / "1" / checkpoint.CHECKSUMS).unlink()
    assert_bitwise(checkpoint.load_arrays(tmp_path / "old", 1, arrays()), arrays())


def test_flipped_score_is_not_the_best(tmp_path: Path) -> None:
    """A score that changed on the disk, written with the checkpoint or later, makes no checkpoint the best."""
    save(tmp_path, 1, score=0.25, keep_last=3)
    save(tmp_path, 2, score=0.5, keep_last=3)
    save(tmp_path, 3, keep_last=3)
    checkpoint.add_score(tmp_path, 3, 0.75)
    assert checkpoint.best_step(tmp_path) == 3
    late = tmp_path / "3" / checkpoint.LATE_SCORE
    late.write_text(late.read_text().replace("0.75", "0.76"))
    assert checkpoint.best_step(tmp_path) == 2
    written = tmp_path / "2" / "metrics" / "metrics"
    written.write_text(written.read_text().replace("0.5", "0.9"))
    assert checkpoint.best_step(tmp_path) == 1


def test_checksums_are_cheap(tmp_path: Path) -> None:
    """The checksums of 50 MB cost less than half of what their save costs."""
    noise = np.random.default_rng(0).random((50, 250_000)).astype(np.float32)
    began = time.perf_counter()
    checkpoint.save(tmp_path, 1, {"agent": noise}, {}, None, 1)
    saved = time.perf_counter()
    checkpoint._checksums(tmp_path / "1", checkpoint._files(tmp_path / "1"))
    assert time.perf_counter() - saved < 0.5 * (saved - began)


def test_resume_from_the_one_before(tiny_run: Maker, tmp_path: Path) -> None:
    """A run whose latest checkpoint is damaged goes on from the one before and ends as if nothing had happened."""
    run = tiny_run("bc", offline_steps=30, online_steps=10)
    run = session.with_fields(run, [("loop.checkpoint_every", 10)])
    assert session.train(run, tmp_path / "whole") and session.train(run, tmp_path / "run")
    latest = max((tmp_path / "run" / "checkpoints").iterdir(), key=lambda path: int(path.name))
    assert latest.name == "40"
    flip(max(files_of(latest / "agent"), key=lambda path: path.stat().st_size), 1000)
    (tmp_path / "run" / "status.json").write_text(json.dumps({"status": "running"}))
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert len(session.evaluate_run(tmp_path / "run", 1)) == 1 and latest.exists()  # to look moves nothing
    assert read_rows(tmp_path / "run" / "metrics.jsonl") == rows
    assert session.resume(tmp_path / "run")
    assert_same_runs(tmp_path / "whole", tmp_path / "run", 0)
    assert (tmp_path / "run" / checkpoint.ASIDE / "40").is_dir() and latest.exists()
