"""Play episodes and write them as a video."""

import os
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from o2o.data.normalizer import Normalizer, normalize
from o2o.errors import ConfigError, EnvironmentFaultError
from o2o.rl.chunks import outdated
from o2o.train.episode import EnvSlot, reset_seed

SUFFIXES = (".mp4", ".gif", ".webm")


def check_window() -> None:
    """Raise `ConfigError` where no window can open: GLFW would end the process without a word."""
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise ConfigError("there is no display for a window; write a video instead, with --out play.mp4")


def check_out(out: Path | None) -> None:
    """Raise `ConfigError` if no video can be written to `out`; its folder is made."""
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
    """Play `episodes` with the mode of `agent`; frames go to `out`, None for a window. Returns one row each."""
    check_out(out)
    act = jax.jit(lambda a, o, c, k: a.sample_actions(o, c, k, True))
    rows, frames, rng = [], [], jax.random.key(reset_seed(*slot.seeds))
    for _ in range(episodes):
        observation, carry, ended, terminated = slot.reset(), agent.initial_carry((1,)), False, False
        while not ended:
            rng, key = jax.random.split(rng)
            batched = jax.tree.map(lambda leaf: np.asarray(leaf)[None], normalize(normalizer, observation))
            actions, carry = act(agent, batched, carry, key)
            if out is not None:
                frames.append(_frame(slot))
            step = slot.step(np.asarray(actions[0]))
            observation, ended, terminated = step.next_observation, step.ended, step.terminated
            if outdated(carry, ended, step.intervened):
                carry = agent.initial_carry((1,))
        rows.append(slot.row(terminated))
    if out is not None:
        _write(out, frames, int(slot.env.metadata.get("render_fps", 30)))
    return rows


def _frame(slot: EnvSlot) -> np.ndarray:
    try:
        return np.asarray(slot.env.render(), np.uint8)
    except Exception as error:
        raise EnvironmentFaultError(
            f"the environment cannot draw ({error}); without a display install EGL or OSMesa and set MUJOCO_GL to it"
        ) from error


def _write(out: Path, frames: list[np.ndarray], fps: int) -> None:
    import imageio.v2 as imageio

    out.parent.mkdir(parents=True, exist_ok=True)
    pictures: list[Any] = list(frames)
    options: dict[str, Any] = {"duration": 1000 / fps} if out.suffix == ".gif" else {"fps": fps}
    if out.suffix == ".webm":
        options["codec"] = "libvpx-vp9"
    imageio.mimwrite(out, pictures, **options)  # pyright: ignore[reportArgumentType, reportCallIssue]
    if not out.stat().st_size:  # ffmpeg's failures do not reach Python
        raise ConfigError(f"video {out} could not be encoded; choose another of {', '.join(SUFFIXES)}")
