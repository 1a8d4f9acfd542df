"""Agents that set priorities, and agents that hear of episodes, in whole runs: what they are told, and exact resume."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o2o.agents import AGENTS, TD3BC, TD3BCConfig, register_agent
from o2o.config import LoopConfig
from o2o.errors import ConfigError
from o2o.report.plots import read_rows
from o2o.runs import session
from o2o.types import PRIORITIES, Array, Batch, Info, Needs, OnlineConfig, Params
from tests.helpers.tiny import largest_difference
from tests.system.test_runs import Maker, StopAt, assert_same_runs, train_interrupted

LOOP = LoopConfig(eval_every=0, eval_episodes=1, log_every=15, checkpoint_every=10_000, updates_per_dispatch=10)


@dataclass(frozen=True)
class LapConfig(TD3BCConfig):
    """Settings of an agent with both needs."""

    silent: bool = False
    """Return no priorities."""

    @property
    def needs(self) -> Needs:
        """Priorities, and to hear of episodes."""
        return Needs(priorities=True, episode_returns=True)


class Lap(TD3BC):
    """TD3 with loss-adjusted priorities (arXiv 2007.06049) that keeps the policy of its best training episode."""

    best: Any = None
    kept: Params = None
    heard: Any = None
    """Episodes, and their steps."""
    shares: Any = None
    """Sum of the mean odds of all minibatches, and their number."""

    @classmethod
    def create(cls, rng: Array, observations: Array, actions: Array, config: Any = LapConfig()) -> Self:
        """Initialise."""
        agent = super().create(rng, observations, actions, config)
        kept = jax.tree.map(jnp.copy, agent.actor.params)
        return agent.replace(best=jnp.float32(-jnp.inf), kept=kept, heard=jnp.zeros(2), shares=jnp.zeros(2))

    def critic_step(self, batch: Batch, rng: Array) -> tuple[Self, Info]:
        """Step the critics; the priority is max(|Q - y|, 1)^0.4, here with the bound 0.01."""
        agent, info = super().critic_step(batch, rng)
        if "slots" not in batch or self.config.silent:
            return agent, info
        targets, _ = self.targets(batch, rng)
        errors = jnp.abs(self.critic(batch["observations"], batch["actions"]) - targets).max(axis=0)
        shares = self.shares + jnp.stack([batch["odds"].mean(), jnp.ones(())])
        return agent.replace(shares=shares), {**info, PRIORITIES: jnp.maximum(errors, 0.01) ** 0.4}

    def after_episodes(self, returns: Array, lengths: Array, over: Array) -> Self:
        """Keep the policy that had the highest return."""
        better = returns[0] > self.best
        kept = jax.tree.map(lambda new, old: jnp.where(better, new, old), self.actor.params, self.kept)
        heard = self.heard + jnp.stack([over.sum(), lengths.sum()])
        return self.replace(best=jnp.maximum(self.best, returns[0]), kept=kept, heard=heard)

    @classmethod
    def preset(cls, family: str, size: Any = "paper") -> Any:
        """Return TD3+BC's settings."""
        base = TD3BC.preset(family, size)
        return replace(base, config=LapConfig(**vars(base.config)), run={})


@pytest.fixture(autouse=True)
def lap() -> Iterator[None]:
    register_agent("lap_of_tests")(Lap)
    yield
    AGENTS.pop("lap_of_tests", None)


@pytest.mark.parametrize("overlap", [False, True])
def test_stop_and_resume(overlap: bool, tiny_run: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run with priorities and kept policies, stopped and resumed, equals one never stopped."""
    seeds = 1 if overlap else 2
    loop = replace(LOOP, overlap=overlap)
    run = tiny_run("lap_of_tests", seeds=seeds, offline_steps=10, online_steps=160, loop=loop)
    assert session.train(run, tmp_path / "whole")
    train_interrupted(run, tmp_path / "parts", monkeypatch, [StopAt("online", 75)])
    assert_same_runs(tmp_path / "whole", tmp_path / "parts", more_than=1)
    rows = [row for row in read_rows(tmp_path / "whole/metrics.jsonl") if "train/return" in row]
    _, trainer = session.open_run(tmp_path / "whole")
    agent: Any = trainer.agent
    for seed in range(seeds):
        returns = [row["train/return"] for row in rows if row["seed"] == seed]
        assert float(agent.best[seed]) == pytest.approx(max(returns), rel=1e-6)
        heard = [len(returns), sum(row["train/length"] for row in rows if row["seed"] == seed)]
        assert agent.heard[seed].tolist() == heard and len(returns) == trainer.counters.episodes[seed] > 0
    assert largest_difference(agent.kept, agent.actor.params) > 0
    given = np.asarray(trainer.replay.arrays()["buffer"].priorities)
    assert len(np.unique(given[given > 0])) > 20 and (given[:, -1] >= 0).all()
    odds, count = np.asarray(agent.shares).T
    assert (count > 100).all() and (odds / count > 1.0).all(), "likelier rows are drawn more often: mean above 1"
    trainer.close()


@pytest.mark.parametrize("replay", ["append", "mixed"])
def test_host_replay_matches(replay: Any, tiny_run: Maker) -> None:
    """With observations on disk rows are drawn by the same priorities."""
    agents, rings = [], []
    fields = [("online", OnlineConfig(utd_ratio=2, random_steps=10, replay=replay))]
    for device_bytes in (None, 0):
        run = tiny_run("lap_of_tests", fields, seeds=2, loop=replace(LOOP, device_bytes=device_bytes))
        trainer = session.build(run)
        assert trainer.offline(10) and trainer.online(30)
        agents.append(trainer.agent)
        rings.append(trainer.replay.arrays()["buffer"])
        trainer.close()
    for name in ("actor", "critic"):
        one, two = (getattr(agent, name) for agent in agents)
        assert largest_difference(one.params, two.params) < 1e-5
    np.testing.assert_allclose(rings[0].priorities, rings[1].priorities, atol=1e-5)
    given = np.asarray(rings[0].priorities)
    assert len(np.unique(given[given > 0])) > 20


def test_wrong_replay_refused(tiny_run: Maker) -> None:
    """Priorities need a buffer that is drawn from step by step, and an update that gives them."""
    for fields in ([("online.replay", "none")], [("online.initial_updates", 5)]):
        with pytest.raises(ConfigError, match="an agent with priorities needs"):
            session.build(tiny_run("lap_of_tests", fields))
    trainer = session.build(tiny_run("lap_of_tests", [("silent", True)], loop=LOOP))
    with pytest.raises(ConfigError, match="Lap needs priorities, and its update returns none of shape"):
        trainer.online(20)
    trainer.close()
