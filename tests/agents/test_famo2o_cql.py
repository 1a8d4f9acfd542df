"""FamO2O over CQL: the coefficient in the actor's loss only, the next state's own, and the released code's variants."""

import functools
import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o2o.agents import CQL, Conservative, CQLConfig, FamO2OCQL, FamO2OCQLConfig
from o2o.agents.balance import encode
from o2o.errors import ConfigError
from o2o.nn.modules import Adam
from tests.helpers.contract import QUICK
from tests.helpers.tiny import (
    ACTION_DIM,
    OBSERVATION_DIM,
    create,
    largest_difference,
    make_batch,
    moved,
    set_config,
    steps,
)

TERM = Conservative(weight=1.0, subset=None, n_actions=3)
WIDTHS = {"actor_hidden_dims": (16,), "critic_hidden_dims": (16,), "conservative": TERM, "critic_layer_norm": False}
CONFIG = replace(FamO2OCQLConfig(), **WIDTHS, balance_hidden_dims=(16,), batch_size=64)
ROWS = make_batch(rows=64)
STATES = ROWS["observations"]
KEY = jax.random.key(5)
STEP = jax.jit(
    lambda agent, rows: (agent.update_critic(rows, KEY), agent.update_policy(rows, KEY, agent.critic)),
    compiler_options=QUICK,
)
"""Both halves of an update, from the same parameters, on rows that have their coefficients."""


def make_agent(**fields: Any) -> FamO2OCQL:
    """Return the agent of key 0 with targets unlike its critics, and fields that its networks do not depend on."""
    agent = set_config(create(FamO2OCQL, CONFIG), **fields)
    return agent.replace(target_critic=jax.tree.map(lambda leaf: 0.7 * leaf, agent.critic.params))


def with_balance(agent: Any, bias: float) -> Any:
    """Return the agent whose balance policy has its mean moved by `bias`, before tanh."""
    tree = jax.tree.map(jnp.copy, agent.balance_actor.params)
    tree["params"]["mean"]["bias"] = jnp.full((1,), bias)
    return agent.replace(balance_actor=agent.balance_actor.replace(params=tree))


def with_first_layer(actor: Any, kernel: Any, bias: Any) -> Any:
    tree = jax.tree.map(jnp.copy, actor.params)
    tree["params"]["MLP_0"]["Dense_0"] = {"kernel": kernel, "bias": bias}
    return actor.replace(params=tree)


def first_layer(actor: Any) -> Any:
    return actor.params["params"]["MLP_0"]["Dense_0"]


@functools.cache
def stepped() -> tuple[Any, Any, Any]:
    """Return rows with coefficients and what the two halves of an update make of the plain toy agent."""
    rows = make_agent().with_betas(ROWS, KEY)
    return rows, *STEP(make_agent(), rows)


def test_balance_range_reached() -> None:
    """The whole range and nothing else is reached."""
    agent, x = make_agent(), jnp.asarray([[-1.0], [0.0], [1.0]])
    np.testing.assert_allclose(agent.to_beta(x), [0.5, 1.0, 1.5])
    assert float(jnp.abs(agent.balance(STATES) - 1.0).max()) < 0.15, "small output layers: first in the middle"
    np.testing.assert_allclose(make_agent(released_range=True).to_beta(x), [-0.5, 0.5, 1.5])
    assert agent.config.reach == (0.5, 1.5) and make_agent(released_range=True).config.reach == (-0.5, 1.5)
    released = with_balance(make_agent(released_range=True), -2.0)
    assert float(released.balance(STATES).max()) < 0.0 < 0.5 <= float(with_balance(agent, -2.0).balance(STATES).min())
    uniform = released.with_betas(
        {name: jnp.tile(leaf, (40, *[1] * (leaf.ndim - 1))) for name, leaf in ROWS.items()}, KEY
    )
    betas = np.sort(np.asarray(uniform["betas"]))
    np.testing.assert_allclose(betas, np.linspace(0.5, 1.5, betas.size), atol=0.05)


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("target", ["next", "current"])
def test_coefficient_by_state(target: Any, online: bool) -> None:
    """Offline uniform for the actor, else pi_b(s); the next action's is drawn by pi_b at s', released: the one of s."""
    agent = make_agent(target_beta=target)
    agent = agent.online() if online else agent
    rows = agent.with_betas(ROWS, KEY)
    for name in ROWS:
        np.testing.assert_array_equal(rows[name], ROWS[name])
    uniform_rng, own_rng, next_rng = jax.random.split(KEY, 3)
    own = agent.to_beta(agent.balance_actor(STATES).sample(own_rng))
    following = agent.to_beta(agent.balance_actor(ROWS["next_observations"]).sample(next_rng))
    drawn = own if online else jax.random.uniform(uniform_rng, (64,), minval=0.5, maxval=1.5)
    np.testing.assert_allclose(rows["betas"], drawn, atol=1e-6)
    np.testing.assert_allclose(rows["next_betas"], following if target == "next" else own, atol=1e-6)


def test_critics_ignore_coefficient() -> None:
    """Critics never see the coefficient.

    Their first layer reads state and action alone; the policy reads its second input.
    """
    agent = make_agent()
    assert agent.critic.params["params"]["dense_0"]["kernel"].shape == (2, OBSERVATION_DIM + ACTION_DIM, 16)
    assert agent.critic(STATES, ROWS["actions"]).shape == (2, 64)
    policy = [agent.actor(STATES, jnp.full(64, beta)).mean for beta in (0.5, 1.5)]
    assert float(jnp.abs(policy[0] - policy[1]).max()) > 1e-3


def test_target_by_hand() -> None:
    """y = r + g m min Q'(s', a'), a' of the family at the next state's coefficient, no entropy."""
    rows, (_, info), _ = stepped()
    action_rng = jax.random.split(jax.random.split(KEY)[0])[1]
    agent = make_agent()
    actions = agent.actor(rows["next_observations"], rows["next_betas"]).sample(action_rng)
    values = agent.critic(ROWS["next_observations"], actions, params=agent.target_critic).min(axis=0)
    targets = np.asarray(ROWS["rewards"] + 0.99 * ROWS["masks"] * values)
    assert float(info["critic/target"]) == pytest.approx(float(targets.mean()), rel=1e-5)
    assert float(info["critic/loss"]) == pytest.approx(float(info["critic/td_loss"] + info["cql/gap"]), rel=1e-5)


def test_policy_losses_by_hand() -> None:
    """Actor: mean(alpha log pi - beta min Q); balance: -mean min Q at its own draw, without entropy."""
    agent = make_agent()
    signs = jnp.where(jnp.arange(64) < 32, 1.0, -1.0)  # negative ones: what the released range asks for
    rows = stepped()[0]
    mixed = {**rows, "betas": signs * rows["betas"]}
    for each, info in ((rows, stepped()[2][1]), (mixed, STEP(agent, mixed)[1][1])):
        actor_rng, balance_rng = jax.random.split(KEY)
        beta, policy = each["betas"], agent.actor(STATES, each["betas"])
        actions, log_prob = policy.sample_and_log_prob(jax.random.split(actor_rng)[0])
        q = agent.critic(STATES, actions).min(axis=0)
        assert float(info["actor/loss"]) == pytest.approx(float(jnp.mean(log_prob - beta * q)), rel=1e-4)
        x_rng, action_rng = jax.random.split(balance_rng)
        x, x_log_prob = agent.balance_actor(STATES).sample_and_log_prob(x_rng)
        actions = agent.actor(STATES, agent.to_beta(x)).sample(action_rng)
        expected = -float(agent.critic(STATES, actions).min(axis=0).mean())
        assert float(info["balance/loss"]) == pytest.approx(expected, rel=1e-4)
        assert float(info["balance/entropy"]) == pytest.approx(-float(x_log_prob.mean()), rel=1e-4)
        assert float(info["balance/std"]) == pytest.approx(float(agent.balance(STATES).std()), rel=1e-3)


def test_losses_step_own_network() -> None:
    """Every loss steps its own network."""
    agent, (_, (judged, _), (acted, _)) = make_agent(), stepped()
    assert moved(judged.critic.params, agent.critic.params)
    for name in ("actor", "balance_actor", "temperature"):
        assert not moved(getattr(judged, name).params, getattr(agent, name).params), name
        assert steps(getattr(judged, name)) == 0 and steps(getattr(acted, name)) == 1
    assert moved(acted.actor.params, agent.actor.params) and steps(acted.critic) == 0
    assert moved(acted.balance_actor.params, agent.balance_actor.params)
    assert not moved(acted.critic.params, agent.critic.params)


def test_balance_learns_through_encoding() -> None:
    """The balance learns through the encoding only."""
    agent, rows = make_agent(), stepped()[0]
    gradient = jax.jit(
        lambda a: jax.grad(lambda p: a.balance_loss(p, rows, KEY, a.critic)[0])(a.balance_actor.params),
        compiler_options=QUICK,
    )
    layer = first_layer(agent.actor)
    blind = with_first_layer(agent.actor, layer["kernel"].at[-6:].set(0.0), layer["bias"])
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient(agent))) > 1e-5
    for leaf in jax.tree.leaves(gradient(agent.replace(actor=blind))):
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


def test_unit_balance_is_plain_cql() -> None:
    """A constant balance of one is plain CQL.

    lo = hi = 1: CQL's losses for a policy whose first bias holds the encoding of 1, same draws.
    """
    agent = make_agent(balance_range=(1.0, 1.0))
    rows = agent.with_betas(ROWS, jax.random.key(11))
    np.testing.assert_array_equal(rows["betas"], np.ones(64))
    np.testing.assert_array_equal(rows["next_betas"], np.ones(64))
    names = CQLConfig.__dataclass_fields__.keys()
    plain = create(CQL, CQLConfig(**{name: getattr(CONFIG, name) for name in names}))
    layer = first_layer(agent.actor)
    bias = layer["bias"] + encode(jnp.ones(())) @ layer["kernel"][-6:]
    narrow = with_first_layer(plain.actor.replace(params=agent.actor.params), layer["kernel"][:-6], bias)
    critic = plain.critic.replace(params=agent.critic.params)
    plain = plain.replace(actor=narrow, critic=critic, target_critic=agent.target_critic)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def reference(plain: Any) -> Any:
        return plain.update_critic(ROWS, KEY), plain.update_policy(ROWS, jax.random.split(KEY)[0], plain.critic)

    (left, left_info), (left_policy, left_policy_info) = STEP(agent, rows)
    (right, right_info), (right_policy, right_policy_info) = reference(plain)
    found, expected = {**left_policy_info, **left_info}, {**right_info, **right_policy_info}
    for name in expected:
        assert float(found[name]) == pytest.approx(float(expected[name]), rel=1e-4, abs=1e-6), name
    moment = lambda model: model.opt_state[0].mu["params"]  # noqa: E731
    assert largest_difference(moment(left.critic), moment(right.critic)) < 1e-5
    one, two = moment(left_policy.actor), moment(right_policy.actor)
    assert largest_difference({**one, "MLP_0": 0}, {**two, "MLP_0": 0}) < 1e-5
    first, second = one["MLP_0"]["Dense_0"], two["MLP_0"]["Dense_0"]
    np.testing.assert_allclose(first["kernel"][:-6], second["kernel"], atol=1e-5)
    np.testing.assert_allclose(first["bias"], second["bias"], atol=1e-5)
    assert largest_difference(left_policy.temperature.params, right_policy.temperature.params) < 1e-6


def test_online_trains_chosen_members() -> None:
    """Online training takes the members that the balance chooses."""
    agent = with_balance(make_agent(), 3.0).online()
    batch = {name: jnp.stack([leaf, leaf]) for name, leaf in ROWS.items()}
    after, info = jax.jit(lambda agent: agent.update(batch), compiler_options=QUICK)(agent)
    assert float(info["actor/beta"]) > 1.4 and float(info["actor/beta_std"]) < 0.2
    assert (steps(after.critic), steps(after.actor), steps(after.balance_actor)) == (2, 1, 1)
    assert after.fine_tuning and not make_agent().fine_tuning
    assert all(np.isfinite(value) for value in info.values())


def test_losses_use_old_parameters() -> None:
    """At one update all losses are of the parameters before it.

    Actor and balance network are judged by the critics from before their step; every part has a key of its own.
    """
    agent, batch = make_agent(), {name: leaf[None] for name, leaf in ROWS.items()}
    agent = agent.replace(critic=agent.critic.replace(optimizer=Adam(0.05)))
    after, _ = jax.jit(lambda a: a.update(batch), compiler_options=QUICK)(agent)
    rng, beta_rng = jax.random.split(agent.rng)
    next_rng, _, policy_rng = jax.random.split(rng, 3)
    rows = jax.tree.map(lambda leaf: leaf[0], agent.with_betas(batch, beta_rng))
    policies = jax.jit(lambda a, critic: a.update_policy(rows, policy_rng, critic)[0], compiler_options=QUICK)
    old, new = policies(agent, agent.critic), policies(agent, after.critic)
    for name in ("actor", "balance_actor"):
        seen, right, wrong = (getattr(each, name).opt_state[0].mu for each in (after, old, new))
        assert largest_difference(seen, right) < 1e-6 < 1e-4 < largest_difference(seen, wrong), name
    assert largest_difference(after.temperature.params, old.temperature.params) < 1e-6
    assert jnp.array_equal(jax.random.key_data(after.rng), jax.random.key_data(next_rng))


def test_small_output_layers() -> None:
    """Output layers begin small.

    Orthogonal at gain 0.1 where the code's are uniform with the same norm; hidden ones at sqrt(2).
    """
    agent = make_agent()
    for model in (agent.actor, agent.balance_actor):
        tree = model.params["params"]
        for head in ("mean", "log_std"):
            np.testing.assert_allclose(np.linalg.norm(tree[head]["kernel"], axis=0), 0.1, rtol=1e-4)
        assert (float(tree["log_std_scale"]), float(tree["log_std_offset"])) == (1.0, -1.0)
    output = agent.critic.params["params"]["output"]["kernel"]
    np.testing.assert_allclose(np.linalg.norm(output, axis=1), 0.1, rtol=1e-4)
    assert np.linalg.norm(first_layer(agent.actor)["kernel"], axis=1) == pytest.approx(
        np.full(9, math.sqrt(2)), rel=1e-4
    )


def test_acting_coefficient() -> None:
    """Acting uses the deterministic coefficient."""
    agent = make_agent()
    betas = agent.balance(STATES)
    assert betas.shape == (64,) and agent.balance(STATES.reshape(4, 16, 3)).shape == (4, 16)
    policy = agent.actor(STATES, betas)
    for key in jax.random.split(KEY, 2):
        np.testing.assert_allclose(agent.sample_actions(STATES, None, key)[0], policy.sample(key), atol=1e-6)
        np.testing.assert_allclose(agent.sample_actions(STATES, None, key, True)[0], policy.mode(), atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"balance_range": (1.5, 0.5)}, r"FamO2OCQLConfig.balance_range is \(1.5, 0.5\); expected two finite numbers"),
        ({"balance_range": (-math.inf, 0.5)}, r"balance_range\[0\] is -inf"),
        ({"target_beta": "both"}, "target_beta is 'both'; expected next or current"),
        ({"encoding_dim": 0}, "encoding_dim is 0"),
        ({"temperature_init": 0.0}, "temperature_init is 0.0"),
    ],
)
def test_wrong_settings_refused(changes: dict[str, Any], words: str) -> None:
    """Wrong settings are refused."""
    with pytest.raises(ConfigError, match=words) as error:
        FamO2OCQLConfig(**changes)
    assert "\n" not in str(error.value)


def test_presets_follow_the_table() -> None:
    preset = FamO2OCQL.preset("locomotion")
    config = preset.config
    assert (preset.offline_steps, preset.online_steps, preset.reward) == (2_000_000, 1_000_000, None)
    assert (config.balance_range, config.conservative.weight, config.conservative.n_actions) == ((0.5, 1.5), 1.0, 10)
    assert config.conservative.importance_sampling and not config.conservative.dual
    assert (config.batch_size, config.discount, config.tau, config.num_critics) == (256, 0.99, 0.005, 2)
    assert (config.actor_lr, config.critic_lr, config.temperature_lr, config.balance_lr) == (3e-4,) * 4
    assert config.critic_layer_norm and not config.actor_layer_norm and not config.backup_entropy
    assert config.max_target_actions is None and config.target_subset is None and config.target_entropy == 1.0
    assert (config.online.replay, config.online.utd_ratio, config.online.warmup_steps) == ("append", 1, 0)
    assert (config.released_range, config.target_beta) == (True, "current")
    maze, small = FamO2OCQL.preset("antmaze").config, FamO2OCQL.preset("locomotion", "small").config
    assert maze.conservative.dual and maze.conservative.subset is None and maze.balance_range == (0.5, 1.5)
    assert small.balance_hidden_dims == (128, 128) and small.balance_lr == small.actor_lr == 1e-3
