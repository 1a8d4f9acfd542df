"""Import of others' formats: every number where it belongs, gaps filled by rule, broken input refused in one line."""

import json
import pickle
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from gymnasium import spaces

from o2o.cli import main
from o2o.data import datasets, files
from o2o.data.clean import without_bad
from o2o.data.files import Episode
from o2o.data.importers import open_source, write as importing
from o2o.data.importers.plan import Options
from o2o.data.lerobot_export import to_lerobot
from o2o.errors import ConfigError, DatasetError
from tests.helpers import foreign
from tests.helpers.foreign import LENGTHS

WRITERS: dict[str, Any] = {
    "robomimic": (foreign.write_robomimic, "low_dim.hdf5"),
    "d4rl": (foreign.write_d4rl, "hopper.hdf5"),
    "ogbench": (foreign.write_ogbench, "cube.npz"),
    "lerobot": (foreign.write_lerobot, "pick"),
}


def imported(path: Path, root: Path, **options: Any) -> list[Episode]:
    """Import `path` as lab/set-v0 and return its episodes."""
    done = importing.import_dataset(path, "lab/set-v0", options=Options(**options), root=root)
    return episodes_of(done.folder)


def episodes_of(folder: Path) -> list[Episode]:
    about = files.read_info(folder / "data")
    storage = files.open_storage(folder / "data", about.metadata)
    return list(map(files.tidy, files.read_episodes(storage, about.name)))


def metadata_of(root: Path) -> dict[str, Any]:
    return json.loads((root / "lab/set-v0/data/metadata.json").read_text())


def test_robomimic_exact(tmp_path: Path) -> None:
    """Demonstrations come in the order of their numbers, with next_obs as last observation and reward 1 as success."""
    foreign.write_robomimic(tmp_path / "low_dim.hdf5")
    found = imported(tmp_path / "low_dim.hdf5", tmp_path / "root")
    for got, made in zip(found, foreign.numbers(), strict=True):
        np.testing.assert_array_equal(got.observations["object"], made["states"][:, :2])
        np.testing.assert_array_equal(got.observations["robot0_eef_pos"], made["states"][:, 2:])
        np.testing.assert_array_equal(got.actions, made["actions"])
        np.testing.assert_array_equal(got.rewards, made["rewards"])
        assert got.success is not None and got.success.tolist() == made["success"].tolist()
    assert [e.terminations[-1] for e in found] == [True, True, False]
    assert [e.truncations[-1] for e in found] == [False, False, True]
    about = metadata_of(tmp_path / "root")
    assert about["source"]["env_args"]["env_name"] == "Lift" and about["license"] is None
    assert files.read_info(tmp_path / "root/lab/set-v0/data").action_space == spaces.Box(-1, 1, (2,), np.float32)


def test_robomimic_without_next(tmp_path: Path) -> None:
    """Without next_obs a success repeats its observation; a demonstration that was cut off loses its last step."""
    foreign.write_robomimic(tmp_path / "a.hdf5", next_obs=False)
    found, made = imported(tmp_path / "a.hdf5", tmp_path / "root"), foreign.numbers()
    assert [len(e.rewards) for e in found] == [5, 7, 3]
    objects = found[0].observations["object"]
    np.testing.assert_array_equal(objects[:5], made[0]["states"][:5, :2])
    np.testing.assert_array_equal(objects[5], objects[4])
    np.testing.assert_array_equal(found[2].observations["object"], made[2]["states"][:4, :2])


def test_robomimic_shaped_reward(tmp_path: Path) -> None:
    """Rewards that are not 0 or 1 do not mean success; --success last says so."""
    foreign.write_robomimic(tmp_path / "a.hdf5", shaped=True)
    plan, _ = importing.plan_import(tmp_path / "a.hdf5")
    assert plan.success is None
    found = imported(tmp_path / "a.hdf5", tmp_path / "root", success="last")
    assert found[2].success is not None and found[2].success.tolist() == [False] * 3 + [True]
    assert found[2].rewards.tolist() == [0.25] * 4 and found[2].terminations[-1]


def test_d4rl_ends(tmp_path: Path) -> None:
    """A terminal repeats its observation, the row of a timeout is left out, unless next_observations are there."""
    for following, lengths in ((False, [5, 7, 3]), (True, [5, 7, 4])):
        path, root = tmp_path / f"{following}.hdf5", tmp_path / str(following)
        foreign.write_d4rl(path, following)
        found = imported(path, root)
        assert [len(e.rewards) for e in found] == lengths
        assert [e.terminations[-1] for e in found] == [True, True, False]
        last = foreign.numbers()[0]["states"][5 if following else 4]
        np.testing.assert_array_equal(found[0].observations[-1], last)
        assert found[1].rewards.tolist() == [0.0] * 6 + [1.0] and found[1].success is None


def test_d4rl_without_timeouts(tmp_path: Path) -> None:
    """Without timeouts the time limit must be given, or episodes would be joined; it counts from each terminal."""
    foreign.write_d4rl(tmp_path / "a.hdf5", following=True)
    with h5py.File(tmp_path / "a.hdf5", "a") as file:
        del file["timeouts"]
    with pytest.raises(DatasetError, match="has no `timeouts`.*`episode_steps`"):
        importing.plan_import(tmp_path / "a.hdf5")
    found = imported(tmp_path / "a.hdf5", tmp_path / "root", episode_steps=4)
    assert [len(e.rewards) for e in found] == [4, 1, 4, 3, 4]
    assert [e.terminations[-1] for e in found] == [False, True, False, True, False]


def test_d4rl_goal_by_key(tmp_path: Path) -> None:
    """A column of infos becomes an observation on demand."""
    foreign.write_d4rl(tmp_path / "maze.hdf5")
    found = imported(tmp_path / "maze.hdf5", tmp_path / "root", keys=("observation=observations", "goal=infos/goal"))
    assert found[0].observations["goal"].tolist() == [[1.0, 1.0]] * 6
    assert found[0].observations["observation"].shape == (6, 3)


def test_ogbench_last_row(tmp_path: Path) -> None:
    """The last row of a trajectory is its last observation only; nothing terminates; the reward is 0, and said."""
    foreign.write_ogbench(tmp_path / "cube.npz")
    plan, _ = importing.plan_import(tmp_path / "cube.npz")
    assert any("no reward: it is 0 everywhere" in rule for rule in plan.rules)
    found = imported(tmp_path / "cube.npz", tmp_path / "root")
    for got, made in zip(found, foreign.numbers(), strict=True):
        np.testing.assert_array_equal(got.observations, made["states"])
        np.testing.assert_array_equal(got.actions, made["actions"])
        assert not got.terminations.any() and got.truncations[-1] and not got.rewards.any()


@pytest.mark.parametrize("version", ["v2.0", "v2.1", "v3.0"])
def test_lerobot_exact(tmp_path: Path, version: str) -> None:
    """Rows, frames and flags of a LeRobot dataset stay together, in one file for all episodes or in one for each."""
    foreign.write_lerobot(tmp_path / "pick", version)
    found, made = imported(tmp_path / "pick", tmp_path / "root"), foreign.numbers(scale=2.0)
    assert [len(e.rewards) for e in found] == [5, 7, 3]
    for i, (got, episode) in enumerate(zip(found, made, strict=True)):
        steps = len(got.rewards)
        rows = min(steps + 1, LENGTHS[i])
        np.testing.assert_array_equal(got.observations["state"][:rows], episode["states"][:rows])
        np.testing.assert_array_equal(got.actions, episode["actions"][:steps])
        frames = got.observations["front"][:rows].astype(int)
        assert frames.shape[1:] == (32, 48, 3)
        assert np.abs(frames - foreign.images(rows, shift=i)).mean() < 2.0  # the next frame is 8 brighter
        assert np.abs(frames - foreign.images(rows, shift=i)).max() < 8
    assert found[0].success is not None and found[0].success[-1] and found[0].terminations[-1]
    about = metadata_of(tmp_path / "root")
    assert about["source"]["fps"] == 10 and about["license"] == "apache-2.0"
    low, high = np.min([e["actions"].min(0) for e in made], 0), np.max([e["actions"].max(0) for e in made], 0)
    space = files.read_info(tmp_path / "root/lab/set-v0/data").action_space
    assert isinstance(space, spaces.Box) and np.allclose(space.low, low) and np.allclose(space.high, high)


def test_camera_resized(tmp_path: Path) -> None:
    """A camera is found by its name and resized; PNG images in the rows are exact."""
    foreign.write_lerobot(tmp_path / "pick", still=True)
    keys = ("state=observation.state", "cam:front@16x24", "cam:wrist")
    found = imported(tmp_path / "pick", tmp_path / "root", keys=keys)
    assert found[1].observations["front"].shape == (8, 16, 24, 3)
    np.testing.assert_array_equal(found[1].observations["wrist"][:7], foreign.images(7, shift=1))
    mean = foreign.images(7, shift=1).reshape(7, 16, 2, 24, 2, 3).mean((2, 4))
    assert np.abs(found[1].observations["front"][:7] - mean).max() < 8


@pytest.mark.parametrize("suffix", [".npz", ".hdf5"])
def test_plain_arrays(tmp_path: Path, suffix: str) -> None:
    """Arrays of documented names: nested observations, images with channels first, ends by count, success."""
    steps = sum(LENGTHS)
    arrays = {
        "observations/state": foreign.flat("states").astype(np.float64),
        "observations/camera": np.moveaxis(foreign.images(steps), -1, 1),
        "actions": foreign.flat("actions"),
        "success": foreign.flat("success"),
        "episode_ends": np.cumsum(LENGTHS),
    }
    path = tmp_path / f"own{suffix}"
    if suffix == ".npz":
        np.savez(path, **arrays)
    else:
        with h5py.File(path, "w") as file:
            for key, value in arrays.items():
                file[key] = value
    found = imported(path, tmp_path / "root")
    assert [len(e.rewards) for e in found] == [5, 7, 3]
    np.testing.assert_array_equal(found[1].observations["camera"][:7], foreign.images(steps)[5:12])
    assert found[0].rewards.tolist() == [0.0] * 4 + [1.0] and found[0].terminations[-1]
    assert found[0].observations["state"].dtype == np.float32


def test_episode_steps(tmp_path: Path) -> None:
    """Rows without any end are refused, or cut after a given number."""
    np.savez(tmp_path / "own.npz", observations=np.zeros((10, 2)), actions=np.zeros((10, 1), np.float32))
    with pytest.raises(DatasetError, match="does not say where its 10 rows end an episode.*`episode_steps`"):
        importing.plan_import(tmp_path / "own.npz")
    found = imported(tmp_path / "own.npz", tmp_path / "root", episode_steps=4)
    assert [len(e.rewards) for e in found] == [3, 3, 1]


def test_interrupted_import_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was imported before a kill is not read again, and the dataset is the one of an import in one go."""
    path, root = tmp_path / "pick", tmp_path / "root"
    foreign.write_lerobot(path)
    whole = imported(path, tmp_path / "other")
    write, written = importing.write_episode, []

    def dies(part: Path, *rest: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(part.name)
        write(part, *rest)

    monkeypatch.setattr(importing, "write_episode", dies)
    with pytest.raises(KeyboardInterrupt):
        imported(path, root)
    assert datasets.list_datasets(root) == []
    with pytest.raises(DatasetError, match="interrupted, and its options is not that of this one: give the command"):
        imported(path, root, reward="zero")
    written.clear()
    monkeypatch.setattr(importing, "write_episode", lambda part, *rest: (written.append(part.name), write(part, *rest)))
    again = imported(path, root)
    assert written == ["0000002.npz"]
    for one, two in zip(whole, again, strict=True):
        np.testing.assert_array_equal(one.observations["front"], two.observations["front"])
        np.testing.assert_array_equal(one.actions, two.actions)
    assert not list(root.glob("lab/.*"))
    with pytest.raises(DatasetError, match="exists already"):
        imported(path, root)


def test_fingerprint_moves_with_data(tmp_path: Path) -> None:
    """The fingerprint of a source is that of its bytes, wherever it lies."""
    prints = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        foreign.write_ogbench(tmp_path / name / "cube.npz")
        (tmp_path / name / "LICENSE").write_text("MIT License\n...")
        imported(tmp_path / name / "cube.npz", tmp_path / f"{name}-root")
        about = metadata_of(tmp_path / f"{name}-root")
        assert about["license"] == "MIT License\n..."
        prints.append(about["source_fingerprint"])
    assert prints[0] == prints[1] and len(prints[0]) == 64


@pytest.mark.parametrize("name", [*WRITERS])
def test_truncated_file_refused(tmp_path: Path, name: str) -> None:
    """Half a file is refused in one line that names it, and nothing appears under the id."""
    writer, file = WRITERS[name]
    writer(tmp_path / file)
    path = tmp_path / file
    broken = path / "data/chunk-000/file-000.parquet" if path.is_dir() else path
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    with pytest.raises(DatasetError) as error:
        importing.import_dataset(path, "lab/set-v0", root=tmp_path / "root")
    assert str(broken) in str(error.value) and "\n" not in str(error.value)
    assert "truncated" in str(error.value) or "cannot be read" in str(error.value)
    assert datasets.list_datasets(tmp_path / "root") == []


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_pickles_refused(tmp_path: Path) -> None:
    """A pickle is refused with the reason, as a file and inside an npz, and its code never runs."""
    ran = tmp_path / "ran"
    (tmp_path / "demos.pkl").write_bytes(pickle.dumps([Trap(ran)]))
    (tmp_path / "renamed.hdf5").write_bytes(pickle.dumps([Trap(ran)]))
    for name in ("demos.pkl", "renamed.hdf5"):
        with pytest.raises(DatasetError, match="is a pickle, and is not read: unpickling runs any code"):
            open_source(tmp_path / name)
    objects = np.empty(3, object)
    objects[:] = [Trap(ran)] * 3
    np.savez(tmp_path / "own.npz", observations=np.zeros((3, 2)), actions=np.zeros((3, 1)), dones=objects)
    with pytest.raises(DatasetError, match="'dones' holds pickled Python objects"):
        open_source(tmp_path / "own.npz")
    assert not ran.exists()


def test_foreign_file_refused(tmp_path: Path) -> None:
    """Other files are refused with what was found in them."""
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DatasetError, match="of no known format \\(neither HDF5 nor npz\\)"):
        open_source(tmp_path / "notes.txt")
    np.savez(tmp_path / "x.npz", obs=np.zeros(3), acts=np.zeros(3))
    with pytest.raises(DatasetError, match="a zip file with acts, obs"):
        open_source(tmp_path / "x.npz")
    with pytest.raises(DatasetError, match="needs arrays `observations` and `actions`; it has acts, obs"):
        open_source(tmp_path / "x.npz", "arrays")
    with pytest.raises(DatasetError, match="is not there"):
        open_source(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="did you mean 'lerobot'"):
        open_source(tmp_path / "x.npz", "leroboot")


def test_unequal_lengths_refused(tmp_path: Path) -> None:
    """Columns of other lengths are refused with both numbers."""
    np.savez(tmp_path / "x.npz", observations=np.zeros((9, 2)), actions=np.zeros((8, 1), np.float32), dones=np.ones(8))
    with pytest.raises(DatasetError, match="'observations' has 9 rows and 'actions' 8"):
        open_source(tmp_path / "x.npz")
    foreign.write_robomimic(tmp_path / "a.hdf5")
    with h5py.File(tmp_path / "a.hdf5", "a") as file:
        del file["data/demo_1/obs/object"]
        file["data/demo_1/obs/object"] = np.zeros((4, 2))
    with pytest.raises(DatasetError, match="'obs/object' has 4 rows and 'actions' 7 \\(episode 1\\)"):
        imported(tmp_path / "a.hdf5", tmp_path / "root")


def test_missing_keys_named(tmp_path: Path) -> None:
    """A column that is not there is refused with those that are."""
    foreign.write_lerobot(tmp_path / "pick")
    with pytest.raises(
        DatasetError, match="no column 'actoin' for the action; did you mean 'action'.*observation.state"
    ):
        importing.plan_import(tmp_path / "pick", options=Options(action="actoin"))
    with pytest.raises(ConfigError, match="0 cameras fit; there are observation.images.front"):
        importing.plan_import(tmp_path / "pick", options=Options(keys=("cam:top",)))
    with pytest.raises(ConfigError, match="expected a size as HEIGHTxWIDTH"):
        importing.plan_import(tmp_path / "pick", options=Options(keys=("observation.state@8x8",)))
    with pytest.raises(DatasetError, match="expected floats"):
        importing.plan_import(tmp_path / "pick", options=Options(action="task_index"))
    with pytest.raises(ConfigError, match="two observations, or an image, are called 'a'"):
        importing.plan_import(tmp_path / "pick", options=Options(keys=("a=action", "a=observation.state")))


def test_nan_refused_or_dropped(tmp_path: Path) -> None:
    """An episode with NaN is refused with its place; --drop-bad leaves it out and counts it."""
    foreign.write_robomimic(tmp_path / "a.hdf5")
    with h5py.File(tmp_path / "a.hdf5", "a") as file:
        file["data/demo_1/actions"][3, 1] = np.nan  # pyright: ignore[reportIndexIssue]
    with pytest.raises(DatasetError, match="episode 1, step 3: actions has nan in entry 1.*`drop_bad`"):
        imported(tmp_path / "a.hdf5", tmp_path / "root")
    done = importing.import_dataset(
        tmp_path / "a.hdf5", "lab/set-v0", options=Options(drop_bad=True), root=tmp_path / "root"
    )
    assert done.episodes == 2 and [number for number, _ in done.dropped] == [1]
    assert json.loads((done.folder / "data/metadata.json").read_text())["dropped_episodes"] == 1


def test_short_video_refused(tmp_path: Path) -> None:
    """A video shorter than its rows is refused with the row that has no frame."""
    foreign.write_lerobot(tmp_path / "pick", "v2.1")
    film = tmp_path / "pick/videos/chunk-000/observation.images.front/episode_000001.mp4"
    film.unlink()
    foreign.write_video(film, foreign.images(4), 10)
    with pytest.raises(DatasetError, match="shorter than its rows: episode 1 has 7 of them.*row 4"):
        imported(tmp_path / "pick", tmp_path / "root")
    film.unlink()
    with pytest.raises(DatasetError, match="episode_000001.mp4 is missing"):
        imported(tmp_path / "pick", tmp_path / "root")


def test_lerobot_faults_named(tmp_path: Path) -> None:
    """Unknown versions, rows that the metadata miscounts, and pointers of Git LFS are refused by name."""
    foreign.write_lerobot(tmp_path / "old", codebase_version="v1.6")
    with pytest.raises(DatasetError, match="codebase_version 'v1.6'; o2o reads v2.0, v2.1, v3.0"):
        open_source(tmp_path / "old")
    foreign.write_lerobot(tmp_path / "pick", "v2.1", camera=False)
    lines = (tmp_path / "pick/meta/episodes.jsonl").read_text().replace('"length": 7', '"length": 8')
    (tmp_path / "pick/meta/episodes.jsonl").write_text(lines)
    with pytest.raises(DatasetError, match="episode 1 has 7 rows in place of the 8"):
        imported(tmp_path / "pick", tmp_path / "root")
    rows = tmp_path / "pick/data/chunk-000/episode_000000.parquet"
    rows.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(DatasetError, match="pointer of Git LFS: run `git lfs pull`"):
        imported(tmp_path / "pick", tmp_path / "root2")


def test_missing_package_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pyarrow the error names the package and the extra."""
    foreign.write_lerobot(tmp_path / "pick")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(DatasetError, match="need pyarrow, which is not installed: pip install 'o2o\\[lerobot\\]'"):
        open_source(tmp_path / "pick")


def test_lerobot_round_trip(tmp_path: Path) -> None:
    """A dataset comes back from LeRobot with its numbers; one that was cut off loses the last step, as documented."""
    foreign.write_robomimic(tmp_path / "a.hdf5", camera=True)
    before = imported(tmp_path / "a.hdf5", tmp_path / "root")
    out = to_lerobot("lab/set-v0", tmp_path / "pick", fps=20, root=tmp_path / "root")
    after = imported(out, tmp_path / "again")
    for one, two in zip(before, after, strict=True):
        steps = len(two.rewards)
        assert steps == len(one.rewards) - (not one.terminations[-1])
        np.testing.assert_array_equal(one.actions[:steps], two.actions)
        np.testing.assert_array_equal(one.rewards[:steps], two.rewards)
        np.testing.assert_array_equal(one.success[:steps], two.success)  # pyright: ignore[reportOptionalSubscript]
        np.testing.assert_array_equal(one.observations["object"][:steps], two.observations["object"][:steps])
        frames = [e.observations["agentview_image"][:steps].astype(int) for e in (one, two)]
        assert np.abs(frames[0] - frames[1]).max() < 8
        assert one.terminations[-1] == two.terminations[-1]
    info = json.loads((out / "meta/info.json").read_text())
    assert info["total_frames"] == sum(LENGTHS) and info["codebase_version"] == "v3.0" and info["fps"] == 20
    actions = np.concatenate([e["actions"] for e in foreign.numbers()])
    stats = json.loads((out / "meta/stats.json").read_text())["action"]
    assert np.allclose(stats["mean"], actions.mean(0), atol=1e-6) and np.allclose(
        stats["std"], actions.std(0), atol=1e-6
    )
    assert stats["count"] == [sum(LENGTHS)]
    with pytest.raises(DatasetError, match="exists already"):
        to_lerobot("lab/set-v0", out, fps=20, root=tmp_path / "root")
    with pytest.raises(ConfigError, match="does not say its steps per second"):
        to_lerobot("lab/set-v0", tmp_path / "b", fps=0, root=tmp_path / "root")


def test_check_drop_bad(tmp_path: Path) -> None:
    """`--drop-bad` writes the sound episodes, byte for byte, as a new dataset and leaves the old one as it was."""
    foreign.write_ogbench(tmp_path / "cube.npz")
    imported(tmp_path / "cube.npz", tmp_path)
    data = tmp_path / "lab/set-v0/data/main_data.hdf5"
    with h5py.File(data, "a") as file:
        file["episode_1/observations"][2, 0] = np.inf  # pyright: ignore[reportIndexIssue]
    before, sound = data.read_bytes(), episodes_of(tmp_path / "lab/set-v0")
    kept = without_bad("lab/set-v0", root=tmp_path)
    assert kept.dropped == 1 and "episode 1, step 2" in kept.problems[0] and kept.folder.name == "set-checked-v0"
    found = episodes_of(kept.folder)
    assert [len(e.rewards) for e in found] == [5, 4] and data.read_bytes() == before
    np.testing.assert_array_equal(found[1].observations, sound[2].observations)
    assert all("env_spec" in line for line in datasets.check(kept.folder))


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A dry run prints what becomes what and writes nothing; the import prints what it made."""
    foreign.write_ogbench(tmp_path / "cube.npz")
    words = ["data", "import", str(tmp_path / "cube.npz"), "lab/cube-v0", "--root", str(tmp_path / "root")]
    with pytest.raises(SystemExit) as end:
        main([*words, "--dry-run"])
    out = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and not (tmp_path / "root").exists()
    assert "OGBench npz: 3 episodes, 19 rows" in out and "qpos" in out and "left out" in out and "licence" in out
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 0 and "imported 3 episodes, 16 steps" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2 and "exists already" in capsys.readouterr().err


def test_environment_gives_spaces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With --env the dataset has the environment's spaces, and data of another shape are refused."""
    rows = {"observations": np.zeros((8, 4)), "actions": np.full((8, 1), 2.0, np.float32), "dones": np.arange(8) == 7}
    np.savez(tmp_path / "own.npz", **rows)
    words = ["data", "import", str(tmp_path / "own.npz"), "--env", "InvertedPendulum-v5", "--root", str(tmp_path)]
    with pytest.raises(SystemExit) as end:
        main([*words[:3], "lab/a-v0", *words[3:]])
    assert end.value.code == 0
    about = datasets.info("lab/a-v0", tmp_path)
    assert about.env_id == "InvertedPendulum-v5" and about.action_space == spaces.Box(-3.0, 3.0, (1,), np.float32)
    np.savez(tmp_path / "own.npz", **{**rows, "observations": np.zeros((8, 5))})
    with pytest.raises(SystemExit) as end:
        main([*words[:3], "lab/b-v0", *words[3:]])
    assert end.value.code == 2 and "the environment has observation[4]" in capsys.readouterr().err
