"""Learning while the environments step: what is older by one update, and what stays the same."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from o2o.keys import ACT, key_at
from o2o.replay.device import insert
from o2o.runs import session
from o2o.runs.session import RunConfig
from o2o.train.programs import learn, learn_and_act
from o2o.train.trainer import Trainer
from tests.system.test_runs import StopAt, assert_same_runs, train_interrupted

Maker = Callable[..., RunConfig]


def overlapped(run: RunConfig, **changes: Any) -> RunConfig:
    return dataclasses.replace(run, loop=dataclasses.replace(run.loop, overlap=True, **changes))


def at_step(run: RunConfig, steps: int) -> Trainer:
    trainer = session.build(run)
    trainer.online(steps)
    return trainer


def stepped(trainer: Trainer) -> tuple[Any, np.ndarray]:
    """Take one more step; return the agent and the actions chosen, `[S, A]`."""
    trainer.step()
    assert trainer.counters.phase == "online"
    return trainer.agent, np.asarray(trainer.state.action)[:, 0]


@pytest.mark.parametrize("seeds", [1, 2])
def test_overlap_acts_one_update_behind(tiny_run: Maker, seeds: int) -> None:
    """A step learns the same and acts by the policy of one update before."""
    run = tiny_run("rlpd", seeds=seeds, offline_steps=0)
    strict, beside = at_step(run, 30), at_step(run, 30)
    beside.loop = dataclasses.replace(beside.loop, overlap=True)
    assert strict.counters.phase == "online"
    before = jax.tree.map(np.asarray, strict.agent.actor.params)
    (learnt, after), (learnt_too, earlier) = stepped(strict), stepped(beside)
    for one, two in zip(jax.tree.leaves(learnt.critic), jax.tree.leaves(learnt_too.critic), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)
    assert strict.fleet is not None and beside.fleet is not None
    for member in range(seeds):
        key = key_at(jax.random.key(run.seed + member), ACT, strict.counters.env_steps)
        agent = jax.tree.map(lambda leaf, m=member: leaf[m], learnt)
        old = agent.replace(actor=agent.actor.replace(params=jax.tree.map(lambda leaf, m=member: leaf[m], before)))
        seen = strict.fleet.observations[member][None]
        np.testing.assert_allclose(after[member], agent.sample_actions(seen, None, key, False)[0][0], atol=1e-5)
        np.testing.assert_allclose(earlier[member], old.sample_actions(seen, None, key, False)[0][0], atol=1e-5)
    assert np.abs(after - earlier).max() > 1e-4
    strict.close()
    beside.close()


def test_same_before_first_update(tiny_run: Maker) -> None:
    """Nothing differs before the first update."""
    run = tiny_run("wsrl", offline_steps=0)
    strict, beside = at_step(run, 22), at_step(overlapped(run), 22)
    assert strict.counters.phase == "online" and beside.counters.phase == "online"
    for key, rows in strict.replay.buffer.rows.items():
        np.testing.assert_array_equal(rows[0, :22], beside.replay.buffer.rows[key][0, :22])
    strict.online(60)
    beside.online(60)
    assert not np.array_equal(strict.replay.buffer.rows["actions"], beside.replay.buffer.rows["actions"])
    assert strict.counters.gradient_steps == beside.counters.gradient_steps > 0
    strict.close()
    beside.close()


def test_two_programs(tiny_run: Maker) -> None:
    """There is one program to choose and one to learn."""
    for program in (insert, learn, learn_and_act):
        program.clear_cache()
    trainer = at_step(overlapped(tiny_run("wsrl", offline_steps=0)), 60)
    assert [program._cache_size() for program in (insert, learn, learn_and_act)] == [1, 1, 1]
    trainer.close()


def test_stop_and_resume(tiny_run: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run stopped and resumed equals one never stopped."""
    run = overlapped(tiny_run("calql", offline_steps=20, online_steps=240), log_every=15)
    assert session.train(run, tmp_path / "whole")
    train_interrupted(run, tmp_path / "parts", monkeypatch, [StopAt("online", 120), StopAt("online", 180)])
    assert_same_runs(tmp_path / "whole", tmp_path / "parts", more_than=4)
