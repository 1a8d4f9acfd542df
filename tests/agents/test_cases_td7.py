"""TD7: embeddings, priorities, clipped values, targets, and which policy is kept, against numbers worked by hand."""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o2o.agents import TD7, TD7Config
from o2o.agents.td7 import unit
from o2o.errors import ConfigError
from o2o.types import PRIORITIES
from tests.helpers.probes import BATCH, BEST_ACTION, DISCOUNT, Probe, best_action, mode, two_steps
from tests.helpers.tiny import largest_difference, make_batch

CONFIG = TD7Config(
    actor_hidden_dims=(16, 16), critic_hidden_dims=(16, 16), encoder_hidden_dims=(16,), embedding=8, batch_size=8
)
KEY = jax.random.key(1)


@functools.cache
def made(config: TD7Config = CONFIG, online: bool = False) -> TD7:
    create = jax.jit(lambda key: TD7.create(key, jnp.zeros((1, 3)), jnp.zeros((1, 2)), config))
    agent = create(jax.random.key(0))
    return agent.online() if online else agent


update = jax.jit(TD7.update)
heard = jax.jit(TD7.after_episodes)


def constant(params: Any, values: Any) -> Any:
    """Return critic parameters whose members have these values everywhere."""
    tree = dict(params["params"])
    head = tree["EnsembleDense_3"]
    bias = jnp.broadcast_to(jnp.asarray(values)[:, None], head["bias"].shape)
    tree["EnsembleDense_3"] = {"kernel": jnp.zeros_like(head["kernel"]), "bias": bias}
    return {"params": tree}


def test_embeddings() -> None:
    """Embeddings of states have a mean size of 1, and the pair's is taught the next state's, which gets no gradient."""
    np.testing.assert_allclose(unit(jnp.asarray([1.0, -3.0, 0.0, 4.0])), [0.5, -1.5, 0.0, 2.0])
    agent, batch = made(), make_batch()
    state, pair = agent.encoder(batch["observations"], batch["actions"])
    np.testing.assert_allclose(jnp.abs(state).mean(axis=-1), 1.0, rtol=1e-5)
    following, _ = agent.encoder(batch["next_observations"], batch["actions"])
    assert float(agent.encoder_loss(agent.encoder.params, batch)) == pytest.approx(
        float(jnp.mean((pair - following) ** 2)), rel=1e-5
    )
    elsewhere = {**batch, "observations": jnp.full_like(batch["observations"], 0.3)}
    grads = [jax.grad(agent.encoder_loss)(agent.encoder.params, each) for each in (batch, elsewhere)]
    assert largest_difference(*grads) > 0
    alone = jax.grad(lambda p: agent.encoder_loss(p, {**batch, "actions": 0 * batch["actions"]}))(agent.encoder.params)
    assert float(jnp.abs(alone["params"]["of_pair"]["Dense_0"]["bias"]).max()) > 0


def test_priorities_and_loss() -> None:
    """Errors 0.5 and 3: loss 0.125 + 3; priority 3 to the power 0.4; where both are below 1 it is 1."""
    agent, batch = made(online=True), make_batch(utd=1)
    zeros = {**batch, "rewards": jnp.zeros((1, 8)), "masks": jnp.zeros((1, 8)), "slots": jnp.zeros((1, 8), jnp.int32)}
    for values, loss, priority in (((0.5, -3.0), 3.125, 3.0**0.4), ((0.5, 0.2), 0.145, 1.0)):
        set_to = agent.replace(critic=agent.critic.replace(params=constant(agent.critic.params, values)))
        _, info = update(set_to, zeros)
        assert float(info["critic/loss"]) == pytest.approx(loss, rel=1e-5)
        assert info[PRIORITIES].shape == (1, 8)
        np.testing.assert_allclose(info[PRIORITIES], priority, rtol=1e-5)
    assert PRIORITIES not in update(agent, batch)[1], "a dataset's rows have none"


def test_values_clipped_to_targets_so_far() -> None:
    """Target critics of 5 and 7: y = r, then r + 0.99 * 5, or 0.99 times the bound; bounds follow renewed targets."""
    agent, batch = made(replace(CONFIG, target_every=2)), make_batch()
    batch = {**batch, "rewards": jnp.linspace(-1.0, 1.0, 8), "masks": jnp.ones(8)}
    agent = agent.replace(target_critic=constant(agent.target_critic, (5.0, 7.0)))
    np.testing.assert_array_equal(agent.next_values(batch["next_observations"], KEY), 0.0)
    agent = agent.replace(bounds=jnp.asarray([-9.0, 9.0]))
    np.testing.assert_allclose(agent.next_values(batch["next_observations"], KEY), 5.0)
    bounded = agent.replace(bounds=jnp.asarray([-2.0, 1.5]))
    np.testing.assert_allclose(bounded.next_values(batch["next_observations"], KEY), 1.5)
    rows = jax.tree.map(lambda leaf: leaf[None], batch)
    once, _ = update(agent, rows)
    np.testing.assert_allclose(once.reached, [-1 + 4.95, 1 + 4.95], rtol=1e-5)
    np.testing.assert_array_equal(once.bounds, agent.bounds)
    twice, _ = update(once, rows)
    np.testing.assert_allclose(twice.bounds, [-1 + 4.95, 1 + 4.95], rtol=1e-5)


def test_targets_renewed_at_once() -> None:
    """Every third step targets become networks, the fixed encoder the learning one, its target the fixed one."""
    agent, batch = made(replace(CONFIG, target_every=3)), make_batch(utd=1)
    for step in range(1, 7):
        before, (agent, _) = agent, update(agent, batch)
        if step % 3:
            assert largest_difference(agent.target_critic, before.target_critic) == 0
            assert largest_difference(agent.fixed_encoder, before.fixed_encoder) == 0
        else:
            assert largest_difference(agent.target_critic, agent.critic.params) == 0
            assert largest_difference(agent.target_actor, agent.actor.params) == 0
            assert largest_difference(agent.fixed_encoder, agent.encoder.params) == 0
            assert largest_difference(agent.target_encoder, before.fixed_encoder) == 0
    assert largest_difference(agent.target_encoder, agent.fixed_encoder) > 0


def test_cloning_offline_only() -> None:
    """Before the switch the loss is -mean Q + 0.1 mean |Q| mse, with Q of 4 everywhere -4 + 0.4 mse; then -4."""
    for online in (False, True):
        agent, batch = made(online=online), make_batch()
        agent = agent.replace(critic=agent.critic.replace(params=constant(agent.critic.params, (4.0, 4.0))))
        loss, info = agent.actor_loss(agent.actor.params, batch, KEY)
        assert float(loss) == pytest.approx(-4.0 + (0.0 if online else 0.4 * float(info["actor/distance"])), rel=1e-5)


def play(agent: TD7, returns: list[float]) -> tuple[TD7, list[str]]:
    """Let an agent that learns between episodes hear of them; say after each what became of the policy on trial."""
    told = []
    for value in returns:
        actor = agent.actor.replace(params=jax.tree.map(lambda leaf: leaf + 1.0, agent.actor.params))
        agent, before = agent.replace(actor=actor), agent
        agent = heard(agent, jnp.asarray([value]), jnp.asarray([5.0]), jnp.ones(1, bool))
        new = largest_difference(agent.tried.actor, before.tried.actor) > 0
        kept = largest_difference(agent.kept.actor, before.tried.actor) == 0
        assert not new or largest_difference(agent.tried.actor, agent.actor.params) == 0
        told.append("kept" if new and kept else "failed" if new else "goes on")
    return agent, told


def test_short_trials() -> None:
    """Of one episode each: whoever does as well as the best so far is kept."""
    agent, told = play(made(online=True), [3.0, 2.0, 5.0, 5.0, 4.9])
    assert told == ["kept", "failed", "kept", "kept", "failed"] and float(agent.trial.best) == 5.0


def test_long_trials() -> None:
    """Of three episodes: the worst counts, a bad one ends the trial; the best so far is first multiplied by 0.9."""
    config = replace(CONFIG, trial_episodes=3, trials_from=10)
    agent, _ = play(made(config, online=True), [10.0])
    agent, told = play(agent.replace(updates=jnp.asarray(10)), [9.5, 20.0, 9.2, 9.1, 30.0, 30.0, 30.0, 30.0])
    assert told == ["goes on", "goes on", "kept", "failed", "goes on", "goes on", "kept", "goes on"]
    assert float(agent.trial.best) == 30.0 and int(agent.trial.episodes) == 1


def test_who_acts() -> None:
    """Offline the actor; online the policy on trial explores, and the kept one is evaluated; both stand still."""
    agent, seen = made(online=True), jnp.ones((4, 3))
    agent, _ = play(agent, [3.0, 2.0])
    loud = agent.replace(config=replace(CONFIG, exploration_noise=0.0))
    for policy, deterministic in ((agent.tried, False), (agent.kept, True)):
        state = agent.encoder(seen, params=policy.encoder, method="states")
        wanted = agent.actor(seen, state, params=policy.actor)
        np.testing.assert_allclose(loud.sample_actions(seen, None, KEY, deterministic)[0], wanted, atol=1e-6)
    assert largest_difference(agent.tried, agent.kept) > 0


@functools.cache
def probe() -> Probe:
    config = replace(
        CONFIG,
        actor_hidden_dims=(32, 32),
        critic_hidden_dims=(32, 32),
        encoder_hidden_dims=(32,),
        batch_size=BATCH,
        discount=DISCOUNT,
        target_every=10,
        target_noise=0.0,
        cloning=0.0,
        actor_lr=3e-3,
        critic_lr=3e-3,
        encoder_lr=3e-3,
    )
    return Probe(TD7.create(jax.random.key(0), jnp.zeros((1, 1)), jnp.zeros((1, 1)), config))


@pytest.mark.learning
def test_known_values() -> None:
    """Q is discounted once per step, and the policy finds the best action."""
    agent = probe().train(two_steps())
    actions = jnp.linspace(-0.9, 0.9, 7)[:, None]
    for state, value in ((-1.0, DISCOUNT), (1.0, 1.0)):
        observations = jnp.full((7, 1), state)
        q = agent.critic(observations, actions, *agent.encoder(observations, actions, params=agent.fixed_encoder))
        np.testing.assert_allclose(q, value, atol=0.15)
    agent = probe().train(best_action())
    for state in (-1.0, 1.0):
        assert abs(mode(agent, state) - BEST_ACTION * state) < 0.2


def test_settings_and_presets() -> None:
    """Ranges, and the numbers of the paper."""
    with pytest.raises(ConfigError, match="target_every"):
        replace(CONFIG, target_every=0)
    config = TD7Config()
    assert (config.online.random_steps, config.trial_episodes, config.trials_from) == (25_000, 20, 750_000)
    assert (config.priority_power, config.target_every, config.cloning) == (0.4, 250, 0.1)
    assert config.needs.priorities and config.needs.episode_returns
    paper = TD7.preset("locomotion")
    assert paper.config == replace(config, online=paper.config.online) and paper.config.online.replay == "append"
