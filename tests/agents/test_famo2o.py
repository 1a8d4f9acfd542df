"""FamO2O over IQL: the family, who trains whom and in which order, and what the balance network learns (2310.17966)."""

import functools
import math
from dataclasses import fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o2o.agents import IQL, FamO2O, FamO2OConfig, IQLConfig, balance as parts
from o2o.agents.balance import coefficient, encode
from o2o.errors import ConfigError
from o2o.nn.modules import Adam
from tests.helpers.contract import QUICK
from tests.helpers.probes import Probe, mode
from tests.helpers.tiny import constant_critic, create, largest_difference, make_batch, moved, set_config, steps

WIDTHS = {f"{name}_hidden_dims": (16,) for name in ("actor", "critic", "value", "balance")}
CONFIG = replace(FamO2OConfig(), **WIDTHS, batch_size=64)
ROWS = make_batch(rows=64)
BATCH = {name: jnp.stack([make_batch(rows=64, seed=seed)[name] for seed in range(3)]) for name in ROWS}
KEY = jax.random.key(3)


def make_agent(**fields: Any) -> FamO2O:
    """Return the agent of key 0 with targets unlike its critics, and fields that its networks do not depend on."""
    agent = set_config(create(FamO2O, CONFIG), **fields)
    return agent.replace(target_critic=jax.tree.map(lambda leaf: 0.7 * leaf, agent.critic.params))


def update(agent: Any, batch: Any = BATCH) -> tuple[Any, Any]:
    """Run one call, compiled for this agent alone."""
    return jax.jit(lambda agent, batch: agent.update(batch), compiler_options=QUICK)(agent, batch)


@functools.cache
def updated() -> tuple[FamO2O, Any]:
    """Return the plain toy agent after three offline updates, and its metrics."""
    return update(make_agent())


def plain_iql(agent: FamO2O, **fields: Any) -> IQL:
    """Return IQL with the agent's critics and values, and an actor without the encoding's inputs."""
    other = create(IQL, IQLConfig(**{**{k: v for k, v in WIDTHS.items() if "balance" not in k}, **fields}))
    tree = jax.tree.map(jnp.copy, agent.actor.params)
    first = tree["params"]["MLP_0"]["Dense_0"]
    first["kernel"] = first["kernel"][:-6]
    shared = {name: getattr(agent, name) for name in ("critic", "target_critic", "value", "rng")}
    return other.replace(actor=other.actor.replace(params=tree), **shared)


def first_kernel(agent: Any) -> jax.Array:
    return agent.actor.params["params"]["MLP_0"]["Dense_0"]["kernel"]


def with_first_kernel(agent: Any, kernel: jax.Array) -> Any:
    tree = jax.tree.map(jnp.copy, agent.actor.params)
    tree["params"]["MLP_0"]["Dense_0"]["kernel"] = kernel
    return agent.replace(actor=agent.actor.replace(params=tree))


def with_balance(agent: Any, bias: float, log_std: float = 0.0) -> Any:
    """Return the agent whose balance policy is tanh of N(mean(s) + bias, exp(log_std))."""
    tree = jax.tree.map(jnp.copy, agent.balance_actor.params)
    tree["params"]["mean"]["bias"] = jnp.full((1,), bias)
    tree["params"]["log_std"] = jnp.full((1,), log_std)
    return agent.replace(balance_actor=agent.balance_actor.replace(params=tree))


# ---------------------------------------------------------------- coefficient and encoding


def test_encoding_by_hand() -> None:
    np.testing.assert_allclose(encode(jnp.zeros(())), [0, 1, 0, 1, 0, 1], atol=1e-7)
    for beta in (1.0, 9.5, 14.0):
        waves = [math.sin(beta), math.cos(beta), math.sin(beta / 21.5443469), math.cos(beta / 21.5443469)]
        waves += [math.sin(beta / 464.1588834), math.cos(beta / 464.1588834)]
        np.testing.assert_allclose(encode(jnp.asarray(beta)), waves, atol=2e-6)
    betas = jnp.linspace(-3.0, 20.0, 50).reshape(5, 10)
    assert encode(betas).shape == (5, 10, 6)
    np.testing.assert_allclose(jnp.sum(encode(betas) ** 2, axis=-1), 3.0, rtol=1e-5)
    np.testing.assert_allclose(encode(jnp.asarray(2.0), 4, 100.0)[2:], [math.sin(0.2), math.cos(0.2)], rtol=1e-5)


def test_coefficient_range() -> None:
    """Coefficients map the interval from -1 to 1 to the range."""
    np.testing.assert_allclose(coefficient(jnp.asarray([-1.0, 0.0, 1.0]), (8.0, 14.0)), [8.0, 11.0, 14.0])
    x = jnp.tanh(jnp.linspace(-30, 30, 1001))
    for low, high in ((8.0, 14.0), (0.1, 0.7), (1 / 3, 5 / 3), (-2.0, 3.0)):
        betas = np.asarray(coefficient(x, (low, high)))
        assert betas.min() >= np.float32(low) and betas.max() <= np.float32(high) and np.all(np.diff(betas) > -1e-5)
        np.testing.assert_allclose([betas[0], betas[-1]], [low, high], rtol=1e-6)
    np.testing.assert_array_equal(coefficient(x, (0.3, 0.3)), np.full(1001, np.float32(0.3)))
    agent, far = make_agent(), 100.0 * ROWS["observations"]
    for betas in (agent.balance(far), agent.online().draw_betas(far, KEY), agent.draw_betas(far, KEY)):
        assert betas.shape == (64,) and float(betas.min()) >= 8.0 and float(betas.max()) <= 14.0


# ---------------------------------------------------------------- what falls out


def test_constant_balance_is_plain_iql(monkeypatch: pytest.MonkeyPatch) -> None:
    """lo = hi = c, no encoding: IQL with beta c, after three updates, V, Q and targets bit for bit."""
    monkeypatch.setattr(parts, "encode", lambda beta, dim, base: jnp.zeros((*beta.shape, dim)))
    agent = make_agent(balance_range=(3.0, 3.0))
    agent = with_first_kernel(agent, first_kernel(agent).at[-6:].set(0.0))
    plain, plain_info = update(plain_iql(agent, beta=3.0, expectile=0.9))
    after, info = update(agent)
    for name in ("critic", "target_critic", "value"):
        one, two = getattr(after, name), getattr(plain, name)
        assert largest_difference(one, two) == 0.0 and moved(one, getattr(agent, name)), name
    np.testing.assert_array_equal(first_kernel(after)[-6:], 0.0)
    narrow = after.actor.params["params"] | {"MLP_0": plain.actor.params["params"]["MLP_0"]}
    assert largest_difference(narrow, plain.actor.params["params"]) == 0.0
    np.testing.assert_array_equal(first_kernel(after)[:-6], first_kernel(plain))
    assert all(float(info[name]) == float(plain_info[name]) for name in plain_info)
    assert float(info["actor/beta"]) == 3.0 and float(info["actor/beta_std"]) == 0.0


def test_values_ignore_balance() -> None:
    """Another range leaves V, Q and targets as they are, bit for bit; the actor feels it."""
    reference, _ = updated()
    after, _ = update(make_agent(balance_range=(1.0, 5.0)))
    for name in ("critic", "target_critic", "value"):
        assert largest_difference(getattr(after, name), getattr(reference, name)) == 0.0, name
    assert moved(after.actor.params, reference.actor.params)


def test_constant_encoding_is_bias() -> None:
    """A constant encoding is a bias.

    The actor loss at lo = hi = c is IQL's of a policy whose first bias holds the encoding of c.
    """
    agent = make_agent(balance_range=(2.0, 2.0))
    plain = plain_iql(agent, beta=2.0)
    tree = plain.actor.params
    tree["params"]["MLP_0"]["Dense_0"]["bias"] += encode(jnp.asarray(2.0)) @ first_kernel(agent)[-6:]
    loss, info = agent.actor_loss(agent.actor.params, ROWS, agent.value, KEY)
    expected, plain_info = plain.actor_loss(tree, ROWS, plain.value, KEY)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert float(info["actor/weight"]) == pytest.approx(float(plain_info["actor/weight"]), rel=1e-6)


# ---------------------------------------------------------------- losses


def test_actor_loss_by_hand() -> None:
    """Every row's coefficient is in its weight and in its policy; the capped share counts rows at the cap."""
    agent = make_agent()
    loss, info = agent.actor_loss(agent.actor.params, ROWS, agent.value, KEY)
    beta = np.asarray(agent.draw_betas(ROWS["observations"], jax.random.split(KEY)[0]))
    states, actions = ROWS["observations"], ROWS["actions"]
    q = np.asarray(agent.critic(states, actions, params=agent.target_critic)).min(axis=0)
    exponents = beta * (q - np.asarray(agent.value(states)))
    weights = np.minimum(np.exp(np.minimum(exponents, 50.0)), 100.0)
    log_prob = np.asarray(agent.actor(states, jnp.asarray(beta)).log_prob(actions))
    assert float(loss) == pytest.approx(-float(np.mean(weights * log_prob)), rel=1e-4)
    share = float(np.mean(exponents >= math.log(100.0)))
    assert 0.0 < share < 1.0 and float(info["actor/capped"]) == pytest.approx(share)
    assert float(info["actor/beta"]) == pytest.approx(float(beta.mean()), rel=1e-6) and beta.std() > 1.0


def test_balance_loss_by_hand() -> None:
    agent = make_agent()
    agent = agent.replace(temperature=agent.temperature.replace(params={"params": {"value": jnp.asarray(-1.0)}}))
    loss, info = agent.balance_loss(agent.balance_actor.params, ROWS, KEY)
    states, (x_rng, action_rng) = ROWS["observations"], jax.random.split(KEY)
    x, log_prob = agent.balance_actor(states).sample_and_log_prob(x_rng)
    beta = 8.0 + (np.asarray(x)[:, 0] + 1.0) / 2.0 * 6.0
    actions = agent.actor(states, jnp.asarray(beta)).sample(action_rng)
    q = np.asarray(agent.critic(states, actions, params=agent.target_critic)).min(axis=0)
    assert float(loss) == pytest.approx(float(np.mean(math.exp(-1.0) * np.asarray(log_prob) - q)), rel=1e-4)
    assert float(info["balance/entropy"]) == pytest.approx(-float(log_prob.mean()), rel=1e-5)
    greedy = 8.0 + (np.tanh(np.asarray(agent.balance_actor(states).mean))[:, 0] + 1.0) / 2.0 * 6.0
    assert float(info["balance/std"]) == pytest.approx(float(greedy.std()), rel=1e-4)
    np.testing.assert_allclose(agent.balance(states), greedy, rtol=1e-5)
    one, two = (np.asarray(jax.random.normal(rng, (64,))) for rng in (x_rng, action_rng))
    assert abs(float(np.mean(one * two))) < 0.4, "x and action must not share their noise"


def test_gradients_reach_own_network() -> None:
    """Gradients reach their own network only."""
    agent = make_agent().online()

    def actor_loss(balance: Any, target: Any, value: Any) -> jax.Array:
        other = agent.replace(balance_actor=agent.balance_actor.replace(params=balance), target_critic=target)
        value = agent.value.replace(params=value)
        return other.actor_loss(agent.actor.params, ROWS, value, KEY)[0]

    inputs = (agent.balance_actor.params, agent.target_critic, agent.value.params)
    for leaf in jax.tree.leaves(jax.jit(jax.grad(actor_loss, argnums=(0, 1, 2)), compiler_options=QUICK)(*inputs)):
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))
    other = with_balance(agent, 2.0)  # betas of step (4) do change with it
    assert float(actor_loss(other.balance_actor.params, *inputs[1:])) != float(actor_loss(*inputs))
    balance, temperature, _ = jax.jit(lambda a: a.balance_step(ROWS, KEY), compiler_options=QUICK)(agent)
    assert moved(balance.params, agent.balance_actor.params) and moved(temperature.params, agent.temperature.params)


def test_balance_learns_through_encoding() -> None:
    """The balance learns through the encoding.

    Without the encoding's weights only the entropy is left in the gradient of the balance loss.
    """
    agent = make_agent()
    states, x_rng = ROWS["observations"], jax.random.split(KEY)[0]

    def entropy_term(params: Any) -> jax.Array:
        return agent.alpha() * agent.balance_actor(states, params=params).sample_and_log_prob(x_rng)[1].mean()

    @functools.partial(jax.jit, compiler_options=QUICK)
    def gradients(actor: Any) -> tuple[Any, Any]:
        other, params = agent.replace(actor=agent.actor.replace(params=actor)), agent.balance_actor.params
        return jax.grad(lambda p: other.balance_loss(p, ROWS, KEY)[0])(params), jax.grad(entropy_term)(params)

    found, entropy = gradients(agent.actor.params)
    assert largest_difference(found, entropy) > 3e-3
    blind = with_first_kernel(agent, first_kernel(agent).at[-6:].set(0.0))
    found, entropy = gradients(blind.actor.params)
    assert largest_difference(found, entropy) < 1e-6


# ---------------------------------------------------------------- entropy and temperature


def test_entropy_reaches_target() -> None:
    """The entropy rises to its target, and the temperature turns there.

    Q constant: nothing but entropy drives the balance; t grows below the target, falls above.
    """
    agent = with_balance(make_agent(), 0.0, log_std=-3.0)
    agent = agent.replace(
        target_critic=constant_critic(agent.target_critic, 1.5),
        balance_actor=agent.balance_actor.replace(optimizer=Adam(1e-2)),
        temperature=agent.temperature.replace(optimizer=Adam(1e-2)),
    )

    def step(agent: Any, key: Any) -> tuple[Any, Any]:
        balance, temperature, info = agent.balance_step(ROWS, key)
        agent = agent.replace(balance_actor=balance, temperature=temperature)
        return agent, (info["balance/entropy"], agent.alpha())

    run = jax.jit(lambda a: jax.lax.scan(step, a, jax.random.split(KEY, 400)), compiler_options=QUICK)
    after, (entropy, alpha) = run(agent)
    entropy, alpha = np.asarray(entropy), np.asarray(alpha)
    assert entropy[0] < -1.5 and entropy[-1] > -0.5
    below, above = int(np.argmax(entropy > -0.5)), entropy.size
    assert np.all(np.diff(alpha[:below]) > 0) and alpha[below // 2] > 1.0
    assert np.all(np.diff(alpha[above - 20 :]) < 0) and np.all(entropy[above - 20 :] > -0.5)
    assert float(entropy.max()) < math.log(2.0) + 0.1, "in the space of x no entropy is above ln 2"


# ---------------------------------------------------------------- phases and order


def test_betas_by_phase() -> None:
    """Betas are uniform offline and the balance policy's online."""
    agent = with_balance(make_agent(), 1.0, log_std=-1.0)
    states = jnp.tile(ROWS["observations"][:1], (4000, 1))
    offline = np.sort(np.asarray(agent.draw_betas(states, KEY)))
    np.testing.assert_allclose(offline, np.linspace(8.0, 14.0, 4000), atol=0.2)
    online = np.sort(np.asarray(agent.online().draw_betas(states, KEY)))
    mean = float(agent.balance_actor(states[:1]).mean[0, 0])
    draws = np.random.default_rng(0).normal(mean, math.exp(-1.0), 4000)
    expected = np.sort(8.0 + 3.0 * (np.tanh(draws) + 1.0))
    np.testing.assert_allclose(online[40:-40], expected[40:-40], atol=0.25)
    assert np.abs(online - offline).max() > 0.5
    _, info = updated()
    assert float(info["actor/beta"]) == pytest.approx(11.0, abs=0.6)
    assert float(info["actor/beta_std"]) == pytest.approx(6.0 / math.sqrt(12.0), abs=0.4)


def test_actor_step_inputs() -> None:
    """The actor sees the new value and the old balance."""
    agent = make_agent().online()
    agent = agent.replace(
        value=agent.value.replace(optimizer=Adam(0.05)), balance_actor=agent.balance_actor.replace(optimizer=Adam(0.5))
    )
    after, _ = update(agent, {name: leaf[None] for name, leaf in ROWS.items()})
    rng = jax.random.split(agent.rng)[1]
    grads = jax.jit(
        lambda a, v: jax.grad(lambda p: a.actor_loss(p, ROWS, v, rng)[0])(a.actor.params), compiler_options=QUICK
    )
    step = lambda other, value: agent.actor.apply_gradients(grads(other, value)).params  # noqa: E731
    assert moved(after.balance_actor.params, agent.balance_actor.params)
    assert largest_difference(after.actor.params, step(agent, after.value)) < 2e-6
    assert largest_difference(after.actor.params, step(agent, agent.value)) > 1e-5
    later = agent.replace(balance_actor=after.balance_actor)
    assert largest_difference(after.actor.params, step(later, after.value)) > 1e-5
    balance_rng = jax.random.split(jax.random.split(agent.rng)[0])[1]
    balance_step = jax.jit(lambda a: a.balance_step(ROWS, balance_rng), compiler_options=QUICK)
    first = lambda other: balance_step(other)[0].opt_state[0].mu  # noqa: E731  # Adam's first step hides the gradient
    assert largest_difference(after.balance_actor.opt_state[0].mu, first(agent)) < 1e-6
    for new in ({"actor": after.actor}, {"target_critic": after.target_critic}):
        assert largest_difference(first(agent.replace(**new)), first(agent)) > 2e-6, "the old actor and the old targets"
    assert largest_difference(after.temperature.params, balance_step(agent)[1].params) < 1e-6


def test_balance_update_period() -> None:
    """The balance steps at every second update."""
    after, info = update(make_agent(balance_every=2))
    assert (steps(after.actor), steps(after.balance_actor), steps(after.temperature)) == (3, 2, 2)
    reference, every = updated()
    assert largest_difference(after.critic, reference.critic) == 0.0
    assert float(info["balance/entropy"]) == pytest.approx(float(every["balance/entropy"]), abs=0.05)


def test_acting_coefficient() -> None:
    """Acting uses the deterministic coefficient."""
    agent, states = make_agent(), ROWS["observations"]
    betas = agent.balance(states)
    assert (
        betas.shape == (64,) and float(betas.std()) > 0.05 and agent.balance(states.reshape(4, 16, 3)).shape == (4, 16)
    )
    policy, greedy = agent.actor(states, betas), jnp.zeros(())
    for key in jax.random.split(KEY, 2):
        sample, _ = agent.sample_actions(states, None, key)
        np.testing.assert_allclose(sample, jnp.clip(policy.sample(key), -1, 1), atol=1e-6)
        greedy, _ = agent.sample_actions(states, None, key, True)
        np.testing.assert_allclose(greedy, policy.mean, atol=1e-6)
    elsewhere, _ = with_balance(agent, 3.0).sample_actions(states, None, KEY, True)
    assert float(jnp.abs(elsewhere - greedy).max()) > 1e-3


def test_bandit_with_mixed_data() -> None:
    """Where the data are bad, greed pays: a higher coefficient there, and values that rise with it."""
    generator = np.random.default_rng(0)
    states = np.where(np.arange(512) % 2 == 0, -1.0, 1.0)[:, None]
    best = np.where(states < 0, -0.4, 0.4)
    actions = np.where(states < 0, best, generator.uniform(-1.0, 1.0, (512, 1)))  # -1: an expert; 1: no idea
    rewards = -10.0 * np.square(actions - best)[:, 0]
    columns = {"observations": states, "actions": actions, "rewards": rewards, "masks": np.zeros(512)}
    table = {name: jnp.asarray(column, jnp.float32) for name, column in columns.items()}
    wide: dict[str, Any] = dict.fromkeys(WIDTHS, (32, 32))
    config = FamO2OConfig(
        **wide, expectile=0.5, balance_range=(0.0, 1.5), batch_size=64, discount=0.5,
        actor_lr=2e-3, critic_lr=2e-3, value_lr=2e-3, balance_lr=2e-3, tau=0.05,
    )  # fmt: skip
    agent = FamO2O.create(jax.random.key(0), jnp.zeros((1, 1)), jnp.zeros((1, 1)), config)
    agent = Probe(agent, steps=2500).train({**table, "next_observations": table["observations"]})
    expert, novice = (float(agent.balance(jnp.asarray([state]))) for state in (-1.0, 1.0))
    assert novice > expert + 0.12, (expert, novice)
    policy: Any = agent.actor(jnp.ones((7, 1)), jnp.linspace(0.0, 1.5, 7))
    values = -10.0 * np.asarray((policy.mean - 0.4) ** 2 + policy.std**2)[:, 0]  # expected reward, in closed form
    assert np.all(np.diff(values) > -0.02) and values[-1] > values[0] + 0.3, values
    assert abs(mode(agent, 1.0) - 0.4) < 0.1 and abs(mode(agent, -1.0) + 0.4) < 0.1


# ---------------------------------------------------------------- networks and settings


def test_first_networks_and_rates() -> None:
    """t = 1, the log-std 0 and clipped to [-10, 2]; the actor's rate is constant online, its dropout on in its loss."""
    agent, states = make_agent(), ROWS["observations"]
    assert float(agent.alpha()) == 1.0
    for free, expected in ((0.0, 0.0), (-40.0, -10.0), (5.0, 2.0)):
        policy = with_balance(agent, 0.0, log_std=free).balance_actor(states)
        np.testing.assert_allclose(policy.std, math.exp(expected), rtol=1e-4)
        assert free or float(agent.balance_actor(states).std[0, 0]) == pytest.approx(1.0)
    config = replace(CONFIG, balance_lr=0.02, actor_decay_steps=10)
    phases = jax.eval_shape(lambda: [(a := FamO2O.create(KEY, states, ROWS["actions"], config)), a.online()])
    rates = [[phase.actor.optimizer, phase.balance_actor.optimizer, phase.temperature.optimizer] for phase in phases]
    assert rates == [[Adam(3e-4, 10), Adam(0.02), Adam(0.02)], [Adam(3e-4), Adam(0.02), Adam(0.02)]]
    still = set_config(agent, balance_range=(9.0, 9.0))
    blurred = still.replace(actor=still.actor.replace(module=still.actor.module.clone(dropout=0.5)))
    for other, alike in ((still, True), (blurred, False)):
        losses = [
            float(other.actor_loss(other.actor.params, ROWS, other.value, key)[0]) for key in jax.random.split(KEY)
        ]
        assert (losses[0] == losses[1]) == alike


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"balance_range": (14.0, 8.0)}, r"FamO2OConfig.balance_range is \(14.0, 8.0\); expected two finite numbers"),
        ({"balance_range": (1.0, math.inf)}, r"balance_range\[1\] is inf"),
        ({"balance_range": (math.nan, 2.0)}, r"balance_range\[0\] is nan"),
        ({"encoding_dim": 5}, "encoding_dim is 5; expected an even number"),
        ({"encoding_base": 0.0}, "encoding_base is 0.0"),
        ({"balance_every": 0}, "balance_every is 0"),
        ({"balance_target_entropy": 0.7}, "balance_target_entropy is 0.7; expected below 0.693"),
        ({"expectile": 1.0}, "expectile is 1.0"),
    ],
)
def test_wrong_settings_refused(changes: dict[str, Any], words: str) -> None:
    """Wrong settings are refused."""
    with pytest.raises(ConfigError, match=words) as error:
        FamO2OConfig(**changes)
    assert "\n" not in str(error.value)


def test_presets_follow_the_table() -> None:
    maze, locomotion = FamO2O.preset("antmaze"), FamO2O.preset("locomotion")
    assert (maze.config.balance_range, maze.config.expectile, maze.config.balance_every) == ((8.0, 14.0), 0.9, 1)
    run = (locomotion.config.balance_range, locomotion.config.expectile, locomotion.config.balance_every)
    assert run == ((1.0, 5.0), 0.7, 5)
    assert (maze.reward, locomotion.normalize_returns) == ((1.0, -1.0), 1000.0)
    for preset in (maze, locomotion):
        config = preset.config
        rates = (config.actor_lr, config.critic_lr, config.value_lr, config.balance_lr)
        assert rates == (3e-4,) * 4 and (config.discount, config.tau, config.batch_size) == (0.99, 0.005, 256)
        assert (config.weight_cap, config.balance_target_entropy) == (100.0, -0.5)
        assert (config.online.replay, config.online.utd_ratio, config.dropout) == ("append", 1, 0.0)
        assert preset.offline_steps == preset.online_steps == 1_000_000
        assert config.balance_hidden_dims == config.actor_hidden_dims == (256, 256)
    low, high = FamO2O.preset("locomotion", "small").config.balance_range
    assert (low, high) == pytest.approx((0.5 / 3, 2.5 / 3))
    assert "beta" not in {field.name for field in fields(FamO2OConfig)}
