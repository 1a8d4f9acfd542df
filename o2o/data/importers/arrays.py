"""Plain arrays in one npz or HDF5 file, one row per step; `docs/data_import.md` lists the names.

`observations` is one array or several `observations/NAME`; row t is what was seen before action t. The observation
after the last step of an episode is in `next_observations` or missing.
"""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np

from o2o.data.importers.columns import (
    check_numbers,
    check_rows,
    columns_of,
    fields_of,
    flagged,
    is_hdf5,
    is_npz,
    names_in,
    read_spans,
)
from o2o.data.importers.source import Description, Raw, Size, Source
from o2o.errors import DatasetError

TERMINATED = ("terminations", "terminated", "terminals")
TRUNCATED = ("truncations", "truncated", "timeouts")
ENDS = ("dones", "done", "ends")
EPISODE_ENDS = "episode_ends"
Span = tuple[int, int, bool | None]


class ArraysSource(Source):
    """Arrays of one length under documented names."""

    name: ClassVar[str] = "arrays"
    title: ClassVar[str] = "plain arrays"
    rules: ClassVar[tuple[str, ...]] = (
        "an episode ends where terminations, truncations or dones say so; `dones` do not say of which kind",
    )
    last_is_row: ClassVar[bool] = False
    """Whether the last row of an episode is only an observation."""

    def __init__(self, path: Path, episode_steps: int | None = None) -> None:
        """Open the file and find where its episodes end. Raises `DatasetError`."""
        super().__init__(path, episode_steps)
        self.columns = columns_of(path)
        self.observed = self._names("observations")
        if not self.observed or "actions" not in self.columns.shapes:
            found = ", ".join(sorted(self.columns.shapes)) or "no array of numbers"
            raise DatasetError(f"{path} needs arrays `observations` and `actions`; it has {found}")
        self.rows = self.columns.shapes["actions"][0]
        if not self.rows:
            raise DatasetError(f"{path} has no rows: 'actions' is an array of shape {self.columns.shapes['actions']}")
        self.next_of = self._following()
        used = ("actions", *self.observed, *self.next_of.values(), *TERMINATED, *TRUNCATED, *ENDS, "rewards", "success")
        check_rows(path, self.columns, used, self.rows, "actions")
        self.spans = self._spans()

    @classmethod
    def detect(cls, path: Path) -> bool:
        """Whether the file has observations and actions."""
        if not (is_hdf5(path) or is_npz(path)):
            return False
        names = names_in(path)
        return "actions" in names and any(name.split("/")[0] == "observations" for name in names)

    def _names(self, head: str) -> list[str]:
        return sorted(name for name in self.columns.shapes if name == head or name.startswith(f"{head}/"))

    def _following(self) -> dict[str, str]:
        """Return the array of next observations of each observation that has one; for all of them or for none."""
        pairs = {name: f"next_{name}" for name in self.observed}
        return pairs if all(name in self.columns.shapes for name in pairs.values()) else {}

    def _first(self, names: Collection[str]) -> str | None:
        return next((name for name in names if name in self.columns.shapes), None)

    def _spans(self) -> list[Span]:
        """Return (start, stop, whether terminal) of every episode."""
        terminal, timeout, done = (
            flagged(self.path, self.columns, self._first(names), self.rows) for names in (TERMINATED, TRUNCATED, ENDS)
        )
        if EPISODE_ENDS in self.columns.shapes:
            done = np.union1d(done, self._listed_ends() - 1)
        known = self._first(TERMINATED) is not None
        ends = np.union1d(np.union1d(terminal, timeout), done)
        if not len(ends) and self.episode_steps is None:
            raise DatasetError(
                f"{self.path} does not say where its {self.rows} rows end an episode: expected one of "
                f"{', '.join((*TERMINATED, *TRUNCATED, *ENDS))} or {EPISODE_ENDS}; or give `episode_steps`"
            )
        starts = np.concatenate([[0], ends + 1])
        stops = np.concatenate([ends + 1, [self.rows]])
        terminals = set(terminal.tolist())
        spans: list[Span] = []
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            ended = stop - 1 in terminals
            step = self.episode_steps or max(stop - start, 1)
            for at in range(start, stop, step):
                end = min(at + step, stop)
                spans.append((at, end, (ended and end == stop) if known else None))
        return spans

    def _listed_ends(self) -> np.ndarray:
        """Return `episode_ends` `[E]`: for each episode the number of rows up to its end."""
        check_numbers(self.path, self.columns, EPISODE_ENDS)
        listed = self.columns.read(EPISODE_ENDS, 0, self.columns.shapes[EPISODE_ENDS][0])
        whole = listed.ndim == 1 and bool(np.all(listed == np.floor(listed)))
        if not whole or np.any(np.diff(listed, prepend=0) <= 0) or (len(listed) and listed[-1] != self.rows):
            raise DatasetError(
                f"{self.path}: {EPISODE_ENDS} must be whole numbers that rise from above 0 to the number of rows, "
                f"{self.rows}; it is {listed[:3].tolist()} ... {listed[-1:].tolist()}"
            )
        return listed.astype(np.int64)

    def describe(self) -> Description:
        """Return what the file holds."""
        fields = fields_of(self.columns, self.rows)
        return Description(
            format=self.title,
            episodes=len(self.spans),
            rows=self.rows,
            fields=fields,
            observations={name: name.removeprefix("observations/") for name in self.observed},
            action="actions",
            reward="rewards" if "rewards" in fields else None,
            success="success" if "success" in fields else None,
            rules=self.rules,
        )

    def episodes(self, keys: Collection[str], sizes: Mapping[str, Size], start: int = 0) -> Iterator[Raw]:
        """Yield the episodes from number `start` on."""
        return read_spans(self.columns, self.spans[start:], keys, sizes, self.next_of, self.last_is_row)

    def close(self) -> None:
        """Close the file."""
        self.columns.close()
