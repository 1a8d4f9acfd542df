"""Environments inside the program: act, step, store and update follow one another without leaving the device.

`Simulated` stands where a `Fleet` does, for environments that are pure functions (`o2o.simulators`). What it stands at
is a pytree, which a checkpoint holds: nothing is played again on a resume. One program serves every agent and replay.
"""

from functools import partial
from typing import Any, NamedTuple, Self

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium.wrappers import OrderEnforcing, TimeLimit

from o2o.data.normalizer import Normalizer
from o2o.envs.wrappers import FaultGuard, FlattenObservation, MapAction, TaskReward
from o2o.nn.kernels import over_seeds
from o2o.replay.source import Sampling
from o2o.simulators import Batch, Worlds
from o2o.simulators.batch import Ends
from o2o.simulators.gym import SimulatorEnv
from o2o.train import programs
from o2o.train.collect import check_fits
from o2o.types import Array, Carry, Info, OnlineConfig

KNOWN = (TaskReward, MapAction, FlattenObservation, FaultGuard, TimeLimit, OrderEnforcing)
"""Wrappers whose pure twin is `Batch`."""
SIMULATED = "simulated"
"""Key of what a checkpoint says of the environments: they are among its arrays."""
ROOM = 256
"""Steps of all environments in one call, at most."""


def batch_of(env: gymnasium.Env) -> Batch | None:
    """Return the pure twin of an environment that `o2o.envs.make` made of a simulator; None of any other.

    A recorder, a history or a base policy around a simulator need it stepped from outside, and so do images.
    """
    layers: dict[type, Any] = {}
    while isinstance(env, gymnasium.Wrapper):
        if type(env) not in KNOWN or type(env) in layers:
            return None
        layers[type(env)], env = env, env.env
    if not isinstance(env, SimulatorEnv) or not layers.keys() >= {TaskReward, MapAction, FlattenObservation}:
        return None
    judge, spec, limit = layers[TaskReward], layers[FlattenObservation].observation_spec, layers.get(TimeLimit)
    most = None if limit is None else limit._max_episode_steps
    if spec.images:
        return None
    return Batch(env.simulator, judge.task, spec, layers[MapAction].action_map, most, judge.terminates)


class Simulated:
    """The training environments of all seeds, `[S, N]`, as arrays on the device."""

    replayable, displaced = True, False

    def __init__(self, batch: Batch, keys: Array, per_seed: int) -> None:
        """Begin the first episodes of `per_seed` environments for each seed's key."""
        self.batch = batch
        reset = jax.jit(over_seeds(partial(batch.reset, n=per_seed), keys.shape[0]))
        self.worlds: Worlds = reset(keys)
        self.slots: list[Any] = []
        """None: no environment is reset or replayed by seeds and actions."""
        self.intervened = np.zeros(keys.shape[0] * per_seed, bool)

    def must_fit(self, row: Any, shared: bool) -> Self:
        """Return itself; raises `EnvironmentMismatchError` if its spaces are not those of a `row`."""
        check_fits(row, self.worlds.observations.shape[2:], self.batch.action_map.space.shape)
        return self

    @property
    def observations(self) -> Array:
        """What the policy sees next, `[S * N, D]`."""
        return self.worlds.observations.reshape(-1, self.worlds.observations.shape[-1])

    def may_move(self) -> None:
        """Do nothing: evaluations play in environments of their own."""

    def hold(self) -> None:
        """Do nothing: nothing moves between steps."""

    def pause(self) -> None:
        """Do nothing: nothing moves between steps."""

    def snapshot(self) -> dict[str, Any]:
        """Return what tells a resume that the environments are among the arrays."""
        return {SIMULATED: self.batch.task.name}

    def row(self, ends: Ends, where: tuple[int, ...]) -> dict[str, Any]:
        """Return the row of the episode that ended at an index of `ends`, as `EnvSlot.row` does for training."""
        success = bool(ends.success[where]) if self.batch.knows_success else None
        numbers = {"return": float(ends.returns[where]), "length": int(ends.lengths[where])}
        return {**numbers, "success": success, "intervention": 0.0}

    def close(self) -> None:
        """Do nothing: nothing is open."""


class Live(NamedTuple):
    """What changes from step to step, leaves `[S, ...]` but for counts and the replay's own."""

    agent: Any
    totals: Info
    carry: Carry
    actions: Array
    """The next actions `[S, N, A]`."""
    worlds: Worlds
    replay: Any
    """A `LiveRing` or a `LiveRollout`."""


class Told(NamedTuple):
    """What the host is told of a call."""

    ends: Ends
    """Of every step and environment, `[ROOM, S, N]`."""
    before: Array
    """Update calls before each step, `[ROOM]`."""
    calls: Array
    """Update calls in all, `[]`."""
    finite: Array
    """Whether all actions, and all that the environments gave, were finite: `[2]`."""


@partial(jax.jit, static_argnames=("batch", "online", "sampling", "random"), donate_argnames="live")
def play_and_learn(
    live: Live,
    offline: Any,
    normalizer: Normalizer | None,
    keys: Array,
    at: Array,
    env_steps: Array,
    count: Array,
    *,
    batch: Batch,
    online: OnlineConfig,
    sampling: Sampling,
    random: bool,
) -> tuple[Live, Told]:
    """Run `count` (traced) steps of all environments as `Trainer.step` does, from gradient step `at` on.

    Each plays the chosen actions, stores the rows, runs the update calls that are due, and chooses the next actions:
    all of them by chance (`random`) or by the policies. `offline`: dataset rows that minibatches hold too, or None.
    """
    seeds, per_seed, action_dim = live.actions.shape
    needs, worth = live.agent.needs, live.agent.updates_per_call
    step_worlds = over_seeds(batch.step, seeds)

    def step(i: Array, state: tuple[Live, Told]) -> tuple[Live, Told]:
        (agent, totals, carry, actions, worlds, replay), told = state
        now = env_steps + i * per_seed
        worlds, rows, ends = step_worlds(worlds, actions)
        given = [rows["rewards"], rows["next_observations"], worlds.observations]
        fine = jnp.stack([jnp.isfinite(actions).all(), jnp.stack([jnp.isfinite(leaf).all() for leaf in given]).all()])
        due = replay.calls_due(now, online, sampling.window)
        replay = replay.add(rows, normalizer)
        if needs.episode_returns:
            agent = programs.after_episodes(agent, ends.returns, ends.lengths.astype(jnp.float32), ends.ended)
        begin = at + told.calls * worth

        def learn(j: Array, state: tuple[Any, Info, Any]) -> tuple[Any, Info, Any]:
            agent, totals, replay = state
            source = replay.source(offline, normalizer)
            agent, totals, given = programs.learned(agent, totals, source, keys, begin + j * worth, sampling)
            return agent, totals, replay if given is None else replay.prioritise(*given)

        agent, totals, replay = jax.lax.fori_loop(0, due, learn, (agent, totals, replay))
        actions, carry = programs.chosen(
            agent, carry, normalizer, keys, worlds.observations, ends.ended, now + per_seed, action_dim, random
        )
        kept = jax.tree.map(lambda leaf, new: leaf.at[i].set(new), told.ends, ends)
        return Live(agent, totals, carry, actions, worlds, replay), Told(
            kept, told.before.at[i].set(told.calls), told.calls + due, told.finite & fine
        )

    shape = (ROOM, seeds, per_seed)
    nothing = Ends(jnp.zeros(shape, bool), jnp.zeros(shape), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool))
    told = Told(nothing, jnp.zeros(ROOM, jnp.int32), jnp.zeros((), jnp.int32), jnp.ones(2, bool))
    return jax.lax.fori_loop(0, count, step, (live, told))


def steps_until(mark: int, at: int, per_seed: int) -> int:
    """Return how many steps of all environments, 1 or more, lead from environment step `at` to `mark` or beyond."""
    return max(-(-(mark - at) // per_seed), 1)
