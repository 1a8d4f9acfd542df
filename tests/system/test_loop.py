"""The loops: schedules, counters, replay modes, what may and may not move; real MuJoCo, tiny networks."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from scipy import stats

from o2o.config import LoopConfig
from o2o.errors import ConfigError, DivergenceError, EnvironmentMismatchError
from o2o.replay.device import insert
from o2o.runs import session
from o2o.runs.session import RunConfig
from o2o.train.programs import learn_and_act, updates
from o2o.train.state import Hooks, evaluation_steps
from o2o.train.trainer import Trainer
from o2o.types import OnlineConfig

Maker = Callable[..., RunConfig]


def trainer_of(run: RunConfig, **hooks: Any) -> Trainer:
    return session.build(run, hooks=Hooks(**hooks))


def leaves(tree: Any) -> list[np.ndarray]:
    data = lambda x: jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x  # noqa: E731
    return [np.asarray(data(leaf)) for leaf in jax.tree.leaves(tree)]


def equal(a: Any, b: Any) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


def networks(agent: Any) -> Any:
    """Return all that training moves: parameters, targets and optimiser states, not the key."""
    learner = getattr(agent, "learner", agent)
    return [learner.actor, learner.critic, learner.target_critic, learner.temperature]


def test_first_update_after_warm_up() -> None:
    """The first update is after the warm-up."""
    assert OnlineConfig(warmup_steps=5000, min_rows=1024).first_update() == 5001
    assert OnlineConfig(warmup_steps=0, min_rows=1024).first_update() == 1025
    assert OnlineConfig(random_steps=5000).first_update() == 5000


def test_evaluation_points() -> None:
    points = evaluation_steps(LoopConfig(eval_every=4000), OnlineConfig(utd_ratio=4, warmup_steps=5000), 10_000)
    assert points == {4000, 8000, 5000, 5001 + 250, 10_000}


def test_wsrl_warm_up(tiny_run: Maker) -> None:
    """WSRL's warm-up moves nothing and keeps only its own rows."""
    trainer = trainer_of(tiny_run("wsrl"))
    trainer.offline(40)
    before = networks(trainer.agent)
    trainer.online(20)
    assert trainer.counters.phase == "online"
    assert equal(networks(trainer.agent), before)
    assert int(trainer.replay.buffer.size[0]) == 20
    assert trainer.counters.gradient_steps == 40
    stored = np.asarray(trainer.replay.buffer.rows["observations"][0, :20])
    offline = np.asarray(trainer.replay.data.rows["observations"])
    assert not (stored[:, None] == offline[None]).all(-1).any()
    mode = trainer.agent_of().sample_actions(stored, None, jax.random.key(0), True)[0]
    assert not np.allclose(mode, trainer.replay.buffer.rows["actions"][0, :20], atol=1e-3)
    trainer.online(21)
    assert equal(networks(trainer.agent), before)
    trainer.online(22)
    assert not equal(networks(trainer.agent), before)
    assert trainer.counters.gradient_steps == 40 + trainer.config.online.utd_ratio
    trainer.close()


def test_rlpd_random_phase(tiny_run: Maker) -> None:
    """RLPD's random phase is uniform and moves nothing."""
    trainer = trainer_of(tiny_run("rlpd", [("online.random_steps", 300)]))
    before = networks(trainer.agent)
    trainer.online(300)
    assert trainer.counters.phase == "online"
    assert equal(networks(trainer.agent), before)
    actions = np.asarray(trainer.replay.buffer.rows["actions"][0, :300])
    for column in actions.T:
        assert stats.kstest(column, stats.uniform(-1, 2).cdf).pvalue > 0.01
    trainer.online(301)
    assert not equal(networks(trainer.agent), before)
    trainer.close()


def test_append_starts_with_dataset(tiny_run: Maker) -> None:
    """A replay that appends starts with the dataset."""
    trainer = trainer_of(tiny_run("iql"))
    trainer.begin_online(30)
    assert trainer.counters.phase == "online"
    rows = trainer.replay.data.size
    assert int(trainer.replay.buffer.size[0]) == rows
    trainer.online(30)
    assert int(trainer.replay.buffer.size[0]) == rows + 30
    trainer.close()


def test_bc_acts_online_without_learning(tiny_run: Maker) -> None:
    trainer = trainer_of(tiny_run("bc"))
    trainer.offline(20)
    before = trainer.agent.actor
    trainer.online(30)
    assert trainer.counters.phase == "online"
    assert equal(trainer.agent.actor, before)
    assert trainer.counters.gradient_steps == 20 and trainer.counters.env_steps == 30
    trainer.close()


def test_calql_finished_episodes_only(tiny_run: Maker) -> None:
    """Cal-QL samples only finished episodes, with their returns."""
    trainer = trainer_of(tiny_run("calql"))
    trainer.offline(20)
    trainer.online(100)
    assert trainer.counters.phase == "online" and trainer.fleet is not None
    length = len(trainer.fleet.slots[0].actions)
    assert int(trainer.replay.buffer.pending[0]) == length
    steps = 400
    trainer.online(steps)
    buffer, finished = trainer.replay.buffer, trainer.counters.episodes[0]
    assert finished >= 1
    visible = int(buffer.size[0] - buffer.pending[0])
    rewards, masks, ends, returns = (
        np.asarray(buffer.rows[k][0, :visible]) for k in ("rewards", "masks", "ends", "mc_returns")
    )
    assert ends.sum() == finished and ends[-1] == 1
    start = 0
    for end in np.flatnonzero(ends):
        part, discount = slice(start, end + 1), trainer.config.discount
        if (rewards[part] == -5).all():
            np.testing.assert_allclose(returns[part], -5 / (1 - discount), rtol=1e-5)
        else:
            expected, g = [], 0.0
            for reward, mask in zip(rewards[part][::-1], masks[part][::-1], strict=True):
                g = reward + discount * mask * g
                expected.append(g)
            np.testing.assert_allclose(returns[part], expected[::-1], rtol=1e-4)
        start = end + 1
    trainer.close()


def test_time_limit_bootstraps(tiny_run: Maker) -> None:
    """A time limit bootstraps, and the last observation is kept."""
    trainer = trainer_of(tiny_run("wsrl", [("online.warmup_steps", 10_000)]))
    trainer.online(400)
    assert trainer.counters.phase == "online"
    rows = {k: np.asarray(v[0, :400]) for k, v in trainer.replay.buffer.rows.items()}
    ends = np.flatnonzero(rows["ends"])
    assert len(ends) >= 1
    for end in ends:
        timeout = rows["rewards"][end] < 0
        assert rows["masks"][end] == float(timeout)
        if end + 1 < 400:
            jump = np.abs(rows["observations"][end + 1] - rows["next_observations"][end]).max()
            assert jump > 0.05
    inside = np.setdiff1d(np.arange(399), ends)
    np.testing.assert_array_equal(rows["observations"][inside + 1], rows["next_observations"][inside])
    trainer.close()


def test_program_per_step_kind(tiny_run: Maker) -> None:
    """There is one program per kind of step."""
    updates.clear_cache()
    insert.clear_cache()
    learn_and_act.clear_cache()
    trainer = trainer_of(tiny_run("wsrl"))
    trainer.offline(40)
    trainer.offline(57)
    assert updates._cache_size() == 1
    trainer.online(60)
    assert insert._cache_size() == 1
    assert learn_and_act._cache_size() == 2, "one for the warm-up, one for learning"
    trainer.close()


def test_no_hidden_transfer(tiny_run: Maker) -> None:
    """No transfer is hidden in the step."""
    trainer = trainer_of(tiny_run("wsrl", online_steps=60))
    trainer.online(40)
    with jax.transfer_guard_device_to_device("disallow"):
        trainer.online(60)
    assert trainer.counters.env_steps == 60
    trainer.close()


def test_seeds_differ(tiny_run: Maker) -> None:
    """Several seeds differ and count apart."""
    rows: list[dict[str, Any]] = []
    trainer = trainer_of(tiny_run("wsrl", seeds=2), metrics=rows.append)
    trainer.offline(20)
    trainer.online(40)
    assert trainer.counters.phase == "online"
    first, second = (leaves(networks(trainer.agent_of(member))) for member in range(2))
    assert any(not np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    observations = np.asarray(trainer.replay.buffer.rows["observations"])
    assert not np.array_equal(observations[0], observations[1])
    assert {row["seed"] for row in rows} == {0, 1}
    assert trainer.counters.env_steps == 40
    trainer.close()


def test_same_seed_reproduces(tiny_run: Maker) -> None:
    """The same seed gives the same numbers."""

    def final(seed: int) -> Any:
        trainer = trainer_of(tiny_run("wsrl", seed=seed))
        trainer.offline(20)
        trainer.online(40)
        trainer.close()
        return networks(trainer.agent_of())

    first = final(3)
    assert equal(first, final(3))
    assert not equal(first, final(4))


def test_normalisation_frozen(tiny_run: Maker) -> None:
    """Normalisation is frozen and travels with the run."""
    trainer = trainer_of(tiny_run("wsrl", normalize=True))
    raw = trainer.data.arrays["observations"]
    assert trainer.normalizer is not None
    np.testing.assert_allclose(trainer.normalizer.mean, raw.mean(0), atol=1e-4)
    np.testing.assert_allclose(np.asarray(trainer.replay.data.rows["observations"]).mean(0), 0.0, atol=1e-3)
    before = trainer.normalizer
    trainer.online(30)
    assert trainer.counters.phase == "online"
    stored = np.asarray(trainer.replay.buffer.rows["observations"][0, 0])
    assert trainer.fleet is not None and equal(trainer.normalizer, before)
    first = trainer.fleet.slots[0]
    first.reset(0)
    np.testing.assert_allclose(stored, np.asarray(before(first.observation)), atol=1e-5)
    trainer.close()


def test_non_finite_policy_named(tiny_run: Maker) -> None:
    """A policy that is not finite is named."""
    trainer = trainer_of(tiny_run("wsrl"))
    broken = jax.tree.map(
        lambda leaf: leaf * np.nan if jax.numpy.issubdtype(leaf.dtype, np.floating) else leaf, trainer.agent
    )
    trainer.start_from(broken, trainer.normalizer)
    with pytest.raises(DivergenceError, match="online step 0 is not finite"):
        trainer.begin_online(10)
        trainer.online(10)
    trainer.close()


def test_settings_out_of_range(tiny_run: Maker) -> None:
    with pytest.raises(ConfigError, match="seeds is 0"):
        trainer_of(tiny_run("wsrl", seeds=0))
    with pytest.raises(ConfigError, match="offline_ratio is 1.5"):
        trainer_of(tiny_run("rlpd", [("online.offline_ratio", 1.5)])).online(10)
    with pytest.raises(ConfigError, match="'append' cannot wait"):
        trainer_of(tiny_run("calql", [("online.replay", "append")])).online(10)


def test_other_environment_refused(tiny_run: Maker) -> None:
    """Another environment is refused."""
    run = dataclasses.replace(tiny_run("wsrl"), env="InvertedPendulum-v5")
    with pytest.raises(EnvironmentMismatchError, match="InvertedPendulum"):
        trainer_of(run).online(10)


@pytest.mark.parametrize("agent", ["wsrl", "calql"])
def test_unreplayable_env_new_episode(agent: str, tiny_run: Maker) -> None:
    """An environment that cannot be replayed begins a new episode."""
    run = tiny_run(agent)
    first = trainer_of(run)
    first.online(30)
    arrays, state = first.save()
    state = json.loads(json.dumps(state))
    second = trainer_of(run)
    made = second.env_fn

    def robot(evaluation: bool) -> Any:
        env = made(evaluation)
        env.metadata = {**env.metadata, "replayable": False}
        return env

    second.env_fn = robot
    second.load(state, lambda _: arrays, 80)
    assert not all(slot.exact for slot in second.fleet.slots)
    assert second.counters.phase == "online" and second.fleet is not None
    assert second.replay.buffer.rows["ends"][0, 29] == 1.0 and int(second.replay.buffer.pending[0]) == 0
    assert second.fleet.slots[0].actions == [] and second.fleet.slots[0].episode == 1
    second.online(40)
    assert second.counters.env_steps == 40 and int(second.replay.buffer.size[0]) == 40
    first.close()
    second.close()
