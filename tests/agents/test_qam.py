"""QAM: path, lean adjoint and matching loss by hand, the exact 1-D case, losses, forms, acting (arXiv 2601.14234)."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o2o.agents import QAM, QAMConfig
from o2o.agents.qam import lean_adjoints, matching_loss, memoryless_path, path_noise
from o2o.nn.generative import Denoiser, Flow
from o2o.nn.modules import Adam, Model
from o2o.rl.losses import lower_bound
from o2o.rl.windows import chunk_transitions
from o2o.types import Batch
from tests.helpers.contract import QUICK
from tests.helpers.tiny import (
    ACTION_DIM,
    OBSERVATION_DIM,
    ROWS,
    constant_critic,
    create,
    largest_difference,
    make_batch,
    moved,
    set_config,
    steps,
    tiny,
)
from tests.helpers.toy_qc import windows

KEY = jax.random.key(4)
H = 2
CONFIG = tiny(QAMConfig(), chunk=H, num_critics=3, flow_steps=4, tau=0.25)
SIZE = H * ACTION_DIM
AVERAGED = ("critic", "behaviour")
update = jax.jit(lambda agent, batch: agent.update(batch), compiler_options=QUICK)


def make_agent(config: QAMConfig = CONFIG, **changes: Any) -> Any:
    """Return the agent of key 0 whose averages differ from what they follow."""
    agent = set_config(create(QAM, config), **changes)
    scaled = {name: jax.tree.map(lambda leaf: 0.7 * leaf, getattr(agent, name).params) for name in AVERAGED}
    return agent.replace(**{f"target_{name}": params for name, params in scaled.items()})


def rows(seed: int = 0) -> Batch:
    """Return windows `[ROWS, H, ...]`; row 0 crosses a time limit, row 1 ends at a terminal."""
    ends, masks = np.zeros((ROWS, H)), np.ones((ROWS, H))
    ends[0, 0] = ends[1, -1] = 1.0
    masks[1, -1] = 0.0
    return windows(np.random.default_rng(seed).normal(size=(ROWS, H)), ends, masks, seed)


def transitions(agent: Any) -> Batch:
    """Return transitions of whole chunks, `[ROWS, ...]`."""
    return chunk_transitions(rows(), agent.config)


def still(x: jax.Array, t: jax.Array) -> jax.Array:
    """Return the velocity 0."""
    return jnp.zeros_like(x)


def gaussian(variance: float) -> Any:
    """Return the exact velocity of a flow from N(0, 1) to N(0, variance)."""

    def velocity(x: jax.Array, t: jax.Array) -> jax.Array:
        t = jnp.asarray(t)[..., None]
        return x * (t * variance - (1 - t)) / ((1 - t) ** 2 + t**2 * variance)

    return velocity


# ---------------------------------------------------------------- path, adjoint, loss


def test_noise_scales() -> None:
    """sigma_i of ten steps, as published."""
    expected = [4.690, 3.162, 2.449, 2, 1.673, 1.414, 1.195, 1, 0.816, 0.632]
    np.testing.assert_allclose(path_noise(10), expected, atol=5e-4)


def test_still_prior_adjoint() -> None:
    """With v_b' = 0 the products telescope: a_i = (i / T) a_T. The loss at v_f = 0 is then 3.40295."""
    path = jax.random.normal(KEY, (11, 5, 1))
    adjoints = lean_adjoints(still, path, jnp.ones((5, 1)))
    expected = np.broadcast_to(np.arange(10)[:, None, None] / 10, (10, 5, 1))
    np.testing.assert_allclose(adjoints, expected, atol=1e-6)
    np.testing.assert_allclose(matching_loss(still, still, path, adjoints), 3.40295, rtol=1e-5)


def test_linear_prior_adjoint() -> None:
    """v_b' = c x: a_i = a_{i+1} (1 + D (2 c - 1 / (t_i + D))), in numpy."""
    path = jax.random.normal(KEY, (6, 3, 2))
    adjoints = np.asarray(lean_adjoints(lambda x, t: 0.3 * x, path, jnp.full((3, 2), 2.0)))
    a = 2.0
    for i in reversed(range(5)):
        a *= 1 + 0.2 * (0.6 - 1 / ((i + 1) / 5))
        np.testing.assert_allclose(adjoints[i], a, atol=1e-6)


def test_network_adjoint() -> None:
    """The adjoint of a network's field is a product with whole Jacobians, at the point x_i and the time t_i + D."""
    agent = make_agent()
    observations, path = make_batch()["observations"], 0.5 * jax.random.normal(KEY, (5, ROWS, SIZE))
    terminal = np.asarray(jax.random.normal(jax.random.key(7), (ROWS, SIZE)), np.float64)

    @jax.jit
    def jacobian(observation: jax.Array, x: jax.Array, late: jax.Array) -> jax.Array:
        slow = agent.slow(observation, agent.target_behaviour)
        return jax.jacfwd(lambda x: 2.0 * slow(x, late) - x / late)(x)

    adjoints = jax.jit(
        lambda terminal: lean_adjoints(agent.slow(observations, agent.target_behaviour), path, terminal),
        compiler_options=QUICK,
    )(jnp.asarray(terminal, jnp.float32))
    for row in range(2):
        a = terminal[row]
        for i in reversed(range(4)):
            matrix = jacobian(observations[row], path[i, row], jnp.asarray((i + 1) / 4))
            a = a + 0.25 * np.asarray(matrix, np.float64).T @ a
            np.testing.assert_allclose(adjoints[i, row], a, atol=1e-5)


@pytest.mark.parametrize(
    ("variance", "shift", "std"), [(1.0, 0.8792, 0.879), (0.25, 0.2617, 0.431), (0.04, 0.0529, 0.154)]
)
def test_exact_shift(variance: float, shift: float, std: float) -> None:
    """Behaviour N(0, s^2) and Q = q a: the optimum v_b' - sigma^2 / 2 a moves the mean by c(s) lambda q.

    The prior is linear and Q too, so the adjoints depend on the step alone.
    """
    slow, slope = gaussian(variance), 0.1
    adjoints = lean_adjoints(slow, jnp.zeros((11, 1)), jnp.full((1,), -slope))[:, 0]
    table = jnp.asarray(path_noise(10) ** 2 / 2, jnp.float32) * adjoints

    def fast(x: jax.Array, t: jax.Array) -> jax.Array:
        return slow(x, t) - table[jnp.round(10 * t).astype(int)]

    assert float(Flow(10).sample(fast, jnp.zeros(1), KEY)[0]) == pytest.approx(shift * slope, rel=2e-3)
    assert float(Flow(10).sample(slow, jnp.full(1, 0.1), KEY)[0]) == pytest.approx(0.1 * std, rel=5e-3)
    if variance == 1.0:
        known = [-0.020, 0.105, 0.323, 0.612, 0.909, 1.136, 1.248, 1.254, 1.192, 1.1]
        np.testing.assert_allclose(adjoints / -slope, known, atol=1e-3)


def test_path_variance() -> None:
    """The memoryless path of an exact N(0, 1) flow has the variances of ten steps, not 1 throughout."""
    field = gaussian(1.0)
    path = jax.jit(lambda noise: memoryless_path(field, field, noise))(jax.random.normal(KEY, (10, 40_000, 1)))
    expected = [1.00, 2.24, 1.21, 0.89, 0.73, 0.66, 0.66, 0.72, 0.84, 1.02, 1.23]
    np.testing.assert_allclose(np.var(np.asarray(path)[..., 0], axis=1), expected, rtol=0.03)


def test_path_fields() -> None:
    """All steps but the last are of the fast field, the last is of the slow one, without noise."""
    noise = jax.random.normal(KEY, (4, 3, 2))
    path = memoryless_path(lambda x, t: jnp.full_like(x, 2.0), lambda x, t: jnp.full_like(x, -3.0), noise)
    np.testing.assert_array_equal(path[0], noise[0])
    x = np.asarray(noise[0], np.float64)
    for i in range(3):
        t, late = i / 4, (i + 1) / 4
        sigma = np.sqrt(2 * (1 - t + 0.25) / late)
        x = x + 0.25 * (4.0 - x / late) + 0.5 * sigma * np.asarray(noise[i + 1])
        np.testing.assert_allclose(path[i + 1], x, atol=1e-5)
    np.testing.assert_allclose(path[4], x - 0.75, atol=1e-5)


@pytest.mark.learning
def test_trained_shift() -> None:
    """A network that learns on its own paths lands on the exact shift, 0.8792 lambda q, within 0.02."""
    slow, slope = gaussian(1.0), 0.5
    nothing = jnp.zeros((64, 1))
    model = Model.create(KEY, Denoiser("mlp", (16, 16)), Adam(1e-2, 700), nothing, nothing, jnp.zeros(64))

    def field(params: Any, x: jax.Array, t: jax.Array) -> jax.Array:
        return model.module.apply(params, jnp.zeros((1, 1)), x, t)  # pyright: ignore[reportReturnType]

    def loss(params: Any, fixed: Any, key: jax.Array) -> jax.Array:
        path = memoryless_path(lambda x, t: field(fixed, x, t), slow, jax.random.normal(key, (10, 64, 1)))
        adjoints = lean_adjoints(slow, path, jnp.full((64, 1), -slope))
        return matching_loss(lambda x, t: field(params, x, t), slow, path, adjoints).mean()

    def step(model: Any, key: jax.Array) -> tuple[Any, None]:
        return model.apply_gradients(jax.grad(loss)(model.params, model.params, key)), None

    trained, _ = jax.jit(lambda model: jax.lax.scan(step, model, jax.random.split(KEY, 700)))(model)
    x = jax.random.normal(jax.random.key(9), (2000, 1))
    x = x - x.mean()
    for i in range(10):
        x = x + field(trained.params, x, jnp.asarray(i / 10)) / 10
    assert float(x.mean()) == pytest.approx(0.8792 * slope, abs=0.02)
    assert float(x.std()) == pytest.approx(0.879, abs=0.04)


# ---------------------------------------------------------------- the agent's losses


def test_terminal_adjoint() -> None:
    """a_T = -lambda grad mean_k Q'_k(s, clip(x)), 0 for coordinates outside the box; lambda scales it."""
    agent = make_agent()
    zero = jax.tree.map(jnp.zeros_like, agent.behaviour.params)
    agent = agent.replace(target_behaviour=zero)
    observations = make_batch()["observations"]
    path = 0.5 * jax.random.normal(KEY, (5, ROWS, SIZE))
    path = path.at[-1].set(jnp.clip(path[-1], -0.9, 0.9)).at[-1, :, 1].set(1.5)
    adjoints = agent.adjoints(observations, path)
    np.testing.assert_array_equal(adjoints[:, :, 1], 0.0)

    def gain(x: jax.Array) -> jax.Array:
        return agent.critic(observations, x, params=agent.target_critic).mean(axis=0).sum()

    slope = np.array(jax.grad(gain)(path[-1].at[:, 1].set(1.0)))
    slope[:, 1] = 0.0
    np.testing.assert_allclose(adjoints[3], -0.75 * slope, atol=1e-5)
    twice = set_config(agent, inverse_temperature=2.0).adjoints(observations, path)
    np.testing.assert_allclose(twice, 2.0 * adjoints, atol=1e-6)


@pytest.mark.parametrize("why", ["lambda", "critic"])
def test_no_slope(why: str) -> None:
    """With lambda 0, or a constant Q, the fast field's optimum is v_b': its loss there is 0, elsewhere it is not."""
    agent = make_agent(inverse_temperature=0.0 if why == "lambda" else 1.0)
    if why == "critic":
        agent = agent.replace(target_critic=constant_critic(agent.target_critic, 3.0))
    batch = transitions(agent)
    assert float(agent.actor_loss(agent.target_behaviour, batch, KEY)[0]) == pytest.approx(0.0, abs=1e-8)
    assert float(agent.actor_loss(agent.actor.params, batch, KEY)[0]) > 0.1
    assert float(make_agent().actor_loss(make_agent().target_behaviour, batch, KEY)[0]) > 1e-6


def test_lambda_zero_acts_by_behaviour() -> None:
    """With lambda 0 the slow field acts, and with another lambda the fast one."""
    observations, noise = make_batch()["observations"], jax.random.normal(KEY, (ROWS, SIZE))
    for weight, network in ((0.0, "behaviour"), (1.0, "actor")):
        agent = make_agent(inverse_temperature=weight)
        model = getattr(agent, network)
        expected = Flow(4).sample(lambda x, t, model=model: model(observations, x, t), noise, KEY)
        np.testing.assert_allclose(agent.flow_chunks(observations, noise), expected, atol=1e-6)


def test_target_by_hand() -> None:
    """Q' = (1, 2, 6): y = R + 0.99^2 m (3 - 0.5 std). A window across a time limit counts nothing."""
    agent = make_agent(pad_terminal=False)
    for member, value in enumerate((1.0, 2.0, 6.0)):
        agent = agent.replace(target_critic=constant_critic(agent.target_critic, value, member))
    raw, batch = rows(), transitions(agent)
    returns = np.asarray(raw["rewards"], np.float64) @ [1.0, 0.99]
    masks = np.ones(ROWS)
    masks[1] = 0.0
    y = returns + 0.99**2 * masks * (3.0 - 0.5 * np.std([1.0, 2.0, 6.0]))
    q = np.asarray(agent.critic(batch["observations"], batch["actions"]), np.float64)
    loss, _ = agent.critic_loss(agent.critic.params, batch, KEY)
    errors = (q - y) ** 2
    assert float(loss) == pytest.approx(errors[:, 1:].sum() / errors.size, rel=1e-4)
    spoilt = {**batch, "rewards": batch["rewards"].at[0].set(50.0), "actions": batch["actions"].at[0].set(0.9)}
    assert float(agent.critic_loss(agent.critic.params, spoilt, KEY)[0]) == pytest.approx(float(loss), rel=1e-6)


def test_lower_bound() -> None:
    """Mean - rho std over all members; where they agree it is their value, with a finite gradient."""
    q = jnp.asarray([[1.0, 2.0], [3.0, 2.0]])
    np.testing.assert_allclose(lower_bound(q, 0.5), [1.5, 2.0])
    grads = np.asarray(jax.grad(lambda q: lower_bound(q, 0.5).sum())(q))
    np.testing.assert_allclose(grads, [[0.75, 0.5], [0.25, 0.5]], atol=1e-6)
    assert np.isfinite(jax.grad(lambda q: lower_bound(q, 0.5).sum())(jnp.ones((1, 2)))).all()


def test_single_action_target() -> None:
    """With h = 1 rows are plain transitions: y = r + 0.99 m v."""
    agent = create(QAM, replace(CONFIG, chunk=1, pessimism=0.0))
    assert agent.needs.window == 1 and agent.initial_carry((4,)) is None
    agent = agent.replace(target_critic=constant_critic(agent.target_critic, 2.0))
    batch = chunk_transitions(make_batch(), agent.config)
    q = np.asarray(agent.critic(batch["observations"], batch["actions"]))
    y = np.asarray(batch["rewards"] + 0.99 * 2.0 * batch["masks"])
    loss, _ = agent.critic_loss(agent.critic.params, batch, KEY)
    assert float(loss) == pytest.approx(np.mean((q - y) ** 2), rel=1e-5)


def test_edit_loss_by_hand() -> None:
    """mean(alpha l - mean_k Q_k(s, clip(a + beta e))) with the density of the unscaled edit; alpha (H + h A / 2)."""
    agent = make_agent(replace(CONFIG, form="edit"), edit_scale=0.5)
    batch = transitions(agent)
    noise_rng, edit_rng = jax.random.split(KEY)
    chunks = agent.flow_chunks(batch["observations"], jax.random.normal(noise_rng, batch["actions"].shape))
    policy = agent.edit(jnp.concatenate([batch["observations"], chunks], axis=-1))
    edits, log_prob = policy.sample_and_log_prob(edit_rng)
    edited = np.clip(np.asarray(chunks) + 0.5 * np.asarray(edits), -1.0, 1.0)
    q = np.asarray(agent.critic(batch["observations"], edited)).mean(axis=0)
    loss, info = agent.edit_loss(agent.edit.params, batch, KEY)
    assert float(loss) == pytest.approx(float(np.mean(np.asarray(log_prob) - q)), rel=1e-4, abs=1e-5)
    assert float(info["edit/entropy"]) == pytest.approx(-float(log_prob.mean()), rel=1e-5)
    dual, _ = agent.temperature_loss(agent.temperature.params, jnp.asarray(-3.0))
    assert float(dual) == pytest.approx(-3.0 + SIZE / 2)


def test_one_step_loss_by_hand() -> None:
    """alpha mean (mu - Flow)^2, of the unclipped mu, minus the mean Q of the clipped one; the same noise in both."""
    agent = make_agent(replace(CONFIG, form="one_step"), alpha=3.0)
    agent = agent.replace(one_step=agent.one_step.replace(params=jax.tree.map(lambda x: 3 * x, agent.one_step.params)))
    batch = transitions(agent)
    noise = jax.random.normal(KEY, batch["actions"].shape)
    chunks = np.asarray(agent.one_step(batch["observations"], noise))
    assert np.abs(chunks).max() > 1.0
    distance = np.mean((chunks - np.asarray(agent.flow_chunks(batch["observations"], noise))) ** 2)
    q = np.asarray(agent.critic(batch["observations"], np.clip(chunks, -1.0, 1.0))).mean()
    loss, _ = agent.policy_loss(agent.one_step.params, batch, KEY)
    assert float(loss) == pytest.approx(3.0 * distance - q, rel=1e-4)


def test_losses_reach_own_network() -> None:
    """The gradients of critics', slow and fast field's losses by the parameters of the other networks are exactly 0."""
    agent = make_agent(replace(CONFIG, form="edit"))
    batch = transitions(agent)
    owners = {"critic": agent.critic_loss, "behaviour": agent.behaviour_loss, "actor": agent.actor_loss}

    def loss_of(networks: dict[str, Any], owner: str) -> jax.Array:
        other = agent.replace(
            **{name: getattr(agent, name).replace(params=params) for name, params in networks.items()}
        )
        return getattr(other, owners[owner].__name__)(networks[owner], batch, KEY)[0]

    networks = {name: getattr(agent, name).params for name in (*owners, "edit")}
    for owner in owners:
        grads = jax.jit(jax.grad(loss_of), static_argnums=1, compiler_options=QUICK)(networks, owner)
        moves = {name for name, each in grads.items() if any(np.any(leaf) for leaf in jax.tree.leaves(each))}
        assert moves == {owner}


def test_averages_lag_one_step() -> None:
    """Averages follow the parameters of before the step: from equal ones the first update leaves them alone."""
    agent = create(QAM, CONFIG)
    batch = jax.tree.map(lambda leaf: leaf[None], rows())
    one, _ = update(agent, batch)
    two, _ = update(one, batch)
    for name in AVERAGED:
        start, target = getattr(agent, name).params, f"target_{name}"
        assert largest_difference(getattr(one, target), start) < 1e-7 and moved(getattr(one, name).params, start)
        expected = jax.tree.map(lambda new, old: old + 0.25 * (new - old), getattr(one, name).params, start)
        assert largest_difference(getattr(two, target), expected) < 1e-6
    assert [steps(model) for model in (two.critic, two.actor, two.behaviour)] == [2, 2, 2]


def test_clip_together() -> None:
    """Together all networks' gradients have norm 1 and their own proportions; else only the fast field's is limited."""
    batch = transitions(make_agent())
    gradients = jax.jit(lambda agent: agent.gradients(batch, KEY)[0], compiler_options=QUICK)
    free = gradients(make_agent(clip_norm=None))
    joint = gradients(make_agent(clip_norm=0.5, clip_together=True))
    squares = lambda tree: sum(float(jnp.square(leaf).sum()) for leaf in jax.tree.leaves(tree))  # noqa: E731
    total = np.sqrt(squares(free))
    assert total > 0.5 and np.sqrt(squares(joint)) == pytest.approx(0.5, rel=1e-4)
    scaled = jax.tree.map(lambda leaf: leaf * 0.5 / total, free)
    assert largest_difference(scaled, joint) < 1e-5
    assert create(QAM, CONFIG).actor.optimizer.clip_norm == 1.0
    assert create(QAM, replace(CONFIG, clip_together=True)).actor.optimizer.clip_norm is None


# ---------------------------------------------------------------- forms and acting


def test_edit_scale_zero() -> None:
    """An edit of scale 0 is QAM: the same keys give the same critics, fields and actions."""
    plain, edit = create(QAM, CONFIG), create(QAM, replace(CONFIG, form="edit", edit_scale=0.0))
    batch = jax.tree.map(lambda leaf: leaf[None], rows())
    one, two = update(plain, batch)[0], update(edit, batch)[0]
    for name in ("actor", "critic", "behaviour"):
        assert largest_difference(getattr(one, name).params, getattr(two, name).params) < 1e-6
    observations = make_batch()["observations"]
    np.testing.assert_allclose(one.propose(observations, KEY), two.propose(observations, KEY), atol=1e-5)
    wide = set_config(two, edit_scale=0.3).propose(observations, KEY)
    change = np.abs(np.asarray(wide) - np.asarray(two.propose(observations, KEY)))
    assert 0.01 < change.max() <= 0.3 + 1e-5


def test_best_of_samples() -> None:
    """Of several samples the one with the highest mean of the critics acts."""
    agent = make_agent(num_samples=4)
    observations = make_batch()["observations"]
    noise = jax.random.normal(jax.random.split(KEY)[0], (4, ROWS, SIZE))
    candidates = np.asarray(agent.flow_chunks(observations, noise))
    scores = np.asarray(agent.critic(observations, candidates)).mean(axis=0)
    assert len(set(scores.argmax(axis=0))) > 1
    expected = candidates[scores.argmax(axis=0), np.arange(ROWS)]
    np.testing.assert_allclose(agent.propose(observations, KEY), expected, atol=1e-6)


@pytest.mark.parametrize("form", ["flow", "edit", "one_step"])
def test_chunk_played_in_order(form: Any) -> None:
    """A chunk is played in order, whatever is observed in between, and a fresh one follows."""
    agent = make_agent(replace(CONFIG, form=form))
    observations = jnp.ones((3, OBSERVATION_DIM))
    chunk = np.asarray(agent.propose(observations, KEY)).reshape(3, H, ACTION_DIM)
    carry = agent.initial_carry((3,))
    for i in range(H):
        played, carry = agent.sample_actions(observations * (1 + i), carry, jax.random.fold_in(KEY, i) if i else KEY)
        np.testing.assert_allclose(played, chunk[:, i], atol=1e-6)
    again, _ = agent.sample_actions(observations, carry, jax.random.key(8))
    assert moved(again, chunk[:, 0]) and float(jnp.abs(again).max()) <= 1.0


def test_one_step_learns() -> None:
    """The one-step policy steps with the other networks, and metrics are finite."""
    agent = create(QAM, replace(CONFIG, form="one_step"))
    learnt, info = update(agent, jax.tree.map(lambda leaf: leaf[None], rows()))
    assert steps(learnt.one_step) == 1 and all(np.isfinite(value) for value in info.values())
