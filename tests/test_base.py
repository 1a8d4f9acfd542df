"""Base policies: units, fresh queues, labels, errors before any step, exported files, and residual runs on top."""

import dataclasses
import itertools
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import jax
import numpy as np
import pytest
from gymnasium import spaces

from o2o import base as bases
from o2o import datasets, envs, experiment
from o2o.base import Base, base_labels, load_base
from o2o.datasets import Dataset
from o2o.encoders import EncoderConfig
from o2o.envs.pointmaze import EMBEDDED
from o2o.episode import EVAL_STREAM, EnvSlot
from o2o.errors import (
    BaseFaultError,
    CheckpointError,
    ConfigError,
    EnvironmentFaultError,
    EnvironmentMismatchError,
    RunError,
)
from o2o.plots import read_rows
from o2o.schedule import LoopConfig
from o2o.tasks import Task
from tests.test_runs import StopAt, assert_same_runs, train_interrupted

HIGH = np.asarray([1.0, 2.0], np.float32)


class Toy(gym.Env):
    """A drifting point: the first coordinate ends the episode beyond 1.2, a time limit of 6 steps does else."""

    observation_space = spaces.Dict({"a": spaces.Box(-np.inf, np.inf, (1,)), "b": spaces.Box(-np.inf, np.inf, (2,))})
    action_space = spaces.Box(-HIGH, HIGH, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.a, self.b, self.t = self.np_random.uniform(-1, 1, 1), self.np_random.uniform(-1, 1, 2), 0
        return self._observation(), {}

    def _observation(self) -> dict[str, np.ndarray]:
        return {"a": self.a.astype(np.float32), "b": self.b.astype(np.float32)}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        self.a, self.b = self.a + 0.3, self.b + 0.1 * np.asarray(action)
        return self._observation(), 0.0, bool(self.a[0] > 1.2), self.t >= 6, {"executed": action}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Return 40 rows or so of random actions in Toy, some episodes terminated and some cut."""
    root = tmp_path_factory.mktemp("toy")
    env = Toy()
    env.action_space.seed(0)
    recorded = list(datasets.record(env, lambda _, rng: (0.4 * rng.uniform(-HIGH, HIGH)).astype(np.float32), 40))
    datasets.write(
        "toy-v0", recorded, observation_space=env.observation_space, action_space=env.action_space, spec=None, root=root
    )
    data = datasets.load("toy-v0", root=root, action_range="data", action_margin=0.2)
    ends, masks = data.arrays["ends"], data.arrays["masks"]
    assert (masks[ends] == 0).any() and (masks[ends] == 1).any()
    return data


class Chunks:
    """Plans four actions from what it sees, and plays them open loop."""

    made = itertools.count()

    def __init__(self) -> None:
        self.number, self.plan, self.seed = next(Chunks.made), [], None

    def reset(self, seed: int) -> None:
        self.plan, self.seed = [], seed

    def act(self, observation: dict[str, np.ndarray]) -> np.ndarray:
        if not self.plan:
            self.plan = [0.1 * observation["b"] + 0.02 * k for k in range(4)]
        return self.plan.pop(0)


def whole_chunks(observation: dict[str, np.ndarray]) -> np.ndarray:
    """Return the same plan as a chunk `[4, 2]`."""
    return np.stack([0.1 * observation["b"] + 0.02 * k for k in range(4)])


def scripted(observation: dict[str, np.ndarray]) -> np.ndarray:
    """Return an action from the environment's own observation."""
    assert set(observation) == {"a", "b"} and observation["a"].shape == (1,)
    return np.concatenate([0.1 * observation["a"], 0.2 * observation["b"][:1]])


def toy_env(data: Dataset, spec: Any) -> gym.Env:
    """Return Toy as a run sees it, corrected by a base."""
    env = envs.wrap(Toy(), Task("toy"), action_map=data.action_map)
    return envs.BaseAction(env, Base(load_base(spec), data))


def test_a_callable_sees_and_acts_in_the_environments_own_terms(world: Dataset) -> None:
    env = toy_env(world, scripted)
    observation, _ = env.reset(seed=3)
    assert env.observation_space.contains(observation) and set(observation) == {"state", "base_action"}
    flat = observation["state"]
    own = scripted({"a": flat[:1], "b": flat[1:]})
    np.testing.assert_allclose(world.action_map.to_env(observation["base_action"]), own, atol=1e-6)
    _, _, _, _, info = env.step(observation["base_action"])
    np.testing.assert_allclose(info["executed"], own, atol=1e-6)  # float precision after scale and un-scale
    np.testing.assert_allclose(info["executed_action"], observation["base_action"], atol=1e-6)


@pytest.mark.parametrize("spec", [Chunks, whole_chunks], ids=["stateful", "chunks"])
def test_the_queue_is_fresh_in_every_episode_whatever_ended_the_last(world: Dataset, spec: Any) -> None:
    env = toy_env(world, spec)
    causes = set()
    for seed in range(8):
        observation, _ = env.reset(seed=seed)
        fresh = 0.1 * observation["state"][1:]
        np.testing.assert_allclose(world.action_map.to_env(observation["base_action"]), fresh, atol=1e-6)
        for t in range(1, 7):
            plan = fresh if t < 4 else later if t > 4 else None  # noqa: F821
            observation, _, terminated, truncated, _ = env.step(np.zeros(2, np.float32))
            if plan is None:
                plan = later = 0.1 * observation["state"][1:]  # noqa: F841
            # The last observation of an episode has what the base would have done there, from its running plan.
            found = world.action_map.to_env(observation["base_action"])
            np.testing.assert_allclose(found, plan + 0.02 * (t % 4), atol=1e-6)
            if terminated or truncated:
                causes.add((terminated, t))
                break
    assert {cause for cause, _ in causes} == {True, False} and any(t % 4 for _, t in causes)


def test_labels_begin_every_episode_afresh(world: Dataset) -> None:
    now, after = base_labels(load_base(Chunks), world)
    b, ends = world.arrays["observations"][:, 1:], world.arrays["ends"]
    final = world.arrays["next_observations"][:, 1:]
    at = 0
    for row in range(world.size):
        expected = 0.1 * b[row - at % 4] + 0.02 * (at % 4)
        np.testing.assert_allclose(now[row], world.action_map.from_env(expected), atol=1e-6)
        behind = at + 1
        start = row - at % 4 if behind % 4 else None
        seen = 0.1 * (final[row] if start is None else b[start]) + 0.02 * (behind % 4)
        np.testing.assert_allclose(after[row], world.action_map.from_env(seen), atol=1e-6)
        at = 0 if ends[row] else behind


def test_demonstrations_as_labels_leave_no_residual(world: Dataset) -> None:
    now, after = base_labels(load_base(scripted), world, "demo")
    np.testing.assert_array_equal(world.arrays["actions"] - now, 0.0)
    ends = np.flatnonzero(world.arrays["ends"])
    inside = np.setdiff1d(np.arange(world.size), ends)
    np.testing.assert_array_equal(after[inside], now[inside + 1])
    last = world.arrays["next_observations"][ends]
    asked = np.stack([scripted({"a": row[:1], "b": row[1:]}) for row in last])
    np.testing.assert_allclose(after[ends], world.action_map.from_env(asked), atol=1e-6)


def test_each_environment_has_a_controller_of_its_own_and_its_seed_from_the_reset(world: Dataset) -> None:
    one, two = (toy_env(world, Chunks) for _ in range(2))
    controllers = [env.get_wrapper_attr("base")._policy.function.__self__ for env in (one, two)]
    assert controllers[0].number != controllers[1].number
    for env in (one, two):
        env.reset(seed=11)
    assert controllers[0].seed == controllers[1].seed is not None
    one.reset(seed=12)
    assert controllers[0].seed != controllers[1].seed
    one.reset()
    two.reset(seed=12)
    two.reset()
    assert controllers[0].seed == controllers[1].seed  # without a seed the sequence goes on
    shared = toy_env(world, Chunks()).get_wrapper_attr("base")._policy.function.__self__
    assert isinstance(shared, Chunks) and shared is not controllers[0]


class Broken:
    """Misbehaves at a step of an episode."""

    def __init__(self, how: str, step: int = 2) -> None:
        self.how, self.step, self.t = how, step, 0

    def reset(self) -> None:
        self.t = -1

    def __call__(self, observation: Any) -> Any:
        self.t += 1
        if self.t < self.step:
            return np.zeros(2)
        if self.how == "raise":
            raise OSError("no answer\nfrom the controller")
        if self.how == "slow":
            time.sleep(0.02)
            return np.zeros(2)
        return {"nan": np.asarray([0.0, np.nan]), "short": np.zeros(3), "units": np.full(2, 40.0)}[self.how]


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ("nan", BaseFaultError, r"base Broken returned nan in its action \(at step 2 of the dataset's first episode\)"),
        ("raise", BaseFaultError, "raised OSError: no answer from the controller .at step 2"),
        ("short", EnvironmentMismatchError, r"an action of shape \(3,\); this environment takes \(2,\)"),
        (
            "units",
            EnvironmentMismatchError,
            r"in other units: its actions reach 40, the environment takes \[-2, 2\]",
        ),
    ],
)
def test_a_bad_base_is_refused_before_any_step(world: Dataset, how: str, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        base_labels(load_base(Broken(how, 0 if how == "units" else 2)), world)


def test_a_slow_base(world: Dataset) -> None:
    with pytest.raises(BaseFaultError, match=r"took 0\.\d* s for an action, 3 times in a row; 0\.001 s are allowed"):
        base_labels(load_base(Broken("slow", 0)), world, timeout_s=0.001)
    base = Base(load_base(Broken("slow", 1)), world, timeout_s=0.001)
    base.reset(0)
    observation = world.arrays["observations"][0]
    for _ in range(3):
        base.act(observation)
    with pytest.raises(BaseFaultError, match=r"3 times in a row.*raise base_timeout_s.*at step 3 of the episode"):
        base.act(observation)
    with pytest.raises(ConfigError, match="base_timeout_s is 0"):
        Base(load_base(scripted), world, timeout_s=0)


def test_a_fault_in_a_run_names_the_step(world: Dataset) -> None:
    env = toy_env(world, Broken("nan", 3))
    env.reset(seed=0)
    env.step(np.zeros(2))
    env.step(np.zeros(2))
    with pytest.raises(EnvironmentFaultError, match="returned nan in its action .at step 3 of the episode"):
        env.step(np.zeros(2))


def test_a_fault_in_the_labels_names_episode_and_step(world: Dataset) -> None:
    calls = itertools.count()

    class Late(Broken):
        def __call__(self, observation: Any) -> Any:
            return np.full(2, np.nan) if next(calls) == 30 else np.zeros(2)

    with pytest.raises(BaseFaultError, match=r"at step \d of dataset episode \d"):
        base_labels(load_base(Late("nan")), world)


def test_a_chunk_longer_than_an_episode_is_refused(world: Dataset) -> None:
    spec = gym.spec("Hopper-v5")
    short = dataclasses.replace(spec, max_episode_steps=3)
    data = dataclasses.replace(world, info=dataclasses.replace(world.info, env_spec=short))
    with pytest.raises(EnvironmentMismatchError, match="a chunk of 4 actions; episodes end after 3 steps"):
        base_labels(load_base(whole_chunks), data)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("nowhere", "none that o2o knows"),
        ("no_such_module_here:act", "cannot be imported"),
        ("math:no_such_name", "no callable 'no_such_name'"),
        ("absent.onnx", "there is no such file"),
        ("absent.pt", "there is no such file"),
    ],
)
def test_specs_that_lead_nowhere(spec: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_base(spec)


def test_a_controller_in_a_python_file(world: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import numpy as np\ndef make():\n    return lambda observation: np.full(2, 0.25)\ndef act(observation):\n"
    (tmp_path / "my_robot.py").write_text(code + "    return np.full(2, 0.25)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for spec in ("my_robot:make", "my_robot:act", f"{tmp_path}/my_robot.py:act"):
        now, _ = base_labels(load_base(spec), world)
        np.testing.assert_allclose(world.action_map.to_env(now), 0.25, atol=1e-6)


@pytest.mark.parametrize(("name", "module", "extra"), [("p.onnx", "onnxruntime", "onnx"), ("p.pt", "torch", "torch")])
def test_a_missing_extra_is_named(
    name: str, module: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"needs {module}, which is not installed: pip install 'o2o\[{extra}\]'"):
        load_base(tmp_path / name)


def linear(state: np.ndarray) -> np.ndarray:
    """Return what the exported policies compute."""
    return 0.1 * np.stack([state[..., 0] + 1.0, state[..., 1] - state[..., 2]], axis=-1)


WEIGHT, BIAS = np.asarray([[0.1, 0.0], [0.0, 0.1], [0.0, -0.1]], np.float32), np.asarray([0.1, 0.0], np.float32)


def write_onnx(path: Path, width: int = 3) -> None:
    onnx = pytest.importorskip("onnx")
    helper, number = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["obs", "w"], ["wx"]), helper.make_node("Add", ["wx", "bias"], ["action"])],
        "policy",
        [helper.make_tensor_value_info("obs", number, ["batch", width])],
        [helper.make_tensor_value_info("action", number, ["batch", 2])],
        [onnx.numpy_helper.from_array(np.resize(WEIGHT, (width, 2)), "w"), onnx.numpy_helper.from_array(BIAS, "bias")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())


def test_an_onnx_graph(world: Dataset, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    write_onnx(tmp_path / "policy.onnx")
    source = load_base(tmp_path / "policy.onnx")
    now, _ = base_labels(source, world)
    expected = linear(world.arrays["observations"])
    np.testing.assert_allclose(now, world.action_map.from_env(expected), atol=1e-5)
    assert source.fingerprint == load_base(str(tmp_path / "policy.onnx")).fingerprint
    write_onnx(tmp_path / "wide.onnx", 5)
    with pytest.raises(EnvironmentMismatchError, match=r"takes .*5.*; observations here are a\[1\] \+ b\[2\]"):
        base_labels(load_base(tmp_path / "wide.onnx"), world)
    (tmp_path / "broken.onnx").write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        base_labels(load_base(tmp_path / "broken.onnx"), world)


def test_a_torchscript_module(world: Dataset, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    layer = torch.nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.as_tensor(WEIGHT.T.copy()))
        layer.bias.copy_(torch.as_tensor(BIAS))
    torch.jit.script(layer).save(str(tmp_path / "policy.pt"))
    torch.export.save(torch.export.export(layer, (torch.zeros(1, 3),)), str(tmp_path / "policy.pt2"))
    for name in ("policy.pt", "policy.pt2"):
        now, _ = base_labels(load_base(tmp_path / name), world)
        np.testing.assert_allclose(now, world.action_map.from_env(linear(world.arrays["observations"])), atol=1e-5)
    (tmp_path / "broken.pt").write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match="is not of torch.jit.save"):
        base_labels(load_base(tmp_path / "broken.pt"), world)


@pytest.fixture(scope="module")
def maze_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a root with a small version of the embedded dataset."""
    root = tmp_path_factory.mktemp("maze")
    recipe = EMBEDDED["pointmaze-umaze"]
    EMBEDDED["pointmaze-umaze"] = dataclasses.replace(recipe, steps=500)
    try:
        envs.make_embedded("pointmaze-umaze", root)
    finally:
        EMBEDDED["pointmaze-umaze"] = recipe
    return root


LOOP = LoopConfig(eval_every=40, eval_episodes=1, log_every=10, checkpoint_every=10_000, updates_per_dispatch=10)
Runs = Callable[..., experiment.RunConfig]


@pytest.fixture
def maze_run(maze_root: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """Return a maker of tiny runs on it: `maze_run(agent, fields, **changes)`."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(maze_root))
    monkeypatch.setenv("O2O_CACHE", str(maze_root / "cache"))

    def make(agent: str, fields: Any = (), **changes: Any) -> experiment.RunConfig:
        run = experiment.preset_run(agent, envs.embedded_id("pointmaze-umaze"), "small")
        config = experiment.with_fields(run.config, [("batch_size", 16), *fields])
        return dataclasses.replace(run, **{"config": config, "loop": LOOP, **changes})

    return make


CHUNKED = [("horizon", 3), ("execute", 2), ("width", 16), ("blocks", 1)]
RESIDUAL = [
    *(("actor_hidden_dims", (16, 16)), ("critic_hidden_dims", (16, 16)), ("online.random_steps", 20)),
    *(("online.initial_updates", 10), ("online.utd_ratio", 2)),
]


@pytest.fixture(scope="module")
def chunked_run(maze_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a trained run of two diffusion policies that play chunks and see two observations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(maze_root))
        run = experiment.preset_run("diffusion_bc", envs.embedded_id("pointmaze-umaze"), "small")
        config = experiment.with_fields(run.config, [("batch_size", 16), *CHUNKED])
        run = dataclasses.replace(
            run, config=config, loop=LOOP, offline_steps=20, online_steps=0, seeds=2, history=2, normalize=True
        )
        path = tmp_path_factory.mktemp("base") / "chunked"
        assert experiment.train(run, path)
    return path


def test_a_run_labels_side_by_side_what_it_does_step_by_step(
    chunked_run: Path, maze_run: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = datasets.load(envs.embedded_id("pointmaze-umaze"))
    source = load_base(chunked_run, member=1)
    source.check(data)
    episode = data.arrays["observations"][:7]
    (together,) = source.actions(data, [episode]) or [None]
    calls = []
    original = bases._act
    monkeypatch.setattr(bases, "_act", lambda *args: calls.append(1) or original(*args))
    alone = Base(source, data)
    for _ in range(2):  # the second time after a queue that was left half full
        alone.reset(0)
        actions = np.stack([alone.act_in_env(observation) for observation in episode])
        np.testing.assert_allclose(actions, together, atol=1e-5)
    assert len(calls) == 2 * 4  # one call to the device per chunk of two
    assert source.fingerprint != load_base(chunked_run, member=0).fingerprint
    np.testing.assert_array_equal(
        *(np.concatenate(source.actions(data, [episode, data.arrays["observations"][9:12]]) or []) for _ in range(2))
    )


def test_a_sampling_base_is_a_function_of_the_reset_seed(chunked_run: Path, maze_run: Runs) -> None:
    data = datasets.load(envs.embedded_id("pointmaze-umaze"))
    base = Base(load_base(chunked_run, sample=True), data)
    observation = data.arrays["observations"][0]
    first = []
    for seed in (1, 1, 2):
        base.reset(seed)
        first.append(base.act(observation))
    np.testing.assert_array_equal(first[0], first[1])
    assert np.any(first[0] != first[2])


def test_a_residual_run_resumes_exactly_and_starts_at_its_bases_level(
    chunked_run: Path, maze_run: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = maze_run("residual", RESIDUAL, base=str(chunked_run), base_sample=True, online_steps=80)
    assert (run.action_range, run.normalize, run.std_floor, run.offline_steps) == ("data", True, 0.1, 0)
    assert experiment.train(run, tmp_path / "whole")
    train_interrupted(run, tmp_path / "parts", monkeypatch, [StopAt("online", 50)])
    assert_same_runs(tmp_path / "whole", tmp_path / "parts", more_than=2)
    rows = read_rows(tmp_path / "whole" / "metrics.jsonl")
    assert rows[-1]["gradient_steps"] == 10 + 2 * 60
    assert rows[0]["phase"] == "warmup" and rows[-1]["actor/residual"] > 0
    config, trainer = experiment.open_run(tmp_path / "whole")
    assert config.base == str(chunked_run) and trainer.normalizer is not None
    stored = trainer.online_state.buffer.rows  # pyright: ignore[reportOptionalMemberAccess]
    b, a = (np.asarray(leaf[0, :20]) for leaf in (stored["observations"]["base_action"], stored["actions"]))
    assert np.abs(a - b).max() <= 0.2 + 1e-5 and np.abs(a - b).mean() > 0.03  # base and noise in the warm-up
    after = np.asarray(stored["next_observations"]["base_action"][0, :19])
    np.testing.assert_array_equal(after, np.asarray(stored["observations"]["base_action"][0, 1:20]))
    trainer.close()
    assert len(experiment.evaluate_run(tmp_path / "whole", episodes=1)) == 1
    assert load_base(tmp_path / "whole").check(trainer.data) is None  # a residual run may be a base itself


def test_the_first_evaluation_is_the_bases_own(chunked_run: Path, maze_run: Runs) -> None:
    run = maze_run("residual", RESIDUAL, base=str(chunked_run), base_member=1)
    trainer = experiment.build(run)
    ours = trainer.evaluate()
    own = load_base(chunked_run, member=1)
    env = envs.make(trainer.data.info, trainer.data.task, evaluation=True)
    base, data = Base(own, dataclasses.replace(trainer.data, action_map=own.data.action_map)), trainer.data
    slot = EnvSlot(env, (0, EVAL_STREAM, 0, 0))
    observation, over = slot.reset(), False
    base.reset(0)
    while not over:
        step = slot.step(base.act(observation))
        observation, over = step.next_observation, step.ended
    assert (ours[0]["length"], ours[0]["success"]) == (len(slot.actions), slot.success) and data.size
    trainer.close()


def test_a_residual_run_needs_a_base_and_others_take_none(maze_run: Runs, chunked_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="agent residual corrects a base policy, and there is none: give --base"):
        experiment.train(maze_run("residual", RESIDUAL), tmp_path / "none")
    with pytest.raises(ConfigError, match="agent bc takes no base policy"):
        experiment.train(maze_run("bc", base=str(chunked_run)), tmp_path / "bc")
    with pytest.raises(ConfigError, match=r"base_member is 2; run .* has 2 seed\(s\)"):
        experiment.train(maze_run("residual", RESIDUAL, base=str(chunked_run), base_member=2), tmp_path / "member")
    assert not any(tmp_path.iterdir())


def test_run_folders_that_are_no_base(
    chunked_run: Path, maze_run: Runs, world: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EnvironmentMismatchError, match=r"was trained on observations .*, here they are a\[1\] "):
        base_labels(load_base(chunked_run), world)
    with pytest.raises(RunError, match="no config.json"):
        load_base(tmp_path)
    shutil.copytree(chunked_run, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "checkpoints")
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        load_base(tmp_path / "copy")
    other = dataclasses.replace(world.info, action_space=spaces.Box(-3.0, 3.0, (2,), np.float32))
    source = load_base(chunked_run)
    there = dataclasses.replace(
        source.data, info=dataclasses.replace(source.data.info, action_space=other.action_space)
    )
    with pytest.raises(EnvironmentMismatchError, match="was trained with the action space"):
        source.check(there)


def test_a_base_that_changed_stops_a_resume(chunked_run: Path, maze_run: Runs, tmp_path: Path) -> None:
    run = maze_run("residual", RESIDUAL, base=str(chunked_run), online_steps=30)
    assert experiment.train(run, tmp_path / "run")
    assert experiment.resume(tmp_path / "run")
    config = (tmp_path / "run" / "config.json").read_text()
    (tmp_path / "run" / "config.json").write_text(config.replace('"base_member": 0', '"base_member": 1'))
    with pytest.raises(ConfigError, match="changed since run"):
        experiment.resume(tmp_path / "run")


def test_labels_are_cached_by_base_and_dataset(
    chunked_run: Path, maze_run: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = datasets.load(envs.embedded_id("pointmaze-umaze"))
    source = load_base(chunked_run)
    one = base_labels(source, data)
    monkeypatch.setattr(type(source), "actions", lambda *_: pytest.fail("asked again"))
    for first, second in zip(one, base_labels(source, data), strict=True):
        np.testing.assert_array_equal(first, second)
    assert all(leaf.shape == (data.size, 2) for leaf in jax.tree.leaves(one))


def look(observation: dict[str, Any]) -> np.ndarray:
    """Return an action that depends on what a camera sees."""
    (image,) = [entry for entry in observation.values() if entry.dtype == np.uint8]
    assert image.ndim == 3
    return np.asarray([image.mean() / 255.0 - 0.5, 0.1], np.float32)


def test_a_residual_run_on_images_resumes_exactly(pixels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = experiment.preset_run("residual", pixels, "small", base="tests.test_base:look")
    encoder = EncoderConfig(kind="conv", conv_features=(4, 4), conv_strides=(3, 2))
    tiny = [("encoder", encoder), ("trunk_width", 8), ("batch_size", 8)]
    config = experiment.with_fields(run.config, [*RESIDUAL, *tiny, ("num_critics", 2)])
    run = dataclasses.replace(run, config=config, loop=LOOP, online_steps=50)
    assert experiment.train(run, tmp_path / "whole")
    train_interrupted(run, tmp_path / "parts", monkeypatch, [StopAt("online", 30)])
    assert_same_runs(tmp_path / "whole", tmp_path / "parts", more_than=0, names=("metrics.jsonl",))
    assert read_rows(tmp_path / "whole" / "metrics.jsonl")[-1]["actor/residual"] > 0
