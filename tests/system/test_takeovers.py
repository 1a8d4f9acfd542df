"""What reaches a robot, and what a human's takeover leaves behind: in training, in evaluation, in play, in files."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces
from minari.dataset.minari_storage import MinariStorage

from o2o import envs
from o2o.agents.jsrl import Episode
from o2o.config import LoopConfig
from o2o.data import datasets
from o2o.data.datasets import Dataset
from o2o.data.spaces import ActionMap
from o2o.data.task import Task
from o2o.errors import BaseFaultError, DatasetError, DivergenceError, EnvironmentFaultError
from o2o.policies import video
from o2o.policies.base import Base, with_base_labels
from o2o.policies.run import RunPolicy, TrainedPolicy
from o2o.rl.chunks import empty_queue, outdated
from o2o.runs.session import load_base
from o2o.train.collect import Fleet
from o2o.train.episode import EnvSlot
from o2o.train.evaluation import EnvFn, evaluate
from o2o.train.state import Hooks
from o2o.train.trainer import Trainer
from tests.system.test_chunk_loops import Probe, ProbeConfig
from tests.system.test_evaluate import Counting, Pendulum

HUMAN = (1, 2)
"""Steps of every episode, counted from 0, in which a human has the arm."""
LIMIT = 6
TASK = Task("arm", has_success=True)


class Arm(gym.Env):
    """An arm that moves by what is commanded; `played` are the commands of each episode. The human says -1."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,))
    action_space = spaces.Box(-2.0, 2.0, (1,), np.float32)

    def __init__(self, human: tuple[int, ...] = HUMAN) -> None:
        self.human, self.played = human, list[list[float]]()

    def _observation(self) -> np.ndarray:
        return np.asarray([self.x, len(self.played[-1])], np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.played.append([])
        self.x = float(self.np_random.uniform())
        return self._observation(), {}

    def step(self, action: Any) -> Any:
        info: dict[str, Any] = {"success": False}
        if len(self.played[-1]) in self.human:
            info["intervene_action"] = np.float32([-1.0])
        self.played[-1].append(float(action[0]))
        self.x += float(info.get("intervene_action", action)[0])
        return self._observation(), self.x, False, len(self.played[-1]) == LIMIT, info


def arms(made: list[Arm] | None = None, human: tuple[int, ...] = HUMAN) -> EnvFn:
    """Return a maker of arms as a run sees them, which keeps them in `made`."""

    def make(evaluation: bool) -> gym.Env:
        arm = Arm(human)
        if made is not None:
            made.append(arm)
        return envs.wrap(arm, TASK, evaluation=evaluation)

    return make


def test_non_finite_action_not_played() -> None:
    """An action that is not finite reaches no robot in evaluation and play."""
    diverged, made = Pendulum(gains=jnp.full(2, jnp.nan)), list[Arm]()
    with pytest.raises(DivergenceError, match="action has nan in entry 0 and was not played"):
        evaluate(diverged, arms(made), episodes=1)
    slot = EnvSlot(arms(made)(True), (0,))
    with pytest.raises(DivergenceError, match="action has nan in entry 0 and was not played"):
        video.record(slot, diverged, None, 1, None)
    assert not any(episode for arm in made for episode in arm.played)


@pytest.mark.parametrize("processes", [0, 2])
def test_non_finite_action_in_processes(processes: int) -> None:
    """An action that is not finite has its error in processes, too."""
    fleet = Fleet(arms(human=(0,)), 0, 2, processes=processes)
    before = fleet.snapshot()
    with pytest.raises(DivergenceError, match="action has inf in entry 0"):
        fleet.step(np.float32([[0.1], [np.inf]]), lambda *_: None)
    assert fleet.snapshot() == before and [slot.interventions for slot in fleet.slots] == [0, 0]
    fleet.close()


def test_non_finite_gives_no_action(arm_data: Dataset) -> None:
    """A sensor or a policy that is not finite gives no action."""
    source: Any = RunPolicy("run", None, probe(arm_data), None, arm_data, 2, True, None)
    policy, plain = TrainedPolicy(source), TrainedPolicy(source)
    with pytest.raises(EnvironmentFaultError, match="observation has nan, for which there is no action"):
        policy.act(np.float32([np.nan, 0.0]))
    seen = np.float32([0.5, 3.0])
    np.testing.assert_array_equal(policy.act(seen), plain.act(seen))  # nothing of the bad one is remembered
    source = RunPolicy("run", None, Diverged(0.0, jnp.zeros(()), None, 1), None, arm_data, 1, True, None)  # pyright: ignore
    with pytest.raises(DivergenceError, match="policy of run has nan in its action: its learner diverged"):
        TrainedPolicy(source).act(seen)
    base = Base(source, arm_data)
    base.reset(0)
    with pytest.raises(BaseFaultError, match=r"base run diverged: the policy of run has nan .*\(at step 0"):
        base.act(seen)


def test_takeover_beyond_action_range(caplog: pytest.LogCaptureFixture) -> None:
    """A takeover beyond the run's actions is reported once."""
    for low, lines in ((-0.5, 1), (-2.0, 0)):
        env = envs.wrap(Arm(), TASK, action_map=ActionMap((low,), (2.0,), (1,)))
        for _ in range(2):
            env.reset(seed=0)
            executed = [env.step(np.zeros(1, np.float32))[4]["executed_action"][0] for _ in range(LIMIT)]
        assert executed[1] == (-1.0 if lines else -0.5)
        assert len(caplog.messages) == lines
        words = "takeover's action has -1 in entry 0, but the run's actions lie within [-0.5, 2] there"
        assert (words in caplog.text) == lines
        caplog.clear()


# ---------------------------------------------------------------- chunks that were planned before the takeover

COMMANDED = [0.0, 0.2, 0.0, 0.0, 0.2, 0.4]
"""What an episode's arm is told by a policy of chunks 0.0, 0.2, 0.4, 0.6: a new one in every step after the human's."""
EXECUTED = [0.0, -1.0, -1.0, 0.0, 0.2, 0.4]


@pytest.fixture(scope="module")
def arm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a dataset of random actions and takeovers, and one episode without."""
    episodes = [*datasets.record(Arm(), wave, 3 * LIMIT), *datasets.record(Arm(human=()), wave, LIMIT, seed=1)]
    space = {"observation_space": Arm.observation_space, "action_space": Arm.action_space}
    return datasets.write("arm-v0", episodes, **space, spec=None, root=tmp_path_factory.mktemp("arm"))


@pytest.fixture(scope="module")
def arm_data(arm_folder: Path) -> Dataset:
    return datasets.load(arm_folder, task=TASK, cache=False)


def wave(_: Any, rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(0.0, 2.0, 1).astype(np.float32)


def probe(data: Dataset) -> Probe:
    return Probe.create(jax.random.key(0), None, data.arrays["actions"])


@pytest.mark.parametrize("where", ["here", "host", "processes"])
def test_takeover_ends_training_chunk(where: str, arm_data: Dataset) -> None:
    """A takeover ends the chunk in training."""
    loop, told = (
        LoopConfig(eval_every=1000, checkpoint_every=1000, env_processes=2 * (where == "processes")),
        list[Any](),
    )
    hooks = Hooks(metrics=told.append)
    trainer = Trainer(Probe, ProbeConfig(), arm_data, arms(), seeds=2, loop=loop, hooks=hooks)
    trainer.evaluate = lambda wait=True: []  # type: ignore[method-assign]
    trainer.begin_online(2 * LIMIT, kind="host" if where == "host" else None)
    trainer.online(2 * LIMIT)
    assert trainer.counters.phase == "online"
    executed = 2.0 * np.asarray(trainer.replay.buffer.rows["actions"])[:, : 2 * LIMIT, 0]
    np.testing.assert_allclose(executed, [EXECUTED * 2] * 2, atol=1e-6)
    trainer.close()
    assert [row["train/intervention"] for row in told if "train/return" in row] == [len(HUMAN) / LIMIT] * 4


def test_takeover_ends_evaluation_chunk(arm_data: Dataset) -> None:
    """A takeover ends the chunk in evaluation and play."""
    made = list[Arm]()
    rows = evaluate(probe(arm_data), arms(made), episodes=3)
    assert [row["intervention"] for row in rows] == [len(HUMAN) / LIMIT] * 3
    video.record(EnvSlot(arms(made)(True), (0,)), probe(arm_data), None, 2, None)
    played = [episode for arm in made for episode in arm.played if episode]
    np.testing.assert_allclose(played, [COMMANDED] * 5, atol=1e-6)


def test_memories_outlive_takeover() -> None:
    """A takeover empties a policy's chunk queue and leaves every other memory as it is."""
    ended, human = np.asarray([True, False, False]), np.asarray([False, True, False])
    assert outdated(empty_queue((3,), 2, 1), ended, human).tolist() == [True, True, False]
    guide = Episode(jnp.zeros(3, jnp.int32), jnp.zeros(3, jnp.int32))
    assert outdated(guide, ended, human) is ended and outdated(None, ended, human) is ended
    made = list[Arm]()
    evaluate(Counting(gains=jnp.zeros(2)), arms(made), episodes=1)
    played = [episode for episode in made[0].played if episode]
    np.testing.assert_allclose(played, [2 * np.arange(LIMIT) / 1000], atol=1e-6)


class Planner:
    """Plans four actions from what it sees, plays them open loop, and is told when a human takes over."""

    def __init__(self) -> None:
        self.plan: list[np.ndarray] = []

    def reset(self) -> None:
        self.plan = []

    interrupt = reset

    def act(self, observation: np.ndarray) -> np.ndarray:
        self.plan = self.plan or list(planned(observation))
        return self.plan.pop(0)


def planned(observation: np.ndarray) -> np.ndarray:
    """Return a chunk `[4, 1]`; the observation's second number is the step."""
    return 0.1 * observation[1:] + 0.01 * np.arange(4, dtype=np.float32)[:, None]


def source_of(kind: str, data: Dataset) -> Any:
    if kind != "run":
        return load_base(Planner if kind == "controller" else planned)
    inner, none = load_base(planned), np.zeros((data.size, 1), np.float32)
    data = with_base_labels(data, none, none)
    return RunPolicy("run", None, Follower(0.0, jnp.zeros(()), None, 1), None, data, 1, True, inner)  # pyright: ignore


class Diverged(Probe):
    """Has nothing to say any more."""

    def sample_actions(self, observations: Any, carry: Any, rng: Any, deterministic: bool = False) -> Any:
        return jnp.full((len(observations), 1), jnp.nan), carry


class Follower(Probe):
    """Plays as its base does."""

    def sample_actions(self, observations: Any, carry: Any, rng: Any, deterministic: bool = False) -> Any:
        return observations["base_action"], carry


@pytest.mark.parametrize("kind", ["chunks", "controller", "run"])
def test_takeover_interrupts_base_policy(kind: str, arm_data: Dataset) -> None:
    """A takeover interrupts a base policy."""
    env = envs.BaseAction(arms()(False), Base(source_of(kind, arm_data), arm_data))
    seen = [env.reset(seed=0)[0]] + [env.step(np.zeros(1, np.float32))[0] for _ in range(LIMIT)]
    found = [2.0 * float(observation["base_action"][0]) for observation in seen]
    # Planned at steps 0 and, as the human had steps 1 and 2, at 2 and at 3.
    np.testing.assert_allclose(found, [0.0, 0.01, 0.2, 0.3, 0.31, 0.32, 0.33], atol=1e-6)


@pytest.mark.parametrize("loaded", [False, True])
def test_chunked_base_replans_after_takeover(loaded: bool, arm_data: Dataset) -> None:
    """A chunking run used as the base policy plans anew after a takeover."""
    source: Any = RunPolicy("run", None, probe(arm_data), None, arm_data, 1, True, None)
    source = load_base(TrainedPolicy(source)) if loaded else source
    env = envs.BaseAction(arms()(False), Base(source, arm_data))
    seen = [env.reset(seed=0)[0]] + [env.step(np.zeros(1, np.float32))[0] for _ in range(LIMIT)]
    found = [2.0 * float(observation["base_action"][0]) for observation in seen]
    np.testing.assert_allclose(found, [*COMMANDED, 0.6], atol=1e-6)


def test_interrupt_from_user_loop(arm_data: Dataset) -> None:
    """A user's own loop interrupts the policy at a takeover, which then plans anew."""
    policy, arm = TrainedPolicy(RunPolicy("run", None, probe(arm_data), None, arm_data, 1, True, None)), Arm()
    for _ in range(2):
        observation, over = arm.reset()[0], False
        policy.reset()
        while not over:
            observation, _, _, over, info = arm.step(policy.act(observation))
            if "intervene_action" in info:
                policy.interrupt()
    np.testing.assert_allclose(arm.played, [COMMANDED] * 2, atol=1e-6)


# ---------------------------------------------------------------- what files say of it


def test_demonstrations_record_human_actions(arm_folder: Path) -> None:
    """Demonstrations have what the human did and when."""
    *taught, alone = MinariStorage.read(arm_folder / "data").get_episodes(range(4))
    for episode in taught:
        assert episode["infos"]["intervened"].tolist() == [False, False, True, True, False, False, False]
        assert (episode["actions"][:, 0] == -1.0).tolist() == [False, True, True, False, False, False]
    assert "intervened" not in (alone.get("infos") or {}) and (alone["actions"] >= 0).all()


def test_demonstrations_copied_and_finite() -> None:
    """Demonstrations hold copies of the observations, and an action that is not finite is refused."""

    class Camera(gym.ObservationWrapper):
        """Gives the same array every time."""

        frame = np.zeros(2, np.float32)

        def observation(self, observation: np.ndarray) -> np.ndarray:
            self.frame[:] = observation
            return self.frame

    (episode,) = datasets.record(Camera(Arm()), wave, LIMIT)
    assert episode.observations[:, 1].tolist() == list(range(LIMIT + 1))
    arm, bad = Arm(human=()), iter([np.float32([0.5]), np.float32([np.nan])])
    with pytest.raises(DatasetError, match=r"policy's action at step 1 of episode 0 is \[nan\]; expected finite"):
        list(datasets.record(arm, lambda *_: next(bad), LIMIT))
    assert arm.played == [[0.5]]
