"""Environments: conventions, faults, takeovers, vectors, exact replay, and the embedded dataset."""

import contextlib
import os
import tempfile
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import pytest
from gymnasium import spaces

from o2o import envs
from o2o.data import datasets
from o2o.data.task import Task
from o2o.envs.pointmaze import EMBEDDED, Recipe, WaypointController
from o2o.errors import ConfigError, DatasetError, DivergenceError, EnvironmentFaultError


class Line(gym.Env):
    """A point on a line: the action moves it, and beyond 1 is success; a trigger breaks it at step 3."""

    observation_space = spaces.Dict({"x": spaces.Box(-np.inf, np.inf, (1,)), "flag": spaces.MultiBinary(1)})
    action_space = spaces.Box(-0.5, 0.5, (1,), np.float32)

    def __init__(self, fault: str | None = None, takeover: bool = False, human: object = np.float32([0.25])) -> None:
        self.fault, self.takeover, self.human, self.x, self.t = fault, takeover, human, 0.0, 0

    def _observation(self):
        return {"x": np.array([self.x], np.float32), "flag": np.array([1], np.int8)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.t = 0.0, 0
        return self._observation(), {}

    def step(self, action):
        self.t += 1
        info = {"success": False}
        if self.takeover:
            info["intervene_action"] = self.human
        self.x += 0.25 if self.takeover else float(action[0])
        info["success"] = self.x >= 1
        reward = float(self.x)
        if self.t == 3 and self.fault == "raise":
            raise ValueError("cable\nloose")
        if self.t == 3 and self.fault == "reward":
            reward = float("nan")
        if self.t == 3 and self.fault == "observation":
            self.x = float("inf")
        return self._observation(), reward, False, self.t >= 6, info


BINARY = Task(
    "line", binary=True, sparse=True, has_success=True, terminate_on_success=True, reward_scale=10.0, reward_bias=5.0
)


def play(env: gym.Env, actions, seed: int = 0):
    rows = [(env.reset(seed=seed)[0],)]
    for action in actions:
        rows.append(env.step(action))
        if rows[-1][2] or rows[-1][3]:
            break
    return rows


def test_step_contract():
    """A wrapped step keeps its contract: the types, the task's reward, the end and the info."""
    env = envs.wrap(Line(), BINARY)
    rows = play(env, [[1.0]] * 6)
    assert rows[0][0].dtype == np.float32 and rows[0][0].tolist() == [1, 0]
    assert env.action_space == spaces.Box(-1, 1, (1,), np.float32)
    assert [row[1] for row in rows[1:]] == [-5.0, 5.0]
    assert rows[-1][2] is True and rows[-1][3] is False
    info = rows[-1][4]
    assert info["success"] is True and info["raw_reward"] == 1.0 and info["executed_action"].tolist() == [1.0]


def test_evaluation_continues_after_success():
    """An evaluation goes on after a success and remembers it."""
    env = envs.wrap(Line(), BINARY, evaluation=True)
    rows = play(env, [[1.0], [1.0], [-1.0], [-1.0], [-1.0], [-1.0]])
    assert len(rows) == 7 and rows[-1][2] is False and rows[-1][3] is True
    successes = [row[4]["success"] for row in rows[1:]]
    assert successes[1] is True and successes[-1] is False


def test_actions_clipped_and_mapped():
    """Actions are clipped and mapped."""
    rows = play(envs.wrap(Line(), Task("raw")), [[7.0], [0.5]])
    assert rows[1][0].tolist() == [1, 0.5] and rows[1][4]["executed_action"].tolist() == [1.0]
    assert rows[2][0].tolist() == [1, 0.75] and rows[2][4]["executed_action"].tolist() == [0.5]


def test_takeover_is_executed_action():
    """The executed action is the takeover's."""
    rows = play(envs.wrap(Line(takeover=True), Task("raw")), [[-1.0]])
    assert rows[1][4]["executed_action"].tolist() == [0.5]


def test_success_none_when_unknown():
    """Success is None where the task knows none."""
    rows = play(envs.wrap(Line(), Task("raw")), [[0.0]] * 6)
    assert len(rows) == 7 and all(row[4]["success"] is None for row in rows[1:])


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("raise", "raised ValueError: cable loose at step 3 of the episode"),
        ("reward", "returned the reward nan at step 3 of the episode"),
        ("observation", "returned inf in its observation 'x' at step 3 of the episode"),
    ],
)
def test_faults_name_step(fault, text):
    """Faults of an environment name the step."""
    env = envs.wrap(Line(fault), Task("raw"))
    with pytest.raises(EnvironmentFaultError, match="environment Line") as caught:
        play(env, [[0.1]] * 6)
    assert text in str(caught.value) and "\n" not in str(caught.value)
    assert play(env, [[0.1]] * 2)[-1][4]["raw_reward"] > 0


class Still(gym.Env):
    """Observes one thing for ever."""

    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, observation: object, reward: float = 0.0) -> None:
        self.seen, self.reward = observation, reward

    def reset(self, *, seed=None, options=None):
        return self.seen, {}

    def step(self, action):
        return self.seen, self.reward, False, False, {}


@pytest.mark.parametrize(
    ("seen", "text"),
    [
        ([0.0, np.nan], "returned nan in its observation[1] on reset"),
        ({"arm": [[1.0], [np.inf, 2.0]]}, "returned inf in its observation 'arm'[1][0] on reset"),
        (np.float64(np.nan), "returned nan in its observation on reset"),
        (np.asarray([0.0, 1e300]), "returned 1e+300 in its observation on reset"),
    ],
)
def test_non_float32_numbers_are_faults(seen, text):
    """Numbers that float32 cannot hold are faults, in whatever form."""
    with pytest.raises(EnvironmentFaultError) as caught:
        envs.wrappers.FaultGuard(Still(seen)).reset()
    assert text in str(caught.value)


def test_numbers_pass_through_guard():
    """Other numbers pass as they are, but no reward beyond float32 does."""
    for seen in ([1, 2.0], 3, np.float64(-3e38), {"a": (np.zeros((2, 2, 3), np.uint8), [])}, np.asarray([True])):
        assert envs.wrappers.FaultGuard(Still(seen)).reset()[0] is seen
    with pytest.raises(EnvironmentFaultError, match=r"returned the reward 1e\+300 at step 1"):
        envs.wrappers.FaultGuard(Still(0.0, 1e300)).step(np.zeros(1))
    for reward, words in ((None, "None"), (np.ones(2), r"array\(\[1., 1.\]\)")):
        with pytest.raises(EnvironmentFaultError, match=rf"{words} as its reward, expected a number, at step 1 of"):
            envs.wrappers.FaultGuard(Still(0.0, reward)).step(np.zeros(1))


@pytest.mark.parametrize(
    ("human", "text"),
    [
        (np.float32([np.nan]), "returned nan in its intervene_action at step 1 of the episode"),
        (
            np.zeros(2),
            r"an intervene_action of shape (2,), expected (1,); leave it out where nobody takes over, at step 1",
        ),
        (None, "an intervene_action of shape (), expected (1,)"),
        ("left", "returned 'left' as its intervene_action, expected an array of numbers"),
    ],
)
def test_impossible_takeover_is_fault(human, text):
    """A takeover that cannot have been executed is a fault."""
    with pytest.raises(EnvironmentFaultError) as caught:
        play(envs.wrap(Line(takeover=True, human=human), Task("raw")), [[0.1]])
    assert text in str(caught.value)


def test_nonfinite_action_not_played():
    """An action that is not finite moves nothing."""
    env = envs.wrap(Line(), Task("raw"))
    env.reset(seed=0)
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(DivergenceError, match=f"action has {bad} in entry 0 and was not played"):
            env.step(np.float32([bad]))
    assert env.unwrapped.t == 0 and env.step([0.5])[0].tolist() == [1, 0.25]


def test_unknown_env_suggests_near_one():
    """The error for an unknown environment suggests a near one."""
    with pytest.raises(ConfigError, match="did you mean.*Hopper-v5"):
        envs.make("Hoper-v5")
    with pytest.raises(ConfigError, match="cannot be made"):
        envs.make("Hopper-v5", env_kwargs={"colour": "red"})


def test_pointmaze_ends_at_goal():
    """A PointMaze episode ends at the goal with the task's reward."""
    env = envs.make("PointMaze_UMaze-v3", evaluation=True)
    controller, rng = WaypointController(env), np.random.default_rng(0)
    env.reset(seed=3)
    over = False
    while not over:
        raw = env.unwrapped
        state = raw.point_env._get_obs()[0]
        observation, reward, terminated, truncated, info = env.step(
            controller({"observation": state, "desired_goal": raw.goal}, rng)
        )
        over = terminated or truncated
        assert reward == (5.0 if info["success"] else -5.0)
        assert observation[:2].tolist() == raw.goal.astype(np.float32).tolist()
    assert terminated and info["success"] and info["raw_reward"] == 1.0


def test_dataset_env_eval_time_limit(tmp_path):
    """The environment of a dataset has the evaluation's time limit."""
    box = spaces.Box(-np.inf, np.inf, (11,), np.float64)
    made = gym.make("Hopper-v5")
    datasets.write(
        "test/limits-v0", [], observation_space=box, action_space=made.action_space, root=tmp_path,
        spec=gym.make("Hopper-v5", max_episode_steps=10**6).spec,
        eval_spec=gym.make("Hopper-v5", max_episode_steps=7).spec,
    )  # fmt: skip
    env = envs.make(datasets.info("test/limits-v0", tmp_path), env_kwargs={"terminate_when_unhealthy": False})
    assert len(play(env, np.zeros((20, 3)))) == 8


REPLAYED = [
    "PointMaze_UMaze-v3",
    "Hopper-v5",
    "AdroitHandDoor-v1",
    "AdroitHandPen-v1",
    "AntMaze_UMaze-v5",
    "FrankaKitchen-v1",
]


@pytest.mark.parametrize("env_id", REPLAYED)
def test_episode_is_deterministic(env_id):
    """An episode is a function of its seed and actions."""
    task = envs.task_for(env_id)
    used, fresh = envs.make(env_id, task, evaluation=True), envs.make(env_id, task, evaluation=True)
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (30, used.action_space.shape[0])).astype(np.float32)
    play(used, rng.uniform(-1, 1, actions.shape), seed=1)
    runs = [play(used, actions, seed=5), play(used, actions, seed=5), play(fresh, actions, seed=5)]
    for other in runs[1:]:
        assert len(other) == len(runs[0])
        for ours, theirs in zip(runs[0], other, strict=True):
            np.testing.assert_array_equal(ours[0], theirs[0])
            assert ours[1:4] == theirs[1:4]
    used.close()
    fresh.close()


def test_make_seed_fixes_unseeded_resets():
    """The seed given to `make` fixes unseeded resets."""
    first, second = (envs.make("PointMaze_UMaze-v3", seed=4) for _ in range(2))
    for _ in range(3):
        np.testing.assert_array_equal(first.reset()[0], second.reset()[0])
    np.testing.assert_array_equal(first.action_space.sample(), second.action_space.sample())


def test_kitchen_reward_counts_subtasks():
    """The kitchen's reward counts subtasks, and infos do not change later."""
    env = envs.make("FrankaKitchen-v1")
    env.reset(seed=0)
    _, reward, _, _, first = env.step(np.zeros(9))
    assert (reward, first["raw_reward"], first["success"]) == (-4.0, 0.0, False)
    env.unwrapped.data.qpos[env.unwrapped.model.joint("microwave").qposadr] = -0.75
    _, reward, _, _, second = env.step(np.zeros(9))
    assert (reward, second["raw_reward"]) == (-3.0, 1.0)
    assert first["episode_task_completions"] == [] and second["episode_task_completions"] == ["microwave"]
    _, reward, *_ = env.step(np.zeros(9))
    assert reward == -3.0


@pytest.mark.parametrize("env_id", ["PointMaze_UMaze-v3", "AntMaze_UMaze-v5"])
def test_mazes_leave_no_temporary_files(env_id, tmp_path, monkeypatch):
    """Mazes leave nothing in the temporary folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made = gym.make(env_id)
    assert len(list(tmp_path.iterdir())) == 1
    made.close()
    with contextlib.closing(envs.make(env_id)) as env:
        env.reset(seed=0)
        assert len(list(tmp_path.iterdir())) == 1
        copies = [env.step(np.zeros(env.action_space.shape))[1] for _ in range(3)]
    assert copies == [-5.0, -5.0, -5.0]


SMALL = Recipe("PointMaze_UMaze-v3", 60, 1_500, 0.5, EMBEDDED["pointmaze-umaze"].moods)


def test_controller_reaches_every_goal():
    env = gym.make("PointMaze_Medium-v3", continuing_task=False, max_episode_steps=400)
    returns = [e.rewards.sum() for e in datasets.record(env, WaypointController(env), 2_000)]
    assert len(returns) > 10 and min(returns) == 1.0


def test_embedded_dataset(tmp_path, monkeypatch):
    """The embedded dataset is sound, replays in its environment and is made only once."""
    monkeypatch.setitem(EMBEDDED, "pointmaze-umaze", SMALL)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setenv("O2O_CACHE", str(tmp_path / "cache"))
    calls: list[tuple[int, int]] = []
    name = envs.make_embedded("pointmaze-umaze", progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (1_500, 1_500) and datasets.check(name) == []
    data = datasets.load(name, task=envs.task_for(datasets.info(name)))
    assert 0.05 < data.info.episode_success.mean() < 0.9
    assert set(np.unique(data.arrays["rewards"])) == {-5.0, 5.0}
    assert data.info.ref_max_score > data.info.ref_min_score
    again = minari.load_dataset(name).recover_environment(eval_env=True)
    assert again.spec.max_episode_steps == 60 and again.unwrapped.continuing_task is False
    envs.make(data.info, data.task).reset(seed=0)
    stored = minari.load_dataset(name)
    seed = next(iter(stored.storage.get_episode_metadata([0])))["seed"]
    observation, _ = again.reset(seed=seed)
    for step, action in enumerate(stored[0].actions):
        np.testing.assert_array_equal(observation["observation"], stored[0].observations["observation"][step])
        observation, *_ = again.step(action)
    assert envs.make_embedded(name) == name and len(calls) == calls.index(calls[-1]) + 1
    changed = Recipe("PointMaze_UMaze-v3", 60, 1_500, 0.1, SMALL.moods)
    monkeypatch.setitem(EMBEDDED, "pointmaze-umaze", changed)
    with pytest.raises(DatasetError, match="another recipe"):
        envs.make_embedded(name)
    with pytest.raises(DatasetError, match="no embedded dataset 'maze'; there are pointmaze-umaze"):
        envs.make_embedded("maze")


def test_embedded_dataset_deterministic(tmp_path, monkeypatch):
    """The embedded dataset is the same every time."""
    monkeypatch.setitem(EMBEDDED, "pointmaze-umaze", SMALL)
    monkeypatch.setenv("O2O_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("o2o.envs.pointmaze.REFERENCE_EPISODES", 2)
    marks = set()
    for root in (tmp_path / "a", tmp_path / "b"):
        marks.add(datasets.load(envs.make_embedded("pointmaze-umaze", root), root=root).fingerprint)
    assert len(marks) == 1


@pytest.mark.data
@pytest.mark.parametrize(
    "name", ["hand_dapg/door/human-v0", "hand_dapg/pen/noisy-v0", "o2o/hopper/medium-v0", "o2o/pointmaze/large-v0"]
)
def test_recorded_dataset_environments(name):
    """The environments of the published datasets fit their rows and tasks."""
    root = os.environ.get("MINARI_DATASETS_PATH")
    if not root or not (Path(root) / name).is_dir():
        pytest.skip(f"{name} is not under MINARI_DATASETS_PATH")
    about = datasets.info(name)
    task = envs.task_for(about, binary=name.startswith("hand"))
    env, data = envs.make(about, task), datasets.load(name, task=task, cache=False)
    observation, _ = env.reset(seed=0)
    assert observation.shape == data.arrays["observations"].shape[1:]
    assert env.action_space.shape == data.arrays["actions"].shape[1:]
    assert env.spec.max_episode_steps < 10_000
    _, reward, _, _, info = env.step(np.zeros(env.action_space.shape, np.float32))
    if task.sparse:
        assert reward == task.failure_reward and info["success"] is False
