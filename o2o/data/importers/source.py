"""What every importer offers: detect its format, describe what is in it, and yield its episodes one after the other."""

import io
import tokenize
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from o2o.errors import DatasetError

Size = tuple[int, int]
"""Height and width of an image."""
UNREADABLE = (
    OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, EOFError, RuntimeError, SyntaxError,
    tokenize.TokenError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""What readers of files raise for broken ones."""
NUMBERS = "biuf"
"""Kinds of numpy types that are numbers."""
PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".joblib")


@dataclass(frozen=True)
class Field:
    """One column of a source: the shape and the type of a row. An image is uint8 `[H, W, C]`."""

    shape: tuple[int, ...]
    dtype: np.dtype
    image: bool = False

    def __str__(self) -> str:
        """Return a description such as `float32[7]`."""
        return f"{'image ' if self.image else ''}{self.dtype}[{'x'.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Description:
    """What a source holds, and which column is what unless the user says otherwise."""

    format: str
    episodes: int
    rows: int
    fields: Mapping[str, Field]
    observations: Mapping[str, str]
    """Columns that become observations, each with its name in the dataset."""
    action: str | None
    reward: str | None = None
    success: str | None = None
    """A column that is above 0 in steps that succeed."""
    rules: tuple[str, ...] = ()
    """What the format leaves open and how the importer decides it, one sentence each."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What else there is to keep, as JSON types: it goes into metadata.json."""


@dataclass(frozen=True)
class Raw:
    """One episode of T rows as the source has it."""

    columns: Mapping[str, np.ndarray]
    """Leaves `[T, ...]` of the columns that were asked for."""
    last: Mapping[str, np.ndarray] | None = None
    """The observation after the last row, leaves `[...]`; None: the source lacks it."""
    terminated: bool | None = None
    """Whether the last row is terminal; None: the source does not say."""


class Source(ABC):
    """A dataset of another format, open for reading. Nothing is read whole: rows come by the episode."""

    name: ClassVar[str]
    """What `--format` says."""

    def __init__(self, path: Path, episode_steps: int | None = None) -> None:
        """Open `path`; `episode_steps` cuts episodes where the source does not say. Raises `DatasetError`."""
        self.path, self.episode_steps = path, episode_steps

    @classmethod
    @abstractmethod
    def detect(cls, path: Path) -> bool:
        """Whether `path` looks like this format."""

    @abstractmethod
    def describe(self) -> Description:
        """Return what the source holds, without reading images. Raises `DatasetError`."""

    @abstractmethod
    def episodes(self, keys: Collection[str], sizes: Mapping[str, Size], start: int = 0) -> Iterator[Raw]:
        """Yield the episodes from number `start` on, with the columns `keys`.

        `sizes`: images to be resized. Raises `DatasetError`, or one of `UNREADABLE`, where the source is broken.
        """

    def files(self) -> list[Path]:
        """Return the files of the source, sorted: their names and bytes are its fingerprint."""
        return [self.path]

    def close(self) -> None:  # noqa: B027
        """Close the files."""


def refuse_pickle(path: Path) -> None:
    """Raise `DatasetError` for a pickle: unpickling runs whatever code the file holds."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        head = file.read(2)
    if path.suffix.lower() in PICKLES or (len(head) == 2 and head[0] == 0x80 and head[1] <= 5):
        raise DatasetError(
            f"{path} is a pickle, and is not read: unpickling runs any code that the file holds. Where you trust it, "
            "load it yourself and save its arrays with numpy.savez (docs/data_import.md lists the keys)"
        )


def check_values(values: np.ndarray, column: str, field: Field, size: Size | None = None) -> None:
    """Raise `DatasetError` if the rows `[T, ...]` of a column, resized to `size`, are not as its field says."""
    wanted = field if size is None else Field((*size, *field.shape[2:]), field.dtype, field.image)
    kinds = "u" if field.image else NUMBERS
    if values.shape[1:] != wanted.shape or values.dtype.kind not in kinds or (field.image and values.dtype != np.uint8):
        found = Field(values.shape[1:], values.dtype, field.image and values.dtype == np.uint8)
        raise DatasetError(f"{column!r} has rows of {found}, expected {wanted}, as in the rest of the data")


def resized(images: np.ndarray, size: Size | None) -> np.ndarray:
    """Return uint8 images `[..., H, W, C]` at `size`, each new pixel the mean of those that it covers."""
    if size is None or images.shape[-3:-1] == size:
        return images
    from PIL import Image

    height, width = size
    flat = images.reshape(-1, *images.shape[-3:])
    out = np.empty((len(flat), height, width, flat.shape[-1]), np.uint8)
    for i, image in enumerate(flat):
        small = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).resize(
            (width, height), Image.Resampling.BOX
        )
        out[i] = np.asarray(small).reshape(height, width, -1)
    return out.reshape(*images.shape[:-3], height, width, flat.shape[-1])


def decoded_image(data: bytes) -> np.ndarray:
    """Return an encoded image (PNG, JPEG) as uint8 `[H, W, 3]`."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"), np.uint8)


def channels_last(images: np.ndarray) -> np.ndarray:
    """Return images `[..., H, W, C]`; those of `[..., C, H, W]` with 1, 3 or 4 channels are turned."""
    return np.moveaxis(images, -3, -1) if is_channels_first(images.shape[-3:]) else images


def is_channels_first(shape: tuple[int, ...]) -> bool:
    """Whether the shape of an image has its channels in front."""
    return len(shape) == 3 and shape[0] in (1, 3, 4) and shape[2] not in (1, 3, 4)


def array_field(shape: tuple[int, ...], dtype: np.dtype) -> Field:
    """Return the field of rows of an array; uint8 of three axes is an image."""
    image = dtype == np.uint8 and len(shape) == 3
    return Field((shape[1], shape[2], shape[0]) if image and is_channels_first(shape) else shape, dtype, image)
