"""What every agent promises the loops; `test_contract.py` runs it on each entry of `AGENTS`.

A `Case` is one agent at toy size, in one phase, with jitted methods that count their traces.
"""

import functools
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from o2o.agents import AGENTS, BCConfig, CalQLConfig, CQLConfig, IQLConfig, RLPDConfig, SACConfig, WSRLConfig
from o2o.networks import Model
from o2o.types import Agent, Batch, Info

OBSERVATION_DIM, ACTION_DIM, ROWS = 3, 2, 8
QUICK = {"xla_backend_optimization_level": 0}
"""Compiler options: toy programs take longer to compile than to run."""
HIDDEN = {"actor_hidden_dims": (16, 16), "batch_size": ROWS}
CRITICS = {**HIDDEN, "critic_hidden_dims": (16, 16)}

CONFIGS: dict[str, Any] = {
    "bc": replace(BCConfig(), **HIDDEN, dropout=0.1),
    "iql": replace(IQLConfig(), **CRITICS, value_hidden_dims=(16, 16), dropout=0.1, actor_decay_steps=100),
    "cql": replace(CQLConfig(), **CRITICS, num_critics=3),
    "calql": replace(CalQLConfig(), **CRITICS, num_critics=3),
    "sac": replace(SACConfig(), **CRITICS),
    "rlpd": replace(RLPDConfig(), **CRITICS, num_critics=3),
    "wsrl": replace(WSRLConfig(), **CRITICS, num_critics=3),
}

EVERY_BLOCK = {"bc": ("actor",), "iql": ("actor", "critic", "value")}
"""Networks that step once per minibatch; the others step once per call. Every agent not listed steps its critic so."""


def make_batch(utd: int, seed: int = 0) -> Batch:
    """Return random transitions with Monte-Carlo returns, leaves `[utd, ROWS, ...]`."""
    keys = jax.random.split(jax.random.key(seed), 6)
    shape = (utd, ROWS)
    return {
        "observations": jax.random.normal(keys[0], (*shape, OBSERVATION_DIM)),
        "actions": jnp.tanh(jax.random.normal(keys[1], (*shape, ACTION_DIM))),
        "rewards": jax.random.normal(keys[2], shape),
        "masks": (jax.random.uniform(keys[3], shape) > 0.2).astype(jnp.float32),
        "next_observations": jax.random.normal(keys[4], (*shape, OBSERVATION_DIM)),
        "mc_returns": jax.random.normal(keys[5], shape),
    }


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
        self.update = jax.jit(update, compiler_options=QUICK)
        self.act = act(lambda agent, obs, rng, det: agent.sample_actions(obs, None, rng, det))

    def make(self, rng: jax.Array) -> Any:
        """Return the agent of a key, in the case's phase."""
        observations, actions = jnp.zeros((1, OBSERVATION_DIM)), jnp.zeros((1, ACTION_DIM))
        agent = AGENTS[self.name].create(rng, observations, actions, CONFIGS[self.name])
        return agent.online() if self.phase == "online" else agent

    @functools.cached_property
    def agent(self) -> Any:
        """The agent of key 0."""
        return self.create(jax.random.key(0))

    @functools.cached_property
    def updated(self) -> tuple[Any, Info]:
        """The agent and its metrics after one call with three minibatches."""
        return self.update(self.agent, make_batch(3))

    @property
    def critic_blocks(self) -> tuple[str, ...]:
        """Names of the networks that step once per minibatch."""
        return EVERY_BLOCK.get(self.name, ("critic", "dual"))


def check_protocol(case: Case) -> None:
    """It is an `Agent` whose config is static, hashable and complete, and whose leaves are distinct device arrays."""
    agent = case.agent
    assert isinstance(agent, Agent) and isinstance(agent.needs, tuple)
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
        assert any(np.any(one != two) for one, two in pairs), f"{name} did not move"


def check_one_trace(case: Case) -> None:
    """Three calls of one shape, each on the result of the one before, are traced once; another ratio once more."""
    for utd in (3, 1):
        agent = case.agent
        for i in range(3):
            agent, info = case.update(agent, make_batch(utd, seed=i))
            assert all(np.isfinite(value) for value in info.values())
        assert case.traces[utd] == 1
        assert jax.tree.structure(agent) == jax.tree.structure(case.agent)


def check_optimisers_step_only_with_their_loss(case: Case) -> None:
    """A call with three minibatches steps the per-minibatch networks three times and the others once."""
    for name, model in models(case.updated[0]).items():
        steps = int(model.opt_state[0].count) - int(models(case.agent)[name].opt_state[0].count)
        assert steps == (3 if name.split("/")[-1] in case.critic_blocks else 1), name


def check_actions(case: Case) -> None:
    """Actions are float32 in [-1, 1] for one observation and for batches; only samples depend on the key."""
    agent = case.updated[0]
    for shape in ((), (5,), (2, 5)):
        observations = 3.0 * jax.random.normal(jax.random.key(1), (*shape, OBSERVATION_DIM))
        actions = []
        for deterministic, seed in ((False, 1), (False, 1), (False, 2), (True, 1), (True, 2)):
            sample, carry = case.act(agent, observations, jax.random.key(seed), deterministic)
            assert sample.shape == (*shape, ACTION_DIM) and sample.dtype == jnp.float32
            assert float(jnp.abs(sample).max()) <= 1.0
            assert carry is None and agent.initial_carry(shape) is None
            actions.append(np.asarray(sample))
        np.testing.assert_array_equal(actions[0], actions[1])
        np.testing.assert_array_equal(actions[3], actions[4])
        assert np.any(actions[0] != actions[2]) and np.any(actions[0] != actions[3])


def check_vmap_over_seeds(case: Case) -> None:
    """Two seeds under `vmap` learn what each learns alone."""
    keys = jax.random.split(jax.random.key(5), 2)
    agents = jax.jit(jax.vmap(case.make), compiler_options=QUICK)(keys)
    batches = [make_batch(3, seed=seed) for seed in (0, 1)]
    stacked = {name: jnp.stack([batch[name] for batch in batches]) for name in batches[0]}
    update = jax.jit(jax.vmap(lambda agent, batch: agent.update(batch)), compiler_options=QUICK)
    together, infos = update(agents, stacked)
    for i in range(2):
        alone, info = case.update(case.create(keys[i]), batches[i])
        assert_same(jax.tree.map(lambda leaf, i=i: leaf[i], together), alone, atol=1e-3)
        assert_same({name: value[i] for name, value in infos.items()}, info, atol=1e-2)


def check_reproducible(case: Case) -> None:
    """The same key gives the same agent bit for bit after an update; another key another one."""
    again, info = case.update(case.create(jax.random.key(0)), make_batch(3))
    assert_same(again, case.updated[0])
    assert_same(info, case.updated[1])
    other = case.create(jax.random.key(1))
    kernels = [np.asarray(jax.tree.leaves(agent.actor.params)[-1]) for agent in (case.agent, other)]
    assert np.any(kernels[0] != kernels[1])


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
    assert_same(case.update(rebuilt, make_batch(3, seed=2)), case.update(agent, make_batch(3, seed=2)))


def check_online_keeps_the_policy(case: Case) -> None:
    """The switch, with no update in between, leaves the deterministic action as it was, and the result can learn."""
    agent = case.updated[0]
    online = jax.jit(lambda agent: agent.online(), compiler_options=QUICK)(agent)
    observations = jax.random.normal(jax.random.key(3), (16, OBSERVATION_DIM))
    key = jax.random.key(0)
    for deterministic in (True, False):
        before, _ = case.act(agent, observations, key, deterministic)
        after, _ = case.act(online, observations, key, deterministic)
        np.testing.assert_allclose(after, before, atol=1e-6)
    assert isinstance(online, Agent)
    assert jax.tree.structure(online.online()) == jax.tree.structure(online)
    agent, info = case.update(online, make_batch(1))
    assert all(np.isfinite(value) for value in info.values())


def check_terminal_rows_have_the_reward_as_target(case: Case) -> None:
    """With masks of 0 the critics' target is the reward; with masks of 1 it is not."""
    batch = make_batch(3)
    _, info = case.update(case.agent, {**batch, "masks": jnp.zeros_like(batch["masks"])})
    if "critic/target" not in info:
        assert case.name == "bc"
        return
    reward = float(batch["rewards"].mean())
    assert abs(float(info["critic/target"]) - reward) < 1e-5
    _, info = case.update(case.agent, {**batch, "masks": jnp.ones_like(batch["masks"])})
    assert abs(float(info["critic/target"]) - reward) > 1e-4


CHECKS = [value for name, value in globals().items() if name.startswith("check_")]
