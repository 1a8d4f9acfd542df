"""LeRobot datasets, v2.0, v2.1 and v3.0: parquet files of rows and mp4 files of frames, with meta/info.json.

In v2 every episode is a file of its own; in v3 a file holds many, and a video too. Both are read in the order of the
files, a batch of rows and a frame of video at a time. The extra `lerobot` (pyarrow and av) reads them; neither torch
nor the lerobot package is needed.
"""

import itertools
import json
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from o2o.data.importers.columns import reason
from o2o.data.importers.source import (
    NUMBERS,
    UNREADABLE,
    Description,
    Field,
    Raw,
    Size,
    Source,
    check_values,
    decoded_image,
    resized,
)
from o2o.errors import DatasetError

VERSIONS = ("v2.0", "v2.1", "v3.0")
BATCH = 2048
"""Rows that are read together."""
PARTS = ("meta", "data", "videos", "images")


@dataclass(frozen=True)
class Entry:
    """One episode of the metadata: its number, its rows, and where they and its videos are."""

    index: int
    length: int
    data: Path
    videos: Mapping[str, tuple[Path, float]] = field(default_factory=dict)
    """For each camera the file and the second at which the episode begins in it."""


class LeRobotSource(Source):
    """A folder of a LeRobot dataset."""

    name: ClassVar[str] = "lerobot"

    def __init__(self, path: Path, episode_steps: int | None = None) -> None:
        """Read meta/. Raises `DatasetError`."""
        super().__init__(path, episode_steps)
        self.info = _json(path / "meta" / "info.json")
        self.version = self.info.get("codebase_version")
        if self.version not in VERSIONS:
            raise DatasetError(
                f"{path}/meta/info.json has codebase_version {self.version!r}; o2o reads {', '.join(VERSIONS)}: "
                "convert it with LeRobot's own script"
            )
        for key in ("features", "data_path", "fps"):
            if key not in self.info:
                raise DatasetError(f"{path}/meta/info.json lacks {key!r}; it has {', '.join(self.info)}")
        if episode_steps is not None:
            raise DatasetError(f"{path}: LeRobot says where an episode ends, so `episode_steps` has no use")
        self.fps = _number(self.info["fps"])
        if not 0 < self.fps < math.inf:
            raise DatasetError(f"{path}/meta/info.json has fps {self.info['fps']!r}, expected frames per second")
        self._parquet = needed("pyarrow.parquet", "pyarrow", path)
        self._check_features()
        features = {name: _feature(about) for name, about in self.info["features"].items()}
        self.fields = {name: found for name, found in features.items() if found is not None}
        kinds = {name: about.get("dtype") for name, about in self.info["features"].items()}
        self.cameras = [name for name in self.fields if kinds[name] == "video"]
        self.stills = [name for name in self.fields if kinds[name] == "image"]
        self.entries = self._entries_v3() if self.version == "v3.0" else self._entries_v2()
        if not self.entries:
            raise DatasetError(f"{path} has no episodes")
        for one, two in itertools.pairwise(self.entries):
            if one.index == two.index:
                raise DatasetError(f"{path}/meta names episode {one.index} twice; copy the dataset again")

    @classmethod
    def detect(cls, path: Path) -> bool:
        """Whether the folder has meta/info.json."""
        return (path / "meta" / "info.json").is_file()

    def _check_features(self) -> None:
        """Raise `DatasetError` unless every feature of meta/info.json says its type and its shape."""
        features = self.info["features"]
        for name, about in features.items() if isinstance(features, dict) else [("features", features)]:
            shape = about.get("shape") if isinstance(about, dict) else None
            sizes = isinstance(shape, list | None) and all(isinstance(n, int) and n >= 0 for n in shape or ())
            if not isinstance(about, dict) or not isinstance(about.get("dtype"), str) or not sizes:
                raise DatasetError(
                    f"{self.path}/meta/info.json: feature {name!r} is {str(about)[:80]}; expected its `dtype` and "
                    "its `shape`"
                )

    def files(self) -> list[Path]:
        """Return the files of the dataset, without caches of its download."""
        return sorted(p for part in PARTS for p in (self.path / part).rglob("*") if p.is_file())

    def _entries_v2(self) -> list[Entry]:
        entries, size = [], self.info.get("chunks_size", 1000)
        if not isinstance(size, int) or size < 1:
            raise DatasetError(f"{self.path}/meta/info.json has chunks_size {size!r}, expected a number of episodes")
        where = self.path / "meta" / "episodes.jsonl"
        for row in _json_lines(where):
            index, length = (_whole(row, key, where) for key in ("episode_index", "length"))
            chunk = index // size
            data = self._at("data_path", episode_chunk=chunk, episode_index=index)
            videos = {
                key: (self._at("video_path", episode_chunk=chunk, episode_index=index, video_key=key), 0.0)
                for key in self.cameras
            }
            entries.append(Entry(index, length, data, videos))
        return sorted(entries, key=lambda entry: entry.index)

    def _entries_v3(self) -> list[Entry]:
        entries, parts = [], sorted((self.path / "meta" / "episodes").glob("*/*.parquet"))
        if not parts:
            raise DatasetError(f"{self.path}/meta/episodes has no parquet file: copy the dataset whole")
        for part in parts:
            file = self._open(part)
            names = [name for name in file.schema_arrow.names if not name.startswith("stats/")]
            for row in file.read(columns=names).to_pylist():
                index, length = (_whole(row, key, part) for key in ("episode_index", "length"))
                place = {name: _whole(row, f"data/{name}", part) for name in ("chunk_index", "file_index")}
                data, videos = self._at("data_path", **place), {}
                for key in self.cameras:
                    place = {name: _whole(row, f"videos/{key}/{name}", part) for name in ("chunk_index", "file_index")}
                    begin = _number(row.get(f"videos/{key}/from_timestamp"))
                    if not 0 <= begin < math.inf:
                        raise DatasetError(f"{part} does not say where episode {index} begins in the video of {key!r}")
                    videos[key] = (self._at("video_path", video_key=key, **place), begin)
                entries.append(Entry(index, length, data, videos))
        return sorted(entries, key=lambda entry: entry.index)

    def _at(self, template: str, **place: Any) -> Path:
        """Return the path of a file by its template in meta/info.json. Raises `DatasetError` for one outside."""
        pattern = self.info.get(template)
        try:
            if not isinstance(pattern, str):
                raise ValueError("expected a text")
            found = self.path / pattern.format(**place)
            if not Path(os.path.normpath(found)).is_relative_to(os.path.normpath(self.path)):
                raise ValueError("it leads out of the dataset's folder")
        except (LookupError, ValueError, AttributeError, TypeError) as error:
            raise DatasetError(f"{self.path}/meta/info.json has {template} {pattern!r}: {error}") from error
        return found

    def _open(self, part: Path) -> Any:
        try:
            return self._parquet.ParquetFile(part)
        except FileNotFoundError as error:
            raise DatasetError(f"{part} is missing: copy the dataset whole") from error
        except (OSError, ValueError) as error:
            raise DatasetError(f"{part} cannot be read as parquet ({_pointer(part) or reason(error)})") from error

    def describe(self) -> Description:
        """Return what the dataset holds."""
        known = [name for name in self.info["features"] if name not in self.fields]
        rules = [
            "`next.done` marks the last row of every episode, time limits too, so it does not mean a terminal state"
        ]
        if known:
            rules.append(f"left out, as they are no arrays of numbers or are depth maps: {', '.join(known)}")
        if _number(self.info.get("total_tasks")) > 1:
            rules.append(
                f"the texts of its {self.info['total_tasks']} tasks are left out; `keys` task=task_index takes their "
                "numbers"
            )
        details = {key: self.info.get(key) for key in ("fps", "robot_type", "codebase_version")}
        names = {name: about.get("names") for name, about in self.info["features"].items() if name in self.fields}
        return Description(
            format=f"LeRobot {self.version}",
            episodes=len(self.entries),
            rows=sum(entry.length for entry in self.entries),
            fields=self.fields,
            observations={name: short_name(name) for name in self.fields if name.startswith("observation")},
            action="action" if "action" in self.fields else None,
            reward="next.reward" if "next.reward" in self.fields else None,
            success="next.success" if "next.success" in self.fields else None,
            rules=tuple(rules),
            details={**details, "names": names},
        )

    def episodes(self, keys: Collection[str], sizes: Mapping[str, Size], start: int = 0) -> Iterator[Raw]:
        """Yield the episodes from the `start`-th on."""
        films = {key: Film(self.path, self.fps) for key in keys if key in self.cameras}
        terminal = ("next.terminated",) if "next.terminated" in self.fields else ()
        columns = [key for key in dict.fromkeys((*keys, *terminal)) if key not in films]
        try:
            for entry, rows in self._rows(self.entries[start:], columns):
                found = {key: self._column(rows, key, sizes.get(key), entry) for key in columns}
                times = self._times(rows, entry) if films else np.empty(0)
                for key, film in films.items():
                    path, begin = entry.videos[key]
                    found[key] = film.frames(path, begin + times - times[0], sizes.get(key), entry.index)
                ended = bool(found["next.terminated"].reshape(-1)[-1]) if terminal else None
                yield Raw({key: found[key] for key in keys}, None, ended)
        finally:
            for film in films.values():
                film.close()

    def _times(self, rows: Any, entry: Entry) -> np.ndarray:
        """Return the seconds of an episode's rows `[T]`; raise `DatasetError` if they are not those of `fps`."""
        times = self._numbers(rows, "timestamp", entry).astype(np.float64)
        steps = np.diff(times)
        if not np.isfinite(times).all() or np.any(steps <= 0):
            raise DatasetError(f"{entry.data}: the timestamps of episode {entry.index} do not rise from row to row")
        if len(steps) and abs(float(np.median(steps)) * self.fps - 1.0) > 0.1:
            raise DatasetError(
                f"{entry.data}: the rows of episode {entry.index} are {float(np.median(steps)):.4g} s apart, and "
                f"meta/info.json says {self.fps:g} frames per second"
            )
        return times

    def _numbers(self, rows: Any, key: str, entry: Entry) -> np.ndarray:
        """Return the numbers in a column of an episode, in one row; raise `DatasetError` for text and empty cells."""
        flat = rows.column(key).combine_chunks()
        while hasattr(flat, "flatten") and "list" in str(flat.type).split("<")[0]:
            flat = flat.flatten()
        values = np.asarray(flat.to_numpy(zero_copy_only=False))
        if values.dtype.kind not in NUMBERS:
            what = "empty cells" if flat.null_count else flat.type
            raise DatasetError(f"{entry.data}: {key!r} of episode {entry.index} has {what}, expected numbers")
        return values.reshape(-1)

    def _rows(self, entries: list[Entry], columns: list[str]) -> Iterator[tuple[Entry, Any]]:
        """Yield every episode with the table of its rows."""
        import pyarrow as pa

        needs = list(dict.fromkeys((*columns, "timestamp", "frame_index", "episode_index")))
        at = 0
        while at < len(entries):
            path = entries[at].data
            wanted = {entry.index: entry for entry in entries[at:] if entry.data == path}
            file = self._open(path)
            lacks = [name for name in needs if name not in file.schema_arrow.names]
            if lacks:
                found = ", ".join(file.schema_arrow.names)
                raise DatasetError(f"{path} lacks the column {', '.join(lacks)}; it has {found}")
            parts: list[Any] = []
            begun: int | None = None
            for batch in file.iter_batches(batch_size=BATCH, columns=needs):
                numbers = np.asarray(batch.column("episode_index").to_numpy(zero_copy_only=False))
                cuts = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
                for low, high in zip(cuts[:-1], cuts[1:], strict=True):
                    if begun is not None and numbers[low] != begun:
                        yield from self._whole(wanted, begun, parts, pa)
                        parts = []
                    begun = int(numbers[low])
                    if begun in wanted:
                        parts.append(batch.slice(low, high - low))
            if begun is not None:
                yield from self._whole(wanted, begun, parts, pa)
            if wanted:
                raise DatasetError(f"{path} has no rows of episode {min(wanted)}, which meta/episodes puts there")
            at = next((i for i in range(at, len(entries)) if entries[i].data != path), len(entries))

    def _whole(self, wanted: dict[int, Entry], index: int, parts: list[Any], pa: Any) -> Iterator[tuple[Entry, Any]]:
        """Yield an episode that is wanted, once its rows are together; raise `DatasetError` if some are missing."""
        if index not in wanted:
            return
        entry, rows = wanted.pop(index), pa.Table.from_batches(parts)
        frames = self._numbers(rows, "frame_index", entry)
        if len(frames) != entry.length or not np.array_equal(frames, np.arange(entry.length)):
            raise DatasetError(
                f"{entry.data}: episode {index} has {len(frames)} rows in place of the {entry.length} that the "
                "metadata says, or they are out of order; copy the dataset again"
            )
        yield entry, rows

    def _column(self, rows: Any, key: str, size: Size | None, entry: Entry) -> np.ndarray:
        """Return one column of an episode as `[T, ...]`."""
        if key in self.stills:
            images = [resized(self._still(cell, entry, key), size) for cell in rows.column(key).to_pylist()]
            for image in images:
                check_values(image[None], key, self.fields[key], size)
            return np.stack(images)
        values, shape = self._numbers(rows, key, entry), self.fields[key].shape
        if values.size != entry.length * int(np.prod(shape)):
            raise DatasetError(
                f"{entry.data}: {key!r} of episode {entry.index} has {values.size} numbers in {entry.length} rows; "
                f"meta/info.json says {shape} in each"
            )
        return values.reshape(entry.length, *shape)

    def _still(self, cell: Any, entry: Entry, key: str) -> np.ndarray:
        cell = cell if isinstance(cell, dict) else {"bytes": cell}
        try:
            if cell.get("bytes"):
                return decoded_image(cell["bytes"])
            if cell.get("path"):
                return decoded_image((self.path / cell["path"]).read_bytes())
        except FileNotFoundError as error:
            raise DatasetError(f"{error.filename}, an image of episode {entry.index}, is missing") from error
        except UNREADABLE as error:
            raise DatasetError(f"{entry.data}: an image {key!r} of episode {entry.index} cannot be decoded") from error
        raise DatasetError(f"{entry.data}: episode {entry.index} has a row without the image {key!r}")


class Film:
    """Frames of a camera's videos at given seconds, in order; a video that holds many episodes stays open."""

    def __init__(self, root: Path, fps: float) -> None:
        """Read videos of `fps` frames per second."""
        self._av, self._fps = needed("av", "av", root), fps
        self._path: Path | None = None
        self._container: Any = None
        self._frames: Iterator[Any] = iter(())
        self._frame: Any = None

    def frames(self, path: Path, times: np.ndarray, size: Size | None, episode: int) -> np.ndarray:
        """Return uint8 frames `[T, H, W, 3]` at `times` `[T]`. Raises `DatasetError` if the video lacks one."""
        if self._path != path or (self._frame is not None and self._frame.time > times[0] + 0.5 / self._fps):
            self._begin(path)
        if times[0] > (self._frame.time if self._frame is not None else 0.0) + 2.0:
            self._container.seek(int(times[0] * self._av.time_base), backward=True)
            self._frames, self._frame = self._container.decode(video=0), None
        out: np.ndarray | None = None
        for i, time in enumerate(times):
            try:
                image = self._at(float(time))
            except (self._av.FFmpegError, *UNREADABLE) as error:
                raise DatasetError(
                    f"{path} cannot be decoded from {time:.3f} s on, in episode {episode} ({reason(error)}); copy the "
                    "dataset again, or leave the camera out with `keys`"
                ) from error
            if image is None:
                raise DatasetError(
                    f"{path} is shorter than its rows: episode {episode} has {len(times)} of them and the "
                    f"video lacks the frame of row {i} (at {time:.3f} s); copy the dataset again, or leave the "
                    "camera out with `keys`"
                )
            pixels = resized(image.to_ndarray(format="rgb24"), size)
            if out is None:
                out = np.empty((len(times), *pixels.shape), np.uint8)
            out[i] = pixels
        assert out is not None
        return out

    def _begin(self, path: Path) -> None:
        self.close()
        try:
            self._container = self._av.open(str(path))
        except FileNotFoundError as error:
            raise DatasetError(
                f"{path} is missing: copy the dataset whole, or leave the camera out with `keys`"
            ) from error
        except (self._av.FFmpegError, *UNREADABLE) as error:
            raise DatasetError(f"{path} cannot be read as a video ({_pointer(path) or reason(error)})") from error
        if not self._container.streams.video:
            raise DatasetError(f"{path} holds no video")
        self._path, self._frames, self._frame = path, self._container.decode(video=0), None

    def _at(self, time: float) -> Any:
        """Return the frame within half a frame of `time`, or None."""
        near = 0.5 / self._fps
        while self._frame is None or self._frame.time < time - near:
            self._frame = next(self._frames, None)
            if self._frame is None:
                self._path = None  # at its end: opened again for who asks for more
                return None
        return self._frame if self._frame.time <= time + near else None

    def close(self) -> None:
        """Close the video."""
        if self._container is not None:
            self._container.close()
        self._container, self._path, self._frame = None, None, None


def needed(module: str, package: str, path: Path) -> Any:
    """Import a module of the extra `lerobot`. Raises `DatasetError` naming the package that is missing."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DatasetError(
            f"{path}: LeRobot data need {package}, which is not installed: pip install 'o2o[lerobot]'"
        ) from error


def _number(value: Any) -> float:
    """Return a number of the metadata; NaN for anything else."""
    return float(value) if isinstance(value, int | float) else math.nan


def _whole(row: Mapping[str, Any], key: str, where: Path) -> int:
    """Return a count of a row of the metadata. Raises `DatasetError` if there is none."""
    value = row.get(key)
    if not isinstance(value, int) or value < 0:
        raise DatasetError(f"{where} has {key} {value!r} for an episode, expected a number; copy the dataset again")
    return value


def short_name(feature: str) -> str:
    """Return a feature's name without `observation.` and `images.`."""
    return re.sub(r"^observations?\.(images?\.)?", "", feature) or feature


def _feature(about: Mapping[str, Any]) -> Field | None:
    """Return a feature as a field; None for texts and depth maps."""
    kind, shape = about.get("dtype"), tuple(int(n) for n in about.get("shape") or (1,))
    if kind in ("video", "image"):
        detail = {**about, **(about.get("info") or {}), **(about.get("video_info") or {})}
        if detail.get("video.is_depth_map") or detail.get("is_depth_map") or len(shape) != 3:
            return None
        names = about.get("names") or []
        first = str(names[0]).startswith("c") if isinstance(names, list) and names else shape[0] in (1, 3)
        return Field((*shape[1:], 3) if first else (*shape[:2], 3), np.dtype(np.uint8), True)
    try:
        dtype = np.dtype(kind)
    except TypeError:
        return None
    return Field(shape, dtype) if dtype.kind in NUMBERS else None


def _pointer(path: Path) -> str | None:
    """Return a hint if a file is only a pointer of Git LFS."""
    try:
        with path.open("rb") as file:
            lfs = file.read(24).startswith(b"version https://git-lfs")
    except OSError:
        return None
    return "it is a pointer of Git LFS: run `git lfs pull`" if lfs else None


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path} cannot be read as JSON ({reason(error)})") from error
    if not isinstance(found, dict):
        raise DatasetError(f"{path} holds no JSON object")
    return found


def _json_lines(path: Path) -> list[dict[str, Any]]:
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        _ = [row.items() for row in rows]
    except (OSError, ValueError, AttributeError) as error:
        raise DatasetError(f"{path} cannot be read as one episode a line ({reason(error)})") from error
    return rows
