"""Export: a Minari dataset as a LeRobot v3.0 one, parquet for numbers and one mp4 per camera and episode.

A LeRobot dataset has as many rows as actions, so the observation after the last step is lost: imported again, an
episode that was cut off is one step shorter, and a terminated one repeats its last observation. Video is lossy.
`next.reward`, `next.success` and `next.done` are LeRobot's; `next.terminated` is o2o's, so that ends keep their kind.
"""

import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

from o2o.data import files
from o2o.data.files import DatasetInfo, Episode
from o2o.data.importers.columns import reason
from o2o.data.importers.lerobot import needed
from o2o.data.spaces import STATE, Leaf, ObservationSpec
from o2o.errors import ConfigError, DatasetError
from o2o.files import whole_folder

CHUNK = 1000
"""Files in a folder."""
FILE_BYTES = 100 * 2**20
"""Bytes of rows after which a new parquet file begins."""
SLOWEST, FASTEST = 0.001, 10_000.0
"""Steps per second that a video can have."""
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = "meta/episodes/chunk-000/file-000.parquet"
NUMBERS = ("timestamp", "frame_index", "episode_index", "index", "task_index")
QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
"""Quantiles among LeRobot's statistics. Those of a dataset are the means of its episodes', weighted by their rows."""
Stats = dict[str, np.ndarray]


def to_lerobot(
    dataset: str | Path, out: Path, fps: float | None = None, root: str | Path | None = None, task: str | None = None
) -> Path:
    """Write a dataset as a LeRobot v3.0 folder `out` and return it; it appears whole or not at all.

    `fps`: steps per second; None: those of the source that it was imported from (`files.rate_of`). `task`: what LeRobot
    shows as its text; None: the dataset's id. Raises `ConfigError` without a rate, `DatasetError` if `out`
    exists or the dataset cannot be read.
    """
    data = files.locate(dataset, root)
    about = files.read_info(data)
    rate = fps if fps is not None else files.rate_of(about)
    if rate is None or not rate > 0:
        raise ConfigError(f"dataset {about.name} does not say its steps per second (fps {rate}): give `fps`")
    if not SLOWEST <= rate <= FASTEST:
        raise ConfigError(f"fps is {rate:g}; expected {SLOWEST:g} to {FASTEST:g} steps per second")
    if out.exists():
        raise DatasetError(f"{out} exists already; give a new folder")
    needed("pyarrow", "pyarrow", out)
    episodes = map(files.tidy, files.read_episodes(files.open_storage(data, about.metadata), about.name))
    try:
        with whole_folder(out) as scratch:
            _Writer(scratch, about, float(rate), task or about.name).write(episodes)
    except OSError as error:
        raise DatasetError(f"{out} could not be written: {error}") from error
    return out


class _Writer:
    """Writes episodes into a folder, one in memory at a time."""

    def __init__(self, folder: Path, about: DatasetInfo, fps: float, task: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.pa, self.pq, self.folder, self.about, self.fps, self.task = pa, pq, folder, about, fps, task
        spec = ObservationSpec.from_space(about.observation_space, True)
        self.leaves = {_feature_name(leaf): leaf for leaf in spec.leaves}
        self.cameras = {name: leaf for name, leaf in self.leaves.items() if leaf.image}
        for name, leaf in self.cameras.items():
            if leaf.pixels[-1] != 3:
                raise DatasetError(f"dataset {about.name}: {name} has {leaf.pixels[-1]} channels; video takes 3")
        assert isinstance(about.action_space, spaces.Box)
        self.file, self.bytes, self.total, self.file_start = 0, 0, 0, 0
        self.open: Any = None
        self.rows: list[dict[str, Any]] = []
        self.sums: dict[str, Stats] = {}
        self.success = True

    def write(self, episodes: Iterator[Episode]) -> None:
        for index, episode in enumerate(episodes):
            self._episode(index, episode)
        if self.open is not None:
            self.open.close()
        self._meta()

    def _episode(self, index: int, episode: Episode) -> None:
        steps = len(episode.rewards)
        if steps == 0:
            raise DatasetError(f"dataset {self.about.name}: episode {index} has no steps; `o2o data check --drop-bad`")
        columns = {name: leaf.of(episode.observations)[:steps] for name, leaf in self.leaves.items()}
        columns["action"] = np.asarray(episode.actions, np.float32)
        numbers = {
            "next.reward": episode.rewards.astype(np.float32),
            "next.done": np.arange(steps) == steps - 1,
            "next.terminated": episode.terminations.astype(bool),
            "timestamp": (np.arange(steps) / self.fps).astype(np.float32),
            "frame_index": np.arange(steps),
            "episode_index": np.full(steps, index),
            "index": np.arange(self.total, self.total + steps),
            "task_index": np.zeros(steps, np.int64),
        }
        if index == 0:
            self.success = episode.success is not None
        if self.success:
            numbers["next.success"] = np.zeros(steps, bool) if episode.success is None else episode.success.astype(bool)
        flat = {name: value.astype(np.float32) for name, value in columns.items() if name not in self.cameras}
        place = self._rows({**flat, **numbers})
        row: dict[str, Any] = {"episode_index": index, "tasks": [self.task], "length": steps, **place}
        row |= {"dataset_from_index": self.total, "dataset_to_index": self.total + steps}
        for name in self.cameras:
            row |= self._video(name, index, columns[name])
        for name, value in {**columns, **numbers}.items():
            stats = _stats(value, name in self.cameras)
            row |= {f"stats/{name}/{key}": number.tolist() for key, number in stats.items()}
            self.sums[name] = stats if name not in self.sums else _joined(self.sums[name], stats)
        self.rows.append({**row, "meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0})
        self.total += steps

    def _rows(self, columns: dict[str, np.ndarray]) -> dict[str, int]:
        """Append the rows of an episode to the current file of rows; return where they are."""
        table = self.pa.table({name: self._array(value) for name, value in columns.items()})
        if self.open is not None and self.bytes + table.nbytes > FILE_BYTES:
            self.open.close()
            self.open, self.bytes, self.file = None, 0, self.file + 1
        place = {"chunk_index": self.file // CHUNK, "file_index": self.file % CHUNK}
        if self.open is None:
            path = self.folder / DATA_PATH.format(**place)
            path.parent.mkdir(parents=True, exist_ok=True)
            self.open = self.pq.ParquetWriter(path, table.schema)
        self.open.write_table(table)
        self.bytes += table.nbytes
        return {f"data/{key}": value for key, value in place.items()}

    def _array(self, value: np.ndarray) -> Any:
        if value.ndim == 1:
            return self.pa.array(value)
        array = self.pa.array(value.reshape(-1))
        for size in reversed(value.shape[1:]):
            array = self.pa.FixedSizeListArray.from_arrays(array, size)
        return array

    def _video(self, name: str, index: int, images: np.ndarray) -> dict[str, Any]:
        """Write an episode's frames of one camera; return where they are."""
        place = {"chunk_index": index // CHUNK, "file_index": index % CHUNK}
        path = self.folder / VIDEO_PATH.format(video_key=name, **place)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_video(path, images, self.fps)
        except (OSError, ValueError) as error:
            size = "x".join(map(str, images.shape[1:3]))
            raise DatasetError(
                f"dataset {self.about.name}: {name}, images of {size}, cannot be written as video ({reason(error)})"
            ) from error
        times = {"from_timestamp": 0.0, "to_timestamp": len(images) / self.fps}
        return {f"videos/{name}/{key}": value for key, value in {**place, **times}.items()}

    def _meta(self) -> None:
        meta = self.folder / "meta"
        (self.folder / EPISODES_PATH).parent.mkdir(parents=True)
        self.pq.write_table(self.pa.Table.from_pylist(self.rows), self.folder / EPISODES_PATH)
        index = {"pandas": json.dumps(_PANDAS_INDEX)}
        tasks = self.pa.table({"task_index": self.pa.array([0]), "task": self.pa.array([self.task])})
        self.pq.write_table(tasks.replace_schema_metadata(index), meta / "tasks.parquet")
        stats = {name: {key: value.tolist() for key, value in found.items()} for name, found in self.sums.items()}
        (meta / "stats.json").write_text(json.dumps(stats, indent=4))
        (meta / "info.json").write_text(json.dumps(self._info(), indent=4))
        licence = self.about.metadata.get("license")
        if licence:
            (self.folder / "LICENSE").write_text(str(licence) + "\n")

    def _info(self) -> dict[str, Any]:
        whole = float(self.fps).is_integer()
        return {
            "codebase_version": "v3.0",
            "robot_type": files.said(self.about, "robot_type"),
            "total_episodes": len(self.rows),
            "total_frames": self.total,
            "total_tasks": 1,
            "chunks_size": CHUNK,
            "data_files_size_in_mb": 100,
            "video_files_size_in_mb": 200,
            "fps": int(self.fps) if whole else self.fps,
            "splits": {"train": f"0:{len(self.rows)}"},
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH if self.cameras else None,
            "features": self._features(),
        }

    def _features(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, leaf in self.leaves.items():
            if leaf.image:
                height, width, channels = leaf.pixels
                video = {
                    "video.height": height,
                    "video.width": width,
                    "video.codec": "h264",
                    "video.pix_fmt": _pixel_format(leaf.pixels),
                    "video.is_depth_map": False,
                    "video.fps": self.fps,
                    "video.channels": channels,
                    "has_audio": False,
                }
                found[name] = _feature("video", leaf.pixels, ["height", "width", "channels"]) | {"info": video}
            else:
                found[name] = _feature("float32", leaf.shape or (1,))
        assert self.about.action_space.shape is not None
        found["action"] = _feature("float32", self.about.action_space.shape)
        found["next.reward"] = _feature("float32", (1,))
        flags = ("next.done", "next.terminated", *(("next.success",) if self.success else ()))
        found |= {name: _feature("bool", (1,)) for name in flags}
        return found | {name: _feature("float32" if name == "timestamp" else "int64", (1,)) for name in NUMBERS}


_PANDAS_INDEX = {
    "index_columns": ["task"],
    "column_indexes": [],
    "columns": [
        {
            "name": "task_index",
            "field_name": "task_index",
            "pandas_type": "int64",
            "numpy_type": "int64",
            "metadata": None,
        },
        {"name": "task", "field_name": "task", "pandas_type": "unicode", "numpy_type": "object", "metadata": None},
    ],
    "creator": {"library": "pyarrow", "version": "18"},
    "pandas_version": "2.2",
}
"""How pandas, with which LeRobot reads tasks.parquet, knows that its index is the text."""


def write_video(path: Path, images: np.ndarray, fps: float) -> None:
    """Write uint8 images `[T, H, W, 3]` as an H.264 mp4 of `fps` frames per second."""
    av = needed("av", "av", path)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width = images.shape[1:3]
        stream.pix_fmt = _pixel_format(images.shape[1:])
        stream.options = {"crf": "18", "g": "2"}
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        container.mux(stream.encode())


def _pixel_format(shape: tuple[int, ...]) -> str:
    """Return yuv420p, which every player shows, or yuv444p for an odd height or width, which it cannot hold."""
    return "yuv420p" if shape[0] % 2 == 0 and shape[1] % 2 == 0 else "yuv444p"


def _feature(dtype: str, shape: tuple[int, ...], names: list[str] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "names": names}


def _feature_name(leaf: Leaf) -> str:
    """Return LeRobot's name of an observation."""
    if not leaf.path:
        return "observation.images.image" if leaf.image else f"observation.{STATE}"
    name = "_".join(map(str, leaf.path))
    return f"observation.images.{name}" if leaf.image else f"observation.{name}"


def _stats(value: np.ndarray, image: bool) -> Stats:
    """Return LeRobot's statistics of rows `[T, ...]`; of images in [0, 1] per channel, `[3, 1, 1]`."""
    if image:
        sample = value[:: max(1, len(value) // 100)].astype(np.float64) / 255.0
        found = _of_rows(sample.reshape(-1, 3))
        return {**{key: of.reshape(3, 1, 1) for key, of in found.items()}, "count": np.asarray([len(sample)])}
    return {**_of_rows(value.astype(np.float64).reshape(len(value), -1)), "count": np.asarray([len(value)])}


def _of_rows(rows: np.ndarray) -> Stats:
    """Return the statistics of each column of rows `[N, D]`."""
    levels = np.quantile(rows, list(QUANTILES.values()), axis=0)
    by_axis = {"min": rows.min, "max": rows.max, "mean": rows.mean, "std": rows.std}
    return {key: np.asarray(of(axis=0)) for key, of in by_axis.items()} | dict(zip(QUANTILES, levels, strict=True))


def _joined(one: Stats, two: Stats) -> Stats:
    """Return the statistics of two sets of rows together."""
    share = float(two["count"][0]) / float(one["count"][0] + two["count"][0])
    mean = one["mean"] + share * (two["mean"] - one["mean"])
    square = (1 - share) * (one["std"] ** 2 + one["mean"] ** 2) + share * (two["std"] ** 2 + two["mean"] ** 2)
    return {
        "min": np.minimum(one["min"], two["min"]),
        "max": np.maximum(one["max"], two["max"]),
        "mean": mean,
        "std": np.sqrt(np.maximum(square - mean**2, 0.0)),
        **{key: one[key] + share * (two[key] - one[key]) for key in QUANTILES},
        "count": one["count"] + two["count"],
    }
