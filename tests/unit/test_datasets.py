"""Loading: against Minari's own reader, transforms, Monte-Carlo returns, cache, mixtures, writing, recorded sets."""

import contextlib
import os
from dataclasses import replace
from pathlib import Path

import minari
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

from o2o import envs
from o2o.data import datasets
from o2o.data.datasets import Episode
from o2o.data.task import Task
from o2o.errors import ConfigError, DatasetError

SPACE = spaces.Dict(
    {
        "observation": spaces.Box(-np.inf, np.inf, (3,), np.float64),
        "desired_goal": spaces.Box(-np.inf, np.inf, (2,), np.float64),
        "achieved_goal": spaces.Box(-np.inf, np.inf, (2,), np.float64),
        "camera": spaces.Box(0, 255, (16, 16, 3), np.uint8),
    }
)
FLAT = spaces.Box(-np.inf, np.inf, (3,), np.float64)
ACTIONS = spaces.Box(-2.0, 2.0, (2,), np.float32)
BINARY = Task(
    "binary", binary=True, sparse=True, has_success=True, terminate_on_success=True, reward_scale=10.0, reward_bias=5.0
)


@pytest.fixture(autouse=True)
def _private_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("O2O_CACHE", str(tmp_path / "cache"))


def episode(steps: int, seed: int, success=None, terminated: bool = False, space: spaces.Space = FLAT) -> Episode:
    """An episode of noise; `success` holds flags per step."""
    rng = np.random.default_rng(seed)

    def draw(sub: spaces.Space):
        if isinstance(sub, spaces.Dict):
            return {key: draw(value) for key, value in sub.spaces.items()}
        if sub.dtype == np.uint8:
            return np.full((steps + 1, *sub.shape), rng.integers(255), np.uint8)
        return rng.normal(size=(steps + 1, *sub.shape))

    ends = np.arange(steps) == steps - 1
    return Episode(
        observations=draw(space),
        actions=rng.uniform(-2, 2, (steps, 2)).astype(np.float32),
        rewards=rng.normal(size=steps),
        terminations=ends & terminated,
        truncations=ends & (not terminated),
        success=None if success is None else np.asarray(success, bool),
        seed=seed,
    )


def put(root: Path, episodes: list[Episode], name: str = "test/set-v0", space: spaces.Space = FLAT, **options) -> str:
    datasets.write(
        name, episodes, observation_space=space, action_space=ACTIONS, spec=EnvSpec("Hopper-v5"), root=root, **options
    )
    return name


def test_rows_match_minari(tmp_path, monkeypatch):
    """The rows equal those of Minari's own reader."""
    episodes = [episode(5, 0, terminated=True, space=SPACE), episode(3, 1, space=SPACE)]
    name = put(tmp_path, episodes, space=SPACE)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    data = datasets.load(name)
    theirs = list(minari.load_dataset(name))
    keys = ("desired_goal", "observation")
    for rows, shift in ((data.arrays["observations"], 0), (data.arrays["next_observations"], 1)):
        expected = [
            np.concatenate([e.observations[k][shift : len(e.rewards) + shift] for k in keys], -1) for e in theirs
        ]
        np.testing.assert_array_equal(rows["state"], np.concatenate(expected).astype(np.float32))
        images = np.concatenate([e.observations["camera"][shift : len(e.rewards) + shift] for e in theirs])
        assert rows["camera"].dtype == np.uint8
        np.testing.assert_array_equal(rows["camera"], images)
    np.testing.assert_allclose(data.arrays["actions"], np.concatenate([e.actions for e in theirs]) / 2, atol=1e-5)
    np.testing.assert_array_equal(
        data.arrays["rewards"], np.concatenate([e.rewards for e in theirs]).astype(np.float32)
    )
    assert data.arrays["masks"].tolist() == [1, 1, 1, 1, 0, 1, 1, 1]
    assert np.flatnonzero(data.arrays["ends"]).tolist() == [4, 7]


def test_actions_stay_off_bounds(tmp_path):
    """Actions stay off the bounds."""
    full = replace(episode(4, 0), actions=np.full((4, 2), 2.0, np.float32))
    data = datasets.load(put(tmp_path, [full]), root=tmp_path)
    assert data.arrays["actions"].max() == np.float32(0.99999)


def test_unmarked_episode_last_row_ends(tmp_path):
    """The last row of an unmarked episode is an end."""
    open_end = replace(episode(3, 0), truncations=np.zeros(3, bool))
    data = datasets.load(put(tmp_path, [open_end, episode(2, 1)]), root=tmp_path)
    assert data.arrays["ends"].tolist() == [False, False, True, False, True]
    assert data.arrays["masks"].tolist() == [1, 1, 1, 1, 1]


def test_binary_task_ends_at_success(tmp_path):
    """A binary task cuts an episode after the last success."""
    episodes = [episode(5, 0, [0, 1, 0, 1, 0]), episode(3, 1, [0, 0, 0])]
    name = put(tmp_path, episodes)
    arrays = datasets.load(name, root=tmp_path, task=BINARY).arrays
    assert arrays["rewards"].tolist() == [-5, 5, -5, 5, -5, -5, -5]
    assert arrays["masks"].tolist() == [1, 0, 1, 0, 1, 1, 1]
    assert arrays["ends"].tolist() == [False, True, False, True, False, False, True]
    np.testing.assert_allclose(arrays["mc_returns"], [-0.05, 5, -0.05, 5, -500, -500, -500], atol=1e-4)
    first = episodes[0].observations.astype(np.float32)
    np.testing.assert_array_equal(arrays["next_observations"][3], first[4])
    np.testing.assert_array_equal(arrays["observations"][4], episodes[1].observations[0].astype(np.float32))


def test_only_successes(tmp_path):
    """`only_successes` leaves failed episodes out, and is refused where none succeeds or none is known to."""
    name = put(tmp_path, [episode(3, 1, [0, 0, 0]), episode(3, 0, [0, 1, 0])])
    data = datasets.load(name, root=tmp_path, task=replace(BINARY, only_successes=True))
    assert data.size == 2 and data.info.episode_success.tolist() == [False, True]
    name = put(tmp_path, [episode(3, 1, [0, 0, 0])], "test/failures-v0")
    with pytest.raises(DatasetError, match="no episode succeeds"):
        datasets.load(name, root=tmp_path, task=replace(BINARY, only_successes=True))
    put(tmp_path, [episode(3, 1)], "test/unknown-v0")
    for names in ("test/unknown-v0", ["test/set-v0", "test/unknown-v0"]):
        with pytest.raises(DatasetError, match="test/unknown-v0: the task keeps only episodes that succeed, and which"):
            datasets.load(names, root=tmp_path, task=Task("dense", has_success=True, only_successes=True))


def test_maze_terminates_on_reward_one(tmp_path):
    """A maze task terminates on reward one and keeps what follows."""
    rewards = replace(episode(4, 0), rewards=np.array([0.0, 1.0, 0.0, 0.0]))
    arrays = datasets.load(put(tmp_path, [rewards]), root=tmp_path, task=envs.task_for("PointMaze_UMaze-v3")).arrays
    assert arrays["rewards"].tolist() == [-5, 5, -5, -5]
    assert arrays["masks"].tolist() == [1, 0, 1, 1]
    assert arrays["ends"].tolist() == [False, True, False, True]
    np.testing.assert_allclose(arrays["mc_returns"], [-0.05, 5, -500, -500], atol=1e-4)


def test_binary_needs_success_flags(tmp_path):
    """A binary task without success flags is an error."""
    with pytest.raises(DatasetError, match=r"needs infos\['success'\]"):
        datasets.load(put(tmp_path, [episode(3, 0)]), root=tmp_path, task=BINARY)


G = datasets.monte_carlo_returns


def test_returns_of_specification():
    """The returns of a failed and of a solved trajectory are those of the specification."""
    ends = np.array([False, False, True])
    failed = G(np.full(3, -5.0), np.ones(3), ends, 0.99, -5.0)
    np.testing.assert_allclose(failed, [-500, -500, -500], rtol=1e-6)
    solved = G(np.array([-5.0, -5, 5]), np.array([1.0, 1, 0]), ends, 0.99, -5.0)
    np.testing.assert_allclose(solved, [-5.0495, -0.05, 5.0], atol=1e-5)


def test_truncated_dense_tail_is_zero():
    """A dense trajectory that is truncated has a tail of zero."""
    np.testing.assert_allclose(G(np.ones(3), np.ones(3), np.array([0, 0, 1]), 0.5), [1.75, 1.5, 1.0])


def test_returns_stop_at_boundaries():
    """Returns do not leak from one trajectory into another, and terminals block them."""
    rewards, masks = np.array([1.0, 2, 4, 8]), np.ones(4)
    np.testing.assert_allclose(G(rewards, masks, np.array([0, 1, 0, 1]), 0.5), [2, 2, 8, 8])
    np.testing.assert_allclose(G(rewards, np.array([1.0, 0, 1, 1]), np.array([0, 0, 0, 1]), 0.5), [2, 2, 8, 8])


def test_returns_independent_of_block_size(monkeypatch):
    """The returns are the same however many rows are computed together."""
    draw = np.random.default_rng(0)
    rewards, masks, ends = draw.normal(size=50), draw.random(50) > 0.1, draw.random(50) > 0.9
    whole = G(rewards, masks, ends, 0.9)
    assert len(np.unique(whole)) > 45
    for count in (1, 7, 49, 50):
        monkeypatch.setattr(datasets, "RETURN_ROWS", count)
        np.testing.assert_array_equal(G(rewards, masks, ends, 0.9), whole)


def test_failure_rule_per_trajectory():
    """The failure rule is per trajectory and needs all rewards to be the failure's."""
    rewards = np.array([-5.0, -5, -5, 5])
    returns = G(rewards, np.array([1.0, 1, 1, 0]), np.array([0, 1, 0, 1]), 0.99, -5.0)
    np.testing.assert_allclose(returns, [-500, -500, -0.05, 5], atol=1e-4)
    np.testing.assert_allclose(G(rewards[:2], np.ones(2), np.array([0, 1]), 0.99), [-9.95, -5], rtol=1e-6)


def test_returns_edge_cases():
    """Returns are right with no end mark, no rows or no discount; an endless failure needs a discount."""
    np.testing.assert_allclose(G(np.ones(2), np.ones(2), np.zeros(2, bool), 1.0), [2, 1])
    assert G(np.empty(0), np.empty(0), np.empty(0, bool), 0.9, -1.0).shape == (0,)
    with pytest.raises(ConfigError, match="below 1"):
        G(np.ones(2), np.ones(2), np.zeros(2, bool), 1.0, -1.0)


def test_path_root_and_variable_agree(tmp_path, monkeypatch):
    """The path, the root and the environment variable find the same data."""
    name = put(tmp_path, [episode(3, 0)])
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    loaded = [datasets.load(name), datasets.load(name, root=tmp_path), datasets.load(tmp_path / name)]
    assert len({data.fingerprint for data in loaded}) == 1
    assert {data.info.ids for data in loaded} == {(name,)}


def test_fingerprint_depends_on_data_only(tmp_path):
    """The fingerprint is of the data, not of the task or the folder."""
    episodes = [episode(3, 0, [0, 1, 0])]
    first = datasets.load(put(tmp_path / "a", episodes), root=tmp_path / "a")
    second = datasets.load(put(tmp_path / "b", episodes), root=tmp_path / "b", task=BINARY, discount=0.5)
    other = datasets.load(put(tmp_path / "c", [episode(3, 9, [0, 1, 0])]), root=tmp_path / "c")
    assert first.fingerprint == second.fingerprint != other.fingerprint
    assert len(first.fingerprint) == 64


def test_cache_used_and_rebuilt(tmp_path, monkeypatch):
    """The cache is used, and a damaged one is made anew."""
    name = put(tmp_path, [episode(30, 0)])
    first = datasets.load(name, root=tmp_path)
    (entry,) = (tmp_path / "cache").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr("o2o.data.datasets._read_rows", None)
        cached = datasets.load(name, root=tmp_path)
    np.testing.assert_array_equal(cached.arrays["observations"], first.arrays["observations"])
    sound = entry.read_bytes()
    for damaged in (b"", sound[: len(sound) // 2], sound[:200] + b"\xff" * 60 + sound[260:]):
        entry.write_bytes(damaged)
        again = datasets.load(name, root=tmp_path)
        np.testing.assert_array_equal(again.arrays["observations"], first.arrays["observations"])
        assert again.fingerprint == first.fingerprint
        assert len(entry.read_bytes()) == len(sound)
    datasets.load(name, root=tmp_path, achieved_goal=True)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".npz"]


def test_unwritable_cache_tolerated(tmp_path, monkeypatch):
    """A cache that cannot be written does not matter."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("O2O_CACHE", str(tmp_path / "file" / "cache"))
    assert datasets.load(put(tmp_path, [episode(3, 0)]), root=tmp_path).size == 3


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_broken_off_cache_leaves_nothing(tmp_path, monkeypatch, error):
    """A cache entry that was broken off leaves nothing."""

    def broken(file, **_):
        file.write(b"half")
        raise error

    name = put(tmp_path, [episode(3, 0)])
    monkeypatch.setattr("o2o.data.cache.np.savez", broken)
    with contextlib.suppress(KeyboardInterrupt):
        datasets.load(name, root=tmp_path)
    assert list((tmp_path / "cache").iterdir()) == []


def test_mixture_keeps_sources_and_weights(tmp_path):
    """A mixture keeps its sources and weights."""
    names = [put(tmp_path, [episode(3, 0)], "test/a-v0"), put(tmp_path, [episode(5, 1)], "test/b-v0")]
    data = datasets.load(names, root=tmp_path, weights=[3, 1])
    assert [(s.start, s.size, s.weight) for s in data.sources] == [(0, 3, 0.75), (3, 5, 0.25)]
    assert data.size == 8 and data.info.ids == ("test/a-v0", "test/b-v0") and data.info.episodes == 2
    alone = datasets.load(names[1], root=tmp_path)
    np.testing.assert_array_equal(data.arrays["mc_returns"][3:], alone.arrays["mc_returns"])
    assert [s.weight for s in datasets.load(names, root=tmp_path).sources] == [3 / 8, 5 / 8]
    for weights in ([1], [1, -1], [0, 0]):
        with pytest.raises(DatasetError, match="weights"):
            datasets.load(names, root=tmp_path, weights=weights)


def test_mixture_names_differing_spaces(tmp_path):
    """The error for a mixture of different spaces names both."""
    names = [put(tmp_path, [episode(3, 0)], "test/a-v0")]
    names.append(put(tmp_path, [episode(3, 0, space=SPACE)], "test/b-v0", space=SPACE))
    with pytest.raises(DatasetError, match="test/a-v0 and test/b-v0 cannot be mixed: observation_space"):
        datasets.load(names, root=tmp_path)


def test_write_is_atomic(tmp_path):
    """A dataset is written whole or not at all, and never overwrites another."""
    name = put(tmp_path, [episode(3, 0)])
    with pytest.raises(DatasetError, match="exists already"):
        put(tmp_path, [episode(3, 0)])

    def broken():
        yield episode(3, 0)
        raise RuntimeError("the robot fell over")

    with pytest.raises(RuntimeError):
        put(tmp_path, broken(), "test/other-v0")
    assert datasets.list_datasets(tmp_path) == [name]
    assert [path.name for path in (tmp_path / "test").iterdir() if path.is_dir()] == ["set-v0"]
    with pytest.raises(DatasetError, match="not of the form"):
        put(tmp_path, [episode(3, 0)], "no version")


def test_minari_reads_written_dataset(tmp_path, monkeypatch):
    """Minari reads what was written."""
    written = episode(4, 7, [0, 0, 1, 1])
    name = put(tmp_path, [written], metadata={"author": {"me"}, "ref_min_score": 0.0, "ref_max_score": 2.0})
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    theirs = minari.load_dataset(name)
    assert theirs[0].infos["success"].tolist() == [False, False, False, True, True]
    np.testing.assert_array_equal(theirs[0].observations, written.observations)
    assert list(theirs.storage.get_episode_metadata([0]))[0]["seed"] == 7
    assert minari.list_local_datasets().keys() == {name}
    assert minari.get_normalized_score(theirs, np.array([1.0])).tolist() == [0.5]
    assert datasets.info(name).normalized(1.0) == 50.0


def test_normalized_score_needs_own_env(tmp_path):
    """A normalized score needs the environment of the reference scores."""
    scores = {"ref_min_score": 0.0, "ref_max_score": 1.0}
    name = put(tmp_path, [episode(3, 0)], metadata=scores)
    about = datasets.info(name, tmp_path)
    continuing = replace(about, eval_env_spec=EnvSpec("Maze-v0", kwargs={"continuing_task": True}))
    maze = envs.task_for("PointMaze_UMaze-v3")
    assert about.normalized(0.5, maze) == 50.0
    assert continuing.normalized(0.5, maze) is None
    assert replace(about, ref_max_score=None).normalized(0.5) is None


def test_describe_and_check_sound_dataset(tmp_path):
    """A sound dataset is described, and `check` finds no problem in it."""
    name = put(tmp_path, [episode(4, 0, [0, 0, 1, 0]), episode(2, 1, [0, 0], terminated=True)])
    about = datasets.describe(name, tmp_path)
    assert (about["episodes"], about["steps"], about["success"], about["terminated"]) == (2, 6, 0.5, 0.5)
    assert about["env"] == "Hopper-v5" and about["observations"] == "observation[3]"
    assert datasets.check(name, tmp_path) == []


def test_mixture_shares_action_range(tmp_path):
    """The action range of the data is shared by a mixture."""
    gentle = [replace(e, actions=0.3 * e.actions) for e in (episode(40, 0), episode(40, 1))]
    names = [put(tmp_path, [e], f"mix/part{i}-v0") for i, e in enumerate(gentle)]
    plain = datasets.load(names, root=tmp_path)
    own = plain.action_map.to_env(plain.arrays["actions"])
    data = datasets.load(names, root=tmp_path, action_range="data", action_margin=0.2)
    assert data.fingerprint == plain.fingerprint and data.action_map != plain.action_map
    np.testing.assert_allclose(data.action_map.to_env(data.arrays["actions"]), own, atol=1e-5)
    low, high = np.asarray(data.action_map.low), np.asarray(data.action_map.high)
    middle, half = (own.max(0) + own.min(0)) / 2, (own.max(0) - own.min(0)) / 2
    np.testing.assert_allclose(high, np.minimum(middle + 1.2 * half, plain.action_map.high), atol=1e-5)
    np.testing.assert_allclose(low, np.maximum(middle - 1.2 * half, plain.action_map.low), atol=1e-5)


RECORDED = {  # episodes, steps, mean return, standard deviation, success in any step: the data's own README
    "hand_dapg/door/human-v0": (25, 6704, 790.8, 353.1, 0.28),
    "hand_dapg/door/human-replay-v0": (25, 6729, 815.8, 353.4, 0.32),
    "hand_dapg/door/expert-v0": (100, 20000, 2875.5, 571.5, 0.96),
    "hand_dapg/door/noisy-v0": (100, 20000, 885.8, 1094.9, 0.29),
    "hand_dapg/pen/expert-v0": (100, 10000, 2966.1, 1880.9, 0.77),
    "hand_dapg/pen/noisy-v0": (100, 10000, 1264.8, 1787.1, 0.42),
    "hand_dapg/relocate/expert-v0": (100, 20000, 4427.8, 553.8, 1.0),
    "hand_dapg/relocate/noisy-v0": (100, 20000, 595.1, 832.7, 0.45),
    "o2o/hopper/expert-v0": (102, 100697, 3679.5, 241.7, None),
    "o2o/hopper/medium-v0": (241, 100382, 1522.0, 709.6, None),
    "o2o/halfcheetah/expert-v0": (70, 70000, 11505.9, 171.5, None),
    "o2o/halfcheetah/medium-v0": (70, 70000, 4022.5, 86.5, None),
    "o2o/walker2d/expert-v0": (78, 70305, 4613.8, 1209.8, None),
    "o2o/walker2d/medium-v0": (125, 70442, 2505.2, 991.3, None),
    "o2o/pointmaze/umaze-v0": (1478, 100078, 1.0, 0.0, 1.0),
    "o2o/pointmaze/large-v0": (561, 100307, 1.0, 0.0, 1.0),
}


@pytest.mark.data
@pytest.mark.parametrize("name", RECORDED)
def test_recorded_numbers(name):
    """The published datasets have the recorded episodes, steps, returns and success rates."""
    root = os.environ.get("MINARI_DATASETS_PATH")
    if not root or not (Path(root) / name).is_dir():
        pytest.skip(f"{name} is not under MINARI_DATASETS_PATH")
    episodes, steps, mean, std, success = RECORDED[name]
    data = datasets.load(name, cache=False)
    returns = data.info.episode_returns
    assert (data.info.episodes, data.size) == (episodes, steps)
    assert abs(returns.mean() - mean) < 0.06 and abs(returns.std() - std) < 0.06
    assert (data.info.episode_success is None) == (success is None)
    if success is not None:
        assert data.info.episode_success.mean() == pytest.approx(success)
    assert int(data.arrays["ends"].sum()) == episodes


@pytest.mark.data
def test_recorded_rows_match_minari():
    """The rows of a published dataset equal those of Minari's reader."""
    name = "hand_dapg/pen/noisy-v0"
    root = os.environ.get("MINARI_DATASETS_PATH")
    if not root or not (Path(root) / name).is_dir():
        pytest.skip(f"{name} is not under MINARI_DATASETS_PATH")
    data, theirs = datasets.load(name, cache=False), list(minari.load_dataset(name))
    after = np.concatenate([e.observations[1:] for e in theirs]).astype(np.float32)
    np.testing.assert_array_equal(data.arrays["next_observations"], after)
    actions = np.clip(np.concatenate([e.actions for e in theirs]), -0.99999, 0.99999)
    np.testing.assert_array_equal(data.arrays["actions"], actions)
