"""Uni-O4: the improvement's step, replacement, AM-Q, the critic's order, the clones' diversity, the switch to PPO."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o2o.agents import PPO, UniO4, UniO4Config
from o2o.agents.uni_o4 import clone_loss, gaussian_kl
from o2o.errors import ConfigError
from o2o.nn.dynamics import Dynamics
from o2o.replay.buffer import OfflineData
from o2o.types import OnlineConfig
from tests.helpers.tiny import create, make_batch, set_config

CONFIG = UniO4Config(
    actor_hidden_dims=(16,),
    value_hidden_dims=(16,),
    critic_hidden_dims=(16,),
    dynamics_hidden_dims=(16,),
    dynamics_members=3,
    dynamics_elites=2,
    num_policies=2,
    candidates=2,
    offline_batch_size=8,
    judge_rows=32,
    horizon=5,
    pretrain_lr=1e-3,
    improve_lr=1e-3,
    termination="never",
    normalize_states=False,
    batch_size=8,
    critic_steps=6,
    dynamics_steps=2,
    clone_steps=4,
    improve_steps=8,
    judge_every=4,
    validate_every=1,
    online=OnlineConfig(replay="rollout", num_envs=2, rollout_steps=16),
)
ROWS = make_batch(rows=64)
DATA = OfflineData.create({**ROWS, "ends": 1.0 - ROWS["masks"]}, ("ends",))
KEY = jax.random.key(5)

improve = jax.jit(lambda agent, data, progress: agent.improve(data, progress))
judge = jax.jit(lambda agent, data: agent.judge(data))
amq = jax.jit(lambda agent, data: agent.amq(agent.policies.params, data))


def make_agent(**changes: Any) -> Any:
    return set_config(create(UniO4, CONFIG), **changes)


def same(left: Any, right: Any) -> bool:
    return all(np.array_equal(one, two) for one, two in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True))


def member(tree: Any, index: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], tree)


@partial(jax.jit, static_argnames="clip")
def improve_gradient(agent: Any, params: Any, reference: Any, observations: jax.Array, clip: float) -> Any:
    return jax.grad(agent.improve_loss, has_aux=True)(params, reference, observations, KEY, clip)


def test_first_step_is_policy_gradient() -> None:
    """The step right after a replacement is the plain policy gradient."""
    agent, observations = make_agent(), ROWS["observations"][:8]
    own = member(agent.policies.params, 0)
    grads, info = improve_gradient(agent, own, own, observations, 0.2)
    actions = agent.policy(own, observations).sample(KEY)
    advantages = agent.advantages(observations, actions)
    plain = jax.grad(lambda p: -jnp.mean(advantages * agent.policy(p, observations).log_prob(actions)))(own)
    assert float(info["improve/clipped"]) == 0.0
    for one, two in zip(jax.tree.leaves(grads), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5, rtol=1e-5)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(plain)) > 1e-3


def test_tiny_clip_shrinks_gradient() -> None:
    """With hardly any clip the gradient shrinks once the policy has left its reference.

    Rows that the step made likelier than the clip allows give no gradient where their advantage is positive.
    """
    agent, observations = make_agent(), ROWS["observations"][:8]
    own = member(agent.policies.params, 0)
    grads, _ = improve_gradient(agent, own, own, observations, 1e-6)
    moved = jax.tree.map(lambda p, g: p - 1e-3 * g / (jnp.abs(g).max() + 1e-12), own, grads)
    after, info = improve_gradient(agent, moved, own, observations, 1e-6)
    size = lambda tree: sum(float(jnp.square(leaf).sum()) for leaf in jax.tree.leaves(tree)) ** 0.5  # noqa: E731
    assert float(info["improve/clipped"]) == 1.0 and size(after) < 0.7 * size(grads)


def test_advantages_normalised() -> None:
    """Advantages are normalised, and a constant in Q or V changes nothing."""
    agent, observations, actions = make_agent(), ROWS["observations"], ROWS["actions"]
    advantages = agent.advantages(observations, actions)
    assert float(advantages.mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(advantages.std()) == pytest.approx(1.0, abs=1e-4)
    value = jax.tree.map(jnp.copy, agent.value.params)
    value["params"]["Dense_0"]["bias"] = value["params"]["Dense_0"]["bias"] + 5.0
    shifted = agent.replace(value=agent.value.replace(params=value))
    np.testing.assert_allclose(shifted.advantages(observations, actions), advantages, atol=1e-4)


def test_zero_advantage_zero_gradient() -> None:
    """The gradient is 0 without an advantage."""
    agent = make_agent()
    zero = jax.tree.map(jnp.zeros_like, agent.critic.params)
    agent = agent.replace(critic=agent.critic.replace(params=zero))
    agent = agent.replace(value=agent.value.replace(params=jax.tree.map(jnp.zeros_like, agent.value.params)))
    own = member(agent.policies.params, 0)
    grads, _ = improve_gradient(agent, own, own, ROWS["observations"][:8], 0.2)
    assert all(not leaf.any() for leaf in jax.tree.leaves(grads))


def test_improvement_keeps_frozen_parts() -> None:
    """The reference stands still between replacements, and the frozen parts do too."""
    agent = make_agent().begin_improvement(DATA)
    moved, info = improve(agent, DATA, 0.0)
    moved, _ = improve(moved, DATA, 0.1)
    assert same(moved.reference, agent.reference) and not same(moved.policies.params, agent.policies.params)
    for part in ("value", "critic", "target_critic"):
        assert same(getattr(moved, part), getattr(agent, part)), part
    assert same(moved.dynamics.model, agent.dynamics.model) and same(moved.dynamics.best, agent.dynamics.best)
    assert {"improve/loss", "amq/score", "amq/best"} <= set(info)


def test_rate_and_clip_decay() -> None:
    """The rate falls to 0, and the clip does too unless it is frozen."""
    agent = make_agent().begin_improvement(DATA)
    still, _ = improve(agent, DATA, 1.0)
    assert same(still.policies.params, agent.policies.params)
    far = agent.replace(policies=agent.policies.replace(params=jax.tree.map(lambda p: 1.02 * p, agent.policies.params)))
    shares = []
    for frozen in (None, 0.0):
        _, info = improve(set_config(far, freeze_clip_at=frozen), DATA, 0.999)
        shares.append(float(info["improve/clipped"]))
    assert shares[0] > 0.9 > shares[1]


def test_judge_replaces_better_policies() -> None:
    """A policy replaces its reference iff its score is better, and the best never falls."""
    agent = make_agent().begin_improvement(DATA)
    best = agent.best.at[0].add(-1.0).at[1].add(1.0)  # the first member is better than its best, the second is not
    other = jax.tree.map(lambda leaf: leaf + 0.25, agent.reference)
    judged = judge(agent.replace(best=best, reference=other), DATA)
    assert same(member(judged.reference, 0), member(agent.policies.params, 0))
    assert same(member(judged.reference, 1), member(other, 1))
    np.testing.assert_array_equal(judged.replaced, [1, 0])
    assert float(judged.best[0]) > float(best[0]) and float(judged.best[1]) == float(best[1])
    assert same(judged.policies.params, agent.policies.params), "refused policies go on from where they are"
    again = judge(judged, DATA)
    np.testing.assert_array_equal(again.replaced, [1, 0])  # common noise: the same policy has the same score
    np.testing.assert_array_equal(again.scores, judged.scores)


def test_fresh_noise_changes_scores() -> None:
    """Fresh noise scores the same policy differently."""
    agent = make_agent(common_noise=False).begin_improvement(DATA)
    first, second = judge(agent, DATA), judge(judge(agent, DATA), DATA)
    assert np.all(first.scores != second.scores)


def test_horizon_one_score() -> None:
    """At horizon 1 the score is the mean Q of the start states.

    All rows as starts: with as many roll-outs as it takes, the sample's mean is the dataset's.
    """
    agent = make_agent(horizon=1, judge_rows=20_000)
    scores, lost = amq(agent, DATA)
    q = jax.vmap(lambda p: agent.critic(ROWS["observations"], agent.policy(p, ROWS["observations"]).mode()).min(axis=0))
    values = q(agent.policies.params)
    np.testing.assert_allclose(scores, values.mean(axis=1), atol=4 * float(values.std()) / 20_000**0.5)
    assert not lost.any()


@pytest.mark.parametrize("horizon", [1, 7])
def test_constant_q_score(horizon: int) -> None:
    """A constant Q, or its sum over the horizon, is the score for every horizon."""
    agent = make_agent(horizon=horizon)
    zero = jax.tree.map(jnp.zeros_like, agent.critic.params)
    zero["params"]["output"]["bias"] = zero["params"]["output"]["bias"] + 3.0
    agent = agent.replace(critic=agent.critic.replace(params=zero))
    np.testing.assert_allclose(amq(agent, DATA)[0], [3.0, 3.0], rtol=1e-5)
    np.testing.assert_allclose(amq(set_config(agent, judge_sum=True), DATA)[0], [3.0 * horizon] * 2, rtol=1e-5)


def test_model_raw_networks_scaled_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model sees raw states and the networks scaled ones.

    A known world: states drift by 1 a step; the score is the mean Q along it, by hand, for any order of rows.
    """
    seen = []

    def drift(self: Any, rng: Any, states: Any, actions: Any) -> Any:
        seen.append(states)
        return states + 1.0, jnp.zeros(states.shape[0]), jnp.zeros(states.shape[0], bool)

    agent = make_agent(normalize_states=True, horizon=3, judge_rows=4_000).take_statistics(DATA)
    agent = agent.replace(dynamics=agent.dynamics.prepare(DATA))
    monkeypatch.setattr(Dynamics, "step", drift)
    scores, _ = jax.jit(lambda a: a.amq(a.policies.params, DATA))(agent)
    own, values = member(agent.policies.params, 0), []
    for t in range(3):
        states = (ROWS["observations"] + t - agent.mean) / agent.std
        values.append(agent.critic(states, jnp.clip(agent.policy(own, states).mode(), -1, 1)).min(axis=0))
    expected = jnp.stack(values)
    assert float(scores[0]) == pytest.approx(float(expected.mean()), abs=4 * float(expected.std()) / 4_000**0.5)
    backwards = OfflineData.create({k: v[::-1] for k, v in {**ROWS, "ends": 1.0 - ROWS["masks"]}.items()}, ("ends",))
    again, _ = jax.jit(lambda a: a.amq(a.policies.params, backwards))(agent)
    np.testing.assert_allclose(again, scores, atol=8 * float(expected.std()) / 4_000**0.5)


def test_expectile_finds_best_action() -> None:
    """The largest expectile finds the best action of the data.

    One state, two actions with rewards 0 and 1, both terminal: V tends to the maximum, not to the mean.
    """
    actions, rewards = jnp.asarray([[-0.5, 0.0], [0.5, 0.0]]), jnp.asarray([0.0, 1.0])
    rows = {"observations": jnp.zeros((8, 3)), "next_observations": jnp.zeros((8, 3)), "masks": jnp.zeros(8)}
    rows |= {"actions": jnp.tile(actions, (4, 1)), "rewards": jnp.tile(rewards, 4), "ends": jnp.ones(8)}
    found = {}
    for expectile in (0.5, 0.98):
        agent = make_agent(expectile=expectile, tau=0.2)
        step = jax.jit(lambda a: jax.lax.scan(lambda b, _: (b.critic_step(rows)[0], None), a, None, length=2500)[0])
        found[expectile] = float(step(agent).value(rows["observations"][:1])[0])
    assert found[0.5] == pytest.approx(0.5, abs=0.1) and found[0.98] > 0.9


def test_ended_rollouts_stop_counting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Roll-outs that ended count no further.

    All end at once: the flat mean is that of the first step; so is the sum.
    """

    def end(self: Any, rng: Any, states: Any, actions: Any) -> Any:
        return states + 1.0, jnp.zeros(states.shape[0]), jnp.ones(states.shape[0], bool)

    agent = make_agent()
    first = amq(set_config(agent, horizon=1), DATA)[0]
    monkeypatch.setattr(Dynamics, "step", end)
    for summed in (False, True):
        config = replace(agent.config, horizon=6, judge_sum=summed)
        scores, _ = agent.replace(config=config).amq(agent.policies.params, DATA)
        np.testing.assert_allclose(scores, first, rtol=1e-5)


def test_critic_step_order() -> None:
    """Q sees V after its step, and the targets follow at every second step."""
    agent = make_agent(pretrain_lr=1e-3)
    batch = {**{key: leaf[:8] for key, leaf in ROWS.items()}, "ends": jnp.zeros(8)}
    stepped, info = jax.jit(lambda a, b: a.critic_step(b))(agent, batch)
    y = lambda a: (batch["rewards"] + 0.99 * batch["masks"] * a.value(batch["next_observations"])).mean()  # noqa: E731
    assert float(info["critic/target"]) == pytest.approx(float(y(stepped)), abs=1e-6)
    assert abs(float(y(agent)) - float(y(stepped))) > 1e-5
    assert same(stepped.target_critic, agent.target_critic)
    twice, _ = jax.jit(lambda a, b: a.critic_step(b))(stepped, batch)
    moved = jax.tree.map(lambda old, new: 0.995 * old + 0.005 * new, agent.target_critic, twice.critic.params)
    for one, two in zip(jax.tree.leaves(twice.target_critic), jax.tree.leaves(moved), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)


def test_expectile_half_and_timeouts() -> None:
    """Expectile one half is half the squared error, and time limits can be terminals."""
    agent = make_agent(expectile=0.5)
    batch = {**{key: leaf[:8] for key, leaf in ROWS.items()}, "ends": jnp.ones(8)}
    _, info = agent.critic_step(batch)
    target = agent.critic(batch["observations"], batch["actions"], params=agent.target_critic).min(axis=0)
    error = jnp.mean(jnp.square(target - agent.value(batch["observations"])))
    assert float(info["value/loss"]) == pytest.approx(0.5 * float(error), rel=1e-5)
    _, info = set_config(agent, timeouts_bootstrap=False).critic_step(batch)
    assert float(info["critic/target"]) == pytest.approx(float(batch["rewards"].mean()), abs=1e-6)


def clone_gradient(agent: Any, index: int, policies: Any = None, **changes: Any) -> Any:
    config = replace(agent.config, **changes)
    policies = policies or agent.policies
    loss = partial(
        clone_loss,
        member=jnp.asarray(index),
        policies=policies,
        observations=ROWS["observations"],
        actions=ROWS["actions"],
        rng=KEY,
        config=config,
    )
    return jax.grad(loss)(member(policies.params, index))


@pytest.mark.parametrize("alpha", [0.1, 0.7])
def test_diversity_gradient_direction(alpha: float) -> None:
    """The released diversity only scales the gradient, and the others turn it."""
    agent = make_agent()
    plain = clone_gradient(agent, 0, diversity="none")
    scaled = clone_gradient(agent, 0, diversity="code_heuristic", diversity_coef=alpha)
    for one, two in zip(jax.tree.leaves(scaled), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(one, (1.0 + alpha) * two, rtol=1e-5, atol=1e-4)
    flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])  # noqa: E731
    for kind in ("sampled_kl", "analytic_kl"):
        own = flat(clone_gradient(agent, 0, diversity=kind, diversity_coef=alpha)) - flat(plain)
        cosine = own @ flat(plain) / np.linalg.norm(own) / np.linalg.norm(flat(plain))
        assert np.linalg.norm(own) > 0.01 * alpha and abs(cosine) < 0.9, kind


@pytest.mark.parametrize("kind", ["sampled_kl", "analytic_kl"])
def test_twin_policies_no_divergence(kind: str) -> None:
    """Twins have no divergence, and nothing flows into the others."""
    agent = make_agent(diversity=kind, diversity_coef=1.0)
    twins = jax.tree.map(lambda leaf: jnp.stack([leaf[0], leaf[0]]), agent.policies)
    arguments = (ROWS["observations"], ROWS["actions"], KEY)
    own, config = member(twins.params, 0), agent.config
    with_term = clone_loss(own, jnp.asarray(0), twins, *arguments, config)
    without = clone_loss(own, jnp.asarray(0), twins, *arguments, replace(config, diversity="none"))
    assert float(with_term) == pytest.approx(float(without), abs=1e-4)
    through = jax.grad(lambda p: clone_loss(own, jnp.asarray(0), twins.replace(params=p), *arguments, config))
    assert all(not leaf.any() for leaf in jax.tree.leaves(through(twins.params)))


def test_paper_diversity_separates_clones() -> None:
    """The diversity of the paper keeps the clones apart."""
    spread = {}
    for kind in ("none", "sampled_kl"):
        agent = make_agent(diversity=kind, diversity_coef=0.5)
        agent, _ = jax.lax.scan(lambda a, _: (a.fit_clones(DATA, 0.0)[0], None), agent, None, length=300)
        dists = [agent.policy(member(agent.policies.params, i), ROWS["observations"]) for i in range(2)]
        spread[kind] = float(gaussian_kl(*dists).mean())
    assert spread["sampled_kl"] > 1.5 * spread["none"]


def test_switch_keeps_policy_and_value() -> None:
    """The switch keeps the policy exactly, and V and the statistics."""
    agent = make_agent(normalize_states=True).take_statistics(DATA).take_candidate(jnp.asarray(1))
    online = agent.online()
    assert isinstance(online, PPO)
    observations = 3.0 * ROWS["observations"]
    before = agent.policy(agent.acting, agent.scaled(observations))
    after = online.actor(online.scaled(observations))
    np.testing.assert_array_equal(before.mean, after.mean)
    np.testing.assert_array_equal(before.std, after.std)
    np.testing.assert_array_equal(before.log_prob(ROWS["actions"]), after.log_prob(ROWS["actions"]))
    assert float(after.std.min()) > np.exp(-5.0) and float(after.std.max()) < 1.0
    assert float(jnp.abs(after.mean).max()) < 1.0
    assert same(online.value.params, agent.value.params) and same(online.mean, agent.mean)
    np.testing.assert_allclose(agent.mean, np.asarray(ROWS["observations"]).mean(axis=0), atol=1e-6)


def test_candidate_ranking() -> None:
    """Candidates are ranked by their last score."""
    agent = make_agent().replace(scores=jnp.asarray([1.0, 2.0]))
    assert same(agent.acting, member(agent.policies.params, 1))
    assert same(agent.take_candidate(jnp.asarray(1)).acting, member(agent.policies.params, 0))


def test_phase_schedule() -> None:
    """The phases add up to the offline steps and stretch with them."""
    agent = make_agent()
    assert [(phase.name, phase.steps, phase.check_every) for phase in agent.phases(20)] == [
        ("critic", 6, 0),
        ("dynamics", 2, 1),
        ("clone", 4, 0),
        ("improve", 8, 4),
    ]
    assert [phase.steps for phase in agent.phases(41)] == [12, 4, 8, 17]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expectile": 1.0}, "expectile is 1.0"),
        ({"dynamics_elites": 9}, "dynamics_elites is 9; expected 1 to dynamics_members=3"),
        ({"candidates": 3}, "candidates is 3; expected 1 to num_policies=2"),
        ({"horizon": 0}, "horizon is 0"),
        ({"dynamics_patience": 0}, "dynamics_patience is 0; expected at least 1"),
        ({"diversity": "kl"}, "diversity is 'kl'; expected none or code_heuristic or analytic_kl or sampled_kl"),
        ({"termination": "Hopper-v5"}, "termination is 'Hopper-v5'; expected learned or never"),
    ],
)
def test_bad_settings_refused(change: dict[str, Any], message: str) -> None:
    """Settings that cannot work are refused."""
    with pytest.raises(ConfigError, match=message):
        replace(CONFIG, **change)
