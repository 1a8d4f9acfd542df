"""Play episodes and write them as a video."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from o2o.episode import EnvSlot
from o2o.errors import ConfigError, EnvironmentFaultError
from o2o.normalizer import Normalizer, normalize

SUFFIXES = (".mp4", ".gif", ".webm")


def record(
    slot: EnvSlot, agent: Any, normalizer: Normalizer | None, episodes: int, out: Path | None
) -> list[dict[str, Any]]:
    """Play `episodes` with the mode of `agent`; frames go to `out`, None for a window. Returns one row each."""
    if out is not None and out.suffix not in SUFFIXES:
        raise ConfigError(f"video {out} has no known suffix; use one of {', '.join(SUFFIXES)}")
    act = jax.jit(lambda a, o, c, k: a.sample_actions(o, c, k, True))
    rows, frames, rng = [], [], jax.random.key(0)
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
    timing = {"duration": 1000 / fps} if out.suffix == ".gif" else {"fps": fps}
    imageio.mimwrite(out, pictures, **timing)  # pyright: ignore[reportArgumentType, reportCallIssue]
