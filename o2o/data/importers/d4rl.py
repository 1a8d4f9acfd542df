"""D4RL's HDF5 files: arrays of one row per step, `terminals` and `timeouts`.

`terminals` are true ends. A row with a timeout is the last of its episode, and what was seen after it is not in the
file, unless `next_observations` are.
"""

from pathlib import Path
from typing import ClassVar

from o2o.data.importers.arrays import ArraysSource, Span
from o2o.data.importers.columns import is_hdf5, names_in
from o2o.errors import DatasetError


class D4rlSource(ArraysSource):
    """An HDF5 file of D4RL."""

    name: ClassVar[str] = "d4rl"
    title: ClassVar[str] = "D4RL HDF5"
    rules: ClassVar[tuple[str, ...]] = (
        "an episode ends at `terminals` (terminal) and at `timeouts` (cut off); the rows behind the last end are "
        "an episode that was cut off",
        "`infos/...` are left out; `keys` takes them, such as goal=infos/goal",
    )

    @classmethod
    def detect(cls, path: Path) -> bool:
        """Whether the file has D4RL's arrays."""
        return is_hdf5(path) and {"observations", "actions", "rewards", "terminals"} <= set(names_in(path))

    def _spans(self) -> list[Span]:
        if "timeouts" not in self.columns.shapes and self.episode_steps is None:
            raise DatasetError(
                f"{self.path} has no `timeouts`, so where a time limit cut an episode is not known: give the limit "
                "with `episode_steps`, or a number that no episode reaches"
            )
        return super()._spans()
