"""WSRL: what crosses the switch, bit for bit, from every pre-trainer; the online step; the zero-gradient replica."""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o2o.agents.bc import BC, BCConfig
from o2o.agents.cql import CQL, CalQL, Conservative, CQLConfig
from o2o.agents.iql import IQL, IQLConfig
from o2o.agents.sac import SAC, SACConfig
from o2o.agents.wsrl import WSRL, WSRLConfig, fitting_bc, fitting_iql, online_sac
from o2o.config import from_dict, to_dict, with_fields
from o2o.errors import CheckpointError, ConfigError
from o2o.nn.modules import Adam
from o2o.types import OnlineConfig
from tests.helpers.tiny import (
    ACTION_DIM,
    OBSERVATION_DIM,
    ROWS,
    constant_critic,
    constant_policy,
    create,
    critic_step,
    largest_difference,
    make_batch,
    moved,
    next_values,
    policy_gradient,
    policy_step,
    set_config,
    steps,
    tiny,
    update,
)

KEY = jax.random.key(11)
EXAMPLE = (jnp.zeros((1, OBSERVATION_DIM)), jnp.zeros((1, ACTION_DIM)))
WIDTHS: dict[str, Any] = {"actor_hidden_dims": (16,), "critic_hidden_dims": (16,), "init_scheme": "xavier"}
FINETUNE = online_sac(**WIDTHS, num_critics=4)
CONFIG = WSRLConfig(
    cql=CQLConfig(**WIDTHS, num_critics=4, conservative=Conservative(n_actions=2), max_target_actions=3),
    iql=fitting_iql(FINETUNE),
    bc=fitting_bc(FINETUNE),
    finetune=FINETUNE,
    batch_size=ROWS,
)
PRETRAINERS: dict[str, Any] = {"calql": CalQL, "cql": CQL, "iql": IQL, "bc": BC, "sac": SAC}


@functools.cache
def pretrained(pretrain: str = "calql") -> Any:
    """Return an agent after two offline calls."""
    agent = create(WSRL, replace(CONFIG, pretrain=pretrain))
    for seed in range(2):
        agent, _ = update(agent, make_batch(1, seed=seed))
    return agent


@jax.jit
def switch(agent: Any) -> Any:
    return agent.online()


def learner() -> Any:
    """Return the online SAC of a pre-trained agent."""
    return switch(pretrained()).learner


def assert_equal(left: Any, right: Any) -> None:
    for one, two in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(one, two)


# ---------------------------------------------------------------- the switch


def test_switch_is_bitwise() -> None:
    """The switch carries networks, temperature and Adam's moments bitwise."""
    before, after = pretrained(), switch(pretrained())
    assert type(before.learner) is CalQL and type(after.learner) is SAC
    for name in ("actor", "critic", "temperature"):
        assert_equal(getattr(before, name).params, getattr(after, name).params)
        assert_equal(getattr(before, name).opt_state, getattr(after, name).opt_state)
        assert steps(getattr(after, name)) == 2
    assert_equal(before.target_critic, after.target_critic)
    assert moved(after.target_critic, after.critic.params)
    assert float(after.learner.alpha()) == float(before.learner.alpha()) != 1.0
    assert not hasattr(after.learner, "dual")
    assert after.config == before.config and after.online() is after
    assert before.needs.batch_keys == before.config.needs.batch_keys == ("mc_returns",) and after.needs.batch_keys == ()


@pytest.mark.parametrize("pretrain", PRETRAINERS)
def test_pretrainer_handover(pretrain: str) -> None:
    """Every pre-trainer hands over what it has."""
    before, after = pretrained(pretrain), switch(pretrained(pretrain))
    assert type(before.learner) is PRETRAINERS[pretrain] and type(after.learner) is SAC
    assert_equal(before.actor.params, after.actor.params)
    assert_equal(before.actor.opt_state[0], after.actor.opt_state[0])
    assert (steps(after.actor), after.actor.optimizer.learning_rate) == (2, FINETUNE.actor_lr)
    observations = make_batch()["observations"]
    for deterministic in (True, False):
        one, two = (agent.sample_actions(observations, None, KEY, deterministic)[0] for agent in (before, after))
        np.testing.assert_array_equal(one, two)
    if pretrain == "bc":
        assert steps(after.critic) == 0
        assert_equal(after.critic.params, after.target_critic)
        with pytest.raises(ConfigError, match="BC has no critic"):
            _ = before.critic
    else:
        assert_equal((before.critic.params, before.target_critic), (after.critic.params, after.target_critic))
        assert_equal(before.critic.opt_state[0], after.critic.opt_state[0])
    if pretrain in ("cql", "calql"):
        assert before.learner.config.max_target_actions == 3 and after.learner.config.max_target_actions is None
        assert before.learner.config.conservative == CONFIG.cql.conservative
    if pretrain in ("bc", "iql"):
        assert float(after.learner.alpha()) == pytest.approx(1.0) and steps(after.temperature) == 0


def test_acting_changes_nothing() -> None:
    """The warm-up only samples: the agent has no state that acting could change, and its samples are stochastic."""
    agent = switch(pretrained())
    observations = make_batch()["observations"]
    one, carry = agent.sample_actions(observations, None, jax.random.key(0))
    two, _ = agent.sample_actions(observations, carry, jax.random.key(1))
    mode, _ = agent.sample_actions(observations, carry, jax.random.key(1), deterministic=True)
    assert carry is None and agent.initial_carry((4,)) is None
    assert np.any(one != two) and np.any(one != mode) and float(jnp.abs(one).max()) <= 1.0


def test_from_agent() -> None:
    """`from_agent` starts from a learner trained elsewhere."""
    source = pretrained("cql").learner
    agent = WSRL.from_agent(source, CONFIG)
    assert agent.learner is source and agent.config == CONFIG
    assert_equal(switch(agent).critic.params, source.critic.params)
    assert_equal(switch(WSRL.from_agent(pretrained("cql"), CONFIG)).actor.params, source.actor.params)


def test_from_iql_keeps_moments() -> None:
    """A start from IQL with a decaying rate keeps the moments."""
    config = IQLConfig(
        **WIDTHS, value_hidden_dims=(16,), squash=True, std_mode="exp",
        actor_layer_norm=True, critic_layer_norm=True, num_critics=4, shared_output=True, actor_decay_steps=100,
    )  # fmt: skip
    source, _ = update(create(IQL, config), make_batch(1))
    after = switch(WSRL.from_agent(source, CONFIG))
    assert_equal(after.actor.opt_state[0], source.actor.opt_state[0])
    assert after.actor.optimizer.decay_steps is None
    limits = {"log_std_range": config.log_std_range}
    parts = {name: replace(getattr(CONFIG, name), **limits) for name in ("cql", "iql", "bc", "finetune")}
    assert after.config == replace(CONFIG, **parts)
    np.testing.assert_array_equal(
        source.sample_actions(jnp.ones((2, OBSERVATION_DIM)), None, KEY, True)[0],
        after.sample_actions(jnp.ones((2, OBSERVATION_DIM)), None, KEY, True)[0],
    )
    stepped, info = update(after, make_batch(2))
    assert steps(stepped.actor) == 2 and all(np.isfinite(value) for value in info.values())


def test_misfit_networks_refused() -> None:
    """Networks that do not fit are refused."""
    plain = create(BC, BCConfig(actor_hidden_dims=(16,), actor_layer_norm=True, squash=False))
    with pytest.raises(ConfigError, match="not tanh-squashed"):
        WSRL.from_agent(plain, CONFIG)
    narrow = create(BC, BCConfig(actor_hidden_dims=(8,), actor_layer_norm=True))
    with pytest.raises(CheckpointError, match="actor does not fit"):
        WSRL.from_agent(narrow, CONFIG)
    with pytest.raises(CheckpointError, match="critic does not fit"):
        WSRL.from_agent(pretrained(), replace(CONFIG, finetune=replace(FINETUNE, num_critics=3)))
    with pytest.raises(ConfigError, match="temperature_param is 'exp'"):
        WSRL.from_agent(pretrained(), replace(CONFIG, finetune=replace(FINETUNE, temperature_param="exp")))


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("pretrain", "part", "changes"),
    [
        ("calql", "cql", {"critic_hidden_dims": (8,)}),
        ("cql", "cql", {"temperature_param": "exp"}),
        ("iql", "iql", {"num_critics": 2}),
        ("bc", "bc", {"log_std_range": (-5.0, 2.0)}),
    ],
)
def test_differing_parts_refused(pretrain: Any, part: str, changes: dict[str, Any]) -> None:
    """Parts whose networks differ are refused.

    Only the pre-trainer at work has to fit; the message names both fields.
    """
    (name,) = changes
    config = replace(CONFIG, pretrain=pretrain, **{part: replace(getattr(CONFIG, part), **changes)})
    with pytest.raises(ConfigError, match=rf"WSRLConfig\.{part}\.{name} is .*WSRLConfig\.finetune\.{name} is"):
        create(WSRL, config)
    jax.eval_shape(lambda key: WSRL.create(key, *EXAMPLE, replace(config, pretrain="sac")), KEY)


def test_shared_phase_settings() -> None:
    """One discount, batch size and schedule hold for both phases."""
    agent = create(WSRL, replace(CONFIG, discount=0.9))
    assert agent.learner.config.discount == agent.online().learner.config.discount == 0.9
    for changes in ({"discount": 0.98}, {"batch_size": 64}, {"online": OnlineConfig(utd_ratio=7)}):
        (name,) = changes
        for part in ("cql", "finetune"):
            with pytest.raises(ConfigError, match=rf"WSRLConfig\.{part}\.{name} is .*WSRLConfig\.{name} is .*leave"):
                replace(CONFIG, **{part: replace(getattr(CONFIG, part), **changes)})
    with pytest.raises(ConfigError, match="'calq'; expected calql"):
        WSRLConfig(pretrain="calq")  # type: ignore[arg-type]


def test_settings_json_round_trip() -> None:
    """The settings survive JSON and name every part."""
    config = WSRL.preset("kitchen").config
    assert from_dict(WSRLConfig, to_dict(config)) == config
    changed = with_fields(config, [("finetune.tau", 0.1), ("cql.conservative.weight", 2.0), ("discount", 0.98)])
    assert (changed.finetune.tau, changed.cql.tau, changed.cql.conservative.weight) == (0.1, 0.005, 2.0)
    assert from_dict(WSRLConfig, to_dict(changed)) == changed


# ---------------------------------------------------------------- the online step


def test_targets_stop_at_terminals_only() -> None:
    """Row 0 is terminal; the others, time limits included, carry the bootstrap term of a constant target of 4."""
    agent = learner()
    agent = agent.replace(target_critic=constant_critic(agent.target_critic, 4.0))
    batch = make_batch()
    _, info = critic_step(agent, batch, KEY)
    targets = np.asarray(batch["rewards"]) + 0.99 * 4.0 * np.asarray(batch["masks"])
    assert float(info["critic/target"]) == pytest.approx(targets.mean(), rel=1e-5)


def test_max_target() -> None:
    """The maximum target is the highest of its ten samples."""
    agent, batch = set_config(learner(), target_subset=None), make_batch()
    _, action_rng = jax.random.split(KEY)
    actions = agent.actor(batch["next_observations"]).sample(action_rng, (10,))
    each = agent.critic(batch["next_observations"], actions, params=agent.target_critic).min(axis=0)
    best = next_values(set_config(agent, max_target_actions=10), batch, KEY)
    np.testing.assert_allclose(best, np.max(each, axis=0), atol=1e-5)
    single = agent.actor(batch["next_observations"]).sample(action_rng)
    expected = agent.critic(batch["next_observations"], single, params=agent.target_critic).min(axis=0)
    np.testing.assert_allclose(next_values(agent, batch, KEY), expected, atol=1e-5)


def test_target_subset_with_replacement() -> None:
    """The target subset is drawn with replacement.

    Of four members both draws coincide with probability 1/4: the target is then that member's value.
    """
    agent, batch = constant_policy(learner(), std=1e-5, mean=None), make_batch(rows=32)
    actions = agent.actor(batch["next_observations"]).mode()
    members = np.asarray(agent.critic(batch["next_observations"], actions, params=agent.target_critic))
    draws = jax.jit(jax.vmap(lambda key: next_values(agent, batch, key)))(jax.random.split(KEY, 400))
    single = np.abs(np.asarray(draws)[:, None] - members).max(axis=-1).min(axis=1) < 1e-3
    dominated = sum(np.all(members[i] <= members[j]) for i in range(4) for j in range(4) if i != j)
    assert np.mean(single) == pytest.approx((4 + 2 * dominated) / 16, abs=0.08) and dominated < 6


def test_single_update_is_joint_step() -> None:
    """One update at ratio one is a joint step from the same parameters."""
    agent, batch = learner(), make_batch(1)
    after, _ = update(agent, batch)
    _, critic_rng, policy_rng = jax.random.split(agent.rng, 3)
    rows = jax.tree.map(lambda leaf: leaf[0], batch)
    critics, _ = critic_step(agent, rows, jax.random.split(critic_rng, 1)[0])
    policy, _ = policy_step(agent, rows, policy_rng, agent.critic)
    assert largest_difference(after.critic.params, critics.critic.params) < 1e-6
    assert largest_difference(after.target_critic, critics.target_critic) < 1e-6
    assert largest_difference(after.actor.params, policy.actor.params) < 1e-5
    assert largest_difference(after.temperature.params, policy.temperature.params) < 1e-6


def test_ratio_four_update_order() -> None:
    """Ratio four takes four critic steps, then one policy step on all rows."""
    agent, batch = learner(), make_batch(4)
    agent = agent.replace(critic=agent.critic.replace(optimizer=Adam(0.01)))
    after, _ = update(agent, batch)
    assert [steps(m) - steps(n) for m, n in ((after.critic, agent.critic), (after.actor, agent.actor))] == [4, 1]
    _, critic_rng, policy_rng = jax.random.split(agent.rng, 3)
    loop = agent
    for i, key in enumerate(jax.random.split(critic_rng, 4)):
        loop, _ = critic_step(loop, jax.tree.map(lambda leaf, i=i: leaf[i], batch), key)
    assert largest_difference(after.critic.params, loop.critic.params) < 1e-4
    assert largest_difference(after.target_critic, loop.target_critic) < 1e-5
    rows = jax.tree.map(lambda leaf: leaf.reshape(4 * ROWS, *leaf.shape[2:]), batch)
    expected, _ = policy_step(loop, rows, policy_rng, loop.critic)
    other, _ = policy_step(loop, rows, policy_rng, agent.critic)
    moments, right, wrong = (a.actor.opt_state[0].mu for a in (after, expected, other))
    assert largest_difference(moments, right) < 1e-4 < 1e-3 < largest_difference(moments, wrong)
    assert largest_difference(after.temperature.params, expected.temperature.params) < 1e-6


def test_bare_calql_is_online_step() -> None:
    """Cal-QL without its term and max backup is the online step."""
    agent = pretrained()
    term = replace(CONFIG.cql.conservative, weight=0.0)
    offline = set_config(agent.learner, conservative=term, max_target_actions=None)
    online = learner().replace(rng=offline.rng)
    batch = make_batch(1)
    (one, _), (two, _) = update(offline, batch), update(online, batch)
    for name in ("actor", "critic", "temperature"):
        assert largest_difference(getattr(one, name).params, getattr(two, name).params) < 1e-6
        assert moved(getattr(one, name).params, getattr(agent.learner, name).params)
    assert largest_difference(one.target_critic, two.target_critic) < 1e-6


def test_actor_follows_lowest_member() -> None:
    """The actor follows the lowest member alone.

    With one member 1e6 below the others, the gradient is that of this member's Q.
    """
    agent = create(SAC, tiny(SACConfig(), **{**WIDTHS, "num_critics": 4, "temperature_init": 1e-12}))
    batch, member = make_batch(), 2
    tree: Any = dict(agent.critic.params["params"])
    tree["output"] = {**tree["output"], "bias": tree["output"]["bias"].at[member].set(-1e3)}
    low = agent.critic.replace(params={"params": tree})
    assert set_config(agent).config.actor_reduce == WSRLConfig().finetune.actor_reduce == "min"
    actor_rng, _ = jax.random.split(KEY)

    def one_member(params: Any) -> Any:
        actions = agent.actor(batch["observations"], params=params).sample(actor_rng)
        return -jnp.mean(agent.critic(batch["observations"], actions)[member])

    expected = jax.jit(jax.grad(one_member))(agent.actor.params)
    assert largest_difference(policy_gradient(agent, batch, KEY, low), expected) < 1e-5
    assert largest_difference(policy_gradient(agent, batch, KEY), expected) > 1e-3


def two_sigmas(agent: Any, next_std: float, std: float) -> tuple[Any, Any]:
    """Return `agent` with sigma of the state, and a batch of states where it is nearly `next_std` (next) and `std`."""
    agent, tree = constant_policy(agent, 0.1), dict(agent.actor.params["params"])
    own = tree["log_std"]["kernel"][:, :1]
    head = {
        "kernel": jnp.repeat(4.0 * own / jnp.linalg.norm(own), ACTION_DIM, axis=1),
        "bias": jnp.full(ACTION_DIM, -2.3),
    }
    tree = {**agent.actor.params["params"], "log_std": head}
    agent = agent.replace(actor=agent.actor.replace(params={"params": tree}))
    states = jax.random.normal(KEY, (2000, OBSERVATION_DIM))
    found = jnp.log(agent.actor(states).std[:, 0])
    here, there = (states[jnp.argmin(jnp.abs(found - np.log(wanted)))] for wanted in (std, next_std))
    batch = make_batch()
    shape = batch["observations"].shape
    return agent, {
        **batch, "observations": jnp.broadcast_to(here, shape), "next_observations": jnp.broadcast_to(there, shape)
    }  # fmt: skip


@pytest.mark.parametrize("std", [0.02, 0.7])
def test_alpha_uses_next_state_entropy(std: float) -> None:
    """Alpha grows iff the entropy at next states is below minus the action dimension.

    `std` is the policy's at the next states; at the present ones it lies on the other side.
    """
    other = 0.7 if std < 0.1 else 0.02
    agent, batch = two_sigmas(learner(), std, other)
    for key, expected in (("next_observations", std), ("observations", other)):
        np.testing.assert_allclose(agent.actor(batch[key]).std, expected, rtol=0.2)
    fresh = agent.replace(temperature=agent.temperature.replace(opt_state=create(WSRL, CONFIG).temperature.opt_state))
    stepped, info = policy_step(fresh, batch, KEY, fresh.critic)
    assert (float(info["actor/entropy"]) < -ACTION_DIM) == (std == 0.02)
    assert (float(stepped.alpha()) > float(fresh.alpha())) == (std == 0.02)


@pytest.mark.parametrize("replica", [False, True])
def test_replica_moves_idle_networks(replica: bool) -> None:
    """Only the replica moves networks whose loss did not run.

    After an actor call, two critic-only steps move the actor in the replica of the code, never in clean mode.
    """
    agent = set_config(learner(), zero_grad_steps=replica)
    after, _ = update(agent, make_batch(2))
    expected = (3, 3, 3) if replica else (2, 1, 1)
    pairs = ((after.critic, agent.critic), (after.actor, agent.actor), (after.temperature, agent.temperature))
    assert tuple(steps(new) - steps(old) for new, old in pairs) == expected
    clean, _ = update(set_config(agent, zero_grad_steps=False), make_batch(2))
    assert moved(after.actor.params, clean.actor.params) == replica


# ---------------------------------------------------------------- schedule and presets


def test_first_update_after_warm_up() -> None:
    """The first update comes one step after the warm-up."""
    online = WSRL.preset("adroit").config.online
    assert (online.warmup_steps, online.utd_ratio, online.replay) == (5000, 4, "online")
    assert online.first_update() == 5001 and replace(online, warmup_steps=0).first_update() == 1025
    assert OnlineConfig(warmup_steps=7).first_update() == 8


def test_paper_presets() -> None:
    presets = {f: WSRL.preset(f) for f in ("antmaze", "adroit", "kitchen", "locomotion")}
    assert {f: p.config.pretrain for f, p in presets.items()} == {
        "antmaze": "calql", "adroit": "calql", "kitchen": "calql", "locomotion": "cql",
    }  # fmt: skip
    assert {f: p.config.finetune.max_target_actions for f, p in presets.items()} == {
        "antmaze": 10, "adroit": None, "kitchen": None, "locomotion": None,
    }  # fmt: skip
    assert [p.offline_steps for p in presets.values()] == [1_000_000, 20_000, 250_000, 250_000]
    for part in ("cql", "finetune"):
        counts = [10, 10, 10, 10] if part == "cql" else [10, 1, 1, 1]  # offline the target takes the best of ten
        assert [getattr(p.config, part).next_entropy_samples for p in presets.values()] == counts
        for preset in presets.values():
            config = getattr(preset.config, part)
            assert (config.num_critics, config.target_subset, config.subset_replace) == (10, 2, True)
            assert (config.actor_lr, config.critic_lr, config.temperature_lr) == (1e-4, 3e-4, 1e-4)
            assert config.target_entropy == 1.0 and not config.backup_entropy and config.actor_reduce == "min"
            assert config.actor_layer_norm and config.critic_layer_norm and config.shared_output
            assert config.last_gain == (None if preset is presets["kitchen"] else 1e-2)
    for preset in presets.values():
        assert preset.config.cql.max_target_actions == 10 and preset.online_steps == 500_000
    small = WSRL.preset("adroit", "small")
    config = small.config
    assert (config.finetune.num_critics, config.online.utd_ratio, config.batch_size) == (4, 4, 128)
    assert config.online.warmup_steps == 3000 and config.cql.conservative.n_actions == 4
    assert small.offline_steps == small.online_steps == 8_000
    assert (config.finetune.actor_lr, config.finetune.critic_lr) == (1e-4, 3e-4)
    assert config.cql.actor_lr == config.iql.value_lr == config.bc.actor_lr == 1e-3
    pointmaze = WSRL.preset("pointmaze", "small").config
    assert (pointmaze.online.utd_ratio, pointmaze.online.warmup_steps) == (2, 1000)
    assert pointmaze.finetune.actor_lr == pointmaze.cql.actor_lr == 3e-4


@pytest.mark.parametrize("size", ["paper", "small"])
@pytest.mark.parametrize("family", ["antmaze", "pointmaze", "adroit", "kitchen", "locomotion", "other"])
def test_pretrainers_fit_online_phase(family: str, size: Any) -> None:
    """Every pre-trainer of a preset fits its online phase."""
    for pretrain in PRETRAINERS:
        config = replace(WSRL.preset(family, size).config, pretrain=pretrain)
        jax.eval_shape(lambda key, c=config: WSRL.create(key, *EXAMPLE, c).online(), KEY)
