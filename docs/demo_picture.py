"""Make the moving picture of README: the policy of `o2o demo` before and after it is fine-tuned in the environment.

python docs/demo_picture.py docs/images/demo.gif      # the demo's run and picture, some minutes on two cores

Every dot is one episode. All episodes of a side begin together, those of both sides in the same states. A dot that
reaches its goal becomes a star.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import gymnasium as gym
import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from o2o import envs
from o2o.data import datasets
from o2o.runs import session
from o2o.startup import prepare_process

EPISODES, EVERY, TAIL = 16, 3, 12


def paths_of(policy: Any, env: gym.Env, episodes: int) -> list[tuple[np.ndarray, bool]]:
    """Return for each episode the places `[T + 1, 2]` and whether it succeeded."""
    found = []
    for seed in range(episodes):
        observation, places, over, success = env.reset(seed=seed)[0], [], False, False
        policy.reset(seed)
        places.append(observation["achieved_goal"])
        while not over and not success:
            observation, _, terminated, truncated, info = env.step(policy.act(observation))
            places.append(observation["achieved_goal"])
            over, success = terminated or truncated, bool(info["success"])
        found.append((np.asarray(places), success))
    return found


def frames(sides: dict[str, list[tuple[np.ndarray, bool]]], maze: Any) -> list[Image.Image]:
    """Return the pictures of two sides, a title and its episodes each."""
    longest = max(len(places) for paths in sides.values() for places, _ in paths)
    figure, axes = plt.subplots(1, len(sides), figsize=(6.4, 3.4), dpi=80, layout="constrained")
    pictures = []
    for t in [*range(0, longest, EVERY), *[longest] * 8]:
        for axis, (title, paths) in zip(axes, sides.items(), strict=True):
            axis.clear()
            axis.set(aspect="equal", xticks=[], yticks=[])
            draw_walls(axis, maze)
            there = 0
            for places, success in paths:
                done = success and t >= len(places) - 1
                there += done
                tail = places[max(0, t - TAIL) : t + 1] if not done else places[-1:]
                tail = places[-1:] if len(tail) == 0 else tail
                axis.plot(tail[:, 0], tail[:, 1], color="#0072b2", alpha=0.4, lw=1)
                colour, marker, size = ("#e69f00", "*", 70) if done else ("#0072b2", "o", 14)
                axis.scatter(*tail[-1], c=colour, marker=marker, s=size, zorder=3)
            axis.set_title(f"{title}: {there} of {len(paths)} there", fontsize=10)
        figure.canvas.draw()
        pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]  # pyright: ignore[reportAttributeAccessIssue]
        pictures.append(Image.fromarray(pixels).quantize(32, dither=Image.Dither.NONE))
    plt.close(figure)
    return pictures


def draw_walls(axis: Any, maze: Any) -> None:
    """Draw the walls of a PointMaze."""
    size = maze.maze_size_scaling
    for row, cells in enumerate(maze.maze_map):
        for column, cell in enumerate(cells):
            if cell == 1:
                x, y = maze.cell_rowcol_to_xy(np.asarray((row, column)))
                axis.add_patch(plt.Rectangle((x - size / 2, y - size / 2), size, size, color="#bbbbbb"))  # pyright: ignore
    axis.autoscale_view()


def main(out: Path, offline_steps: int = 4_000, online_steps: int = 8_000, episodes: int = EPISODES) -> None:
    """Pre-train, keep that policy, fine-tune, play both and write the picture."""
    name = envs.make_embedded(envs.DEMO_DATASET)
    env = gym.make(envs.specification(datasets.info(name)), disable_env_checker=True)
    changes = {"offline_steps": offline_steps, "online_steps": 0, "loop": {"eval_every": 0}}
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "demo"
        session.train(session.preset_run("wsrl", name, "small", **changes), run)
        before = paths_of(session.load_policy(run), env, episodes)
        session.resume(run, online_steps=online_steps)
        after = paths_of(session.load_policy(run), env, episodes)
    sides = {"from the dataset": before, f"{online_steps:,} steps later": after}
    pictures = frames(sides, env.unwrapped.maze)  # pyright: ignore[reportAttributeAccessIssue]
    out.parent.mkdir(parents=True, exist_ok=True)
    pictures[0].save(out, save_all=True, append_images=pictures[1:], duration=120, loop=0, optimize=True)
    for title, paths in sides.items():
        print(f"{title}: {sum(success for _, success in paths)} of {len(paths)} episodes reach the goal")
    env.close()


if __name__ == "__main__":
    prepare_process()
    main(Path(sys.argv[1]))
