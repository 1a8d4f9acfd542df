"""Base policies: units, fresh queues, labels, and errors before any step and in the middle of a run."""

import dataclasses
import itertools
import time
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from o2o import envs
from o2o.data.datasets import Dataset
from o2o.data.task import Task
from o2o.errors import BaseFaultError, ConfigError, EnvironmentFaultError, EnvironmentMismatchError
from o2o.policies.base import Base, base_labels
from o2o.runs.session import load_base
from tests.helpers.toy_world import Toy


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


def test_callable_in_env_terms(world: Dataset) -> None:
    """A callable sees and acts in the environment's own terms."""
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
def test_queue_fresh_every_episode(world: Dataset, spec: Any) -> None:
    """The queue is fresh in every episode, whatever ended the last."""
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


def test_labels_restart_every_episode(world: Dataset) -> None:
    """Labels begin every episode afresh."""
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


def test_demo_labels_zero_residual(world: Dataset) -> None:
    """Demonstrations as labels leave no residual."""
    now, after = base_labels(load_base(scripted), world, "demo")
    np.testing.assert_array_equal(world.arrays["actions"] - now, 0.0)
    ends = np.flatnonzero(world.arrays["ends"])
    inside = np.setdiff1d(np.arange(world.size), ends)
    np.testing.assert_array_equal(after[inside], now[inside + 1])
    last = world.arrays["next_observations"][ends]
    asked = np.stack([scripted({"a": row[:1], "b": row[1:]}) for row in last])
    np.testing.assert_allclose(after[ends], world.action_map.from_env(asked), atol=1e-6)


def test_controller_per_environment(world: Dataset) -> None:
    """Each environment has a controller of its own, and its seed from the reset."""
    one, two = (toy_env(world, Chunks) for _ in range(2))
    controllers = [env.get_wrapper_attr("base")._controller.function.__self__ for env in (one, two)]
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
    shared = toy_env(world, Chunks()).get_wrapper_attr("base")._controller.function.__self__
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
def test_bad_base_refused(world: Dataset, how: str, error: type, words: str) -> None:
    """A bad base is refused before any step."""
    with pytest.raises(error, match=words):
        base_labels(load_base(Broken(how, 0 if how == "units" else 2)), world)


def test_slow_base(world: Dataset) -> None:
    """A base that is too slow three times in a row is a fault."""
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


def test_run_fault_names_step(world: Dataset) -> None:
    """A fault in a run names the step."""
    env = toy_env(world, Broken("nan", 3))
    env.reset(seed=0)
    env.step(np.zeros(2))
    env.step(np.zeros(2))
    with pytest.raises(EnvironmentFaultError, match="returned nan in its action .at step 3 of the episode"):
        env.step(np.zeros(2))


def test_label_fault_names_step(world: Dataset) -> None:
    """A fault in the labels names the episode and the step."""
    calls = itertools.count()

    class Late(Broken):
        def __call__(self, observation: Any) -> Any:
            return np.full(2, np.nan) if next(calls) == 30 else np.zeros(2)

    with pytest.raises(BaseFaultError, match=r"at step \d of dataset episode \d"):
        base_labels(load_base(Late("nan")), world)


def test_overlong_chunk_refused(world: Dataset) -> None:
    """A chunk longer than an episode is refused."""
    spec = gym.spec("Hopper-v5")
    short = dataclasses.replace(spec, max_episode_steps=3)
    data = dataclasses.replace(world, info=dataclasses.replace(world.info, env_spec=short))
    with pytest.raises(EnvironmentMismatchError, match="a chunk of 4 actions; episodes end after 3 steps"):
        base_labels(load_base(whole_chunks), data)
