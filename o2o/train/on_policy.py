"""The online loop of on-policy agents: several environments per seed, an update whenever a rollout is full.

One dispatch per step of all environments: it chooses the next actions and, where the rollout is full, updates before.
The rollout itself waits in host memory, so that nothing but observations and actions travels between two updates.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from o2o.data.normalizer import Normalizer, normalize
from o2o.replay.buffer import TRANSITION_KEYS
from o2o.train import programs as dispatch
from o2o.train.programs import OnlineState, clear_carry, over_seeds
from o2o.train.trainer import Trainer
from o2o.types import Array, Batch, Carry, Info


@partial(jax.jit, static_argnames="seeds", donate_argnames=("agent", "carry", "totals"))
def rollout_step(
    agent: Any,
    carry: Carry,
    rng: Array,
    totals: Info,
    normalizer: Normalizer | None,
    rows: Batch | None,
    observations: Any,
    ended: Array,
    *,
    seeds: int,
) -> tuple[Any, Carry, Array, Info, Array]:
    """Update on a full rollout `rows`, leaves `[S, T, N, ...]` (None: not yet), then choose actions `[S, N, A]`.

    `observations` are `[S, N, D]`; `ended` `[S, N]` clears the carry.
    """

    def one_seed(
        agent: Any, carry: Carry, rng: Array, totals: Info, rows: Batch | None, observations: Any, ended: Array
    ) -> tuple[Any, Carry, Array, Info, Array]:
        rng, key = jax.random.split(rng)
        if rows is not None:
            seen = {k: normalize(normalizer, v) if k.endswith("observations") else v for k, v in rows.items()}
            agent, info = agent.update(seen)
            totals = jax.tree.map(jnp.add, totals, info)
        carry = clear_carry(carry, agent.initial_carry(ended.shape), ended)
        actions, carry = agent.sample_actions(normalize(normalizer, observations), carry, key, False)
        return agent, carry, rng, totals, actions

    return over_seeds(one_seed, seeds)(agent, carry, rng, totals, rows, observations, ended)


class RolloutTrainer(Trainer):
    """A `Trainer` whose online phase is on-policy (`OnlineConfig.replay` "rollout")."""

    @property
    def slots_shape(self) -> tuple[int, ...]:
        """Environments per seed, behind the seed axis: `[S, N]`."""
        return (self.seeds, self.online_config.num_envs)

    @property
    def phase_name(self) -> str:
        """`offline` or `online`: there is no warm-up."""
        return self.counters.phase

    def begin_online(self, steps: int, host: bool | None = None, play: bool = True) -> None:
        """Choose a candidate, switch the agents to their online form, allocate one rollout, reset the environments.

        Where a stop is asked for while candidates play, nothing of that is done.
        """
        if self.online_state is not None:
            return
        if host is None and not self.choose_candidates():  # not where a run is being resumed
            return
        online = self.online_config
        agent = dispatch.each_seed(dispatch.to_online, self.agent)
        length, keys = online.rollout_steps // online.num_envs, (*TRANSITION_KEYS, "ends")
        rows = {key: self.offline_data.rows[key] for key in keys}
        place = (self.seeds, length, online.num_envs)
        storage = jax.tree.map(lambda leaf: np.zeros((*place, *leaf.shape[1:]), leaf.dtype), rows)
        storage["ends"] = storage["ends"].astype(np.float32)
        carry = jax.vmap(lambda a: a.initial_carry((online.num_envs,)))(agent)
        example = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), storage)

        def zeros(agent: Any) -> Info:
            infos = jax.eval_shape(lambda a, b: a.update(b)[1], agent, example)
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), infos)

        totals = over_seeds(zeros, self.seeds)(agent)
        if play:
            self.make_fleet(per_seed=online.num_envs)
        self.online_state = OnlineState(agent, storage, carry, self.rng, totals)  # type: ignore[arg-type]
        self.visible = [0] * self.seeds
        self.counters.phase, self.counters.logged_at = "online", 0

    def choose_candidates(self) -> bool:
        """Evaluate the policies that the agent offers for the online phase; each seed's agent takes its best one.

        False, and nothing is chosen, if a stop was asked for before.
        """
        count = self.agent.candidates
        if count < 2:
            return True
        scores = np.zeros((count, self.seeds))
        for index in range(count):
            agent = jax.jit(jax.vmap(lambda a, i=index: a.take_candidate(jnp.asarray(i))))(self.agent)
            rows = self.evaluator.until_stopped(agent, self.normalizer, self.counters.offline_steps)
            if rows is None:
                return False
            for member in range(self.seeds):
                scores[index, member] = np.mean([row["score"] for row in rows if row["seed"] == member])
        self.agent = jax.jit(jax.vmap(lambda a, i: a.take_candidate(i)))(self.agent, jnp.asarray(scores.argmax(axis=0)))
        return True

    def _act(self, rows: Batch | None, ended: np.ndarray) -> None:
        assert self.online_state is not None and self.fleet is not None
        state = self.online_state
        observations = jax.tree.map(lambda o: o.reshape(*self.slots_shape, *o.shape[1:]), self.fleet.observations)
        agent, carry, rng, totals, self.action = rollout_step(
            state.agent, state.carry, state.rng, state.totals, self.normalizer, rows, observations,
            ended.reshape(self.slots_shape), seeds=self.seeds,
        )  # fmt: skip
        self.online_state = OnlineState(agent, state.buffer, carry, rng, totals)

    def first_actions(self) -> None:
        """Choose the actions for the observations at which the environments stand."""
        self._act(None, np.zeros(self.slots_shape, bool))

    def _online_step(self) -> None:
        assert self.online_state is not None and self.action is not None and self.fleet is not None
        counters, online = self.counters, self.online_config
        actions = self.finite_actions()
        rows, ended = self.fleet.step(actions.reshape(-1, actions.shape[-1]), self._episode_finished)
        at, storage = self.visible[0], self.online_state.buffer

        def store(leaf: np.ndarray, row: np.ndarray) -> None:
            leaf[:, at] = np.reshape(row, (*self.slots_shape, *row.shape[1:]))

        jax.tree.map(store, storage, rows)
        self.fleet.forget(np.flatnonzero(ended))
        full = at + 1 == online.rollout_steps // online.num_envs
        over = self.fleet.outdated(self.online_state.carry, ended)
        self._act(storage if full else None, over)  # type: ignore[arg-type]
        self.visible = [0 if full else at + 1] * self.seeds
        counters.env_steps += online.num_envs
        if full:
            counters.gradient_steps += self.online_state.agent.rollout_updates
            counters.online_updates += 1
            self.updates_since_log += 1

    def _episode_finished(self, member: int, row: dict[str, Any]) -> None:
        super()._episode_finished(member // self.online_config.num_envs, row)

    def mark_ends(self, where: np.ndarray) -> None:
        """Make the newest row the last of its episode where `where` `[S * N]` is true."""
        assert self.online_state is not None
        if self.visible[0]:
            ends = self.online_state.buffer["ends"][:, self.visible[0] - 1]  # type: ignore[index]
            np.maximum(ends, np.reshape(where, self.slots_shape), out=ends)

    def placed(self, buffer: Any) -> Any:
        """Return a loaded rollout in writable host memory."""
        return jax.tree.map(np.array, buffer)


def trainer_class(online: Any) -> type[Trainer]:
    """Return the trainer that drives an online phase: the one with replay, or the one with rollouts.

    Raises `ConfigError` for rollouts that cannot be made (`OnlineConfig.check_rollout`).
    """
    if online.replay != "rollout":
        return Trainer
    online.check_rollout()
    return RolloutTrainer
