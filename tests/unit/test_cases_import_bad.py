"""Data that are not what they seem: each is refused in one line that names what is wrong; nothing is left of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from gymnasium import spaces

from o2o.data import datasets, files
from o2o.data.files import Episode
from o2o.data.importers import write as importing
from o2o.data.importers.plan import Options
from o2o.data.lerobot_export import to_lerobot
from o2o.errors import O2OError
from tests.helpers import foreign

ROWS, FLAGS = 8, np.arange(8) % 4 == 3
DATA, EPISODES = "data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet"
FILM = "videos/observation.images.front/chunk-000/file-000.mp4"
BEGIN = "videos/observation.images.front/from_timestamp"


def refused(path: Path, words: str, **options: Any) -> None:
    """Assert that an import ends in one line with `words` in it, and that no dataset appears."""
    root = path.parent / "root"
    with pytest.raises(O2OError, match=words) as error:
        importing.import_dataset(path, "lab/set-v0", options=Options(**options), root=root)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert datasets.list_datasets(root) == []


def arrays(**changed: Any) -> dict[str, Any]:
    """Return plain arrays of two episodes; None takes one away."""
    found = {"observations": np.zeros((ROWS, 3)), "actions": np.zeros((ROWS, 2), np.float32), "dones": FLAGS, **changed}
    return {key: value for key, value in found.items() if value is not None}


NPZ: dict[str, tuple[dict[str, Any], str]] = {
    "complex actions": ({"actions": np.zeros((ROWS, 2), complex)}, "'actions' is complex128, expected numbers"),
    "texts": ({"observations": np.array(["a"] * ROWS)}, "'observations' is <U1, expected numbers"),
    "rewards as text": ({"rewards": np.array(["1"] * ROWS)}, "'rewards' is <U1, expected numbers"),
    "success as text": ({"success": np.array(["no"] * ROWS)}, "'success' is <U2, expected numbers"),
    "NaN in success": ({"success": np.full(ROWS, np.nan)}, "episode 0, step 0: 'success' has nan.*`drop_bad`"),
    "NaN in flags": ({"dones": np.where(FLAGS, np.nan, 0.0)}, "'dones' is nan in row 3, expected 0 or 1"),
    "flags between": ({"dones": np.full(ROWS, 0.5)}, "'dones' is 0.5 in row 0, expected 0 or 1"),
    "flags of two columns": (
        {"dones": np.zeros((ROWS, 2))},
        r"'dones' is an array of shape \(8, 2\), expected one flag",
    ),
    "ends with fractions": ({"dones": None, "episode_ends": np.array([3.5, 8.0])}, "must be whole numbers that rise"),
    "ends with NaN": ({"dones": None, "episode_ends": np.array([np.nan, 8.0])}, "must be whole numbers that rise"),
    "ends as text": ({"dones": None, "episode_ends": np.array(["4", "8"])}, "'episode_ends' is <U1, expected numbers"),
    "lengths as ends": (
        {"dones": None, "episode_ends": np.array([4, 4])},
        "rise from above 0 to the number of rows, 8",
    ),
    "by columns": ({"observations": np.zeros((3, ROWS)).T}, "'observations' is stored column after column"),
    "no rows": ({key: np.zeros((0, 2)) for key in ("observations", "actions")}, "has no rows: 'actions' is an array"),
    "no numbers": ({"observations": np.zeros((ROWS, 0))}, r"'observations' is float64\[0\]: its rows have no numbers"),
    "other next": ({"next_observations": np.zeros((ROWS, 4))}, r"has rows of float64\[4\], expected float64\[3\]"),
}


@pytest.mark.parametrize("name", NPZ)
def test_arrays_refused(name: str, tmp_path: Path) -> None:
    """An array that is no number, no flag or of another shape is named; it is never read as something else."""
    changed, words = NPZ[name]
    np.savez(tmp_path / "own.npz", **arrays(**changed))
    refused(tmp_path / "own.npz", words)


def test_success_with_gaps_dropped(tmp_path: Path) -> None:
    """An episode of which it is not known whether it succeeded is left out and counted with `drop_bad`."""
    np.savez(tmp_path / "own.npz", **arrays(success=np.where(np.arange(ROWS) == 5, np.nan, FLAGS)))
    refused(tmp_path / "own.npz", "episode 1, step 1: 'success' has nan")
    done = importing.import_dataset(
        tmp_path / "own.npz", "lab/set-v0", options=Options(drop_bad=True), root=tmp_path / "root"
    )
    assert done.episodes == 1 and [number for number, _ in done.dropped] == [1]


def test_refused_then_mended(tmp_path: Path) -> None:
    """An import that a faulty episode ended stands in nobody's way: other columns begin anew, with every episode."""
    seen = np.where(np.arange(ROWS)[:, None] == 5, np.nan, np.zeros((ROWS, 3)))
    np.savez(tmp_path / "own.npz", **arrays(observations=seen, other=np.ones((ROWS, 1))))
    refused(tmp_path / "own.npz", "episode 1, step 1: observations .* has nan")
    done = importing.import_dataset(
        tmp_path / "own.npz", "lab/set-v0", options=Options(keys=("other",)), root=tmp_path / "root"
    )
    found = next(files.read_episodes(files.open_storage(done.folder / "data", {}), "lab/set-v0"))
    assert done.episodes == 2 and not done.dropped and found.observations.shape == (4, 1)


def test_nothing_fits_then_mended(tmp_path: Path) -> None:
    """An import of which no episode is left stands in nobody's way: other options begin anew."""
    np.savez(tmp_path / "own.npz", **arrays(dones=None))
    refused(tmp_path / "own.npz", "none of 8 episodes can be imported", episode_steps=1)
    done = importing.import_dataset(
        tmp_path / "own.npz", "lab/set-v0", options=Options(episode_steps=4), root=tmp_path / "root"
    )
    assert done.episodes == 2


def put(file: h5py.File, name: str, value: Any) -> None:
    """Put an array in the place of another."""
    if name in file:
        del file[name]
    file[name] = value


HDF5: dict[str, tuple[str, Any, str]] = {
    "flags of two columns": ("terminals", np.zeros((16, 2), bool), "expected one flag per step"),
    "flags with NaN": ("timeouts", np.full(16, np.nan), "'timeouts' is nan in row 0"),
    "rewards of fields": ("rewards", np.zeros(16, [("a", "f4")]), "'rewards' is .*, expected numbers"),
    "texts": ("observations", [b"a"] * 16, "'observations' is .*, expected numbers"),
    "an array as demonstration": ("data/demo_0", np.zeros(3), "demo_0 is no group of arrays but"),
    "a demonstration without actions": ("data/demo_1/actions", np.float64(1), "demo_1 has no array of actions; it has"),
    "wider actions": ("data/demo_1/actions", np.zeros((7, 3)), r"rows of float64\[3\], expected float64\[2\]"),
    "wider observations": ("data/demo_1/obs/object", np.zeros((7, 3)), r"\[3\], expected float64\[2\].*episode 1"),
    "short next": ("data/demo_1/next_obs/object", np.zeros((5, 2)), "next_obs/object of shape .5, 2. for 7 actions"),
    "no next": ("data/demo_1/next_obs/object", np.zeros((0, 2)), "next_obs/object of shape .0, 2. for 7 actions"),
}


@pytest.mark.parametrize("name", HDF5)
def test_hdf5_refused(name: str, tmp_path: Path) -> None:
    """In D4RL's and robomimic's files an array of another kind than the rest is named with its place."""
    key, value, words = HDF5[name]
    (foreign.write_robomimic if key.startswith("data/") else foreign.write_d4rl)(tmp_path / "x.hdf5")
    with h5py.File(tmp_path / "x.hdf5", "a") as file:
        put(file, key, value)
    refused(tmp_path / "x.hdf5", words)


def said(**changed: Any) -> Callable[[Path], None]:
    """Return a change of entries of meta/info.json."""

    def change(folder: Path) -> None:
        path = folder / "meta/info.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))

    return change


def cells(file: str, column: str, values: Any) -> Callable[[Path], None]:
    """Return a change of one column of a parquet file; None removes it."""

    def change(folder: Path) -> None:
        table = pq.read_table(folder / file)
        at = table.schema.get_field_index(column)
        new = table.remove_column(at) if values is None else table.set_column(at, column, pa.array(values))
        pq.write_table(new, folder / file)

    return change


def twice(folder: Path) -> None:
    """Name every episode twice."""
    table = pq.read_table(folder / EPISODES)
    pq.write_table(pa.concat_tables([table, table]), folder / EPISODES)


LEROBOT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "info cut off": (lambda p: (p / "meta/info.json").write_text('{"fps": 10,'), "info.json cannot be read as JSON"),
    "no version": (said(codebase_version=None), "codebase_version None; o2o reads"),
    "no rate": (said(fps=0), "has fps 0, expected frames per second"),
    "another rate": (said(fps=17), "are 0.1 s apart, and meta/info.json says 17 frames per second"),
    "features as list": (said(features=[]), "feature 'features' is .*; expected its `dtype` and its `shape`"),
    "shape of words": (said(features={"action": {"dtype": "float32", "shape": ["x"]}}), "feature 'action' is"),
    "paths outside": (said(data_path="../{chunk_index}/{file_index}"), "leads out of the dataset's folder"),
    "no pattern": (said(data_path="{chunk_index.x}"), "info.json has data_path '{chunk_index.x}'"),
    "an episode without length": (cells(EPISODES, "length", [5, None, 4]), "has length None for an episode"),
    "no place of a video": (cells(EPISODES, BEGIN, None), "does not say where episode 0 begins in the video"),
    "episodes twice": (twice, "names episode 0 twice"),
    "time stands still": (cells(DATA, "timestamp", [0.0] * 16), "timestamps of episode 0 do not rise"),
    "times as text": (cells(DATA, "timestamp", ["0"] * 16), "'timestamp' of episode 0 has string, expected numbers"),
    "success with gaps": (cells(DATA, "next.success", [None, True] * 8), "has empty cells, expected numbers"),
    "a film of zeros": (
        lambda p: (p / FILM).write_bytes((p / FILM).read_bytes()[:900] + bytes(300) + (p / FILM).read_bytes()[1200:]),
        "file-000.mp4 cannot be",
    ),
    "an image of bytes": (
        cells(DATA, "observation.images.wrist", [{"bytes": b"x", "path": None}] * 16),
        "an image 'observation.images.wrist' of episode 0 cannot be decoded",
    ),
    "images of another size": (
        cells(DATA, "observation.images.wrist", [foreign.png(np.zeros((8, 8, 3), np.uint8))] * 16),
        r"image uint8\[8x8x3\], expected image uint8\[32x48x3\]",
    ),
}


@pytest.mark.parametrize("name", LEROBOT)
def test_lerobot_refused(name: str, tmp_path: Path) -> None:
    """Metadata that say nothing or something else than the rows do are refused with file and entry."""
    change, words = LEROBOT[name]
    foreign.write_lerobot(tmp_path / "pick", still="image" in name)
    change(tmp_path / "pick")
    refused(tmp_path / "pick", words)


def test_fault_of_names(tmp_path: Path) -> None:
    """An observation without a name is refused: nobody could ask for it."""
    np.savez(tmp_path / "own.npz", **arrays())
    with pytest.raises(O2OError, match="'=observations': the observation has no name"):
        importing.plan_import(tmp_path / "own.npz", options=Options(keys=("=observations",)))
    np.savez(tmp_path / "own.npz", **arrays(observations=None, **{"observations/": np.zeros((ROWS, 3))}))
    with pytest.raises(O2OError, match="the observation 'observations/' has no name"):
        importing.plan_import(tmp_path / "own.npz")


def test_as_ogbench_reads(tmp_path: Path) -> None:
    """The rows of an import are those that OGBench's own loader makes of the file."""
    theirs = pytest.importorskip("ogbench.utils", reason="needs ogbench: pip install 'o2o[ogbench]'")
    foreign.write_ogbench(tmp_path / "cube.npz")
    wanted = theirs.load_dataset(str(tmp_path / "cube.npz"))
    done = importing.import_dataset(tmp_path / "cube.npz", "lab/set-v0", root=tmp_path / "root")
    found = datasets.load([str(done.folder)]).arrays
    for key in ("observations", "actions", "next_observations"):
        np.testing.assert_array_equal(found[key], wanted[key])


def test_lerobot_export_refused(tmp_path: Path) -> None:
    """A rate that no video has, and images that no video holds, are refused; nothing appears."""
    grey = np.zeros((ROWS, 6, 8, 1), np.uint8)
    np.savez(tmp_path / "own.npz", **arrays(observations=None, **{"observations/cam": grey}))
    importing.import_dataset(tmp_path / "own.npz", "lab/set-v0", root=tmp_path / "root")
    for fps in (1e-9, 1e12):
        with pytest.raises(O2OError, match="expected 0.001 to 10000 steps per second"):
            to_lerobot("lab/set-v0", tmp_path / "out", fps=fps, root=tmp_path / "root")
    with pytest.raises(O2OError, match="observation.images.cam has 1 channels; video takes 3"):
        to_lerobot("lab/set-v0", tmp_path / "out", fps=10, root=tmp_path / "root")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own.npz", "root"]


def test_channels_first_exported(tmp_path: Path) -> None:
    """Images that a dataset holds with their channels first are frames like any other in LeRobot's layout."""
    seen = np.moveaxis(foreign.images(5, (16, 24)), -1, 1)
    ends = np.arange(4) == 3
    episode = Episode({"cam": seen}, np.zeros((4, 2), np.float32), np.zeros(4), ends, ~ends & False)
    files.write_dataset(
        "lab/set-v0",
        [episode],
        observation_space=spaces.Dict({"cam": spaces.Box(0, 255, (3, 16, 24), np.uint8)}),
        action_space=spaces.Box(-1.0, 1.0, (2,), np.float32),
        spec=None,
        root=tmp_path,
    )
    out = to_lerobot("lab/set-v0", tmp_path / "out", fps=10, root=tmp_path)
    assert json.loads((out / "meta/info.json").read_text())["features"]["observation.images.cam"]["shape"] == [
        16,
        24,
        3,
    ]
    stats = json.loads((out / "meta/stats.json").read_text())["observation.images.cam"]
    median = np.median(foreign.images(4, (16, 24)) / 255, axis=(0, 1, 2))
    np.testing.assert_allclose(np.ravel(stats["q50"]), median, atol=1e-6)
    done = importing.import_dataset(out, "lab/back-v0", root=tmp_path)
    found = next(files.read_episodes(files.open_storage(done.folder / "data", {}), "lab/back-v0"))
    assert np.abs(found.observations["cam"][:4].astype(int) - foreign.images(4, (16, 24))).max() < 8
