"""FQL: every loss by hand, who gets which gradient, distillation noise for noise, two modes (arXiv 2502.02538)."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o2o.agents import FQL, FQLConfig
from o2o.errors import ConfigError
from o2o.types import Batch
from tests.helpers.contract import QUICK
from tests.helpers.probes import LONG
from tests.helpers.tiny import constant_critic, create, largest_difference, make_batch, moved, set_config, steps, tiny

KEY = jax.random.key(4)
CONFIG = tiny(FQLConfig(), tau=0.25)
update = jax.jit(lambda agent, batch: agent.update(batch), compiler_options=QUICK)


def make_agent(**changes: Any) -> Any:
    """Return the agent of key 0 whose target critics differ from the critics."""
    agent = set_config(create(FQL, CONFIG), **changes)
    return agent.replace(target_critic=jax.tree.map(lambda leaf: 0.7 * leaf, agent.critic.params))


def noise_like(batch: Batch) -> jax.Array:
    """Return noise `[..., A]` for the actions of a batch."""
    return jax.random.normal(KEY, batch["actions"].shape)


def with_params(agent: Any, network: str, params: Any) -> Any:
    """Return the agent with other parameters of one network."""
    return agent.replace(**{network: getattr(agent, network).replace(params=params)})


def with_constant(agent: Any, network: str, layer: str, value: float) -> Any:
    """Return the agent whose `network` gives `value` everywhere; `layer` is its last one."""
    tree = dict(getattr(agent, network).params["params"])
    tree[layer] = {"kernel": jnp.zeros_like(tree[layer]["kernel"]), "bias": jnp.full_like(tree[layer]["bias"], value)}
    return with_params(agent, network, {"params": tree})


@pytest.mark.parametrize(("aggregate", "next_value"), [("mean", 2.0), ("min", 1.0)])
def test_target_by_hand(aggregate: str, next_value: float) -> None:
    """Q' = (1, 3): y = r + 0.99 m agg Q'; the loss is the mean over critics and rows."""
    agent, batch = make_agent(aggregate=aggregate), make_batch()
    for member, value in enumerate((1.0, 3.0)):
        agent = agent.replace(target_critic=constant_critic(agent.target_critic, value, member))
    loss, info = agent.critic_loss(agent.critic.params, batch, noise_like(batch))
    y = np.asarray(batch["rewards"] + 0.99 * batch["masks"] * next_value)
    q = np.asarray(agent.critic(batch["observations"], batch["actions"]))
    assert float(info["critic/target"]) == pytest.approx(y.mean(), rel=1e-5)
    assert float(loss) == pytest.approx(np.mean((q - y) ** 2), rel=1e-5)


def test_target_clips_policy_action() -> None:
    """The target evaluates the clipped action of the policy.

    The policy gives 5 everywhere, which is 1 in the environment.
    """
    agent, batch = make_agent(), make_batch()
    agent = with_constant(agent, "one_step", "Dense_0", 5.0)
    q = agent.critic(batch["next_observations"], jnp.ones_like(batch["actions"]), params=agent.target_critic)
    expected = batch["rewards"] + 0.99 * batch["masks"] * q.mean(axis=0)
    _, info = agent.critic_loss(agent.critic.params, batch, noise_like(batch))
    assert float(info["critic/target"]) == pytest.approx(float(expected.mean()), rel=1e-5)


def test_flow_euler_steps() -> None:
    """The flow takes Euler steps and clips once.

    One step is clip(z + v(s, z, 0)); ten of a constant velocity c are clip(z + c).
    """
    agent, batch = make_agent(flow_steps=1), make_batch()
    noise = noise_like(batch)
    velocity = agent.actor(batch["observations"], noise, jnp.zeros(()))
    expected = jnp.clip(noise + velocity, -1.0, 1.0)
    np.testing.assert_allclose(agent.flow_actions(batch["observations"], noise), expected, atol=1e-5)
    last = sorted(name for name in agent.actor.params["params"] if name.startswith("Dense"))[-1]
    constant = set_config(with_constant(agent, "actor", last, -0.8), flow_steps=10)
    expected = jnp.clip(noise - 0.8, -1.0, 1.0)
    np.testing.assert_allclose(constant.flow_actions(batch["observations"], noise), expected, atol=1e-5)


@pytest.mark.parametrize("normalize_q", [False, True])
def test_policy_loss_by_hand(normalize_q: bool) -> None:
    """The distance is a mean over rows and entries, of the unclipped action; Q is of the clipped one."""
    agent, batch = make_agent(alpha=3.0, normalize_q=normalize_q), make_batch(rows=64)
    noise = noise_like(batch)
    actions = np.asarray(agent.one_step(batch["observations"], noise))
    assert np.abs(actions).max() > 1.0
    distance = np.mean((actions - np.asarray(agent.flow_actions(batch["observations"], noise))) ** 2)
    q = np.asarray(agent.critic(batch["observations"], np.clip(actions, -1.0, 1.0))).mean(axis=0)
    size = np.abs(q).mean() if normalize_q else 1.0
    loss, _ = agent.policy_loss(agent.one_step.params, batch, noise)
    assert float(loss) == pytest.approx(3.0 * distance - q.mean() / size, rel=1e-4, abs=1e-5)


def test_losses_reach_own_network() -> None:
    """The gradients of one loss by the parameters of the other networks are exactly 0 after the update's split."""
    agent, batch = make_agent(), make_batch()
    noise = noise_like(batch)
    losses = {
        "critic": lambda a: a.critic_loss(a.critic.params, batch, noise)[0],
        "actor": lambda a: a.flow_loss(a.actor.params, batch, KEY)[0],
    }
    for owner, loss in losses.items():
        for other in {"critic", "actor", "one_step"} - {owner}:
            grads = jax.grad(lambda p, other=other, loss=loss: loss(with_params(agent, other, p)))(
                getattr(agent, other).params
            )
            assert all(float(jnp.abs(leaf).max()) == 0.0 for leaf in jax.tree.leaves(grads)), (owner, other)
    one, _ = update(agent, make_batch(1))
    two, _ = update(set_config(agent, alpha=1e3), make_batch(1))
    assert moved(one.one_step.params, two.one_step.params)
    assert not moved(one.critic.params, two.critic.params) and not moved(one.actor.params, two.actor.params)


def test_target_lags_one_step() -> None:
    """The target lags one step behind the critics.

    From Q' = Q the first update leaves Q' alone; the second moves it by tau of the first step's change.
    """
    agent = make_agent()
    agent = agent.replace(target_critic=jax.tree.map(jnp.copy, agent.critic.params))
    one, _ = update(agent, make_batch(1))
    assert largest_difference(one.target_critic, agent.target_critic) < 1e-7
    two, _ = update(one, make_batch(1))
    expected = jax.tree.map(lambda new, old: old + 0.25 * (new - old), one.critic.params, agent.critic.params)
    assert moved(one.critic.params, agent.critic.params)
    assert largest_difference(two.target_critic, expected) < 1e-6
    assert [steps(model) for model in (two.critic, two.actor, two.one_step)] == [2, 2, 2]


def two_modes(rows: int = 64) -> Batch:
    """Return terminal transitions of one state with actions -0.5 and 0.5 in turn; the reward is the action."""
    actions = jnp.where(jnp.arange(rows) % 2 == 0, -0.5, 0.5)[:, None]
    states, zeros = jnp.zeros((rows, 1)), jnp.zeros(rows)
    return {
        "observations": states,
        "actions": actions,
        "rewards": actions[:, 0],
        "masks": zeros,
        "next_observations": states,
    }


@pytest.fixture(scope="module")
def trained() -> dict[float, Any]:
    """Return the agent trained on two modes with a large and with a small alpha."""
    config = FQLConfig(actor_hidden_dims=(64, 64), critic_hidden_dims=(32, 32), actor_lr=3e-3, critic_lr=3e-3)

    def train(agent: Any) -> Any:
        batch = jax.tree.map(lambda leaf: leaf[None], two_modes())
        return jax.lax.fori_loop(0, 2000, lambda _, agent: agent.update(batch)[0], agent)

    make = lambda alpha: FQL.create(KEY, jnp.zeros((1, 1)), jnp.zeros((1, 1)), replace(config, alpha=alpha))  # noqa: E731
    return {alpha: jax.jit(train, compiler_options=LONG)(make(alpha)) for alpha in (1e6, 0.3)}


@pytest.mark.learning
def test_large_alpha_matches_flow(trained: dict[float, Any]) -> None:
    """With a large alpha the policy is the flow, noise for noise."""
    agent, states = trained[1e6], jnp.zeros((500, 1))
    noise = jax.random.normal(jax.random.key(1), (500, 1))
    one, flow = np.asarray(agent.one_step(states, noise))[:, 0], np.asarray(agent.flow_actions(states, noise))[:, 0]
    assert np.corrcoef(one, flow)[0, 1] > 0.97 and abs(np.corrcoef(one, np.roll(flow, 1))[0, 1]) < 0.2
    assert 0.4 < np.mean(flow > 0) < 0.6 and np.mean(np.abs(np.abs(flow) - 0.5) < 0.2) > 0.8


@pytest.mark.learning
def test_small_alpha_takes_better_mode(trained: dict[float, Any]) -> None:
    """With a small alpha the policy takes the better mode."""
    played, _ = trained[0.3].sample_actions(jnp.zeros((500, 1)), None, jax.random.key(1))
    both, _ = trained[1e6].sample_actions(jnp.zeros((500, 1)), None, jax.random.key(1))
    assert float(jnp.mean(played > 0.0)) > 0.9 and 0.35 < float(jnp.mean(both > 0.0)) < 0.65


def test_actions_always_sampled() -> None:
    """Every action is a sample.

    There is no deterministic mode: the same key gives the same action either way, another key another one.
    """
    agent = make_agent()
    observations = jnp.zeros((200, 3))
    drawn, fixed, other = (
        agent.sample_actions(observations, None, jax.random.key(seed), deterministic)[0]
        for seed, deterministic in ((1, False), (1, True), (2, True))
    )
    np.testing.assert_array_equal(drawn, fixed)
    assert float(drawn.std()) > 0.05 and bool(jnp.any(drawn != other))


def test_wrong_settings_refused() -> None:
    """Wrong settings are refused."""
    for name, value in {"alpha": -1.0, "num_critics": 0, "flow_steps": 0, "aggregate": "max"}.items():
        with pytest.raises(ConfigError, match=f"FQLConfig.{name} is"):
            replace(CONFIG, **{name: value})


def test_presets_follow_the_paper() -> None:
    preset = FQL.preset("antmaze")
    config = preset.config
    assert (config.alpha, config.aggregate, config.num_critics, config.flow_steps) == (10.0, "mean", 2, 10)
    assert config.actor_hidden_dims == config.critic_hidden_dims == (512,) * 4 and not config.normalize_q
    assert (config.batch_size, config.actor_lr, config.tau, preset.reward) == (256, 3e-4, 0.005, (1.0, -1.0))
    assert preset.offline_steps == FQL.preset("pointmaze").offline_steps == 1_000_000
    assert FQL.preset("adroit").config.aggregate == "min" and FQL.preset("kitchen").config.normalize_q
