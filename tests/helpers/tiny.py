"""Toy batches and networks for the tests of the actor-critic family."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from o2o.agents.sac import SAC
from o2o.types import Batch, Info

OBSERVATION_DIM, ACTION_DIM, ROWS = 3, 2, 8


def forget_many_programs() -> None:
    """Drop compiled programs before they are too many: each maps memory, and Linux allows some 65,000 of them."""
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


def make_batch(utd: int | None = None, rows: int = ROWS, seed: int = 0) -> Batch:
    """Return random transitions, row 0 of each minibatch terminal, leaves `[utd, rows, ...]` or `[rows, ...]`."""
    draw = np.random.default_rng(seed).normal
    shape = (rows,) if utd is None else (utd, rows)
    masks = np.ones(shape)
    masks[..., 0] = 0.0
    batch = {
        "observations": draw(size=(*shape, OBSERVATION_DIM)),
        "actions": np.tanh(draw(size=(*shape, ACTION_DIM))),
        "rewards": draw(size=shape),
        "masks": masks,
        "next_observations": draw(size=(*shape, OBSERVATION_DIM)),
        "mc_returns": draw(size=shape),
    }
    return {name: jnp.asarray(rows, jnp.float32) for name, rows in batch.items()}


def tiny(config: Any, **changes: Any) -> Any:
    """Return `config` with two hidden layers of 16, four critics at most, and `changes`."""
    small = {"actor_hidden_dims": (16, 16), "critic_hidden_dims": (16, 16), "num_critics": min(config.num_critics, 4)}
    return replace(config, **{**small, "batch_size": ROWS, **changes})


@functools.cache
def create(agent_class: Any, config: Any) -> Any:
    """Return the agent of key 0 and toy dimensions."""
    observations, actions = jnp.zeros((1, OBSERVATION_DIM)), jnp.zeros((1, ACTION_DIM))
    return jax.jit(lambda key: agent_class.create(key, observations, actions, config))(jax.random.key(0))


def set_config(agent: Any, **changes: Any) -> Any:
    """Return `agent` with settings changed that its networks do not depend on."""
    return agent.replace(config=replace(agent.config, **changes))


@jax.jit
def next_values(agent: Any, batch: Batch, rng: jax.Array) -> jax.Array:
    """Return the agent's v'(s') on leaves `[rows, ...]`: its targets y without rewards and terminals, undiscounted."""
    if isinstance(agent, SAC):
        endless = {**batch, "rewards": jnp.zeros_like(batch["rewards"]), "masks": jnp.ones_like(batch["masks"])}
        return agent.targets(endless, rng) / agent.config.discount
    return agent.next_values(batch["next_observations"], rng)


@jax.jit
def critic_step(agent: Any, batch: Batch, rng: jax.Array) -> tuple[Any, Info]:
    """Step the agent's critics on leaves `[rows, ...]`."""
    return agent.update_critic(batch, rng)


@jax.jit
def policy_step(agent: Any, batch: Batch, rng: jax.Array, critic: Any) -> tuple[Any, Info]:
    """Step the agent's actor and temperature on leaves `[rows, ...]`."""
    return agent.update_policy(batch, rng, critic)


@jax.jit
def update(agent: Any, batch: Batch) -> tuple[Any, Info]:
    """Run one call of the agent on leaves `[utd, rows, ...]`."""
    return agent.update(batch)


def policy_gradient(agent: Any, batch: Batch, rng: jax.Array, critic: Any = None) -> Any:
    """Return the actor's gradient, read from the first moment (1 - 0.9) g of its first Adam step."""
    stepped, _ = policy_step(agent, batch, rng, critic or agent.critic)
    return jax.tree.map(lambda moment: moment / 0.1, stepped.actor.opt_state[0].mu)


def constant_critic(params: Any, value: float, member: int | None = None) -> Any:
    """Return critic parameters whose members (or one, in an ensemble without shared output) are `value` everywhere."""
    tree = dict(params["params"])
    name = "output" if "output" in tree else "shared_output"
    index = slice(None) if member is None else member
    head = tree[name]
    tree[name] = {"kernel": head["kernel"].at[index].set(0.0), "bias": head["bias"].at[index].set(value)}
    return {"params": tree}


def constant_policy(agent: Any, std: float, mean: float | None = 0.0) -> Any:
    """Return `agent` (`exp` std) with the same std, and unless None the same mean before tanh, at every state."""
    tree = dict(agent.actor.params["params"])
    for name, bias in (("mean", mean), ("log_std", float(np.log(std)))):
        if bias is not None:
            head = tree[name]
            tree[name] = {"kernel": jnp.zeros_like(head["kernel"]), "bias": jnp.full_like(head["bias"], bias)}
    return agent.replace(actor=agent.actor.replace(params={"params": tree}))


def moved(one: Any, two: Any) -> bool:
    """Whether any leaf of two pytrees of the same structure differs."""
    return largest_difference(one, two) > 0.0


def steps(model: Any) -> int:
    """Return how often the model's Adam has stepped."""
    return int(model.opt_state[0].count)


def largest_difference(left: Any, right: Any) -> float:
    """Return the largest absolute difference between two pytrees of the same structure."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return max(float(jnp.max(jnp.abs(one - two))) for one, two in pairs)
