"""Agents that learn windows and play chunks, in the loops: when updates begin, carries, and exact resume."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from o2o.config import LoopConfig
from o2o.errors import ConfigError
from o2o.policies import video
from o2o.report.plots import read_rows
from o2o.rl.chunks import empty_queue, next_action
from o2o.runs import session
from o2o.runs.session import RunConfig
from o2o.train.episode import EnvSlot
from o2o.train.evaluation import Evaluator
from o2o.train.state import Hooks
from o2o.train.trainer import Trainer
from o2o.types import Agent, AgentConfig, Needs, OnlineConfig

Maker = Callable[..., RunConfig]
KEY = jax.random.key(11)
PLACES, LIMIT = 4, 6


# ---------------------------------------------------------------- an agent that tells what happens to it


@dataclass(frozen=True)
class ProbeConfig(AgentConfig):
    """Settings of the probe."""

    batch_size: int = 8
    window: int = PLACES
    online: OnlineConfig = OnlineConfig(warmup_steps=10_000)

    @property
    def needs(self) -> Needs:
        return Needs(window=self.window)


class Probe(Agent):
    """Plays chunks of 0.0, 0.1, 0.2, 0.3 and counts its updates; its metrics say what the batches were."""

    updates: jax.Array
    rng: jax.Array
    config: Any = struct.field(pytree_node=False)
    action_dim: int = struct.field(pytree_node=False)

    @classmethod
    def create(cls, rng: Any, observations: Any, actions: Any, config: ProbeConfig = ProbeConfig()) -> Self:
        return cls(updates=jnp.zeros((), jnp.int32), rng=rng, config=config, action_dim=actions.shape[-1])

    def update(self, batch: Any) -> tuple[Self, Any]:
        size = jnp.asarray(batch["rewards"].size, jnp.float32)
        valid = batch["valid"].mean() if self.config.window > 1 else jnp.ones(())
        return self.replace(updates=self.updates + batch["rewards"].shape[0]), {"a/rows": size, "a/valid": valid}

    def sample_actions(self, observations: Any, carry: Any, rng: Any, deterministic: bool = False) -> Any:
        chunk = jnp.broadcast_to(0.1 * jnp.arange(PLACES)[:, None], (*carry.left.shape, PLACES, self.action_dim))
        return next_action(carry, lambda: chunk, PLACES)

    def initial_carry(self, batch_shape: Any) -> Any:
        return empty_queue(batch_shape, PLACES, self.action_dim)


class Exploring(Probe):
    """The same, with random actions of its own."""

    def random_actions(self, observations: Any, rng: Any, action_dim: int) -> Any:
        return jnp.full((*observations.shape[:-1], self.action_dim), -0.7)


class Recorder(gymnasium.Wrapper):
    """Keep the first action number of every step of every episode, and end it by a time limit."""

    def __init__(self, env: gymnasium.Env, episodes: list[list[float]]) -> None:
        super().__init__(env)
        self.episodes, self.played = episodes, []

    def reset(self, **kwargs: Any) -> Any:
        self.played = []
        self.episodes.append(self.played)
        return self.env.reset(**kwargs)

    def step(self, action: Any) -> Any:
        self.played.append(round(float(action[0]), 3))
        observation, reward, terminated, _, info = self.env.step(action)
        return observation, reward, terminated, len(self.played) >= LIMIT, info


WHOLE = [0.0, 0.1, 0.2, 0.3, 0.0, 0.1]
"""What a policy of chunks plays in an episode of six steps if its queue was empty at the start."""


@pytest.fixture
def probe(tiny_run: Maker) -> Callable[..., Trainer]:
    """Return a maker of trainers of the probe on short episodes; `trainer.episodes` are the actions played."""

    def make(kind: Any = Probe, seeds: int = 1, **changes: Any) -> Trainer:
        plain = session.build(tiny_run("bc"))
        episodes: list[list[float]] = []
        loop = LoopConfig(eval_every=10_000, eval_episodes=3, log_every=10_000, checkpoint_every=10_000)
        rows: list[dict[str, Any]] = []
        trainer = Trainer(
            kind, ProbeConfig(**changes), plain.data, lambda _: Recorder(plain.env_fn(False), episodes), seeds=seeds,
            loop=loop, hooks=Hooks(metrics=rows.append),
        )  # fmt: skip
        trainer.evaluate = lambda wait=True: []
        trainer.episodes, trainer.metrics = episodes, rows  # type: ignore[attr-defined]
        return trainer

    return make


def whole(episodes: list[list[float]]) -> list[list[float]]:
    return [episode for episode in episodes if len(episode) == LIMIT]


@pytest.mark.parametrize("seeds", [1, 2])
def test_queue_cleared_in_training(probe: Any, seeds: int) -> None:
    """Queues are cleared at time limits in training."""
    trainer = probe(seeds=seeds)
    trainer.online(20)
    played = whole(trainer.episodes)
    assert len(played) == 3 * seeds and played == [WHOLE] * (3 * seeds)
    buffer = trainer.replay.buffer
    np.testing.assert_allclose(buffer.rows["actions"][0, :LIMIT, 0], WHOLE, atol=1e-6)
    trainer.close()


@pytest.mark.parametrize("seeds", [1, 2])
def test_queue_cleared_in_evaluation(probe: Any, seeds: int) -> None:
    """Queues are cleared at time limits in evaluation."""
    trainer = probe(seeds=seeds)
    evaluator = Evaluator(trainer.env_fn, seeds, 5, 0, slots=2)
    evaluator(trainer.agent, None, 0)
    assert whole(trainer.episodes) == [WHOLE] * (5 * seeds)
    evaluator.close()


def test_queue_cleared_in_play(probe: Any) -> None:
    """Queues are cleared at time limits in play."""
    trainer = probe()
    slot = EnvSlot(trainer.env_fn(True), (0, 1, 0, 0))
    video.record(slot, trainer.agent_of(), None, 3, None)
    assert whole(trainer.episodes) == [WHOLE] * 3
    slot.env.close()


# ---------------------------------------------------------------- when updates begin


def test_first_update_waits_for_window(probe: Any) -> None:
    """The first update waits until a window is stored."""
    trainer = probe(online=OnlineConfig())
    trainer.online(PLACES)
    assert int(trainer.agent.updates[0]) == 0 and trainer.phase_name == "warmup"
    trainer.online(PLACES + 1)
    assert int(trainer.agent.updates[0]) == 1 and trainer.phase_name == "online"
    assert trainer.counters.gradient_steps == trainer.counters.online_updates == 1
    trainer.close()


@pytest.mark.parametrize("replay", ["online", "mixed", "append"])
def test_initial_updates_run_once(probe: Any, replay: Any) -> None:
    """Initial updates run once, before the first online update."""
    wanted = OnlineConfig(utd_ratio=2, warmup_steps=5, initial_updates=7, replay=replay, offline_ratio=0.5)
    trainer = probe(seeds=2, online=wanted)
    trainer.online(6)
    assert trainer.agent.updates.tolist() == [0, 0] and trainer.phase_name == "warmup"
    trainer.online(7)
    assert trainer.agent.updates.tolist() == [9, 9]
    assert trainer.counters.gradient_steps == 9 and trainer.counters.online_updates == 1
    mean_rows = [row["a/rows"] for row in trainer.metrics if "a/rows" in row]
    assert mean_rows == [8 * PLACES * (7 * 1 + 2) / 8] * 2, "seven calls of one update and one of two"
    trainer.online(8)
    assert trainer.agent.updates.tolist() == [11, 11]
    trainer.close()


def test_initial_updates_after_resume(probe: Any) -> None:
    """Initial updates are not repeated after a resume."""
    wanted = OnlineConfig(warmup_steps=3, initial_updates=5)
    first, second = probe(online=wanted), probe(online=wanted)
    first.online(6)
    arrays, state = first.save()
    second.load(json.loads(json.dumps(state)), lambda _: jax.tree.map(jnp.copy, arrays), 20)
    for trainer in (first, second):
        trainer.online(8)
        assert int(trainer.agent.updates[0]) == 5 + 4
        trainer.close()


def test_own_random_actions(probe: Any) -> None:
    """An agent's own random actions replace uniform ones."""
    uniform, own = (probe(kind, online=OnlineConfig(random_steps=5)) for kind in (Probe, Exploring))
    for trainer in (uniform, own):
        trainer.online(9)
    actions = [np.asarray(t.replay.buffer.rows["actions"][0, :9, 0]) for t in (uniform, own)]
    np.testing.assert_allclose(actions[1][:5], -0.7, atol=1e-6)
    assert len(set(actions[0][:5].tolist())) == 5
    for taken in actions:
        np.testing.assert_allclose(taken[6:9], [0.0, 0.1, 0.2], atol=1e-6)  # step 5 is the last of the first episode
    for trainer in (uniform, own):
        trainer.close()


def test_overlong_window_refused(probe: Any) -> None:
    """A window longer than what is stored is refused before any step."""
    with pytest.raises(ConfigError, match=r"learns from 10000000 steps in a row, the dataset holds \d+; shorten"):
        probe(window=10_000_000)
    trainer = probe()
    trainer.loop = replace(trainer.loop, replay_capacity=3)
    with pytest.raises(ConfigError, match="learns from 4 steps in a row, the replay buffer holds 3"):
        trainer.begin_online(20)
    assert trainer.episodes == []


def test_no_updates_no_warm_up(tiny_run: Maker) -> None:
    """An agent that never updates has no warm-up."""
    trainer = session.build(tiny_run("bc"))
    trainer.online(5)
    assert trainer.phase_name == "online" and trainer.counters.online_updates == 0
    trainer.close()


def test_waiting_is_warm_up(tiny_run: Maker) -> None:
    """Waiting for the first finished episode is warm-up."""
    trainer = session.build(tiny_run("calql"))
    trainer.online(30)
    assert trainer.counters.env_steps > trainer.online_config.first_update()
    assert trainer.phase_name == "warmup" and trainer.counters.gradient_steps == 0
    trainer.close()


# ---------------------------------------------------------------- resume


def test_lost_environment_new_chunk(probe: Any) -> None:
    """A policy whose environment is lost begins a new chunk, and the others go on."""
    first, second = probe(seeds=2), probe(seeds=2)
    first.online(2)
    arrays, state = first.save()
    state = json.loads(json.dumps(state))
    made = second.env_fn
    built: list[Any] = []

    def env_fn(evaluation: bool) -> Any:
        env = made(evaluation)
        env.metadata = {**env.metadata, "replayable": len(built) > 0}
        built.append(env)
        return env

    second.env_fn = env_fn
    second.load(state, lambda _: arrays, 20)
    assert not all(slot.exact for slot in second.fleet.slots)
    assert second.state.carry.left[:, 0].tolist() == [3, 1], "member 0 has a new chunk, member 1 the old one"
    np.testing.assert_allclose(second.state.action[:, 0, 0], [0.0, 0.2], atol=1e-6)
    second.online(3)
    np.testing.assert_allclose(second.replay.buffer.rows["actions"][:, 2, 0], [0.0, 0.2], atol=1e-6)
    assert second.replay.buffer.rows["ends"][:, 1].tolist() == [1.0, 0.0]
    first.close()
    second.close()


def test_qc_resume_with_queue(tiny_run: Maker, tmp_path: Path) -> None:
    """QC stopped with actions in its queue goes on as if it had not been."""
    fields = [("num_samples", 3), ("flow_steps", 2), ("online.warmup_steps", 12)]
    run = tiny_run("qc", fields, seeds=2, offline_steps=20, online_steps=40)
    ends = []
    for stops in ((), (("offline", 10), ("online", 28))):
        trainer = session.build(run)
        for phase, step in (*stops, ("end", 0)):
            if phase == "offline":
                trainer.offline(step)
            elif phase == "online":
                trainer.offline(20)
                trainer.online(step)
                left = trainer.state.carry.left  # type: ignore[union-attr]
                assert (np.asarray(left) > 0).all(), "a queue with actions in it"
            else:
                trainer.offline(20)
                trainer.online(40)
                break
            trainer = reopened(trainer, run, tmp_path / phase)
        ends.append(trainer.save()[0])
        assert trainer.counters.gradient_steps == 20 + 40 - 13
        trainer.close()
    for ours, theirs in zip(jax.tree.leaves(ends[0]), jax.tree.leaves(ends[1]), strict=True):
        if jnp.issubdtype(ours.dtype, jax.dtypes.prng_key):
            ours, theirs = jax.random.key_data(ours), jax.random.key_data(theirs)
        np.testing.assert_array_equal(ours, theirs)


def reopened(trainer: Trainer, run: RunConfig, folder: Path) -> Trainer:
    """Save the trainer to the disk, close it, and return another one that stands at the same point."""
    from o2o.train import checkpoint

    checkpoint.save(folder, 1, *trainer.save(), None, 1)
    trainer.close()
    fresh = session.build(run)
    step, state, _ = checkpoint.load_state(folder)
    fresh.load(state, lambda targets: checkpoint.load_arrays(folder, step, targets), run.online_steps)
    assert fresh.fleet is None or all(slot.exact for slot in fresh.fleet.slots)
    return fresh


def test_qc_phases(tiny_run: Maker, tmp_path: Path) -> None:
    """A run of QC reports its phases."""
    fields = [("num_samples", 3), ("flow_steps", 2), ("online.warmup_steps", 12)]
    assert session.train(tiny_run("qc", fields, offline_steps=20, online_steps=40), tmp_path / "run")
    metrics = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert {"offline", "online"} <= {row["phase"] for row in metrics}
    assert any("critic/valid" in row for row in metrics)
    episodes = read_rows(tmp_path / "run" / "episodes.jsonl")
    assert {row["phase"] for row in episodes} == {"offline", "warmup", "online"}


def test_default_window() -> None:
    """Every agent without a window learns from plain rows."""
    assert AgentConfig().needs.window == 1 and Probe.create(KEY, None, jnp.zeros((1, 2))).needs.window == PLACES
