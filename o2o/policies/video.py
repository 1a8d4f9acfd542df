"""Play episodes in a window or into a video file."""

import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from o2o.data.normalizer import Normalizer
from o2o.data.rollout import rollout
from o2o.errors import ConfigError, EnvironmentFaultError
from o2o.train.acting import Agents, stack_of_one
from o2o.train.episode import EnvSlot, reset_seed
from o2o.types import Array

SUFFIXES = (".mp4", ".gif", ".webm")


def check_window(instead: str = "write a video instead, with `out` such as play.mp4") -> None:
    """Raise `ConfigError`, saying what to do `instead`, if there is no display.

    Without one, GLFW and PyBullet end the process.
    """
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise ConfigError(f"there is no display for a window; {instead}")


def check_out(out: Path | None) -> None:
    """Make the folder of the video file `out`; raise `ConfigError` if no video can be written there."""
    if out is None:
        return
    if out.suffix not in SUFFIXES:
        raise ConfigError(f"video {out} has no known suffix; use one of {', '.join(SUFFIXES)}")
    there = out.exists()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.open("ab").close()
    except OSError as error:
        raise ConfigError(f"video {out} cannot be written: {error.strerror}") from error
    if not there:
        out.unlink()


def record(
    slot: EnvSlot, agent: Any, normalizer: Normalizer | None, episodes: int, out: Path | None
) -> list[dict[str, Any]]:
    """Play `episodes` episodes with the mode of `agent` and return one row each (`EnvSlot.row`).

    Frames go to the video file `out`; None: the environment draws into its own window.
    """
    check_out(out)
    frames: list[np.ndarray] = []
    policy = Agents(stack_of_one(agent), normalizer, 1, _keys(slot))
    draw = (lambda: None) if out is None else (lambda: frames.append(_frame(slot)))
    played = rollout(policy, [slot], [iter(range(episodes))], before_step=draw)
    rows = [slot.row(step.terminated) for _, step in played]
    if out is not None:
        _write(out, frames, int(slot.env.metadata.get("render_fps", 30)))
    return rows


def _keys(slot: EnvSlot) -> Iterator[Array]:
    """Yield the random keys `[1]` of every step."""
    rng = jax.random.key(reset_seed(*slot.seeds))
    while True:
        rng, key = jax.random.split(rng)
        yield key[None]


def _frame(slot: EnvSlot) -> np.ndarray:
    try:
        return np.asarray(slot.env.render(), np.uint8)
    except Exception as error:
        raise EnvironmentFaultError(
            f"the environment cannot draw ({error}); without a display install EGL or OSMesa, set MUJOCO_GL to egl or "
            "osmesa, and restart Python"
        ) from error


def _write(out: Path, frames: list[np.ndarray], fps: int) -> None:
    import imageio.v2 as imageio

    out.parent.mkdir(parents=True, exist_ok=True)
    pictures: list[Any] = list(frames)
    options: dict[str, Any] = {"duration": 1000 / fps} if out.suffix == ".gif" else {"fps": fps}
    if out.suffix == ".webm":
        options["codec"] = "libvpx-vp9"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"os\.fork", RuntimeWarning)  # JAX's; the child is ffmpeg at once
        imageio.mimwrite(out, pictures, **options)  # pyright: ignore[reportArgumentType, reportCallIssue]
    if not out.stat().st_size:  # ffmpeg's failures do not reach Python
        raise ConfigError(f"video {out} could not be encoded; choose another of {', '.join(SUFFIXES)}")
