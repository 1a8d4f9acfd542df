"""Videos: every frame of every episode is in the file; `o2o play` draws with whatever GL back end there is."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
import pytest

from o2o.errors import ConfigError
from o2o.policies import video
from o2o.runs import session
from o2o.runs.session import RunConfig

ROOT = Path(__file__).parents[2]
DRAW = (
    "import mujoco; m = mujoco.MjModel.from_xml_string('<mujoco><worldbody><geom size=\"1\"/></worldbody></mujoco>');"
    "r = mujoco.Renderer(m, 16, 16); r.update_scene(mujoco.MjData(m)); r.render(); r.close()"
)
"""Draws one picture."""


def frames(path: Path) -> int:
    reader = imageio.get_reader(path)
    return sum(1 for _ in reader)  # pyright: ignore[reportArgumentType]


def gl_environment() -> dict[str, str]:
    """Return variables with which MuJoCo draws without a display; skips, naming what failed, where none does."""
    reasons = []
    for backend in dict.fromkeys((os.environ.get("MUJOCO_GL", "egl"), "egl", "osmesa")):
        variables = {**os.environ, "MUJOCO_GL": backend, "PYOPENGL_PLATFORM": backend, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", DRAW], env=variables, capture_output=True, text=True, timeout=120)
        if done.returncode == 0:
            return variables
        reasons.append(f"{backend}: {(done.stderr.strip().splitlines() or ['no message'])[-1][:150]}")
    pytest.skip("no GL back end draws, so no video was tested (apt install libosmesa6): " + "; ".join(reasons))


@pytest.mark.parametrize("suffix", video.SUFFIXES)
def test_file_holds_every_frame(suffix: str, tmp_path: Path) -> None:
    """A video file holds every frame."""
    pictures = [np.full((64, 48, 3), 10 * i, np.uint8) for i in range(17)]
    out = tmp_path / "new" / f"video{suffix}"
    video._write(out, pictures, 20)
    assert frames(out) == 17
    middle: Any = imageio.mimread(out, memtest=False)[8]
    assert middle.shape[:2] == (64, 48) and abs(float(np.asarray(middle)[..., :3].mean()) - 80) < 6


def test_bad_suffix_or_path_refused(tmp_path: Path) -> None:
    """An unknown suffix and an unwritable place are refused."""
    slot: Any = None
    with pytest.raises(ConfigError, match="has no known suffix; use one of .mp4, .gif, .webm"):
        video.record(slot, None, None, 1, tmp_path / "video.avi")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="video .* cannot be written"):
        video.record(slot, None, None, 1, tmp_path / "file" / "video.mp4")


def test_window_needs_display(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window needs a display."""
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="no display for a window; write a video instead, with `out`"):
        session.play_run(tmp_path, None)
    monkeypatch.setenv("DISPLAY", ":0")
    video.check_window()


def test_play_writes_whole_episodes(tiny_run: Callable[..., RunConfig], tmp_path: Path) -> None:
    """`play` writes a video of whole episodes."""
    variables = gl_environment()
    session.train(tiny_run("bc", offline_steps=10, online_steps=0), tmp_path / "run")
    command = [sys.executable, "-m", "o2o", "play", str(tmp_path / "run"), "--out", str(tmp_path / "play.mp4")]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    steps = [int(number) for number in re.findall(r"(\d+) steps", done.stdout)]
    assert len(steps) == 1 and steps[0] >= 10
    assert frames(tmp_path / "play.mp4") == sum(steps)
    pictures: Any = imageio.mimread(tmp_path / "play.mp4", memtest=False)
    assert np.asarray(pictures[0]).std() > 5.0, "the first picture shows something"
    assert np.abs(np.asarray(pictures[0], float) - np.asarray(pictures[-1], float)).max() > 30.0, "and it moves"
