"""OGBench's npz files: rows of trajectories without rewards; the last row of each is only an observation.

`terminals` mark where a trajectory was cut, not a terminal state: OGBench's own loader bootstraps there too.
"""

from pathlib import Path
from typing import ClassVar

from o2o.data.importers.arrays import ArraysSource, Span
from o2o.data.importers.columns import is_npz, names_in


class OgbenchSource(ArraysSource):
    """An npz file of OGBench."""

    name: ClassVar[str] = "ogbench"
    title: ClassVar[str] = "OGBench npz"
    rules: ClassVar[tuple[str, ...]] = (
        "`terminals` mark the last row of a trajectory, which was cut off there and did not terminate",
        "the last row of a trajectory is its last observation; its action is left out",
        "`qpos`, `qvel` and other states of the simulator are left out; `keys` takes them",
    )
    last_is_row: ClassVar[bool] = True

    @classmethod
    def detect(cls, path: Path) -> bool:
        """Whether the file has OGBench's arrays and no rewards."""
        names = set(names_in(path)) if is_npz(path) else set()
        return {"observations", "actions", "terminals", "qpos"} <= names and "rewards" not in names

    def _spans(self) -> list[Span]:
        return [(start, stop, False) for start, stop, _ in super()._spans() if stop - start > 1]
