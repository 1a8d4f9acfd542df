"""Learning while the environments step: what is older by one update, and what stays the same."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from o2o.runs import session
from o2o.runs.session import RunConfig
from o2o.train.programs import insert, learn, learn_and_choose
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
    trainer._online_step()
    assert trainer.online_state is not None
    return trainer.online_state.agent, np.asarray(trainer.action)


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_step_learns_the_same_and_acts_by_the_policy_of_one_update_before(tiny_run: Maker, seeds: int) -> None:
    run = tiny_run("rlpd", seeds=seeds, offline_steps=0)
    strict, beside = at_step(run, 30), at_step(run, 30)
    beside.loop = dataclasses.replace(beside.loop, overlap=True)
    assert strict.online_state is not None
    before, rng = jax.tree.map(np.asarray, strict.online_state.agent.actor.params), strict.online_state.rng
    (learnt, after), (learnt_too, earlier) = stepped(strict), stepped(beside)
    for one, two in zip(jax.tree.leaves(learnt.critic), jax.tree.leaves(learnt_too.critic), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)
    assert strict.fleet is not None and beside.fleet is not None
    for member in range(seeds):
        _, _, key = jax.random.split(rng[member], 3)
        agent = jax.tree.map(lambda leaf, m=member: leaf[m], learnt)
        old = agent.replace(actor=agent.actor.replace(params=jax.tree.map(lambda leaf, m=member: leaf[m], before)))
        seen = strict.fleet.observations[member][None]
        np.testing.assert_allclose(after[member], agent.sample_actions(seen, None, key, False)[0][0], atol=1e-5)
        np.testing.assert_allclose(earlier[member], old.sample_actions(seen, None, key, False)[0][0], atol=1e-5)
    assert np.abs(after - earlier).max() > 1e-4
    strict.close()
    beside.close()


def test_before_the_first_update_nothing_differs(tiny_run: Maker) -> None:
    run = tiny_run("wsrl", offline_steps=0)
    strict, beside = at_step(run, 22), at_step(overlapped(run), 22)
    assert strict.online_state is not None and beside.online_state is not None
    for key, rows in strict.online_state.buffer.rows.items():
        np.testing.assert_array_equal(rows[0, :22], beside.online_state.buffer.rows[key][0, :22])
    strict.online(60)
    beside.online(60)
    assert not np.array_equal(strict.online_state.buffer.rows["actions"], beside.online_state.buffer.rows["actions"])
    assert strict.counters.gradient_steps == beside.counters.gradient_steps > 0
    strict.close()
    beside.close()


def test_one_program_to_choose_and_one_to_learn(tiny_run: Maker) -> None:
    for program in (insert, learn, learn_and_choose):
        program.clear_cache()
    trainer = at_step(overlapped(tiny_run("wsrl", offline_steps=0)), 60)
    assert [program._cache_size() for program in (insert, learn, learn_and_choose)] == [1, 1, 1]
    trainer.close()


def test_stopped_and_resumed_equals_never_stopped(
    tiny_run: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = overlapped(tiny_run("calql", offline_steps=20, online_steps=240), log_every=15)
    assert session.train(run, tmp_path / "whole")
    train_interrupted(run, tmp_path / "parts", monkeypatch, [StopAt("online", 120), StopAt("online", 180)])
    assert_same_runs(tmp_path / "whole", tmp_path / "parts", more_than=4)
