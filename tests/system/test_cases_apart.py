"""Learner and robots apart: the same run as in one process, and no stored transition lost or there twice."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from o2o.config import LoopConfig, to_dict
from o2o.errors import ConfigError, EnvironmentMismatchError, RunError
from o2o.runs import actor, session
from o2o.runs.session import RunConfig
from o2o.train import link as links
from o2o.train.link import Hub, Row, shared_key
from o2o.train.spool import Spool

Maker = Callable[..., RunConfig]
LEARNER = """
import json, sys
from pathlib import Path
from o2o.runs import session
from o2o.runs.session import settings_of
from o2o.train.link import Hub, shared_key
port, path = int(sys.argv[1]), Path(sys.argv[2])
hub = Hub(("127.0.0.1", port), shared_key("127.0.0.1"), silent_s=2.0)
if len(sys.argv) > 3:
    done = session.train(settings_of(json.loads(Path(sys.argv[3]).read_text()), "test"), path, quiet=True, hub=hub)
else:
    done = session.resume(path, quiet=True, hub=hub)
sys.exit(0 if done else 3)
"""
LOOP = LoopConfig(
    eval_every=0, eval_episodes=1, eval_envs=1, log_every=50, checkpoint_every=40, updates_per_dispatch=10
)


def free_port() -> int:
    hub = Hub(("127.0.0.1", 0), b"")
    hub.close()
    return hub.address[1]


def stored(path: Path) -> Any:
    """Return the rows of the replay in a run's last checkpoint, leaves `[N, ...]`, and its counters."""
    _, trainer = session.open_run(path)
    steps = trainer.counters.env_steps
    rows = {key: np.asarray(value)[0, :steps] for key, value in trainer.replay.buffer.rows.items()}
    counters = trainer.counters
    trainer.close()
    return rows, counters


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    """Return all transitions that actors of this process record from now on."""
    found = list[Row]()
    append = Spool.append

    def noting(self: Spool, entry: bytes) -> int:
        number = append(self, entry)
        found.append(Row.unpacked(self.about["actor"], number, entry))
        return number

    monkeypatch.setattr(Spool, "append", noting)
    return found


def test_learner_killed(tiny_run: Maker, noted: list[Row], tmp_path: Path) -> None:
    """A learner is killed in the middle and resumed: all that the robot played is stored, in its order, once."""
    run = tiny_run("rlpd", offline_steps=0, online_steps=160, loop=LOOP)
    (tmp_path / "settings.json").write_text(json.dumps(to_dict(run)))
    port, path = free_port(), tmp_path / "run"

    def learner(*args: str) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", LEARNER, str(port), str(path), *args])

    first = learner(str(tmp_path / "settings.json"))
    second: list[subprocess.Popen] = []

    def kill() -> None:
        while len(noted) < 100:
            time.sleep(0.01)
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        second.append(learner())

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    while True:
        try:
            done = actor.act("PointMaze_UMaze-v3", f"127.0.0.1:{port}", tmp_path / "spool", lost="go-on")
            break
        except RunError as error:  # the learner still starts
            assert "no learner answers" in str(error) and first.poll() is None
            time.sleep(0.1)
    killer.join()
    assert second[0].wait(20) == 0
    rows, counters = stored(path)
    assert counters.env_steps == 160 and counters.online_updates > 0
    assert [row.number for row in noted] == list(range(1, len(noted) + 1)) and len(noted) >= 160
    assert done.transitions == len(noted)
    for key in ("observations", "actions", "next_observations", "rewards"):
        np.testing.assert_array_equal(rows[key], np.concatenate([row.values[key] for row in noted[:160]]), key)
