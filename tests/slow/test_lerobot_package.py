"""LeRobot's own package and o2o read what the other has written: numbers, frames, ends and rates."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from o2o.data import files
from o2o.data.importers import write as importing
from o2o.data.lerobot_export import to_lerobot

SCRIPT = Path(__file__).parent / "lerobot_package.py"
PYTHON = os.environ.get("LEROBOT_PYTHON") or (sys.executable if importlib.util.find_spec("lerobot") else None)
"""A Python that has LeRobot; it need not be this one, since its pins may clash with o2o's."""


def lerobot(*words: str | Path) -> dict[str, np.ndarray]:
    """Run the script with LeRobot; return the rows that it wrote."""
    assert PYTHON is not None
    done = subprocess.run([PYTHON, str(SCRIPT), *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    with np.load(words[2]) as rows:
        return dict(rows)


@pytest.mark.skipif(PYTHON is None, reason="needs lerobot: LEROBOT_PYTHON=/venv/with/lerobot/bin/python make slow")
def test_lerobot_round_trip(tmp_path: Path) -> None:
    """What LeRobot has written is imported to the number, and LeRobot reads the export of it."""
    made = lerobot("write", tmp_path / "own", tmp_path / "made.npz")
    seen = lerobot("read", tmp_path / "own", tmp_path / "seen.npz")
    done = importing.import_dataset(tmp_path / "own", "lab/pick-v0", root=tmp_path / "root")
    about = files.read_info(done.folder / "data")
    storage = files.open_storage(done.folder / "data", about.metadata)
    episodes = list(map(files.tidy, files.read_episodes(storage, about.name)))
    assert [len(e.rewards) for e in episodes] == [9, 5, 12]
    assert [bool(e.terminations[-1]) for e in episodes] == [True, False, True]
    starts, steps = (0, 9, 15), [min(len(e.rewards) + 1, n) for e, n in zip(episodes, (9, 6, 12), strict=True)]
    for episode, start, rows in zip(episodes, starts, steps, strict=True):
        span = slice(start, start + len(episode.rewards))
        np.testing.assert_array_equal(episode.actions, made["action"][span])
        np.testing.assert_array_equal(episode.success, made["success"][span])
        np.testing.assert_array_equal(episode.observations["state"][:rows], made["state"][start : start + rows])
        for camera in ("front", "wrist"):
            frames = episode.observations[camera][:rows].astype(int)
            assert np.abs(frames - seen[f"observation.images.{camera}"][start : start + rows]).max() <= 4
    out = to_lerobot("lab/pick-v0", tmp_path / "out", root=tmp_path / "root")
    back = lerobot("read", out, tmp_path / "back.npz")
    kept = np.r_[0:14, 15:27]  # the one that was cut off has lost its last step
    assert back["fps"] == 20 and back["episodes"] == 3
    np.testing.assert_array_equal(back["action"], made["action"][kept])
    np.testing.assert_array_equal(back["observation.state"], made["state"][kept])
    np.testing.assert_array_equal(back["next.success"].reshape(-1), made["success"][kept])
    assert {key for key in seen if key.startswith("stats/action/")} <= set(back)
    np.testing.assert_allclose(back["stats/action/mean"], made["action"][kept].mean(0), atol=1e-6)
    for camera in ("front", "wrist"):
        name = f"observation.images.{camera}"
        assert np.abs(back[name].astype(int) - seen[name][kept].astype(int)).mean() < 3
