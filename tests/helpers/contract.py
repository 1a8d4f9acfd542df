"""What every agent promises the loops; `test_contract.py` runs it on each entry of `AGENTS`.

A `Case` is one agent at toy size, in one phase, with jitted methods that count their traces.
"""

import functools
from collections import Counter
from dataclasses import dataclass, field, fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from o2o.agents import (
    AGENTS,
    AWACConfig,
    BCConfig,
    CalQLConfig,
    CQLConfig,
    DiffusionBCConfig,
    EXPOConfig,
    FamO2OConfig,
    FamO2OCQLConfig,
    FlowBCConfig,
    IBRLConfig,
    IQLConfig,
    JSRLConfig,
    PEXConfig,
    PPOConfig,
    QAMConfig,
    QCConfig,
    ResidualConfig,
    RLPDConfig,
    SACConfig,
    TD3BCConfig,
    UniO4Config,
    WSRLConfig,
)
from o2o.agents.wsrl import online_sac
from o2o.nn.generative import Diffusion, Flow
from o2o.nn.modules import Model
from o2o.types import Agent, Batch, Info, Needs, OnlineConfig

OBSERVATION_DIM, ACTION_DIM, ROWS = 3, 2, 8
QUICK = {"xla_backend_optimization_level": 0}
"""Compiler options: toy programs take longer to compile than to run."""
HIDDEN = {"actor_hidden_dims": (16, 16), "batch_size": ROWS}
CRITICS = {**HIDDEN, "critic_hidden_dims": (16, 16)}

ON_POLICY = {**HIDDEN, "value_hidden_dims": (16, 16), "epochs": 1, "pretrain_lr": 1e-3, "actor_lr": 1e-3}
"""One epoch of minibatches of ROWS rows: a rollout `[T, ROWS]` is T of them."""

CONFIGS: dict[str, Any] = {
    "bc": replace(BCConfig(), **HIDDEN, dropout=0.1),
    "iql": replace(IQLConfig(), **CRITICS, value_hidden_dims=(16, 16), dropout=0.1, actor_decay_steps=100),
    "cql": replace(CQLConfig(), **CRITICS, num_critics=3),
    "calql": replace(CalQLConfig(), **CRITICS, num_critics=3),
    "sac": replace(SACConfig(), **CRITICS),
    "rlpd": replace(RLPDConfig(), **CRITICS, num_critics=3),
    "wsrl": WSRLConfig(
        cql=CQLConfig(**CRITICS, num_critics=3), finetune=online_sac(**CRITICS, num_critics=3), batch_size=ROWS
    ),
    "diffusion_bc": DiffusionBCConfig(
        model=Diffusion(3, clip="prediction"), horizon=3, execute=2, width=16, blocks=1, dropout=0.1, batch_size=ROWS
    ),
    "qc": replace(QCConfig(), **CRITICS, chunk=3, policy="distilled", flow_steps=2),
    "qam": replace(QAMConfig(), **CRITICS, chunk=3, num_critics=3, form="edit", flow_steps=3),
    "flow_bc": replace(FlowBCConfig(model=Flow(2), network="mlp"), **HIDDEN),
    "expo": EXPOConfig(
        edit_hidden_dims=(16, 16),
        critic_hidden_dims=(16, 16),
        num_critics=3,
        base_width=16,
        base_blocks=1,
        diffusion=Diffusion(3),
        n_samples=3,
        n_edits=2,
        edit_scale=0.3,
        edit_dropout=0.1,
        batch_size=ROWS,
    ),
    "famo2o": replace(FamO2OConfig(), **CRITICS, value_hidden_dims=(16, 16), balance_hidden_dims=(16,), dropout=0.1),
    "famo2o_cql": replace(FamO2OCQLConfig(), **CRITICS, balance_hidden_dims=(16,)),
    "residual": replace(
        ResidualConfig(), **CRITICS, num_critics=3, actor_lr=1e-3, online=OnlineConfig(utd_ratio=3, replay="mixed")
    ),
    "ppo": replace(PPOConfig(), **ON_POLICY),
    "uni_o4": UniO4Config(
        **ON_POLICY,
        critic_hidden_dims=(16, 16),
        num_policies=2,
        candidates=1,
        dynamics_hidden_dims=(16,),
        dynamics_members=2,
        dynamics_elites=1,
    ),
    "awac": replace(AWACConfig(), **CRITICS),
    "td3bc": replace(TD3BCConfig(), **CRITICS),
    "ibrl": replace(
        IBRLConfig(), **CRITICS, clone_hidden_dims=(16, 16), actor_dropout=0.1, num_critics=3, policy_delay=3
    ),
    "jsrl": replace(JSRLConfig(), **CRITICS, value_hidden_dims=(16, 16), max_guide_steps=3),
    "pex": replace(PEXConfig(), **CRITICS, value_hidden_dims=(16, 16), evaluation_randomness=0.0),
}


def toy(config: Any) -> Any:
    """Return an agent's settings with minibatches of ROWS, and two hidden layers of 16 for every network."""
    widths = {field.name: (16, 16) for field in fields(config) if field.name.endswith("hidden_dims")}
    return replace(config, **widths, batch_size=ROWS)


CONFIGS = {name: toy(kind.preset("other", "small").config) for name, kind in AGENTS.items()} | CONFIGS
"""An agent that needs nothing else is not listed above."""
CONFIGS["td7"] = replace(CONFIGS["td7"], target_every=2)  # before targets are renewed once, values in them are 0

EVERY_BLOCK = {"bc": ("actor",), "iql": ("actor", "critic", "value"), "diffusion_bc": ("actor",), "flow_bc": ("actor",)}
EVERY_BLOCK |= {"qc": ("actor", "critic", "one_step"), "awac": ("actor", "critic")}
EVERY_BLOCK |= {"ppo": ("actor", "value"), "uni_o4": ("policies", "value", "critic", "actor")}
EVERY_BLOCK |= {"pex": ("actor", "critic", "value"), "ibrl": ("critic", "reference/actor")}
EVERY_BLOCK |= {"jsrl": ("actor", "critic", "value")}
EVERY_BLOCK |= {"qam": ("actor", "behaviour", "critic", "edit", "temperature")}
EVERY_BLOCK |= {"fql": ("actor", "critic", "one_step"), "ifql": ("actor", "critic", "value")}
EVERY_BLOCK |= {"dsrl": ("actor", "critic", "noise_critic", "base", "temperature")}
EVERY_BLOCK |= {"td7": ("critic", "encoder")}
EVERY_BLOCK |= {"famo2o": ("actor", "critic", "value", "balance_actor", "temperature")}
"""Networks that step once per minibatch; the others step once per call. Every agent not listed steps its critic so."""
BEFORE_ONLINE = {"expo": ("base",), "uni_o4": ("value", "critic", "policies"), "ibrl": ("reference/actor",)}
"""Networks that learn before `online()`, for agents where these are not all."""
FROZEN_ONLINE = {"ibrl": ("reference/actor",)}
"""Networks that learn no more after it."""
ALWAYS_SAMPLED = {"expo", "fql", "qam"}
"""Agents whose deterministic action is a sample like any other."""
ONLINE_CASES = ("wsrl", "expo", "pex", "ibrl", "jsrl", "ppo", "uni_o4")
"""Agents whose online form has the whole contract to itself; that of the others has the same update."""
NEW_AT_THE_SWITCH = {"pex", "ibrl"}
"""Agents whose switch changes the policy by design."""


def make_batch(utd: int, seed: int = 0, window: int = 1) -> Batch:
    """Return random transitions with Monte-Carlo returns and next actions, leaves `[utd, ROWS, ...]`.

    With a `window` W above 1: `[utd, ROWS, W, ...]`, with `ends` and `valid`.
    """
    keys = jax.random.split(jax.random.key(seed), 7)
    shape = (utd, ROWS) if window == 1 else (utd, ROWS, window)
    ends = (jax.random.uniform(keys[6], shape) > 0.8).astype(jnp.float32)
    valid = (jnp.cumsum(ends, axis=-1) - ends == 0).astype(jnp.float32)
    return {
        **({} if window == 1 else {"ends": ends, "valid": valid}),
        "observations": jax.random.normal(keys[0], (*shape, OBSERVATION_DIM)),
        "actions": jnp.tanh(jax.random.normal(keys[1], (*shape, ACTION_DIM))),
        "rewards": jax.random.normal(keys[2], shape),
        "masks": (jax.random.uniform(keys[3], shape) > 0.2).astype(jnp.float32),
        "next_observations": jax.random.normal(keys[4], (*shape, OBSERVATION_DIM)),
        "mc_returns": jax.random.normal(keys[5], shape),
        "next_actions": jnp.tanh(jax.random.normal(jax.random.fold_in(keys[5], 1), (*shape, ACTION_DIM))),
        "next_valid": (jax.random.uniform(jax.random.fold_in(keys[5], 2), shape) > 0.2).astype(jnp.float32),
    }


def fresh_carry(agent: Any, observations: Any) -> Any:
    """Return the carry of new episodes, one for each of the observations `[..., D]`."""
    return agent.initial_carry(jax.tree.leaves(observations)[0].shape[:-1])


def observed(name: str, states: jax.Array) -> Any:
    """Return the observations that an agent takes, made of states `[..., OBSERVATION_DIM]`."""
    if not AGENTS[name].preset("other", "small").config.needs.base_policy:
        return states
    return {"state": states, "base_action": jnp.tanh(states[..., :ACTION_DIM])}


def models(agent: Any) -> dict[str, Model]:
    """Return the agent's networks that have an optimiser, by attribute path."""
    leaves = jax.tree_util.tree_leaves_with_path(agent, is_leaf=lambda node: isinstance(node, Model))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): node for path, node in leaves if isinstance(node, Model)
    }


def assert_same(left: Any, right: Any, atol: float | None = None) -> None:
    """Compare two pytrees: bit for bit, or within `atol`."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, two in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, two = jax.random.key_data(one), jax.random.key_data(two)
        if atol is None or not jnp.issubdtype(one.dtype, jnp.floating):
            np.testing.assert_array_equal(one, two)
        else:
            np.testing.assert_allclose(one, two, atol=atol, rtol=atol)


@dataclass
class Case:
    """One agent at toy size, in one phase."""

    name: str
    phase: str
    traces: Counter[int] = field(default_factory=Counter)
    """Traces of `update` by update-to-data ratio."""

    def __post_init__(self) -> None:
        """Jit the methods once for all tests of the case."""

        def update(agent: Any, batch: Batch) -> tuple[Any, Info]:
            self.traces[batch["rewards"].shape[0]] += 1
            return agent.update(batch)

        act = functools.partial(jax.jit, static_argnums=3, compiler_options=QUICK)
        self.create = jax.jit(self.make, compiler_options=QUICK)
        traced = jax.jit(update, inline=True)  # traced once for both
        self.update = jax.jit(traced, compiler_options=QUICK)

        def side_by_side(agents: Any, batches: Any) -> Any:
            stacked = (jax.tree.map(lambda *leaves: jnp.stack(leaves), *each) for each in (agents, batches))
            return [
                [jax.tree.map(lambda leaf, i=i: leaf[i], part) for i in range(2)] for part in jax.vmap(traced)(*stacked)
            ]

        self.update_side_by_side = jax.jit(side_by_side, compiler_options=QUICK)
        self.act = act(lambda agent, obs, rng, det: agent.sample_actions(obs, fresh_carry(agent, obs), rng, det))
        self.go_on = act(lambda agent, obs, rng, det, carry: agent.sample_actions(obs, carry, rng, det))

    def make(self, rng: jax.Array) -> Any:
        """Return the agent of a key, in the case's phase."""
        observations = observed(self.name, jnp.zeros((1, OBSERVATION_DIM)))
        actions = jnp.zeros((1, ACTION_DIM))
        agent = AGENTS[self.name].create(rng, observations, actions, CONFIGS[self.name])
        return agent.online() if self.phase == "online" else agent

    @functools.cached_property
    def agent(self) -> Any:
        """The agent of key 0."""
        return self.create(jax.random.key(0))

    def batch(self, utd: int, seed: int = 0) -> Batch:
        """Return random minibatches of what the agent learns from."""
        batch = make_batch(utd, seed, self.agent.needs.window)
        if self.phase == "online" and self.agent.config.online.replay == "rollout":
            batch["ends"] = 1.0 - batch["masks"]
        keys = ("observations", "next_observations")
        return {**batch, **{key: observed(self.name, batch[key]) for key in keys}}

    @functools.cached_property
    def updated(self) -> tuple[Any, Info]:
        """The agent and its metrics after one call with three minibatches."""
        return self.update(self.agent, self.batch(3))

    @property
    def critic_blocks(self) -> tuple[str, ...]:
        """Names of the networks that step once per minibatch."""
        return EVERY_BLOCK.get(self.name, ("critic", "dual"))

    def learns(self, network: str) -> bool:
        """Whether a network learns in this phase."""
        if self.phase == "online":
            return network not in FROZEN_ONLINE.get(self.name, ())
        return network in BEFORE_ONLINE.get(self.name, (network,))


def check_protocol(case: Case) -> None:
    """It is an `Agent` whose config is static, hashable and complete, and whose leaves are distinct device arrays."""
    agent = case.agent
    assert isinstance(agent, Agent) and isinstance(agent.needs, Needs)
    assert hash(agent.config) == hash(replace(agent.config))
    assert agent.config.batch_size == ROWS and agent.config.discount == 0.99
    assert agent.config.online.utd_ratio >= 1
    leaves = jax.tree.leaves(agent)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    plain = [leaf for leaf in leaves if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    assert not any(leaf.weak_type for leaf in plain)
    assert len({leaf.unsafe_buffer_pointer() for leaf in plain}) == len(plain)  # or donation fails


def check_finite_update(case: Case) -> None:
    """One call gives finite parameters and scalar metrics named like `critic/loss`, and moves the agent."""
    agent, info = case.updated
    for leaf in jax.tree.leaves(agent):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            assert np.all(np.isfinite(leaf))
    assert info and all("/" in name for name in info)
    assert all(value.shape == () and np.isfinite(value) for value in info.values())
    assert np.any(jax.random.key_data(agent.rng) != jax.random.key_data(case.agent.rng))
    moved = models(agent)
    for name, before in models(case.agent).items():
        pairs = zip(jax.tree.leaves(before.params), jax.tree.leaves(moved[name].params), strict=True)
        assert any(np.any(one != two) for one, two in pairs) == case.learns(name), name


def check_one_trace(case: Case) -> None:
    """Three calls of one shape, each on the result of the one before, are traced once; another ratio once more.

    The later ones move nothing between host and device.
    """
    for utd in (3, 1):
        agent = case.agent
        for i in range(3):
            batch = case.batch(utd, seed=i)
            with jax.transfer_guard("disallow" if i else "allow"):
                agent, info = case.update(agent, batch)
            assert all(np.isfinite(value) for value in info.values())
        assert case.traces[utd] == 1
        assert jax.tree.structure(agent) == jax.tree.structure(case.agent)


def check_optimisers_step_only_with_their_loss(case: Case) -> None:
    """A call with three minibatches steps the per-minibatch networks three times and the others once."""
    for name, model in models(case.updated[0]).items():
        steps = np.max(model.opt_state[0].count) - np.max(models(case.agent)[name].opt_state[0].count)
        expected = 3 if {name, name.split("/")[-1]} & set(case.critic_blocks) else 1
        assert steps == (expected if case.learns(name) else 0), name


def check_actions(case: Case) -> None:
    """Actions are float32 in [-1, 1] for one observation and for batches; only samples depend on the key."""
    agent = case.updated[0]
    for shape in ((), (2, 5)):
        observations = observed(case.name, 3.0 * jax.random.normal(jax.random.key(1), (*shape, OBSERVATION_DIM)))
        actions = []
        for deterministic, seed in ((False, 1), (False, 1), (False, 2), (True, 1), (True, 2)):
            sample, _ = case.act(agent, observations, jax.random.key(seed), deterministic)
            assert sample.shape == (*shape, ACTION_DIM) and sample.dtype == jnp.float32
            assert float(jnp.abs(sample).max()) <= 1.0
            actions.append(np.asarray(sample))
        np.testing.assert_array_equal(actions[0], actions[1])
        assert not shape or np.any(actions[0] != actions[2])  # two draws may choose the same action once
        if case.name in ALWAYS_SAMPLED:
            np.testing.assert_array_equal(actions[0], actions[3])
            continue
        np.testing.assert_array_equal(actions[3], actions[4])
        assert not shape or np.any(actions[0] != actions[3])


def check_carry(case: Case) -> None:
    """What the policy carries keeps structure, shapes and types, has the batch's axes, and serves each entry alone."""
    agent = case.updated[0]
    observations = observed(case.name, jax.random.normal(jax.random.key(1), (2, 5, OBSERVATION_DIM)))
    described = lambda carry: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), carry)  # noqa: E731
    fresh = agent.initial_carry((2, 5))
    assert all(leaf.shape[:2] == (2, 5) for leaf in jax.tree.leaves(fresh))
    carry = fresh
    for seed in range(3):
        _, carry = case.go_on(agent, observations, jax.random.key(seed), True, carry)
        assert described(carry) == described(fresh)
    early = jnp.arange(2)[:, None] == 0  # the first row begins new episodes, the second goes on
    mixed = jax.tree.map(lambda a, b: jnp.where(early.reshape(2, *[1] * (a.ndim - 1)), a, b), fresh, carry)
    actions = [case.go_on(agent, observations, jax.random.key(9), True, each)[0] for each in (fresh, carry, mixed)]
    np.testing.assert_allclose(actions[2], jnp.concatenate([actions[0][:1], actions[1][1:]]), atol=1e-6)


def check_vmap_over_seeds(case: Case) -> None:
    """Two seeds under `vmap` learn what each learns alone."""
    keys = jax.random.split(jax.random.key(5), 2)
    alike = [case.create(key) for key in keys]
    batches = [case.batch(3, seed=seed) for seed in (0, 1)]
    together, infos = case.update_side_by_side(tuple(alike), tuple(batches))
    for i in range(2):
        alone, info = case.update(alike[i], batches[i])
        assert_same(together[i], alone, atol=1e-3)
        assert_same(infos[i], info, atol=1e-2)


def check_reproducible(case: Case) -> None:
    """The same key gives the same agent bit for bit after an update; another key another one."""
    again, info = case.update(case.create(jax.random.key(0)), case.batch(3))
    assert_same(again, case.updated[0])
    assert_same(info, case.updated[1])
    other = case.create(jax.random.key(1))
    first = [next(iter(models(agent).values())) for agent in (case.agent, other)]
    pairs = zip(*(jax.tree.leaves(model.params) for model in first), strict=True)
    assert any(np.any(one != two) for one, two in pairs)


def check_round_trip(case: Case) -> None:
    """Leaves and treedef are the whole agent: rebuilt from host copies, it goes on exactly as the original."""
    agent = case.updated[0]
    leaves, treedef = jax.tree.flatten(agent)
    copies = [
        jax.random.wrap_key_data(jnp.asarray(np.asarray(jax.random.key_data(leaf))))
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else jnp.asarray(np.asarray(leaf))
        for leaf in leaves
    ]
    rebuilt = jax.tree.unflatten(treedef, copies)
    assert_same(rebuilt, agent)
    assert_same(case.update(rebuilt, case.batch(3, seed=2)), case.update(agent, case.batch(3, seed=2)))


def check_online_keeps_the_policy(case: Case) -> None:
    """The switch, with no update in between, leaves the deterministic action as it was, and the result can learn."""
    agent = case.updated[0]
    online = jax.jit(lambda agent: agent.online(), compiler_options=QUICK)(agent)
    observations = observed(case.name, jax.random.normal(jax.random.key(3), (2, 5, OBSERVATION_DIM)))
    key, on_policy = jax.random.key(0), online.config.online.replay == "rollout"
    kept = case.phase == "online" or case.name not in NEW_AT_THE_SWITCH
    for deterministic in (True, False) if kept else ():
        before, _ = case.act(agent, observations, key, deterministic)
        after, _ = case.act(online, observations, key, deterministic)
        np.testing.assert_allclose(after, before, atol=1e-6)
    assert isinstance(online, Agent)
    assert jax.tree.structure(online.online()) == jax.tree.structure(online)
    if case.phase == "offline" and case.name in ONLINE_CASES:
        return
    _, info = case.update(online, {**case.batch(1), "ends": jnp.zeros((1, ROWS))} if on_policy else case.batch(1))
    assert all(np.isfinite(value) for value in info.values())


def check_terminal_rows_have_the_reward_as_target(case: Case) -> None:
    """With masks of 0 the critics' target is the reward; with masks of 1 it is not.

    For windows, whose reward is a sum: with masks of 0 it does not depend on the next states, with masks of 1 it does.
    """
    batch = case.batch(3)
    _, info = case.update(case.agent, {**batch, "masks": jnp.zeros_like(batch["masks"])})
    if "critic/target" not in info:
        assert not any("critic" in name and case.learns(name) for name in models(case.agent))
        return
    if case.agent.needs.window > 1:
        for mask, bootstraps in ((0.0, False), (1.0, True)):
            rows = {**batch, "masks": jnp.full_like(batch["masks"], mask), "valid": jnp.ones_like(batch["valid"])}
            elsewhere = {**rows, "next_observations": jax.tree.map(lambda leaf: leaf + 1.0, rows["next_observations"])}
            targets = [float(case.update(case.agent, each)[1]["critic/target"]) for each in (rows, elsewhere)]
            assert (abs(targets[0] - targets[1]) > 1e-4) == bootstraps
        return
    reward = float(batch["rewards"].mean())
    assert abs(float(info["critic/target"]) - reward) < 1e-5
    _, info = case.update(case.agent, {**batch, "masks": jnp.ones_like(batch["masks"])})
    assert abs(float(info["critic/target"]) - reward) > 1e-4


CHECKS = [value for name, value in globals().items() if name.startswith("check_")]
