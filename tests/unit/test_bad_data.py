"""Bad datasets: each fault, made on disk, gives its own one-line `DatasetError`, from `load` and from `check`."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

from o2o import envs
from o2o.data import datasets
from o2o.data.datasets import Episode
from o2o.errors import DatasetError, EnvironmentMismatchError

NAME = "test/bad-v0"
OBSERVATIONS = spaces.Box(-np.inf, np.inf, (11,), np.float64)
ACTIONS = spaces.Box(-1.0, 1.0, (3,), np.float32)


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("O2O_CACHE", str(tmp_path / "cache"))
    return tmp_path / "datasets"


def episode(steps: int = 4, seed: int = 0) -> Episode:
    rng = np.random.default_rng(seed)
    return Episode(
        observations=rng.normal(size=(steps + 1, 11)),
        actions=rng.uniform(-1, 1, (steps, 3)).astype(np.float32),
        rewards=rng.normal(size=steps),
        terminations=np.zeros(steps, bool),
        truncations=np.arange(steps) == steps - 1,
    )


def put(root: Path, episodes: list[Episode], actions: spaces.Space = ACTIONS, spec: EnvSpec | None = None) -> None:
    datasets.write(NAME, episodes, observation_space=OBSERVATIONS, action_space=actions, spec=spec, root=root)


def test_write_refuses_empty_episode(root):
    """An episode without steps is not written, and nothing is left behind."""
    with pytest.raises(DatasetError, match="has no steps; leave it out"):
        put(root, [episode(), episode(steps=0)])
    assert not list(root.rglob("*.hdf5"))


def hdf5(root: Path) -> Path:
    return root / NAME / "data" / "main_data.hdf5"


def error(root: Path, **options) -> str:
    """The message of loading, which must be one line and name the dataset."""
    with pytest.raises(DatasetError) as caught:
        datasets.load(NAME, root=root, **options)
    message = str(caught.value)
    assert "\n" not in message and NAME in message
    return message


def test_unknown_id_suggests_near_ones(root):
    """The error for an unknown id suggests near ones and says how to download."""
    put(root, [episode()])
    with pytest.raises(DatasetError) as caught:
        datasets.load("test/bat-v0", root=root)
    message = str(caught.value)
    assert "did you mean 'test/bad-v0'?" in message and "minari download test/bat-v0" in message
    with pytest.raises(DatasetError, match="o2o data make pointmaze-umaze"):
        datasets.load("o2o/embedded/pointmaze-umaze-v0", root=root / "nowhere")


def test_no_network(root, monkeypatch):
    """A download that fails without a network is a dataset error that says so."""

    def refuse(name):
        raise ConnectionError("Failed to resolve 'huggingface.co'\n(no route)")

    monkeypatch.setattr("minari.download_dataset", refuse)
    message = error(root, download=True)
    assert "could not be downloaded (ConnectionError" in message and "is there a network?" in message
    with pytest.raises(DatasetError, match="could not be downloaded"):
        datasets.load("malformed id", root=root, download=True)


def test_truncated_file(root):
    """A truncated file is reported with the episode that cannot be read."""
    put(root, [episode(200, i) for i in range(20)])
    whole = hdf5(root).read_bytes()
    hdf5(root).write_bytes(whole[: len(whole) // 2])
    assert "episode 0 of 20 cannot be read, the file is corrupt or truncated" in error(root)
    assert len(datasets.check(NAME, root)) == 1


def test_overwritten_file(root):
    """A file overwritten with something else is reported as corrupt."""
    put(root, [episode()])
    hdf5(root).write_bytes(b"this is not HDF5" * 100)
    assert "corrupt or truncated" in error(root)


def test_missing_episode_named(root):
    """An episode that is missing is named."""
    put(root, [episode(), episode()])
    with h5py.File(hdf5(root), "a") as file:
        del file["episode_1"]
    assert "episode 1 of 2 cannot be read" in error(root)


def test_missing_data_or_metadata(root):
    """A missing data file and missing metadata are each reported."""
    put(root, [episode()])
    hdf5(root).unlink()
    assert "cannot be opened" in error(root)
    (root / NAME / "data" / "metadata.json").unlink()
    assert "has no metadata.json" in error(root)


def test_unreadable_metadata(root):
    """Metadata that cannot be read, or lack a field, are reported with what is wrong."""
    put(root, [episode()])
    path = root / NAME / "data" / "metadata.json"
    text = path.read_text()
    path.write_text(text[:50])
    assert "not readable JSON" in error(root)
    path.write_text(json.dumps({"data_format": "hdf5"}))
    assert "lacks dataset_id, total_episodes, total_steps" in error(root)
    path.write_text("[]")
    assert "lacks dataset_id, total_episodes, total_steps, data_format" in error(root)
    path.write_text(json.dumps(json.loads(text) | {"total_steps": None}))
    assert "lacks total_steps" in error(root)
    path.write_text(json.dumps(json.loads(text) | {"observation_space": '{"type": "Blob"}'}))
    assert "its observation_space cannot be read" in error(root)
    path.write_text(json.dumps(json.loads(text) | {"env_spec": "{}"}))
    assert "its env_spec cannot be read" in error(root)
    path.write_text(json.dumps(json.loads(text) | {"env_spec": {"id": "Hopper-v5"}}))
    assert "its env_spec cannot be read" in error(root)


def test_empty_dataset(root):
    """A dataset without episodes is refused as empty."""
    put(root, [])
    assert "it is empty (0 episodes)" in error(root)


def test_zero_length_episode(root):
    """An episode without steps is named."""
    put(root, [episode(), episode()])
    with h5py.File(hdf5(root), "a") as file:
        for key in ("actions", "rewards", "terminations", "truncations", "observations"):
            data = file[f"episode_1/{key}"]
            data.resize((1 if key == "observations" else 0, *data.shape[1:]))
    assert "episode 1 has no steps" in error(root)


@pytest.mark.parametrize(("key", "step"), [("observations", 4), ("rewards", 2), ("actions", 0)])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_values(root, key, step, value):
    """Values that are not finite are reported with their episode and step."""
    bad = episode()
    getattr(bad, key)[step, ...] = value
    put(root, [episode(), bad])
    message = error(root)
    assert f"episode 1, step {step}: {key}" in message and f"{value}" in message


def test_values_too_large_for_float32(root):
    """Values too large for float32 are reported with their episode, step and entry."""
    bad = episode()
    bad.observations[2, 3] = 1e300
    put(root, [bad])
    assert "episode 0, step 2: observations (observation) has 1e+300 in entry 3" in error(root)


def test_actions_outside_bounds(root):
    """Actions outside the bounds are refused unless they are to be clipped."""
    bad = episode()
    bad.actions[3, 1] = 1.37
    put(root, [episode(), bad])
    message = error(root)
    assert "episode 1, step 3: action entry 1 is 1.37, outside the bounds [-1, 1]" in message
    assert "set `clip_actions` to clip them" in message
    data = datasets.load(NAME, root=root, clip_actions=True)
    assert data.arrays["actions"].max() == np.float32(0.99999)
    assert "outside the bounds" in error(root)


def test_actions_at_bounds_accepted(root):
    """Actions at the bounds are fine."""
    put(root, [replace(episode(), actions=np.array([[1, -1, np.nextafter(np.float32(1), 2)]] * 4, np.float32))])
    assert datasets.load(NAME, root=root).size == 4


def test_discrete_actions(root):
    """Discrete actions are refused."""
    put(root, [replace(episode(), actions=np.zeros(4, np.int64))], spaces.Discrete(3))
    assert "Discrete(3)" in error(root) and "not supported" in error(root)
    assert "Discrete(3)" in datasets.check(NAME, root)[0]


def test_unbounded_actions(root):
    """Actions without finite bounds are refused."""
    put(root, [episode()], spaces.Box(-np.inf, np.inf, (3,), np.float32))
    assert "no finite bounds" in error(root)


def test_mismatched_lengths(root):
    """Columns whose lengths do not fit are reported with their episode."""
    put(root, [episode(), replace(episode(), observations=np.zeros((4, 11)))])
    assert "episode 1 has 4 observations for 4 steps, expected 5" in error(root)
    shutil.rmtree(root / NAME)
    put(root, [replace(episode(), actions=np.zeros((3, 3), np.float32))])
    assert "episode 0 has 3 actions for 4 rewards" in error(root)


def test_mismatched_shapes(root):
    """Shapes that do not fit the spaces are reported with their episode."""
    put(root, [replace(episode(), observations=np.zeros((5, 10)))])
    assert "episode 0: observation entry 'observation' has shape (5, 10), expected (11,)" in error(root)
    shutil.rmtree(root / NAME)
    put(root, [replace(episode(), actions=np.zeros((4, 2), np.float32))])
    assert "episode 0" in error(root) and "actions" in error(root)


def test_images_not_uint8(root):
    """Images that are not uint8 are refused."""
    space = spaces.Dict({"camera": spaces.Box(0, 255, (8, 8, 3), np.uint8), "x": OBSERVATIONS})
    bad = episode()
    bad = replace(bad, observations={"camera": np.full((5, 8, 8, 3), 0.5), "x": bad.observations})
    datasets.write(NAME, [bad], observation_space=space, action_space=ACTIONS, spec=None, root=root)
    words = "episode 0: observation entry 'camera': images are float64, expected uint8"
    assert words in error(root) and any(words in problem for problem in datasets.check(NAME, root))


def test_mixture_needs_same_action_space(root):
    """Datasets of other actions are not mixed, whatever their range."""
    put(root, [episode()])
    wide = replace(episode(), actions=np.zeros((4, 2), np.float32))
    other = {"observation_space": OBSERVATIONS, "action_space": spaces.Box(-1.0, 1.0, (2,), np.float32)}
    datasets.write("test/other-v0", [wide], **other, spec=None, root=root)
    for action_range in ("space", "data"):
        with pytest.raises(DatasetError, match=r"bad-v0 and test/other-v0 cannot be mixed: action_space Box\(.*\(3,\)"):
            datasets.load([NAME, "test/other-v0"], root=root, action_range=action_range)


def test_root_is_file(root):
    """A root that is a file is refused and left as it is."""
    root.write_text("mine")
    with pytest.raises(DatasetError, match="could not be written to .*: .*Not a directory"):
        put(root, [episode()])
    for refused in (envs.make_embedded, datasets.load):
        with pytest.raises(DatasetError, match="datasets is a file, expected a folder of datasets"):
            refused("o2o/embedded/pointmaze-umaze-v0", root=root)
    assert root.read_text() == "mine"


def test_check_collects_all_problems(root):
    first, second = episode(), episode()
    first.observations[0, 0] = np.nan
    first.actions[1, 0] = 3.0
    second.rewards[2] = np.inf
    put(root, [first, second])
    path = root / NAME / "data" / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"total_steps": 99}))
    problems = datasets.check(NAME, root)
    assert len(problems) == 4
    for text in (
        "episode 0, step 0",
        "outside the bounds",
        "episode 1, step 2",
        "99 steps, the data has 8",
    ):
        assert sum(text in problem for problem in problems) == 1


def test_bad_dataset_not_cached(root, tmp_path):
    """Nothing is cached of a bad dataset."""
    put(root, [])
    error(root)
    assert not (tmp_path / "cache").exists()


def test_env_spaces_mismatch(root):
    """A dataset whose spaces differ from the environment's is refused with both named."""
    put(root, [episode()], spec=EnvSpec("Hopper-v5"))
    about = datasets.info(NAME, root)
    with pytest.raises(EnvironmentMismatchError) as caught:
        envs.make("Walker2d-v5", dataset=about)
    assert NAME in str(caught.value) and "Walker2d-v5" in str(caught.value) and "\n" not in str(caught.value)
    assert "observation[11]" in str(caught.value) and "observation[17]" in str(caught.value)
    wide = replace(about, action_space=spaces.Box(-2.0, 2.0, (3,), np.float32))
    with pytest.raises(EnvironmentMismatchError, match=r"has actions Box\(-2.0, 2.0.*Hopper-v5 has Box\(-1.0, 1.0"):
        envs.make("Hopper-v5", dataset=wide)
    with pytest.raises(EnvironmentMismatchError, match="does not name its environment; give one with `env`"):
        envs.make(replace(about, env_spec=None))
