"""The jitted programs of training: updates on minibatches, and acting; one set for every kind of replay.

All take and return state with a leading seed axis `[S]`. One seed runs without that axis inside (no batched products of
size one); several run under `vmap`, or one after the other where that is faster (`o2o.nn.kernels`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from o2o.data.normalizer import Normalizer, normalize
from o2o.errors import ConfigError
from o2o.keys import ACT, INIT, key_at
from o2o.nn.kernels import over_seeds, seeds_in_turn
from o2o.nn.modules import where_leading
from o2o.replay.source import BatchSource, DatasetRows, Sampling
from o2o.rl.chunks import planned_in_turn
from o2o.train.acting import act, clear_carry
from o2o.train.devices import divided
from o2o.types import PRIORITIES, Agent, AgentConfig, Array, Batch, Carry, Info, Phase

Priorities = tuple[Array, Array] | None
"""Slots of the rows that an update learnt from and their new priorities, `[S, utd, B]`; None: rows have none."""
OWN = Sampling(0)
"""The sampling of a phase that draws its own rows."""


@partial(jax.jit, static_argnames=("agent_class", "config"))
def create_agent(
    key: Array, observations: Any, actions: Array, *, agent_class: type[Agent], config: AgentConfig
) -> Agent:
    """Initialise one seed's agent from example observations `[1, D]` and actions `[1, A]`."""
    return agent_class.create(key_at(key, INIT), observations, actions, config)


@jax.jit
def to_online(agent: Agent) -> Agent:
    """Return one agent in its online form."""
    return agent.online()


@partial(jax.jit, inline=True)
def update(agent: Any, batch: Batch) -> tuple[Any, Info]:
    """Run one agent's update call. Jitted, so that it is traced once for all programs that it becomes a part of."""
    return agent.update(batch)


@partial(jax.jit, static_argnames="step", inline=True)
def own_update(agent: Any, data: Any, progress: Array, *, step: Callable[..., tuple[Any, Info]]) -> tuple[Any, Info]:
    """Run one gradient step `Phase.update` of one agent; traced once, as `update` is."""
    return step(agent, data, progress)


def zeros_of(program: Callable[..., Any], agent: Any, *args: Any, **static: Any) -> Info:
    """Return zeros shaped like the metrics of `program(agent, *args)`, leaves `[S]`, for stacked agents `[S, ...]`."""
    seeds = jax.tree.leaves(agent)[0].shape[0]
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), agent)
    infos = _metrics(jax.eval_shape(partial(program, **static), one, *args)[1])
    return jax.tree.map(lambda leaf: jnp.zeros((seeds, *leaf.shape), leaf.dtype), infos)


def _metrics(info: Info) -> Info:
    return {name: value for name, value in info.items() if name != PRIORITIES}


def _add(totals: Info, info: Info) -> Info:
    return jax.tree.map(jnp.add, totals, _metrics(info))


@partial(jax.jit, static_argnames=("sampling", "phase"), donate_argnames=("agent", "totals"))
def updates(
    agent: Any,
    totals: Info,
    source: BatchSource,
    keys: Array,
    at: Array,
    count: Array,
    *,
    sampling: Sampling,
    phase: Phase | None = None,
    begin: Array | int = 0,
) -> tuple[Any, Info]:
    """Run `count` (traced: no recompile) update calls from gradient step `at` on; their metrics join `totals` `[S]`.

    With a `phase` that has an `update` of its own: its gradient steps, the phase having begun at step `begin`.
    """
    seeds, stride = keys.shape[0], max(sampling.utd_ratio, 1)
    if not source.shared:  # rows differ by seed: draw for all seeds, then update them

        def step(i: Array, state: tuple[Any, Info]) -> tuple[Any, Info]:
            return learned(*state, source, keys, at + i * stride, sampling)[:2]

        return jax.lax.fori_loop(0, count, step, (agent, totals))
    assert isinstance(source, DatasetRows)

    def one_seed(agent: Any, totals: Info, key: Array) -> tuple[Any, Info]:
        def step(i: Array, state: tuple[Any, Info]) -> tuple[Any, Info]:
            agent, totals = state
            if phase is not None and phase.update is not None:
                progress = (at + i - begin) / jnp.float32(phase.steps)
                agent, info = own_update(agent, source.data, progress, step=phase.update)
            else:
                agent, info = update(agent, divided(source.one_seed(key, at + i * stride, sampling), axis=1))
            return agent, _add(totals, info)

        return jax.lax.fori_loop(0, count, step, (agent, totals))

    return over_seeds(one_seed, seeds, in_turn=seeds_in_turn(agent))(agent, totals, keys)


def learned(
    agent: Any, totals: Info, source: BatchSource, keys: Array, at: Array, sampling: Sampling
) -> tuple[Any, Info, Priorities]:
    """Run every seed's update call of gradient step `at`; its metrics join the totals. Its priorities come last."""

    def one_seed(agent: Any, totals: Info, batch: Batch) -> tuple[Any, Info, Priorities]:
        agent, info = update(agent, batch)
        if "slots" not in batch:
            return agent, _add(totals, info), None
        if PRIORITIES not in info or info[PRIORITIES].shape != batch["slots"].shape:
            raise ConfigError(
                f"{type(agent).__name__} needs priorities, and its update returns none of shape "
                f"{batch['slots'].shape} as {PRIORITIES!r} among its metrics"
            )
        return agent, _add(totals, info), (batch["slots"], info[PRIORITIES])

    batches = divided(source.minibatches(keys, at, sampling), axis=2)
    return over_seeds(one_seed, keys.shape[0], in_turn=seeds_in_turn(agent))(agent, totals, batches)


@jax.jit
def has_nan(agents: Any) -> Array:
    """Return `[S]` whether an agent of `agents`, leaves `[S, ...]`, has a NaN anywhere."""
    floats = [leaf for leaf in jax.tree.leaves(agents) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.any(jnp.stack([jnp.isnan(leaf).reshape(leaf.shape[0], -1).any(axis=1) for leaf in floats]), axis=0)


@partial(jax.jit, static_argnames="check", donate_argnames="agent")
def check_phase(agent: Any, data: Any, *, check: Callable[[Any, Any], Any]) -> Any:
    """Let every agent look at what a phase of its pre-training has made so far (`Phase.check`)."""
    return over_seeds(lambda a: check(a, data), jax.tree.leaves(agent)[0].shape[0])(agent)


@partial(jax.jit, static_argnames="sampling", donate_argnames=("agent", "totals"))
def learn(
    agent: Any, totals: Info, source: BatchSource, keys: Array, at: Array, *, sampling: Sampling
) -> tuple[Any, Info, Priorities]:
    """Run the update call of `learn_and_act` alone, on the same draw."""
    return learned(agent, totals, source, keys, at, sampling)


@partial(jax.jit, static_argnames=("sampling", "action_dim", "random"), donate_argnames=("agent", "totals", "carry"))
def learn_and_act(
    agent: Any,
    totals: Info,
    carry: Carry,
    source: BatchSource | None,
    normalizer: Normalizer | None,
    keys: Array,
    at: Array,
    observations: Any,
    over: Array,
    env_step: Array,
    *,
    sampling: Sampling,
    action_dim: int,
    random: bool,
) -> tuple[Any, Info, Carry, Array, Priorities]:
    """Run the update call of gradient step `at`, then choose the actions `[S, N, A]` of environment step `env_step`.

    `source` None: no update. `observations` are raw, `[S, N, D]`; `over` `[S, N]` clears the carry; `random`: the
    agent's random actions instead of its policy's.
    """
    given = None
    if source is not None:
        agent, totals, given = learned(agent, totals, source, keys, at, sampling)
    actions, carry = chosen(agent, carry, normalizer, keys, observations, over, env_step, action_dim, random)
    return agent, totals, carry, actions, given


def chosen(
    agent: Any,
    carry: Carry,
    normalizer: Normalizer | None,
    keys: Array,
    observations: Any,
    over: Array,
    env_step: Array,
    action_dim: int,
    random: bool,
) -> tuple[Array, Carry]:
    """Return every seed's actions `[S, N, A]` of environment step `env_step`, and the next carry."""
    choose = partial(_choose, normalizer=normalizer, env_step=env_step, action_dim=action_dim, random=random)
    each = over_seeds(choose, keys.shape[0], in_turn=planned_in_turn(carry))
    return each(agent, carry, keys, observations, over)


@partial(jax.jit, donate_argnames="agent")
def after_episodes(agent: Any, returns: Array, lengths: Array, over: Array) -> Any:
    """Let agents hear of the training episodes that ended where `over`, all `[S, N]`; the others stay as they are."""

    def one_seed(agent: Any, returns: Array, lengths: Array, over: Array) -> Any:
        return where_leading(over.any(), agent.after_episodes(returns, lengths, over), agent)

    return over_seeds(one_seed, over.shape[0])(agent, returns, lengths, over)


def _choose(
    agent: Any,
    carry: Carry,
    key: Array,
    observations: Any,
    over: Array,
    *,
    normalizer: Normalizer | None,
    env_step: Array,
    action_dim: int,
    random: bool,
) -> tuple[Array, Carry]:
    """Return one seed's actions `[N, A]` for raw `observations` `[N, D]`, and the next carry."""
    key = key_at(key, ACT, env_step)
    carry = clear_carry(carry, agent.initial_carry(over.shape), over)
    if random:
        return agent.random_actions(normalize(normalizer, observations), key, action_dim), carry
    return act(agent, normalizer, observations, carry, key)
