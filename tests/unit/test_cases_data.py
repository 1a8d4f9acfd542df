"""Datasets as people have them: each fault is refused in one right line, or handled right."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium as gym
import h5py
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

from o2o import envs
from o2o.data import datasets
from o2o.data.datasets import Dataset, Episode
from o2o.data.rows import Indexed
from o2o.data.spaces import ActionMap, ObservationSpec
from o2o.data.task import Task
from o2o.errors import ConfigError, DatasetError, EnvironmentFaultError, EnvironmentMismatchError

T, NAME = 10, "lab/set-v0"
OBSERVATIONS, ACTIONS = spaces.Box(-10, 10, (3,), np.float64), spaces.Box(-1, 1, (2,), np.float32)
Put = Callable[..., Dataset]


def episode(seed: int = 0, steps: int = T, **columns: Any) -> Episode:
    """An episode of noise that succeeds in its last step; `columns` replace its own."""
    rng, last = np.random.default_rng(seed), np.arange(steps) == steps - 1
    made = Episode(
        observations=rng.normal(size=(steps + 1, 3)),
        actions=rng.uniform(-1, 1, (steps, 2)).astype(np.float32),
        rewards=np.arange(steps) * 1.0,
        terminations=np.zeros(steps, bool),
        truncations=last,
        success=last,
    )
    return replace(made, **columns)


@pytest.fixture
def put(tmp_path: Path) -> Put:
    """Write episodes, edit the file, load it."""

    def make(
        episodes: list[Episode],
        edit: Callable[[h5py.File], Any] = lambda _: None,
        space: spaces.Space = OBSERVATIONS,
        actions: spaces.Space = ACTIONS,
        spec: EnvSpec | None = None,
        name: str = NAME,
        load: bool = True,
        **options: Any,
    ) -> Any:
        datasets.write(name, episodes, observation_space=space, action_space=actions, spec=spec, root=tmp_path)
        with h5py.File(tmp_path / name / "data" / "main_data.hdf5", "a") as file:
            edit(file)
        return datasets.load(name, root=tmp_path, **{"cache": False, **options}) if load else None

    return make


def success_as(values: Any, key: str = "success") -> Callable[[h5py.File], None]:
    """An edit that replaces the success flags of all episodes."""

    def edit(file: Any) -> None:
        for name in file:
            infos = file[name]["infos"]
            del infos["success"]
            infos.create_dataset(key, data=values)

    return edit


def column_as(column: str, values: Any, name: str = "episode_1") -> Callable[[h5py.File], None]:
    """An edit that replaces a column of one episode."""

    def edit(file: Any) -> None:
        del file[name][column]
        file[name].create_dataset(column, data=values)

    return edit


@pytest.mark.parametrize(
    ("values", "known"),
    [
        (np.append(np.zeros(T), 1.0), True),
        (np.append(np.nan, np.zeros(T)), False),
        (np.arange(T) == 3, True),
        (np.zeros((T + 1, 1), np.int64), False),
        (np.eye(1, T + 1, T).T.repeat(3, 1), True),
    ],
    ids=["floats", "nan at reset", "one per step", "column", "three columns"],
)
@pytest.mark.parametrize("key", ["success", "is_success"])
def test_success_flags_read(put: Put, values: Any, known: bool, key: str) -> None:
    """Success is known under both names, as floats, with a row for the reset, and with several columns."""
    data = put([episode(i) for i in range(2)], success_as(values, key))
    assert data.info.episode_success is not None and data.info.episode_success.tolist() == [known] * 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.append(np.zeros(T), np.nan), "infos/success has the value .*nan.*, expected true or false"),
        (np.full(T, 0.5), "infos/success has the value .*0.5"),
        (np.array([b"False"] * T), "infos/success has the value .*False"),
        (np.zeros(T - 3), r"infos/success has shape \(7,\) for 10 steps"),
        (np.array(True), r"infos/success has shape \(\) for 10 steps"),
    ],
    ids=["nan", "half", "text", "short", "one for all"],
)
def test_no_flags_refused(put: Put, values: Any, message: str) -> None:
    """What is no flag per step is refused by name, and never counts as success."""
    with pytest.raises(DatasetError, match=f"{NAME}: episode 0: {message}"):
        put([episode()], success_as(values))


def test_missing_success_told(put: Put, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One episode without flags is named; left out on request, the others keep theirs."""
    edit = lambda file: file["episode_2"]["infos"].__delitem__("success")  # noqa: E731
    with pytest.raises(DatasetError, match=r"1 of 4 episodes.* 2 the first, have no infos/success"):
        put([episode(i) for i in range(4)], edit)
    data = datasets.load(NAME, root=tmp_path, cache=False, skip_bad_episodes=True)
    assert data.size == 3 * T and data.info.episodes == 3
    assert data.info.episode_success is not None and data.info.episode_success.tolist() == [True] * 3
    assert "1 episodes are left out" in caplog.text
    assert any("no infos/success" in problem for problem in datasets.check(NAME, tmp_path))


@pytest.mark.parametrize("column", ["rewards", "terminations", "truncations"])
def test_trailing_axis_of_one(put: Put, tmp_path: Path, column: str) -> None:
    """Columns of `[T, 1]` give the same rows as `[T]`."""
    plain = put([episode(0), episode(1)], name="lab/plain-v0")
    wide = put([replace(e, **{column: getattr(e, column)[:, None]}) for e in (episode(0), episode(1))])
    assert wide.fingerprint == plain.fingerprint and int(wide.arrays["ends"].sum()) == 2
    assert {wide.arrays[key].shape for key in ("rewards", "masks", "ends", "mc_returns")} == {(2 * T,)}


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("rewards", np.zeros((T, 2)), r"rewards have shape \(10, 2\), expected one value per step"),
        ("rewards", np.array([b"1.0"] * T), "rewards are .*, expected numbers"),
        ("terminations", np.zeros((T, 2), bool), r"terminations have shape \(10, 2\)"),
        ("terminations", np.array([b"False"] * T), "terminations has the value .*False"),
        ("terminations", np.full(T, np.nan), "terminations has the value .*nan"),
        ("truncations", np.full(T, 2), "truncations has the value .*2"),
        ("terminations", np.arange(T) == 4, r"step 4: terminations is true there, and the episode goes on for 5 steps"),
        ("truncations", np.arange(T) == 0, "step 0: truncations is true there"),
        ("actions", np.zeros((T, 2), complex), "actions are complex128, expected numbers"),
    ],
)
def test_bad_column_named(put: Put, tmp_path: Path, column: str, values: Any, message: str) -> None:
    """A column of another shape or type, or an end in the midst, is refused in one line, by `check` too."""
    with pytest.raises(DatasetError, match=f"{NAME}: episode 1.*{message}.*skip_bad_episodes") as caught:
        put([episode(0), episode(1), episode(2)], column_as(column, values))
    assert "\n" not in str(caught.value)
    assert len(datasets.check(NAME, tmp_path)) == 1
    assert datasets.load(NAME, root=tmp_path, cache=False, skip_bad_episodes=True).size == 2 * T


def test_bad_episodes_left_out(put: Put, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The episode that lacks its last observation is left out on request, in the cache too, and that is logged."""
    put([episode(i) for i in range(5)], column_as("observations", np.zeros((T, 3)), "episode_3"), load=False)
    with pytest.raises(DatasetError, match="episode 3 has 10 observations for 10 steps, expected 11"):
        datasets.load(NAME, root=tmp_path)
    data = None
    for _ in range(2):
        caplog.clear()
        data = datasets.load(NAME, root=tmp_path, skip_bad_episodes=True)
        assert data.size == 4 * T and len(data.info.episode_returns) == 4  # pyright: ignore[reportArgumentType]
        assert "episode 3 has 10 observations" in caplog.text
    assert data is not None
    expected = np.concatenate([episode(i).observations[:-1] for i in (0, 1, 2, 4)]).astype(np.float32)
    np.testing.assert_array_equal(data.arrays["observations"], expected)


def test_observation_outside_box(put: Put, tmp_path: Path) -> None:
    """`check` names an observation outside its Box; training on it is possible."""
    bad = episode()
    bad.observations[4, 1] = 12.5
    assert put([bad]).size == T
    problems = datasets.check(NAME, tmp_path)
    assert "episode 0, step 4: observations (observation) have 12.5 in entry 1, outside" in problems[0]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("no_such_module:Env", "there is no module no_such_module"),
        ("gymnasium.no_such:Env", "there is no module gymnasium.no_such"),
        ("gymnasium.envs.mujoco.hopper_v5:NoSuch", "module gymnasium.envs.mujoco.hopper_v5 has no NoSuch"),
        ("gymnasium.envs.mujoco.hopper_v5:HopperEnv", None),
    ],
)
def test_entry_point_checked(put: Put, tmp_path: Path, entry: str, message: str | None) -> None:
    """`check` tells an entry point that does not exist, and runs no code for it."""
    put([episode()], spec=EnvSpec("Mine-v0", entry_point=entry), load=False)
    problems = datasets.check(NAME, tmp_path)
    assert (len(problems) == 0) if message is None else (message in problems[0])
    assert "no_such_module" not in sys.modules


@pytest.mark.parametrize("bound", [np.finfo(np.float32).max, 1e10, np.inf])
@pytest.mark.parametrize("low", [-1.0, 0.0])
def test_bounds_without_use(put: Put, bound: float, low: float) -> None:
    """Bounds that stand for none are refused; with the range of the data they are not asked for."""
    space = spaces.Box(np.float32(low * bound if low else 0.0), np.float32(bound), (2,), np.float32)
    rows = episode(actions=np.random.default_rng(0).uniform(0.1, 0.5, (T, 2)).astype(np.float32))
    with pytest.raises(DatasetError, match=r"no (finite|useful) bounds: .*action_range 'data'"):
        put([rows], actions=space)
    data = put([rows], actions=space, name="lab/other-v0", action_range="data")
    assert data.arrays["actions"].std() > 0.4
    np.testing.assert_allclose(data.action_map.to_env(data.arrays["actions"]), rows.actions, atol=1e-5)


def test_narrow_bounds_refused() -> None:
    """Bounds that are one and the same number in float32 are refused."""
    space = spaces.Box(np.array([5e5]), np.array([5e5 + 0.01]), (1,), np.float64)
    with pytest.raises(EnvironmentMismatchError, match="too close to each other for float32"):
        ActionMap.from_space(space)


def test_fixed_joint(put: Put) -> None:
    """A joint whose bounds are equal is played there and stored as 0."""
    space = spaces.Box(np.array([-1, 0.3], np.float32), np.array([1, 0.3], np.float32), dtype=np.float32)
    rows = episode(actions=np.stack([np.linspace(-0.9, 0.9, T), np.full(T, 0.3)], 1).astype(np.float32))
    data = put([rows], actions=space)
    np.testing.assert_allclose(data.arrays["actions"], rows.actions * [1, 0], atol=1e-6)
    assert data.action_map.to_env([0.5, 0.9]).tolist() == pytest.approx([0.5, 0.3])


@pytest.mark.parametrize(
    ("offset", "step", "told"), [(1.78e9, 0.05, True), (5.3e6, 0.01, True), (1e6, 1.0, False), (0.0, 0.05, False)]
)
def test_lost_digits_told(
    put: Put, caplog: pytest.LogCaptureFixture, tmp_path: Path, offset: float, step: float, told: bool
) -> None:
    """Numbers whose steps vanish in float32 are named, on every load; ticks that float32 can count are not."""
    rows = episode()
    rows.observations[:, 1] = offset + np.arange(T + 1) * step
    space = spaces.Box(-np.inf, np.inf, (3,), np.float64)
    put([rows], space=space, load=False)
    for _ in range(2):
        caplog.clear()
        datasets.load(NAME, root=tmp_path)
        assert ("observation entries observation[1] (there in steps of" in caplog.text) == told


S = 64
IMAGES = {
    "HWC": (S, S, 3),
    "CHW": (3, S, S),
    "grey": (S, S),
    "grey stack": (4, S, S),
    "stack": (4, S, S, 3),
    "stack of CHW": (4, 3, S, S),
}


@pytest.mark.parametrize("layout", IMAGES)
def test_image_layouts(layout: str) -> None:
    """Images of every layout reach the agent as `[H, W, C]`, pixel by pixel, and go back to their own."""
    shape = IMAGES[layout]
    space = spaces.Dict({"cam": spaces.Box(0, 255, shape, np.uint8), "state": spaces.Box(-1, 1, (3,), np.float32)})
    spec, sample = ObservationSpec.from_space(space), space.sample()
    flat = spec.flatten(sample)
    stack = sample["cam"].reshape(-1, *shape[-3:]) if len(shape) == 4 else sample["cam"][None]
    frames = [f.transpose(1, 2, 0) if "C" in layout and f.shape[0] == 3 else f for f in stack]
    frames = [f.transpose(1, 2, 0) if f.shape[0] == 4 else f[..., None] if f.ndim == 2 else f for f in frames]
    expected = np.concatenate(frames, axis=-1)
    np.testing.assert_array_equal(flat["cam"], expected)
    assert spec.images == {"cam": expected.shape} and spec.state_dim == 3
    np.testing.assert_array_equal(spec.unflatten(flat)["cam"], sample["cam"])
    batch = spec.flatten({key: np.stack([entry] * 2) for key, entry in sample.items()})
    np.testing.assert_array_equal(batch["cam"][1], expected)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(0, 1, (S, S, 3), np.float32),
        spaces.Box(0, 1, (3, S, S), np.float32),
        spaces.Box(0, 65535, (S, S, 1), np.uint16),
        spaces.Box(0, 10, (S, S), np.float32),
        spaces.Box(0, 255, (S, S, 3), np.int64),
        spaces.MultiBinary((S, S)),
        spaces.Box(0, 255, (2, 2, 2, S, S), np.uint8),
    ],
    ids=str,
)
def test_other_images_refused(space: spaces.Space, put: Put) -> None:
    """Images of other types are no thousands of plain numbers: one line says what is taken."""
    whole = spaces.Dict({"cam": space, "state": spaces.Box(-1, 1, (3,), np.float32)})
    with pytest.raises(EnvironmentMismatchError, match=r"'cam' looks like an image, .*uint8 \(0 to 255\) of shape"):
        ObservationSpec.from_space(whole)


def test_small_arrays_are_numbers() -> None:
    """Height maps and boards stay numbers."""
    space = spaces.Dict({"map": spaces.Box(0, 9, (11, 11), np.float32), "board": spaces.Box(0, 9, (8, 8), np.uint8)})
    assert ObservationSpec.from_space(space).state_dim == 121 + 64


def test_mixture_names_environments(put: Put, tmp_path: Path) -> None:
    """Datasets of different environments, or of one with other arguments, are mixed only if one is named."""
    for name, env_id, size in (
        ("lab/peg-v0", "Peg-v0", 1),
        ("lab/cable-v0", "Cable-v0", 1),
        ("lab/big-v0", "Peg-v0", 2),
    ):
        put([episode()], spec=EnvSpec(env_id, entry_point="m:E", kwargs={"size": size}), name=name, load=False)
    for other in ("lab/cable-v0", "lab/big-v0"):
        with pytest.raises(DatasetError, match=r"lab/peg-v0 and lab/.* name different environments, Peg-v0"):
            datasets.load(["lab/peg-v0", other], root=tmp_path, cache=False)
        assert datasets.load(["lab/peg-v0", other], root=tmp_path, cache=False, env="Peg-v0").size == 2 * T
    assert datasets.load(["lab/peg-v0", "lab/peg-v0"], root=tmp_path, cache=False).size == 2 * T


def test_mixture_of_known_and_unknown_success(put: Put, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where one dataset lacks success, that is logged; a task that ends at success refuses it."""
    put([episode()], name="lab/a-v0", load=False)
    put([episode(success=None)], name="lab/b-v0", load=False)
    pair = ["lab/a-v0", "lab/b-v0"]
    assert datasets.load(pair, root=tmp_path, cache=False).info.episode_success is None
    assert "dataset lab/b-v0 has no infos['success']" in caplog.text
    with pytest.raises(DatasetError, match=r"lab/b-v0 has no infos\['success'\] and the others have: the task ends"):
        datasets.load(pair, root=tmp_path, cache=False, task=Task("t", has_success=True, terminate_on_success=True))


def test_next_observations_by_index(put: Put, tmp_path: Path) -> None:
    """The next observations are those of the file, for whole episodes, cut ones, mixtures and histories."""
    from o2o.data.history import with_history

    episodes = [episode(i, steps=4 + i) for i in range(3)]
    flags = [np.arange(4 + i) == 1 for i in range(3)]
    data = put(episodes)
    following = np.concatenate([e.observations[1:] for e in episodes]).astype(np.float32)
    after = data.arrays["next_observations"]
    assert isinstance(after, Indexed) and np.shares_memory(after.frames, data.arrays["observations"])
    assert after.frames.nbytes == (data.size + 3) * 3 * 4
    np.testing.assert_array_equal(after, following)
    np.testing.assert_array_equal(after[2:9, 1], following[2:9, 1])
    put([replace(e, success=f) for e, f in zip(episodes, flags, strict=True)], name="lab/cut-v0", load=False)
    task = Task("t", has_success=True, binary=True, sparse=True, terminate_on_success=True)
    cut = datasets.load("lab/cut-v0", root=tmp_path, cache=False, task=task)
    expected = [e.observations[[1, 2]].astype(np.float32) for e in episodes]
    np.testing.assert_array_equal(cut.arrays["next_observations"], np.concatenate(expected))
    mixed = datasets.load([NAME, NAME], root=tmp_path, cache=False)
    np.testing.assert_array_equal(mixed.arrays["next_observations"], np.concatenate([following] * 2))
    long = with_history(mixed, 2).arrays
    joined = np.concatenate([mixed.arrays["observations"], mixed.arrays["next_observations"]], axis=1)
    np.testing.assert_array_equal(long["next_observations"], joined)


class Robot(gym.Env):
    """An environment whose success flag is whatever the class says."""

    observation_space, action_space = spaces.Box(-1, 1, (2,), np.float32), ACTIONS
    info: dict[str, Any] = {}
    render_modes: list[str | None] = []

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        Robot.render_modes.append(render_mode)

    metadata = {"render_modes": ["human", "rgb_array"]}

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        return np.zeros(2, np.float32), dict(self.info)

    def step(self, action: Any) -> Any:
        return np.zeros(2, np.float32), 0.0, False, False, dict(self.info)


@pytest.fixture
def robot(monkeypatch: pytest.MonkeyPatch) -> str:
    """Register the robot in a module of its own, which also registers its task."""
    module = ModuleType("robot_module")
    module.Robot = Robot  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "robot_module", module)
    monkeypatch.setitem(
        gym.registry, "Robot-v0", EnvSpec("Robot-v0", entry_point="robot_module:Robot", max_episode_steps=5)
    )
    monkeypatch.setattr(Robot, "info", {})
    monkeypatch.setattr(Robot, "render_modes", [])
    return "Robot-v0"


@pytest.mark.parametrize(
    ("info", "success"),
    [
        ({"is_success": 1.0}, True),
        ({"success": np.array([0, 1, 0])}, True),
        ({"is_success": np.float32(0)}, False),
        ({}, None),
    ],
)
def test_live_success(robot: str, monkeypatch: pytest.MonkeyPatch, info: dict[str, Any], success: bool | None) -> None:
    """The environment's success is known under both names, in every form."""
    monkeypatch.setattr(Robot, "info", info)
    env = envs.make(robot)
    env.reset(seed=0)
    assert env.step(np.zeros(2, np.float32))[4]["success"] is success


@pytest.mark.parametrize("flag", [np.nan, "False", 0.5])
def test_live_flag_refused(robot: str, monkeypatch: pytest.MonkeyPatch, flag: Any) -> None:
    """A flag that is neither true nor false is the environment's fault, and never a success."""
    monkeypatch.setattr(Robot, "info", {"success": flag})
    env = envs.make(robot)
    assert env.reset(seed=0)[1]["success"] is None
    with pytest.raises(
        EnvironmentFaultError, match=r"Robot-v0 returned .* as info\['success'\], expected true or false"
    ):
        env.step(np.zeros(2, np.float32))
    with pytest.raises(DatasetError, match=r"as info\['success'\], expected true or false, at step 0"):
        list(datasets.record(gym.make(robot), lambda *_: np.zeros(2, np.float32), steps=3))


def test_recorded_window_stays_shut(robot: str, tmp_path: Path) -> None:
    """A dataset recorded with windows, or with pictures of every step, opens none and keeps none."""
    for number, mode in enumerate(("human", "rgb_array")):
        env, name = gym.make(robot, render_mode=mode), f"lab/seen{number}-v0"
        rows = list(datasets.record(env, lambda *_: np.zeros(2, np.float32), steps=10))
        space: Any = {"observation_space": env.observation_space, "action_space": env.action_space}
        datasets.write(name, rows, spec=env.spec, root=tmp_path, **space)
        about = datasets.info(name, tmp_path)
        Robot.render_modes.clear()
        for evaluation in (False, True):
            envs.make(about, evaluation=evaluation)
        assert "human" not in Robot.render_modes and len(Robot.render_modes) == 2
        assert envs.same_environment(robot, about) == (mode == "human")
    gym.registry[robot].kwargs["render_mode"] = "human"
    Robot.render_modes.clear()
    envs.make(robot)
    assert Robot.render_modes == [None]
    envs.make(robot, render_mode="human")
    assert Robot.render_modes == [None, "human"]


def test_endless_environment_is_cut(robot: str, tmp_path: Path) -> None:
    """An environment without a time limit gets one where there is a dataset: ten of its episodes, at least 1000."""
    gym.registry[robot].max_episode_steps = None
    rows = [
        Episode(np.zeros((n + 1, 2)), np.zeros((n, 2), np.float32), np.zeros(n), np.zeros(n, bool), np.zeros(n, bool))
        for n in (150, 51)
    ]
    put = {"observation_space": Robot.observation_space, "action_space": ACTIONS, "spec": gym.spec(robot)}
    datasets.write(NAME, rows, root=tmp_path, **put)
    env = envs.make(datasets.info(NAME, tmp_path), evaluation=True)
    env.reset(seed=0)
    steps = 1
    while not env.step(np.zeros(2, np.float32))[3]:
        steps += 1
    assert steps == 1010 and envs.endless(robot)


POSITION_STATE = {
    "AntMaze_UMaze-v5": ("achieved_goal", 31),
    "AntMaze_UMazeDense-v4": ("achieved_goal", 31),
    "PointMaze_UMaze-v3": ("desired_goal", 6),
}


@pytest.mark.parametrize("env_id", POSITION_STATE)
def test_maze_position_is_seen(env_id: str) -> None:
    """Moving the robot changes what the policy sees; an AntMaze's x and y come first, as in D4RL."""
    env = envs.make(env_id)
    first, width = POSITION_STATE[env_id]
    spec = env.get_wrapper_attr("observation_spec")
    seen, info = env.reset(seed=0)
    assert spec.leaves[0].name == first and seen.shape[0] >= width
    maze: Any = env.unwrapped
    inner = maze.ant_env if hasattr(maze, "ant_env") else maze.point_env
    qpos, qvel = inner.data.qpos.copy(), inner.data.qvel.copy()
    qpos[:2] += [0.25, -0.5]
    inner.set_state(qpos, qvel)
    state = inner._get_obs()
    moved = spec.flatten(maze._get_obs(state[0] if isinstance(state, tuple) else state))
    at = slice(0, 2) if first == "achieved_goal" else slice(2, 4)
    np.testing.assert_allclose(moved[at], qpos[:2], atol=1e-5)
    env.close()


@pytest.mark.parametrize("env_id", ["FetchPush-v4", "FrankaKitchen-v1", "PointMaze_UMaze-v3", "AntMaze_UMaze-v5"])
def test_nothing_unseen_in_known_tasks(env_id: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In no task of the table an entry is left out that no other follows; without its task AntMaze is told."""
    env = gym.make(env_id)
    rows = list(datasets.record(env, lambda _, rng: rng.uniform(-1, 1, env.action_space.shape), steps=60))  # pyright: ignore[reportArgumentType]
    put = {"observation_space": env.observation_space, "action_space": env.action_space, "spec": env.spec}
    datasets.write(NAME, rows, root=tmp_path, **put)
    about = datasets.info(NAME, tmp_path)
    datasets.load(NAME, root=tmp_path, cache=False, clip_actions=True, task=envs.task_for(about))
    assert "left out" not in caplog.text
    datasets.load(NAME, root=tmp_path, cache=False, clip_actions=True)
    assert ("achieved_goal is left out of the observations" in caplog.text) == env_id.startswith("AntMaze")


def test_task_of_module_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module of a dataset's environment is imported before its task is chosen, at every door."""
    (tmp_path / "late_robot.py").write_text(
        "import gymnasium as gym\nfrom o2o import envs\nfrom o2o.data.task import Task\n"
        "envs.register('Late-v0', Task('late', sparse=True, terminate_on_success=True, success_reward=1.0,"
        " has_success=True, raw_failure_reward=0.0))\n"
        "class Late(gym.Env):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("o2o.envs.tasks.TASKS", list(envs.TASKS))
    monkeypatch.setenv("O2O_TRUSTED_FOLDERS", str(tmp_path))
    rows = episode(rewards=np.append(np.zeros(T - 1), 1.0), success=None)
    spec = EnvSpec("Late-v0", entry_point="late_robot:Late", max_episode_steps=T)
    put = {"observation_space": OBSERVATIONS, "action_space": ACTIONS, "spec": spec}
    datasets.write(NAME, [rows], root=tmp_path, **put)
    assert "late_robot" not in sys.modules
    described = envs.describe(NAME, tmp_path)
    assert "late_robot" in sys.modules and described["task"].sparse and described["success"] == 1.0
    task = envs.run_task(datasets.info(NAME, tmp_path))
    assert task == envs.run_task(datasets.info(NAME, tmp_path), "late_robot:Late-v0") or task.terminate_on_success
    sys.modules.pop("late_robot")


@pytest.mark.parametrize(
    ("recorded", "given", "refused"),
    [
        ("PointMaze_UMaze-v3", "PointMaze_UMazeDense-v3", True),
        ("FetchReachDense-v4", "FetchReach-v4", True),
        ("PointMaze_UMaze-v3", "PointMaze_Medium-v3", False),
        ("FetchReach-v4", "FetchReach-v4", False),
    ],
)
def test_env_of_another_reward(put: Put, tmp_path: Path, recorded: str, given: str, refused: bool) -> None:
    """`--env` with another type of reward than the dataset's is refused by name."""
    put([episode()], spec=gym.spec(recorded), load=False)
    about = datasets.info(NAME, tmp_path)
    if not refused:
        assert envs.run_task(about, given).name == given
        return
    with pytest.raises(ConfigError, match=f"environment {given} pays another reward than dataset {NAME}.*reward_type"):
        envs.run_task(about, given)


def test_adroit_binary_takes_any_reward(put: Put, tmp_path: Path) -> None:
    """Where the task replaces the reward, the recorded one does not matter."""
    put([episode()], spec=gym.spec("AdroitHandDoor-v1"), load=False)
    task = envs.run_task(datasets.info(NAME, tmp_path), "AdroitHandDoorSparse-v1", True)
    assert task.binary


def test_metadata_steps_wrong(put: Put, tmp_path: Path) -> None:
    """Counts in the metadata that are too small or too large change no row."""
    plain = put([episode(i) for i in range(3)])
    path = tmp_path / NAME / "data" / "metadata.json"
    for steps in (1, 1000):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"total_steps": steps}))
        again = datasets.load(NAME, root=tmp_path, cache=False)
        assert again.fingerprint == plain.fingerprint
        np.testing.assert_array_equal(again.arrays["next_observations"], plain.arrays["next_observations"])
