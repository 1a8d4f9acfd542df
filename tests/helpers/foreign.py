"""Tiny datasets in the formats of others: files as their own writers lay them out."""

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from o2o.data.lerobot_export import write_video

LENGTHS = (5, 7, 4)
STATE, ACTION = 3, 2


def numbers(seed: int = 0, scale: float = 0.5) -> list[dict[str, np.ndarray]]:
    """Return three episodes: states `[T, 3]`, actions `[T, 2]`, rewards and success `[T]`; the last one fails."""
    rng = np.random.default_rng(seed)
    episodes = []
    for i, steps in enumerate(LENGTHS):
        good = np.zeros(steps, bool)
        good[-1] = i < 2
        states = rng.normal(size=(steps + 1, STATE)).astype(np.float32)
        actions = rng.uniform(-scale, scale, size=(steps, ACTION)).astype(np.float32)
        episodes.append({"states": states, "actions": actions, "success": good, "rewards": good.astype(np.float64)})
    return episodes


def images(steps: int, size: tuple[int, int] = (32, 48), shift: int = 0) -> np.ndarray:
    """Return smooth frames `[T, H, W, 3]`, each brighter than the one before."""
    height, width = size
    ramp = np.linspace(0, 80, width)[None, :, None] + np.linspace(0, 60, height)[:, None, None]
    return np.stack([np.clip(ramp + 8 * t + shift + np.asarray([0, 15, 30]), 0, 255) for t in range(steps)]).astype(
        np.uint8
    )


def write_robomimic(path: Path, next_obs: bool = True, camera: bool = False, shaped: bool = False) -> None:
    """Write as robomimic's dataset_states_to_obs.py does (done_mode 2), demonstrations in the order of their names."""
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        for i, episode in reversed(list(enumerate(numbers()))):
            group, steps = data.create_group(f"demo_{i if i < 2 else 10}"), LENGTHS[i]
            group.create_dataset("actions", data=episode["actions"].astype(np.float64))
            group.create_dataset("states", data=np.zeros((steps, 9)))
            group.create_dataset("rewards", data=episode["rewards"] + 0.25 * shaped)
            group.create_dataset("dones", data=(np.arange(steps) == steps - 1).astype(np.int64))
            for name, part in (("obs", episode["states"][:-1]), ("next_obs", episode["states"][1:])):
                if name == "obs" or next_obs:
                    group.create_dataset(f"{name}/object", data=part[:, :2].astype(np.float64))
                    group.create_dataset(f"{name}/robot0_eef_pos", data=part[:, 2:].astype(np.float64))
                    if camera:
                        seen = images(steps + 1, shift=i)[:-1] if name == "obs" else images(steps + 1, shift=i)[1:]
                        group.create_dataset(f"{name}/agentview_image", data=seen)
            group.attrs["num_samples"] = steps
            group.attrs["model_file"] = "<mujoco/>"
        data.attrs["total"] = sum(LENGTHS)
        data.attrs["env_args"] = json.dumps({"env_name": "Lift", "type": 1, "env_kwargs": {"control_freq": 20}})


def flat(key: str) -> np.ndarray:
    """Return one quantity of all episodes, row after row, without last observations."""
    return np.concatenate([e[key][:-1] if key == "states" else e[key] for e in numbers()])


def ends() -> np.ndarray:
    """Return the last row of each episode as flags."""
    rows = np.zeros(sum(LENGTHS), bool)
    rows[np.cumsum(LENGTHS) - 1] = True
    return rows


def write_d4rl(path: Path, following: bool = False) -> None:
    """Write as D4RL does: the first two episodes end in a terminal, the last one in a timeout."""
    terminal = ends()
    terminal[-1] = False
    with h5py.File(path, "w") as file:
        file["observations"], file["actions"] = flat("states"), flat("actions")
        file["rewards"], file["terminals"] = flat("rewards").astype(np.float32), terminal
        file["timeouts"] = ends() & ~terminal
        file["infos/goal"] = np.ones((sum(LENGTHS), 2), np.float32)
        file["metadata/algorithm"] = np.bytes_("SAC")
        if following:
            file["next_observations"] = np.concatenate([e["states"][1:] for e in numbers()])


def write_ogbench(path: Path) -> None:
    """Write as OGBench's generators do (numpy.savez_compressed): a trajectory has its last observation as a row."""
    rows: dict[str, list[Any]] = {"observations": [], "actions": [], "terminals": [], "qpos": [], "qvel": []}
    for episode in numbers():
        steps = len(episode["actions"])
        rows["observations"].append(episode["states"])
        rows["actions"].append(np.concatenate([episode["actions"], np.full((1, ACTION), 0.9, np.float32)]))
        rows["terminals"].append(np.arange(steps + 1) == steps)
        rows["qpos"].append(np.zeros((steps + 1, 4), np.float32))
        rows["qvel"].append(np.zeros((steps + 1, 4), np.float32))
    arrays = {key: np.concatenate(parts) for key, parts in rows.items()}
    np.savez_compressed(path, **arrays)  # pyright: ignore[reportArgumentType]


def write_lerobot(path: Path, version: str = "v3.0", camera: bool = True, still: bool = False, **extra: Any) -> None:
    """Write the published layout of LeRobot `version`; in v3.0 all episodes share one file of rows and one video.

    `still`: images within the parquet file. `extra` replaces entries of info.json.
    """
    episodes, three = numbers(scale=2.0), version == "v3.0"
    (path / "meta").mkdir(parents=True)
    features: dict[str, Any] = {
        "observation.state": {"dtype": "float32", "shape": [STATE], "names": ["x", "y", "gripper"]},
        "action": {"dtype": "float32", "shape": [ACTION], "names": None},
        "next.reward": {"dtype": "float32", "shape": [1], "names": None},
        "next.done": {"dtype": "bool", "shape": [1], "names": None},
        "next.success": {"dtype": "bool", "shape": [1], "names": None},
        "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    }
    features |= {
        key: {"dtype": "int64", "shape": [1], "names": None}
        for key in ("frame_index", "episode_index", "index", "task_index")
    }
    if camera:
        features["observation.images.front"] = {
            "dtype": "video",
            "shape": [3, 32, 48],
            "names": ["channels", "height", "width"],
            "info": {"video.fps": 10.0, "video.codec": "h264", "video.is_depth_map": False},
        }
    if still:
        features["observation.images.wrist"] = {
            "dtype": "image",
            "shape": [32, 48, 3],
            "names": ["height", "width", "channel"],
        }
    tables, first, rows = [], 0, []
    for i, episode in enumerate(episodes):
        steps = LENGTHS[i]
        columns: dict[str, Any] = {
            "observation.state": pa.FixedSizeListArray.from_arrays(episode["states"][:-1].reshape(-1), STATE),
            "action": pa.array(episode["actions"].tolist(), pa.list_(pa.float32())),
            "next.reward": episode["rewards"].astype(np.float32),
            "next.done": np.arange(steps) == steps - 1,
            "next.success": episode["success"],
            "timestamp": (np.arange(steps) / 10).astype(np.float32),
            "frame_index": np.arange(steps),
            "episode_index": np.full(steps, i),
            "index": np.arange(first, first + steps),
            "task_index": np.zeros(steps, np.int64),
        }
        if still:
            columns["observation.images.wrist"] = [
                {"bytes": png(image), "path": None} for image in images(steps, shift=i)
            ]
        tables.append(pa.table(columns))
        place = {"chunk_index": 0, "file_index": 0}
        row: dict[str, Any] = {"episode_index": i, "tasks": ["pick it up"], "length": steps}
        rows.append(
            row
            | {f"data/{key}": value for key, value in place.items()}
            | {"dataset_from_index": first, "dataset_to_index": first + steps}
            | {f"videos/observation.images.front/{key}": value for key, value in place.items() if camera}
            | ({"videos/observation.images.front/from_timestamp": first / 10} if camera else {})
        )
        first += steps
    if three:
        data, video = (
            "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
            "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        )
        _parquet(pa.concat_tables(tables), path / "data/chunk-000/file-000.parquet")
        _parquet(pa.Table.from_pylist(rows), path / "meta/episodes/chunk-000/file-000.parquet")
        _parquet(pa.table({"task_index": [0], "__index_level_0__": ["pick it up"]}), path / "meta/tasks.parquet")
        if camera:
            _film(
                path / "videos/observation.images.front/chunk-000/file-000.mp4",
                [images(n, shift=i) for i, n in enumerate(LENGTHS)],
            )
    else:
        data, video = (
            "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
            "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        )
        for i, table in enumerate(tables):
            _parquet(table, path / f"data/chunk-000/episode_{i:06d}.parquet")
            if camera:
                _film(
                    path / f"videos/chunk-000/observation.images.front/episode_{i:06d}.mp4",
                    [images(LENGTHS[i], shift=i)],
                )
        lines = [json.dumps({key: row[key] for key in ("episode_index", "tasks", "length")}) for row in rows]
        (path / "meta/episodes.jsonl").write_text("\n".join(lines) + "\n")
        (path / "meta/tasks.jsonl").write_text(json.dumps({"task_index": 0, "task": "pick it up"}) + "\n")
    info = {"codebase_version": version, "robot_type": "so100", "total_episodes": 3, "total_frames": first}
    info |= {"total_tasks": 1, "chunks_size": 1000, "fps": 10, "splits": {"train": "0:3"}, "data_path": data}
    (path / "meta/info.json").write_text(json.dumps({**info, "video_path": video, "features": features, **extra}))
    (path / "README.md").write_text("---\nlicense: apache-2.0\ntags:\n- LeRobot\n---\nA dataset.\n")


def _parquet(table: pa.Table, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def _film(path: Path, parts: list[np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, np.concatenate(parts), 10)


def png(image: np.ndarray) -> bytes:
    """Return an image as a PNG file."""
    import io

    from PIL import Image

    with io.BytesIO() as file:
        Image.fromarray(image).save(file, format="PNG")
        return file.getvalue()
