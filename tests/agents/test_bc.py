"""BC: likelihood and squared error by hand, on data whose best answer is known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o2o.agents import BC, BCConfig
from o2o.errors import ConfigError
from o2o.types import Batch

TINY = BCConfig(actor_hidden_dims=(16, 16), batch_size=64)


def make_batch(utd: int = 1, rows: int = 64, seed: int = 0) -> Batch:
    """Return random transitions, leaves `[utd, rows, ...]`."""
    keys = jax.random.split(jax.random.key(seed), 5)
    return {
        "observations": jax.random.normal(keys[0], (utd, rows, 3)),
        "actions": jnp.tanh(jax.random.normal(keys[1], (utd, rows, 2))),
        "rewards": jax.random.normal(keys[2], (utd, rows)),
        "masks": jnp.ones((utd, rows)),
        "next_observations": jax.random.normal(keys[3], (utd, rows, 3)),
    }


def make_agent(seed: int = 0, **fields: object) -> BC:
    """Return a tiny agent for `make_batch`."""
    return BC.create(
        jax.random.key(seed),
        jnp.zeros((1, 3)),
        jnp.zeros((1, 2)),
        dataclasses.replace(TINY, **fields),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("squash", [True, False])
def test_nll_loss_value(squash: bool) -> None:
    """The NLL is minus the mean log-density of the actions."""
    agent, rows = make_agent(squash=squash), jax.tree.map(lambda leaf: leaf[0], make_batch())
    loss, info = agent.actor_loss(agent.actor.params, rows, agent.rng)
    dist = agent.actor(rows["observations"])
    assert float(loss) == pytest.approx(-float(dist.log_prob(rows["actions"]).mean()), rel=1e-5)
    assert float(info["actor/mse"]) == pytest.approx(float(((dist.mode() - rows["actions"]) ** 2).mean()), rel=1e-5)


def test_mse_loss_and_policy() -> None:
    """The MSE is the squared error of the mode, and the policy is deterministic."""
    agent, rows = make_agent(loss="mse"), jax.tree.map(lambda leaf: leaf[0], make_batch())
    loss, _ = agent.actor_loss(agent.actor.params, rows, agent.rng)
    mode = np.tanh(np.asarray(agent.actor(rows["observations"]).mean))
    assert float(loss) == pytest.approx(float(np.mean((mode - np.asarray(rows["actions"])) ** 2)), rel=1e-5)
    sampled, _ = agent.sample_actions(rows["observations"], None, jax.random.key(1))
    np.testing.assert_allclose(sampled, mode, rtol=1e-5)


def test_finite_loss_at_bounds() -> None:
    """Actions at the bounds give a finite loss and gradient."""
    agent, rows = make_agent(), jax.tree.map(lambda leaf: leaf[0], make_batch())
    rows["actions"] = jnp.sign(rows["actions"])
    (loss, _), grads = jax.value_and_grad(agent.actor_loss, has_aux=True)(agent.actor.params, rows, agent.rng)
    assert np.isfinite(loss) and all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))


def test_loss_reaches_action_entropy() -> None:
    """The loss on a linear-Gaussian toy reaches the entropy of the actions."""
    noise = 0.1
    agent = make_agent(squash=False, std_mode="uniform", actor_lr=3e-3)

    def step(agent: BC, rng: jax.Array) -> tuple[BC, jax.Array]:
        keys = jax.random.split(rng)
        observations = jax.random.uniform(keys[0], (256, 3), minval=-1.0, maxval=1.0)
        mean = 0.3 * observations @ jnp.array([[1.0, 0.0], [0.0, -1.0], [1.0, 1.0]])
        actions = mean + noise * jax.random.normal(keys[1], (256, 2))
        agent, info = agent.update({"observations": observations[None], "actions": actions[None]})
        return agent, info["actor/loss"]

    agent, losses = jax.jit(lambda agent, rngs: jax.lax.scan(step, agent, rngs))(
        agent, jax.random.split(jax.random.key(1), 1500)
    )
    entropy = 2 * 0.5 * np.log(2 * np.pi * np.e * noise**2)
    assert float(losses[-100:].mean()) == pytest.approx(entropy, abs=0.15)
    assert float(losses[0]) > entropy + 1.0


def test_log_std_floor() -> None:
    """The log-std has its floor at minus five."""
    agent, rows = make_agent(std_mode="uniform"), jax.tree.map(lambda leaf: leaf[0], make_batch())
    agent.actor.params["params"]["log_std"] = jnp.full((2,), -40.0)
    np.testing.assert_allclose(agent.actor(rows["observations"]).std, np.exp(-5.0), rtol=1e-5)


def test_dropout_in_loss_only() -> None:
    """Dropout changes the loss but not the acting policy."""
    agent, rows = make_agent(dropout=0.5), jax.tree.map(lambda leaf: leaf[0], make_batch())
    one, _ = agent.actor_loss(agent.actor.params, rows, jax.random.key(1))
    two, _ = agent.actor_loss(agent.actor.params, rows, jax.random.key(2))
    assert float(one) != float(two)
    actions = [agent.sample_actions(rows["observations"], None, jax.random.key(i), True)[0] for i in (1, 2)]
    np.testing.assert_array_equal(actions[0], actions[1])


def test_plain_gaussian_samples_clipped() -> None:
    """Plain Gaussian samples are clipped."""
    agent = make_agent(squash=False)
    actions, _ = agent.sample_actions(jnp.ones((200, 3)), None, jax.random.key(0))
    assert float(jnp.abs(actions).max()) == 1.0


def test_rewards_and_masks_ignored() -> None:
    """Rewards and masks do not matter."""
    agent, batch = make_agent(), make_batch()
    other = {**batch, "rewards": batch["rewards"] + 5.0, "masks": 1.0 - batch["masks"]}
    one, two = agent.update(batch)[0], agent.update(other)[0]
    for left, right in zip(jax.tree.leaves(one.actor), jax.tree.leaves(two.actor), strict=True):
        np.testing.assert_array_equal(left, right)


def test_wrong_settings_refused() -> None:
    """Wrong settings and dict observations are refused."""
    with pytest.raises(ConfigError, match=r"BCConfig\.loss is 'huber'"):
        BCConfig(loss="huber")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="needs flat float32 observations"):
        BC.create(jax.random.key(0), {"state": jnp.zeros((1, 3))}, jnp.zeros((1, 2)))  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["antmaze", "pointmaze", "adroit", "kitchen", "locomotion", "other"])
def test_presets(family: str) -> None:
    paper, small = BC.preset(family, "paper"), BC.preset(family, "small")
    assert paper.config.actor_hidden_dims == (256, 256) and paper.offline_steps >= 20_000
    assert small.offline_steps == 10_000 and small.config.online.replay == "none"
