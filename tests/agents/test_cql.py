"""CQL and Cal-QL: the conservative gap against closed forms, the clamp, the dual variable, the max-target backup."""

import math
from dataclasses import fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o2o.agents.cql import CQL, CalQL, CalQLConfig, Conservative, CQLConfig, official
from o2o.errors import ConfigError, DatasetError
from o2o.types import Batch
from tests.helpers.tiny import (
    ACTION_DIM,
    ROWS,
    constant_critic,
    constant_policy,
    create,
    critic_step,
    largest_difference,
    make_batch,
    moved,
    next_values,
    set_config,
    steps,
    tiny,
    update,
)

KEY = jax.random.key(7)
N = 3
TERM = Conservative(n_actions=N, weight=2.0)
FAST = {"actor_hidden_dims": (16,), "critic_hidden_dims": (16,), "init_scheme": "xavier"}


def cql(kind: Any = CQL, **term: Any) -> Any:
    """Return a toy agent whose conservative term has settings changed that its networks do not depend on.

    Its config is its own class's: jaxlib takes two classes with equal fields for one, and might run one's program.
    """
    own = CalQLConfig if issubclass(kind, CalQL) else CQLConfig
    plain = create(CQL, tiny(own(), conservative=TERM, **FAST))
    agent = kind(**{field.name: getattr(plain, field.name) for field in fields(plain)})
    return set_config(agent, conservative=replace(TERM, **term))


def with_dual(**term: Any) -> Any:
    config = tiny(CQLConfig(), conservative=replace(TERM, dual=True), **FAST)
    return set_config(create(CQL, config), conservative=replace(config.conservative, **term))


@jax.jit
def gap(agent: Any, batch: Batch, rng: jax.Array) -> tuple[jax.Array, jax.Array]:
    q = agent.critic(batch["observations"], batch["actions"])
    return agent.conservative_gap(agent.critic.params, batch, q, rng)


@jax.jit
def gap_gradient(agent: Any, batch: Batch, rng: jax.Array) -> Any:
    def mean_gap(params: Any) -> Any:
        q = agent.critic(batch["observations"], batch["actions"], params=params)
        return jnp.mean(agent.conservative_gap(params, batch, q, rng)[0])

    return jax.grad(mean_gap)(agent.critic.params)


def flat(agent: Any, value: float = 0.0) -> Any:
    """Return `agent` with Q = `value` everywhere."""
    return agent.replace(critic=agent.critic.replace(params=constant_critic(agent.critic.params, value)))


def bounded(value: float, utd: int | None = None) -> Batch:
    batch = make_batch(utd)
    return {**batch, "mc_returns": jnp.full_like(batch["mc_returns"], value)}


@jax.jit
def entries(agent: Any, batch: Batch) -> jax.Array:
    """Return -log-density of the 3N sampled actions `[3N, B]`: the entries z of Q = 0, for the key that `gap` gets."""
    _, current_rng, next_rng = jax.random.split(jax.random.split(KEY)[1], 3)
    count = agent.config.conservative.n_actions
    current = agent.actor(batch["observations"]).sample_and_log_prob(current_rng, (count,))[1]
    following = agent.actor(batch["next_observations"]).sample_and_log_prob(next_rng, (count,))[1]
    return -jnp.concatenate([jnp.full_like(current, -ACTION_DIM * math.log(2.0)), current, following])


# ---------------------------------------------------------------- calibration


def test_unbounded_calql_equals_cql() -> None:
    """Cal-QL with the bound minus infinity is CQL, but for how two programs round."""
    batch = bounded(-math.inf, utd=2)
    plain, calibrated = cql(CQL), cql(CalQL)
    assert type(plain) is CQL and type(calibrated) is CalQL
    left, left_info = update(plain, batch)
    right, right_info = update(calibrated, batch)
    for name in ("actor", "critic", "temperature"):
        for one, two in zip(jax.tree.leaves(getattr(left, name)), jax.tree.leaves(getattr(right, name)), strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)
    assert left_info.keys() == right_info.keys()
    for key in left_info:
        np.testing.assert_allclose(left_info[key], right_info[key], rtol=1e-5, err_msg=key)
    assert moved(left.critic.params, plain.critic.params)


def test_bounded_calql_differs() -> None:
    """Cal-QL with a reachable bound differs from CQL."""
    plain, calibrated = (update(cql(kind), make_batch(2)) for kind in (CQL, CalQL))
    assert 0.0 < float(calibrated[1]["calql/clamped"]) < 1.0
    assert float(plain[1]["calql/clamped"]) == 0.0
    assert moved(plain[0].critic.params, calibrated[0].critic.params)


def test_huge_bound_gradient() -> None:
    """A huge bound leaves only the data term in the gradient.

    The clamped policy entries are dominating constants: the gradient of the gap is that of -Q(s, a_data).
    """
    agent, batch = cql(CalQL, subset=None), bounded(1e4)

    def data_term(params: Any) -> Any:
        return -jnp.mean(agent.critic(batch["observations"], batch["actions"], params=params))

    expected = jax.jit(jax.grad(data_term))(agent.critic.params)
    assert largest_difference(gap_gradient(agent, batch, KEY), expected) < 1e-5
    assert moved(gap_gradient(cql(CQL, subset=None), batch, KEY), expected)


def test_clamp_before_correction() -> None:
    """The clamp acts before the correction and on policy samples only.

    Q = 0 and G = 5: uniform entries stay at d ln 2, policy entries are 5 - ln pi.
    """
    batch, agent = bounded(5.0), flat(cql(CalQL))
    z = np.asarray(entries(agent, batch))
    np.testing.assert_allclose(z[:N], ACTION_DIM * math.log(2.0), rtol=1e-6)
    released = np.log(np.exp(z[:N]).sum(axis=0) + np.exp(5.0 + z[N:]).sum(axis=0))
    gaps, clamped = gap(agent, batch, KEY)
    np.testing.assert_allclose(gaps, np.broadcast_to(released, (2, ROWS)), rtol=1e-5)
    assert float(clamped) == 1.0


def test_clamped_share() -> None:
    """The clamped share counts policy samples below the return."""
    batch = make_batch()
    batch["mc_returns"] = jnp.where(jnp.arange(ROWS) < 3, 1.0, -1.0)
    assert float(gap(flat(cql(CalQL)), batch, KEY)[1]) == pytest.approx(3 / ROWS)
    assert float(gap(flat(cql(CalQL)), bounded(-0.1), KEY)[1]) == 0.0


def test_calql_needs_returns() -> None:
    """Cal-QL without returns is refused."""
    batch = make_batch(1)
    del batch["mc_returns"]
    with pytest.raises(DatasetError, match="mc_returns"):
        cql(CalQL).update(batch)
    assert CalQLConfig().needs.batch_keys == ("mc_returns",) and CQLConfig().needs.batch_keys == ()


# ---------------------------------------------------------------- conservative term


def test_importance_entries_average() -> None:
    """Importance entries average to the volume of the action box.

    For Q = 0, exp(z) = 1 / pi(a), whose mean over a ~ pi is the volume 2^d, for both policy blocks.
    """
    agent, batch = constant_policy(cql(n_actions=20_000), std=1.2, mean=0.3), make_batch(rows=2)
    weights = np.exp(entries(agent, batch)).reshape(3, -1)
    np.testing.assert_allclose(weights.mean(axis=1), 2.0**ACTION_DIM, rtol=0.03)
    assert weights[0].std() < 1e-5 and weights[1].std() > 0.1 and np.any(weights[1] != weights[2])


def test_soft_mean_without_importance() -> None:
    """Without importance sampling it is a soft mean over 3N + 1 entries.

    Q = c everywhere: logsumexp of 3N + 1 entries c - ln(3N + 1) is c, the gap 0; without the constant ln(3N + 1).
    """
    batch = make_batch()
    gaps, _ = gap(flat(cql(importance_sampling=False), 2.5), batch, KEY)
    np.testing.assert_allclose(gaps, 0.0, atol=1e-5)
    gaps, _ = gap(flat(cql(importance_sampling=False, subtract_log_count=False), 2.5), batch, KEY)
    np.testing.assert_allclose(gaps, math.log(3 * N + 1), rtol=1e-5)


def test_gap_lower_clip() -> None:
    """The gap is clipped from below, row by row."""
    agent, batch = cql(), make_batch()
    gaps, _ = gap(agent, batch, KEY)
    low = float(np.quantile(gaps, 0.3))
    clipped, _ = gap(cql(gap_min=low), batch, KEY)
    np.testing.assert_allclose(clipped, np.maximum(gaps, low), rtol=1e-5)
    assert np.any(clipped != gaps)


def test_samples_judged_at_current_state() -> None:
    """All sampled actions are judged at the current state.

    With the same policy at every state, next observations cannot matter; the current ones do.
    """
    agent, batch = constant_policy(cql(), std=0.5), make_batch()
    gaps, _ = gap(agent, batch, KEY)
    for name, matters in (("next_observations", False), ("observations", True)):
        other, _ = gap(agent, {**batch, name: 3.0 * batch[name]}, KEY)
        assert bool(np.any(other != gaps)) == matters
    moving, _ = gap(cql(), batch, KEY)
    elsewhere, _ = gap(cql(), {**batch, "next_observations": 3.0 * batch["next_observations"]}, KEY)
    assert np.any(moving != elsewhere)  # policy samples for s' do enter


def test_no_gap_gradient_to_actor() -> None:
    """The actor changes the gap but gets no gradient from it."""
    agent, batch = cql(), make_batch()

    @jax.jit
    def loss_and_gradient(actor: Any) -> Any:
        def loss(params: Any) -> Any:
            other = agent.replace(actor=agent.actor.replace(params=params))
            return other.critic_loss(other.critic.params, batch, jnp.zeros(ROWS), KEY)[0]

        return jax.value_and_grad(loss)(actor)

    value, grads = loss_and_gradient(agent.actor.params)
    assert all(float(jnp.abs(leaf).max()) == 0.0 for leaf in jax.tree.leaves(grads))
    changed, _ = loss_and_gradient(jax.tree.map(lambda leaf: 1.5 * leaf + 0.1, agent.actor.params))
    assert abs(float(changed - value)) > 1e-3


def test_gap_uses_drawn_members() -> None:
    """The gap is taken of two drawn members, the same for the sampled and the data actions.

    Only drawn members get a gradient: two or, with replacement, one of four; over many keys every member.
    """
    agent, batch = cql(), make_batch()
    assert gap(agent, batch, KEY)[0].shape == (2, ROWS) and gap(cql(subset=None), batch, KEY)[0].shape == (4, ROWS)
    grads = jax.vmap(lambda key: gap_gradient(agent, batch, key))(jax.random.split(KEY, 40))
    kernel = np.abs(grads["params"]["dense_0"]["kernel"]).max(axis=(2, 3))
    drawn = (kernel > 0).sum(axis=1)
    assert set(drawn) == {1, 2} and np.all((kernel > 0).any(axis=0))


def test_loss_is_td_plus_gap() -> None:
    """The loss is the TD loss plus the weighted gap."""
    batch = make_batch()
    _, info = critic_step(cql(), batch, KEY)
    assert float(info["critic/loss"]) == pytest.approx(float(info["critic/td_loss"] + 2.0 * info["cql/gap"]), rel=1e-5)
    _, info = critic_step(with_dual(), batch, KEY)
    penalty = 2.0 * float(info["cql/dual"]) * (float(info["cql/gap"]) - 0.8)
    assert float(info["cql/dual"]) == pytest.approx(1.0, rel=1e-6)
    assert float(info["critic/loss"]) == pytest.approx(float(info["critic/td_loss"]) + penalty, rel=1e-5)


# ---------------------------------------------------------------- dual variable


def test_dual_direction() -> None:
    """The dual grows where the gap is above its target and shrinks where it is below."""
    batch, agent = make_batch(), with_dual()
    measured = float(critic_step(agent, batch, KEY)[1]["cql/gap"])
    for target, sign in ((measured - 1.0, 1), (measured + 1.0, -1)):
        after, _ = critic_step(with_dual(target_gap=target), batch, KEY)
        assert np.sign(float(after.dual()) - float(agent.dual())) == sign


@pytest.mark.parametrize("param", ["exp", "softplus"])
def test_dual_slope(param: Any) -> None:
    """The dual stays where the gap is at its target and has the stated slope elsewhere.

    d/dp of -w alpha'(p) (gap - 0.8): 0 at the gap; for `exp` -w alpha' (gap - 0.8).
    """
    agent = with_dual(dual_param=param, weight=5.0)
    slope = jax.grad(agent.dual_loss)
    (still,) = jax.tree.leaves(slope(agent.dual.params, jnp.asarray(0.8)))
    assert float(still) == 0.0
    (up,) = jax.tree.leaves(slope(agent.dual.params, jnp.asarray(1.8)))
    free = float(agent.dual())
    expected = {"exp": math.exp(free), "softplus": 1 / (1 + math.exp(-free))}[param]
    assert float(up) == pytest.approx(-5.0 * expected, rel=1e-5)
    assert float(jax.grad(agent.dual_loss, argnums=1)(agent.dual.params, jnp.asarray(1.8))) == 0.0


# ---------------------------------------------------------------- target and schedule


def test_max_target_over_actions() -> None:
    """The max target is the best of ten actions by the subset minimum.

    y is the maximum over the ten draws of the minimum over heads, so never below any single one of them.
    """
    agent, batch = set_config(cql(), target_subset=None), make_batch()
    _, action_rng = jax.random.split(KEY)
    observations = batch["next_observations"]
    actions = agent.actor(observations).sample(action_rng, (10,))
    each = np.asarray(agent.critic(observations, actions, params=agent.target_critic)).min(axis=0)
    values = np.asarray(next_values(agent, batch, KEY))
    np.testing.assert_allclose(values, each.max(axis=0), rtol=1e-4, atol=1e-5)
    assert np.all(values >= each - 1e-5) and np.all(values > each.min(axis=0))


def test_terminal_targets() -> None:
    """Terminal targets are the reward."""
    batch = make_batch()
    batch["masks"] = jnp.zeros(ROWS)
    _, info = critic_step(cql(), batch, KEY)
    assert float(info["critic/target"]) == pytest.approx(float(batch["rewards"].mean()), rel=1e-5)


def test_steps_per_call() -> None:
    """One call steps the critic and the dual per minibatch and the policy once."""
    agent, _ = update(with_dual(), make_batch(3))
    assert (steps(agent.critic), steps(agent.dual), steps(agent.actor), steps(agent.temperature)) == (3, 3, 1, 1)


def test_online_keeps_loss() -> None:
    """The loss stays the same online, and the replay mixes half and half."""
    agent = cql(CalQL)
    assert agent.online() is agent
    online = CalQL.preset("antmaze").config.online
    assert (online.replay, online.offline_ratio, online.utd_ratio) == ("mixed", 0.5, 1)


# ---------------------------------------------------------------- variants and presets


def test_official_variant() -> None:
    config = tiny(official(CalQLConfig(conservative=Conservative(n_actions=N, dual=True))), **FAST)
    agent = create(CalQL, config)
    assert (config.num_critics, config.target_subset, config.conservative.subset) == (2, None, None)
    assert not config.critic_layer_norm and not config.shared_output and config.conservative.weight == 5.0
    assert float(agent.alpha()) == pytest.approx(1.0)
    assert float(agent.dual()) == pytest.approx(1.0)  # the free parameter; the multiplier is e
    tree = agent.actor.params["params"]
    assert float(tree["log_std_scale"]) == 1.0 and float(tree["log_std_offset"]) == -1.0
    _, info = update(agent, make_batch(1))
    assert float(info["cql/dual"]) == pytest.approx(math.e, rel=1e-5)
    assert all(np.isfinite(value) for value in info.values())


def test_paper_presets() -> None:
    maze, adroit, kitchen, locomotion = (CQL.preset(f) for f in ("antmaze", "adroit", "kitchen", "locomotion"))
    assert maze.config.conservative.dual and maze.config.conservative.target_gap == 0.8
    assert maze.config.critic_hidden_dims == (256,) * 4
    assert [p.config.conservative.weight for p in (adroit, kitchen, locomotion)] == [1.0, 5.0, 5.0]
    assert [p.config.conservative.importance_sampling for p in (maze, adroit, kitchen, locomotion)] == [
        True, True, False, True,
    ]  # fmt: skip
    assert [p.offline_steps for p in (maze, adroit, kitchen, locomotion)] == [1_000_000, 20_000, 250_000, 250_000]
    assert [p.reward for p in (maze, adroit, kitchen, locomotion)] == [(10.0, -5.0), (10.0, 5.0), (1.0, -4.0), None]
    for preset in (maze, adroit, kitchen, locomotion):
        config = preset.config
        assert (config.actor_lr, config.critic_lr, config.temperature_lr) == (1e-4, 3e-4, 1e-4)
        assert (config.num_critics, config.target_subset, config.conservative.subset) == (2, None, None)
        assert (config.last_gain, config.output_gain, config.policy_output_gain) == (None, 1e-2, 1e-2)
        assert config.std_mode == "scaled" and not config.critic_layer_norm and not config.shared_output
        assert config.max_target_actions == 10 and not config.backup_entropy and config.conservative.n_actions == 10
        assert config.next_entropy_samples is None and CalQLConfig().next_entropy_samples == 1
    assert adroit.config.critic_hidden_dims == (512,) * 3
    assert type(CalQL.preset("adroit").config) is CalQLConfig and type(adroit.config) is CQLConfig


def test_wrong_settings_refused() -> None:
    """Bad settings are refused."""
    with pytest.raises(ConfigError, match="n_actions"):
        Conservative(n_actions=0)
    with pytest.raises(ConfigError, match="expected a CQLConfig"):
        CQL.create(KEY, jnp.zeros((1, 3)), jnp.zeros((1, 2)), create(CQL, tiny(CQLConfig())).config.online)
