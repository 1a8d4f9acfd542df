"""The jitted programs of the two phases: hundreds of offline updates per call; two calls per online environment step.

All take and return state with a leading seed axis `[S]`. One seed runs without that axis inside (no batched products of
size one); several run under `vmap`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp

from o2o.data.normalizer import Normalizer, normalize
from o2o.nn.kernels import seeds_in_turn
from o2o.nn.modules import where_leading
from o2o.replay.buffer import TRANSITION_KEYS, OfflineData, ReplayBuffer, sample_minibatches
from o2o.rl.chunks import planned_in_turn
from o2o.types import Array, Batch, Carry, Info, Phase


class Placed(Protocol):
    """A dataset, wherever its observations are: an `OfflineData`, or a `HostData` (`o2o.replay.host`)."""

    @property
    def light(self) -> OfflineData:
        """What of it is on the device."""
        ...

    def batch_shapes(self, shape: tuple[int, ...], window: int = 1) -> Batch:
        """Return the shapes and types of what a draw of `shape` gives an agent with this `window`."""
        ...


def over_seeds(function: Callable[..., Any], seeds: int, in_axes: Any = 0, in_turn: bool = False) -> Callable[..., Any]:
    """Map `function` over the leading seed axis of its arguments (those with in_axes 0).

    `in_turn`: one seed after the other, all arguments per seed and copied; not for a replay buffer.
    """
    if seeds > 1 and in_turn:
        return lambda *args: jax.lax.map(lambda each: function(*each), args)
    if seeds > 1:
        return jax.vmap(function, in_axes=in_axes)

    def single(*args: Any) -> Any:
        axes = in_axes if isinstance(in_axes, tuple) else (in_axes,) * len(args)
        stripped = [jax.tree.map(lambda leaf: leaf[0], a) if ax == 0 else a for a, ax in zip(args, axes, strict=True)]
        return jax.tree.map(lambda leaf: leaf[None], function(*stripped))

    return single


def each_seed(function: Callable[[Any], Any], stacked: Any) -> Any:
    """Apply `function` to one seed after the other and stack the results; for initialisation.

    Not `vmap`: batched orthogonal initialisers can deadlock on XLA's CPU back end (jaxlib 0.10.2, 2 cores).
    """
    seeds = jax.tree.leaves(stacked)[0].shape[0]
    results = [function(jax.tree.map(lambda leaf, m=member: leaf[m], stacked)) for member in range(seeds)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)


@partial(jax.jit, static_argnames=("agent_class", "config"))
def create_agent(rng: Array, observations: Any, actions: Array, *, agent_class: Any, config: Any) -> Any:
    """Initialise one agent from example observations `[1, D]` and actions `[1, A]`."""
    return agent_class.create(rng, observations, actions, config)


@jax.jit
def to_online(agent: Any) -> Any:
    """Return one agent in its online form."""
    return agent.online()


def metric_zeros(agent: Any, data: Placed, phase: Phase | None = None) -> Info:
    """Return zeros shaped like the metrics of one seed's update, in a `phase` (they depend on no batch size)."""
    if phase is not None and phase.update is not None:
        step = phase.update
        infos = jax.eval_shape(lambda a, d: step(a, d, jnp.zeros(()))[1], agent, data)
    else:
        batch = data.batch_shapes((1, agent.config.batch_size), agent.needs.window)
        infos = jax.eval_shape(lambda a, b: a.update(b)[1], agent, batch)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), infos)


@partial(jax.jit, static_argnames=("seeds", "batch_size", "phase"), donate_argnames=("agent", "rng"))
def offline_updates(
    agent: Any,
    rng: Array,
    data: OfflineData,
    num_updates: Array,
    *,
    seeds: int,
    batch_size: int,
    phase: Phase | None = None,
    begin: Array | float = 0.0,
    length: Array | float = 1.0,
) -> tuple[Any, Array, Info]:
    """Run `num_updates` (traced: no recompile) updates on dataset minibatches; metrics are means, `[S]` each.

    With a `phase` that has an `update` of its own: its updates, of which `begin` of `length` (traced) are done.
    """

    step = None if phase is None else phase.update

    def one_seed(agent: Any, rng: Array) -> tuple[Any, Array, Info]:
        def body(i: int, state: tuple[Any, Array, Info]) -> tuple[Any, Array, Info]:
            agent, rng, totals = state
            if step is not None:
                agent, info = step(agent, data, jnp.asarray((begin + i) / length))
            else:
                rng, key = jax.random.split(rng)
                agent, info = agent.update(data.draw(key, (1, batch_size), agent.needs.window))
            return agent, rng, jax.tree.map(jnp.add, totals, info)

        start = (agent, rng, metric_zeros(agent, data, phase))
        agent, rng, totals = jax.lax.fori_loop(0, num_updates, body, start)
        return agent, rng, jax.tree.map(lambda total: total / num_updates, totals)

    return over_seeds(one_seed, seeds, in_turn=seeds_in_turn(agent))(agent, rng)


@partial(jax.jit, static_argnames=("seeds", "check"), donate_argnames="agent")
def check_phase(agent: Any, data: OfflineData, *, seeds: int, check: Callable[[Any, Any], Any]) -> Any:
    """Let every agent look at what a phase of its pre-training has made so far (`Phase.check`)."""
    return over_seeds(lambda a: check(a, data), seeds)(agent)


class OnlineState(NamedTuple):
    """All device state of the online phase, leading axis `[S]`."""

    agent: Any
    buffer: ReplayBuffer
    carry: Carry
    rng: Array
    totals: Info
    """Metrics summed since the last log row."""


class OnlineMode(NamedTuple):
    """What one online call does; static, so each value is one compiled program."""

    seeds: int
    update: bool
    random: bool
    pending: bool
    utd_ratio: int
    batch_size: int
    offline_ratio: float
    window: int = 1
    overlap: bool = False
    """Choose before the update, so that it runs while the environments step (`LoopConfig.overlap`)."""

    def before_learning(self) -> Self:
        """Return what the program that chooses does: with `overlap`, nothing else."""
        return self._replace(update=False, overlap=False) if self.overlap else self

    def draw(self, rng: Array, offline: OfflineData | None, buffer: ReplayBuffer, utd_ratio: int) -> Batch:
        """Draw the minibatches of `utd_ratio` critic updates."""
        return sample_minibatches(rng, offline, buffer, utd_ratio, self.batch_size, self.offline_ratio, self.window)


def fresh_online_state(agent: Any, rng: Array, offline: Placed, capacity: int, append: bool) -> OnlineState:
    """Return the state at the switch: agents `[S]` in online form, replay empty or (`append`) holding the dataset."""
    seeds = rng.shape[0]
    rows = {key: offline.light.rows[key] for key in (*TRANSITION_KEYS, *agent.needs.keys, "ends")}
    buffer = ReplayBuffer.create(jax.tree.map(lambda leaf: leaf[0], rows), capacity)
    buffer = buffer.extend(rows) if append else buffer
    buffer = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (seeds, *leaf.shape)).copy(), buffer)
    carry = jax.vmap(lambda a: a.initial_carry((1,)))(agent)
    totals = over_seeds(lambda a: metric_zeros(a, offline), seeds)(agent)
    return OnlineState(agent, buffer, carry, rng, totals)


def choose(
    agent: Any, normalizer: Normalizer | None, observation: Any, carry: Carry, rng: Array, random: bool, action_dim: int
) -> tuple[Array, Carry]:
    """Return one observation's action `[A]`, at random where the phase wants it, and the next carry."""
    batched = jax.tree.map(lambda leaf: leaf[None], normalize(normalizer, observation))
    if random:
        return agent.random_actions(batched, rng, action_dim)[0], carry
    actions, carry = agent.sample_actions(batched, carry, rng, False)
    return actions[0], carry


def clear_carry(carry: Carry, fresh: Carry, ended: Any) -> Carry:
    """Put `fresh` where `ended [...]` is true, leaves `[..., *]`: what a policy remembers ends with its episode."""
    return where_leading(ended, fresh, carry)


@partial(jax.jit, static_argnames=("seeds", "random"))
def first_actions(
    state: OnlineState, normalizer: Normalizer | None, observations: Any, *, seeds: int, random: bool
) -> tuple[OnlineState, Array]:
    """Choose the actions `[S, A]` for the first observations `[S, D]` of the phase."""
    action_dim = state.buffer.rows["actions"].shape[-1]

    def one_seed(agent: Any, carry: Carry, rng: Array, observation: Any) -> tuple[Array, Carry, Array]:
        rng, key = jax.random.split(rng)
        action, carry = choose(agent, normalizer, observation, carry, key, random, action_dim)
        return action, carry, rng

    action, carry, rng = over_seeds(one_seed, seeds)(state.agent, state.carry, state.rng, observations)
    return state._replace(carry=carry, rng=rng), action


@partial(jax.jit, static_argnames="mode", donate_argnames="state")
def initial_updates(state: OnlineState, offline: OfflineData | None, count: Array, *, mode: OnlineMode) -> OnlineState:
    """Run `count` (traced) updates on minibatches `[1, B, ...]` of `mode`'s kind; their metrics join the totals."""

    def one_seed(state: OnlineState) -> OnlineState:
        def body(_: int, state: OnlineState) -> OnlineState:
            rng, key = jax.random.split(state.rng)
            agent, info = state.agent.update(mode.draw(key, offline, state.buffer, 1))
            return state._replace(agent=agent, rng=rng, totals=jax.tree.map(jnp.add, state.totals, info))

        return jax.lax.fori_loop(0, count, body, state)

    return over_seeds(one_seed, mode.seeds)(state)


@partial(jax.jit, static_argnames=("seeds", "pending"), donate_argnames="buffer")
def insert(
    buffer: ReplayBuffer, normalizer: Normalizer | None, rows: Batch, *, seeds: int, pending: bool
) -> ReplayBuffer:
    """Store one raw transition per seed, `rows` `[S, ...]`, normalised; `pending` hides it until `commit_episodes`.

    A program of its own: in one that also draws, XLA copies the whole buffer in every step.
    """

    def one_seed(buffer: ReplayBuffer, row: Batch) -> ReplayBuffer:
        row = {key: normalize(normalizer, v) if key.endswith("observations") else v for key, v in row.items()}
        return buffer.add(row, pending=pending)

    return over_seeds(one_seed, seeds)(buffer, rows)


def updated(agent: Any, totals: Info, batches: Batch, seeds: int) -> tuple[Any, Info]:
    """Run every seed's update call on its batch, leaves `[S, ...]`; its metrics join the totals."""

    def one_seed(agent: Any, totals: Info, batch: Batch) -> tuple[Any, Info]:
        agent, info = agent.update(batch)
        return agent, jax.tree.map(jnp.add, totals, info)

    return over_seeds(one_seed, seeds, in_turn=seeds_in_turn(agent))(agent, totals, batches)


def learned(
    agent: Any, totals: Info, rng: Array, buffer: ReplayBuffer, offline: OfflineData | None, mode: OnlineMode
) -> tuple[Any, Info]:
    """Run every seed's update call on what the key `rng` `[S]` of its step draws; its metrics join the totals."""

    def draw(rng: Array, buffer: ReplayBuffer) -> Batch:
        return mode.draw(jax.random.split(rng, 3)[1], offline, buffer, mode.utd_ratio)

    return updated(agent, totals, over_seeds(draw, mode.seeds)(rng, buffer), mode.seeds)


@partial(jax.jit, static_argnames="mode", donate_argnames=("agent", "totals"))
def learn(
    agent: Any, totals: Info, rng: Array, buffer: ReplayBuffer, offline: OfflineData | None, *, mode: OnlineMode
) -> tuple[Any, Info]:
    """Run the update call of `learn_and_choose` alone, on the same draw."""
    return learned(agent, totals, rng, buffer, offline, mode)


@partial(jax.jit, static_argnames="mode", donate_argnames=("agent", "carry", "totals"))
def learn_and_choose(
    agent: Any,
    carry: Carry,
    rng: Array,
    totals: Info,
    buffer: ReplayBuffer,
    offline: OfflineData | None,
    normalizer: Normalizer | None,
    observations: Any,
    ended: Array,
    *,
    mode: OnlineMode,
) -> tuple[Any, Carry, Array, Info, Array]:
    """Run one update call, then choose the next actions `[S, A]` for raw `observations` `[S, D]`.

    `ended` `[S]` clears the carry.
    """

    action_dim = buffer.rows["actions"].shape[-1]

    def act(agent: Any, carry: Carry, rng: Array, observation: Any, ended: Array) -> tuple[Carry, Array, Array]:
        rng, _, act_rng = jax.random.split(rng, 3)
        carry = clear_carry(carry, agent.initial_carry((1,)), ended)
        action, carry = choose(agent, normalizer, observation, carry, act_rng, mode.random, action_dim)
        return carry, rng, action

    if mode.update:
        agent, totals = learned(agent, totals, rng, buffer, offline, mode)
    in_turn = planned_in_turn(carry)
    carry, rng, action = over_seeds(act, mode.seeds, in_turn=in_turn)(agent, carry, rng, observations, ended)
    return agent, carry, rng, totals, action


def online_step(
    state: OnlineState,
    offline: OfflineData | None,
    normalizer: Normalizer | None,
    rows: Batch,
    observations: Any,
    ended: Array,
    *,
    mode: OnlineMode,
) -> tuple[OnlineState, Array]:
    """Insert `rows` `[S, ...]`, run one update call, choose the next actions `[S, A]` for `observations` `[S, D]`.

    `ended` `[S]` clears the carry. Rows and observations come raw. With `mode.overlap` the actions are chosen first,
    and are there while the update is still under way.
    """
    buffer = insert(state.buffer, normalizer, rows, seeds=mode.seeds, pending=mode.pending)
    first = mode.before_learning()
    agent, carry, rng, totals, action = learn_and_choose(
        state.agent, state.carry, state.rng, state.totals, buffer, offline, normalizer, observations, ended, mode=first
    )
    if mode.update and mode.overlap:
        agent, totals = learn(agent, totals, state.rng, buffer, offline, mode=mode)
    return OnlineState(agent, buffer, carry, rng, totals), action


@partial(jax.jit, static_argnames="seeds", donate_argnames="buffer")
def commit_episodes(buffer: ReplayBuffer, mc_returns: Array, counts: Array, *, seeds: int) -> ReplayBuffer:
    """Make the newest `counts` `[S]` rows visible with their returns-to-go `mc_returns` `[S, L]`."""
    return over_seeds(lambda b, g, n: b.commit(g, n), seeds)(buffer, mc_returns, counts)
