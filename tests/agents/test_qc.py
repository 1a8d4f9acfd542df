"""QC: a chunk of one, the acting rules, what its losses move, and its networks at their optimum."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o2o.agents import QC, QCConfig
from o2o.errors import ConfigError
from o2o.rl.windows import Chunks, chunk_rows
from tests.helpers.tiny import (
    ACTION_DIM,
    OBSERVATION_DIM,
    constant_critic,
    create,
    largest_difference,
    make_batch,
    set_config,
)
from tests.helpers.toy_qc import (
    BASE,
    DISCOUNT,
    DISTILLED,
    KEY,
    H,
    act,
    flow_chunks,
    propose,
    quick,
    random_windows,
    update,
)

# ---------------------------------------------------------------- a chunk of one


@pytest.mark.parametrize("config", [BASE, DISTILLED], ids=["best_of_n", "distilled"])
def test_chunk_of_one(config: QCConfig) -> None:
    """A chunk of one is FQL or best of N on plain transitions."""
    agent = create(QC, replace(config, chunk=1, alpha=2.0))
    assert agent.needs.window == 1 and agent.initial_carry((4,)) is None
    batch = make_batch(utd=1, seed=4)
    rows = jax.tree.map(lambda leaf: leaf[0], batch)
    chunks = chunk_rows({**jax.tree.map(lambda x: x[:, None], rows), "valid": jnp.ones((8, 1))}, DISCOUNT, True)
    rng, target_rng, flow_rng, policy_rng = jax.random.split(agent.rng, 4)
    # FQL's equations, written out on the plain rows.
    action = propose(agent, rows["next_observations"], target_rng, False)
    q_next = agent.critic(rows["next_observations"], action, params=agent.target_critic).mean(axis=0)
    y = rows["rewards"] + DISCOUNT * rows["masks"] * q_next
    q = agent.critic(rows["observations"], rows["actions"])
    stepped, info = update(agent, batch)
    np.testing.assert_allclose(info["critic/loss"], np.mean(np.square(q - y)), rtol=1e-4)
    np.testing.assert_allclose(info["actor/loss"], agent.flow_loss(agent.actor.params, chunks, flow_rng)[0], rtol=1e-4)
    if agent.one_step is not None:
        z = jax.random.normal(policy_rng, rows["actions"].shape)
        played = agent.one_step(rows["observations"], z)
        distance = jnp.mean(jnp.square(played - flow_chunks(agent, rows["observations"], z)))
        gain = jnp.mean(agent.critic(rows["observations"], jnp.clip(played, -1, 1)))
        np.testing.assert_allclose(info["policy/distance"], distance, rtol=1e-4)
        np.testing.assert_allclose(info["policy/q"], gain, rtol=1e-3, atol=1e-6)
        loss, _ = agent.policy_loss(agent.one_step.params, chunks, policy_rng)
        np.testing.assert_allclose(loss, 2 * distance - gain, rtol=1e-4)
    mixed = jax.tree.map(lambda new, old: 0.005 * new + 0.995 * old, stepped.critic.params, agent.target_critic)
    assert largest_difference(stepped.target_critic, mixed) < 1e-7, "the targets follow the new parameters"
    assert jnp.array_equal(jax.random.key_data(stepped.rng), jax.random.key_data(rng))


# ---------------------------------------------------------------- acting


def test_best_of_one() -> None:
    """Best of one is a sample of the flow."""
    agent = set_config(create(QC, BASE), num_samples=1)
    observations = jax.random.normal(KEY, (6, OBSERVATION_DIM))
    noise = jax.random.normal(jax.random.key(9), (1, 6, H * ACTION_DIM))
    expected = flow_chunks(agent, observations, noise[0])
    np.testing.assert_allclose(propose(agent, observations, jax.random.key(9), False), expected, atol=1e-6)


def test_best_sample_selected() -> None:
    """A constant critic leaves the first sample, and a real one takes the best."""
    agent = create(QC, BASE)
    observations = jax.random.normal(KEY, (6, OBSERVATION_DIM))
    noise = jax.random.normal(jax.random.key(9), (4, 6, H * ACTION_DIM))
    candidates = flow_chunks(agent, observations, noise)
    flat = agent.replace(critic=agent.critic.replace(params=constant_critic(agent.critic.params, 1.0)))
    np.testing.assert_allclose(propose(flat, observations, jax.random.key(9), False), candidates[0], atol=1e-6)
    scores = np.asarray(agent.critic(observations, candidates).mean(axis=0))
    chosen = np.asarray(propose(agent, observations, jax.random.key(9), False))
    for i, best in enumerate(scores.argmax(axis=0)):
        np.testing.assert_allclose(chosen[i], candidates[best, i], atol=1e-6)
    assert len(set(scores.argmax(axis=0))) > 1


def test_value_grows_with_samples() -> None:
    """The value of the best grows with the number of samples."""
    agent = create(QC, BASE)
    observations = jax.random.normal(KEY, (500, OBSERVATION_DIM))
    values = []
    for count in (1, 4, 16):
        chunks = propose(set_config(agent, num_samples=count), observations, jax.random.key(2), False)
        values.append(float(agent.critic(observations, chunks).mean()))
    assert values[1] > values[0] + 0.01 and values[2] > values[1] + 0.01


def test_selection_uses_online_critics() -> None:
    """Selection uses the online critics and not their targets."""
    agent = create(QC, BASE)
    observations = jax.random.normal(KEY, (6, OBSERVATION_DIM))
    other = agent.replace(target_critic=constant_critic(agent.target_critic, 0.0))
    chunks = [propose(each, observations, KEY, False) for each in (agent, other)]
    np.testing.assert_array_equal(chunks[0], chunks[1])


@pytest.mark.parametrize("config", [BASE, DISTILLED], ids=["best_of_n", "distilled"])
def test_deterministic_chunks(config: QCConfig) -> None:
    """Deterministic chunks depend on the observation only."""
    agent = create(QC, config)
    observations = jax.random.normal(KEY, (5, OBSERVATION_DIM))
    together = propose(agent, observations, jax.random.key(0), True)
    alone = jnp.stack([propose(agent, each, jax.random.key(7), True) for each in observations])
    np.testing.assert_allclose(together, alone, atol=1e-6)
    assert float(jnp.abs(together - together[0]).max()) > 1e-3


def test_chunk_queue_order() -> None:
    """The queue plays the chunk in order, and a new one is chosen where it ended."""
    agent = create(QC, BASE)
    carry, observations = agent.initial_carry((2,)), jax.random.normal(KEY, (H + 1, 2, OBSERVATION_DIM))
    keys = jax.random.split(jax.random.key(5), H + 1)
    taken, left = [], []
    for obs, key in zip(observations, keys, strict=True):
        action, carry = act(agent, obs, carry, key, False)
        taken.append(np.asarray(action))
        left.append(carry.left.tolist())
    chunk = np.asarray(propose(agent, observations[0], keys[0], False)).reshape(2, H, ACTION_DIM)
    np.testing.assert_allclose(np.stack(taken[:H], axis=1), chunk, atol=1e-6)
    assert left == [[2, 2], [1, 1], [0, 0], [2, 2]]
    later = np.asarray(propose(agent, observations[H], keys[H], False)).reshape(2, H, ACTION_DIM)
    np.testing.assert_allclose(taken[H], later[:, 0], atol=1e-6)


# ---------------------------------------------------------------- what moves what


def test_loss_gradients_isolated() -> None:
    """Each loss has gradients for its own network only."""
    agent = create(QC, DISTILLED)
    chunks = chunk_rows(jax.tree.map(lambda leaf: leaf[0], random_windows()), DISCOUNT, True)
    parts = {name: getattr(agent, name).params for name in ("actor", "critic", "one_step")}

    def rebuilt(params: Any) -> Any:
        return agent.replace(**{name: getattr(agent, name).replace(params=params[name]) for name in params})

    def flow(params: Any) -> Any:
        return rebuilt(params).flow_loss(params["actor"], chunks, KEY)[0]

    def distilled(params: Any) -> Any:
        return rebuilt(params).policy_loss(params["one_step"], chunks, KEY)[0]

    def critic(params: Any) -> Any:
        built = rebuilt(params)
        return built.critic_loss(params["critic"], chunks, built.targets(chunks, KEY))[0]

    def norms(loss: Any) -> dict[str, float]:
        grads = quick(jax.grad(loss))(parts)
        return {name: max(float(jnp.abs(x).max()) for x in jax.tree.leaves(grads[name])) for name in parts}

    found = norms(flow)
    assert found["actor"] > 0 and found["critic"] == found["one_step"] == 0.0
    found = norms(distilled)
    assert found["one_step"] > 0 and found["actor"] == 0.0
    found = norms(critic)
    assert found["critic"] > 0 and found["actor"] == found["one_step"] == 0.0


def test_policy_loss_isolated() -> None:
    """The policy's loss leaves critic and flow as they would be."""
    agent = create(QC, DISTILLED)
    results = [update(set_config(agent, alpha=alpha), random_windows())[0] for alpha in (0.0, 100.0)]
    assert largest_difference(results[0].critic.params, results[1].critic.params) == 0.0
    assert largest_difference(results[0].actor.params, results[1].actor.params) == 0.0
    assert largest_difference(results[0].one_step.params, results[1].one_step.params) > 1e-5


# ---------------------------------------------------------------- at the optimum


WIDE = replace(DISTILLED, chunk=2, actor_hidden_dims=(48, 48), flow_steps=5, alpha=1e4)
"""Networks that can learn a distribution of chunks, of 4 numbers each."""


def fit(name: str, agent: Any, data: Any, count: int) -> Any:
    """Return the agent after `count` steps of one network, `actor` or `one_step`, on chunks `data(key) [64, n]`."""
    rows = {"observations": jnp.zeros((64, OBSERVATION_DIM)), "next_observations": jnp.zeros((64, OBSERVATION_DIM))}
    ones = {"returns": jnp.zeros(64), "masks": jnp.ones(64), "valid": jnp.ones(64)}
    fast = replace(getattr(agent, name).optimizer, learning_rate=3e-3, decay_steps=count)
    model = getattr(agent, name)
    agent = agent.replace(**{name: model.replace(optimizer=fast, opt_state=fast.build().init(model.params))})

    def step(agent: Any, key: Any) -> tuple[Any, None]:
        data_key, key = jax.random.split(key)
        actions = data(data_key)
        chunks = Chunks(**rows, **ones, actions=actions, entries=jnp.ones_like(actions))
        loss = agent.flow_loss if name == "actor" else agent.policy_loss
        model = getattr(agent, name)
        grads = jax.grad(lambda params: loss(params, chunks, key)[0])(model.params)
        return agent.replace(**{name: model.apply_gradients(grads)}), None

    return jax.jit(lambda a: jax.lax.scan(step, a, jax.random.split(KEY, count))[0])(agent)


def test_flow_fits_one_chunk() -> None:
    """A flow fitted to one chunk maps all noise to it."""
    point = jnp.asarray([0.5, -0.5, 0.2, -0.7])
    agent = fit("actor", create(QC, WIDE), lambda _: jnp.broadcast_to(point, (64, 4)), 700)
    chunks = flow_chunks(agent, jnp.zeros((300, OBSERVATION_DIM)), jax.random.normal(jax.random.key(1), (300, 4)))
    assert float(jnp.abs(chunks - point).mean()) < 0.05 and float(jnp.abs(chunks - point).max()) < 0.4


def test_one_step_policy_matches_flow() -> None:
    """The one-step policy is the flow, noise for noise."""

    def two_modes(key: Any) -> Any:
        return jnp.where(jax.random.bernoulli(key, shape=(64, 1)), 0.6, -0.6) * jnp.ones((64, 4))

    agent = fit("actor", create(QC, WIDE), two_modes, 700)
    agent = fit("one_step", agent, two_modes, 700)
    noise, observations = jax.random.normal(jax.random.key(1), (400, 4)), jnp.zeros((400, OBSERVATION_DIM))
    flow = np.asarray(flow_chunks(agent, observations, noise))
    played = np.clip(np.asarray(agent.one_step(observations, noise)), -1, 1)
    assert 0.2 < (flow.mean(axis=1) > 0).mean() < 0.8, "both modes are drawn"
    error = np.square(flow - played).mean()
    shuffled = np.square(flow - np.roll(played, 1, axis=0)).mean()
    assert error < 0.05 and shuffled > 0.4


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk": 0}, "chunk is 0; expected at least 1"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"policy": "best"}, "policy is 'best'"),
        ({"aggregate": "max"}, "aggregate is 'max'"),
        ({"alpha": -1.0}, "alpha is -1.0"),
    ],
)
def test_wrong_settings_named(changes: dict[str, Any], message: str) -> None:
    """Settings that cannot be used are named."""
    with pytest.raises(ConfigError, match=message):
        QCConfig(**changes)


def test_paper_preset() -> None:
    """The paper preset has the paper's numbers."""
    preset = QC.preset("other", "paper")
    config = preset.config
    assert (config.chunk, config.num_samples, config.alpha, config.batch_size) == (5, 32, 100.0, 256)
    assert config.actor_hidden_dims == config.critic_hidden_dims == (512,) * 4
    assert (config.online.replay, config.online.warmup_steps, config.online.utd_ratio) == ("append", 5000, 1)
    assert QC.preset("antmaze", "small").reward == (1.0, -1.0)
