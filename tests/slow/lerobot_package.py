"""Write and read LeRobot datasets with LeRobot's own package; run by a Python that has it, which need not have o2o.

python tests/slow/lerobot_package.py write FOLDER ROWS.npz
python tests/slow/lerobot_package.py read FOLDER ROWS.npz
"""

import inspect
import os
import sys
from importlib.metadata import version
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before lerobot: everything is in the folder

import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset

LENGTHS, FPS = (9, 6, 12), 20
CAMERAS = {"front": (48, 64), "wrist": (64, 64)}
TASKS = ("pick it up", "put it down")
FEATURES = {
    "observation.state": {"dtype": "float32", "shape": (4,), "names": ["x", "y", "z", "gripper"]},
    "action": {"dtype": "float32", "shape": (2,), "names": ["forward", "turn"]},
    "next.reward": {"dtype": "float32", "shape": (1,), "names": None},
    "next.success": {"dtype": "bool", "shape": (1,), "names": None},
    **{
        f"observation.images.{name}": {"dtype": "video", "shape": (*size, 3), "names": ["height", "width", "channels"]}
        for name, size in CAMERAS.items()
    },
}


def frame(camera: str, episode: int, step: int) -> np.ndarray:
    """Return a smooth image `[H, W, 3]`; the brightness tells episode and step."""
    height, width = CAMERAS[camera]
    ramp = np.linspace(0, 60, width)[None, :, None] + np.linspace(0, 40, height)[:, None, None]
    return np.clip(ramp + 8 * step + 20 * episode + np.array([0, 10, 20]), 0, 255).astype(np.uint8)


def write(folder: Path, rows: Path) -> None:
    """Write three episodes of two tasks with two cameras, the second one without success; keep the rows in `rows`."""
    made = LeRobotDataset.create("lab/pick", FPS, FEATURES, root=folder, robot_type="so101")
    rng, kept = np.random.default_rng(0), {"state": [], "action": [], "success": []}
    for episode, steps in enumerate(LENGTHS):
        for step in range(steps):
            state, action = rng.normal(size=4).astype(np.float32), rng.uniform(-1, 1, 2).astype(np.float32)
            success = episode != 1 and step == steps - 1
            numbers = {"next.reward": np.float32([success]), "next.success": np.array([success])}
            images = {f"observation.images.{name}": frame(name, episode, step) for name in CAMERAS}
            task = TASKS[episode % 2]
            row = {"observation.state": state, "action": action, **numbers, **images}
            if "task" in inspect.signature(made.add_frame).parameters:  # of 0.3, which writes v2.1
                made.add_frame(row, task)
            else:
                made.add_frame({**row, "task": task})
            for name, value in zip(kept, (state, action, success), strict=True):
                kept[name].append(value)
        made.save_episode()
    if hasattr(made, "finalize"):
        made.finalize()
    np.savez(rows, **{name: np.array(values) for name, values in kept.items()})


def read(folder: Path, rows: Path) -> None:
    """Read a dataset row by row, and write what LeRobot gives: arrays, images `[N, H, W, 3]`, texts of tasks."""
    data = LeRobotDataset("lab/pick", root=folder)
    found: dict[str, list[object]] = {}
    for row in range(len(data)):
        for name, value in data[row].items():
            array = np.asarray(value)
            if "images" in name:
                array = np.round(np.moveaxis(array, 0, -1) * 255).astype(np.uint8)
            found.setdefault(name, []).append(array)
    stats = {f"stats/{name}/{key}": value for name, part in data.meta.stats.items() for key, value in part.items()}
    arrays = {name: np.array(values) for name, values in found.items()}
    np.savez(rows, fps=data.fps, episodes=data.num_episodes, **arrays, **stats)


if __name__ == "__main__":
    what, folder, rows = sys.argv[1:]
    {"write": write, "read": read}[what](Path(folder), Path(rows))
    print(f"lerobot {version('lerobot')}")
