"""Evaluation: seeded episodes in environments of their own, one row each; all seeds and slots act in one call."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import gymnasium
import jax
import numpy as np

from o2o.closing import Closing
from o2o.data.normalizer import Normalizer, normalize
from o2o.errors import ConfigError
from o2o.nn.kernels import over_seeds
from o2o.rl.chunks import outdated, planned_in_turn
from o2o.train.episode import EVAL_STREAM, EnvSlot, reset_seed
from o2o.train.programs import clear_carry
from o2o.types import Array, Carry

EnvFn = Callable[[bool], gymnasium.Env]
"""Make one environment; the argument says whether it is for evaluation."""


@partial(jax.jit, static_argnames="deterministic")
def _act(
    agent: Any, normalizer: Normalizer | None, observations: Any, carry: Carry, rng: Array, deterministic: bool
) -> tuple[Array, Carry]:
    """Act for stacked agents `[S]` on observations `[S, slots, D]`."""
    seeds = jax.tree.leaves(observations)[0].shape[0]
    keys = jax.random.split(rng, seeds)
    act = lambda a, o, c, k: a.sample_actions(normalize(normalizer, o), c, k, deterministic)  # noqa: E731
    if carry is None:
        return jax.vmap(act)(agent, observations, carry, keys)
    return over_seeds(act, seeds, in_turn=planned_in_turn(carry))(agent, observations, carry, keys)


class Evaluator:
    """Keeps evaluation environments between evaluations; `slots` of them per seed play side by side."""

    def __init__(
        self,
        env_fn: EnvFn,
        seeds: int,
        episodes: int,
        seed: int,
        normalized: Callable[[float], float | None] | None = None,
        slots: int = 5,
    ) -> None:
        """Prepare for `episodes` episodes of each of `seeds` agents; environments are made at first use."""
        self.env_fn, self.seeds, self.episodes, self.seed, self.normalized = env_fn, seeds, episodes, seed, normalized
        if episodes < 1:
            raise ConfigError(f"eval_episodes is {episodes}; expected at least 1")
        self.slots = min(slots, episodes)
        self.envs: list[list[EnvSlot]] = []
        self.should_stop: Callable[[], bool] = lambda: False
        self._finished: list[tuple[Any, list[dict[str, Any]]]] = []

    def __call__(
        self, agent: Any, normalizer: Normalizer | None, point: int, deterministic: bool = True
    ) -> list[dict[str, Any]]:
        """Play all episodes with the stacked `agent`; return their rows.

        Resets depend on (seed, member, `point`), noise of the policies on (seed, `point`) and the member too.
        """
        rows = self._play(agent, normalizer, point, deterministic, lambda: False)
        assert rows is not None
        return rows

    def _play(
        self, agent: Any, normalizer: Normalizer | None, point: int, deterministic: bool, stop: Callable[[], bool]
    ) -> list[dict[str, Any]] | None:
        """Play all episodes; None if `stop` broke them off."""
        if not self.envs:
            first = EnvSlot(self.env_fn(True), ())
            self.slots = self.slots if first.replayable else 1  # of a robot there is one
            slots = [EnvSlot(self.env_fn(True), ()) for _ in range(self.seeds * self.slots - 1)]
            self.envs = np.reshape(np.asarray([first, *slots], object), (self.seeds, self.slots)).tolist()
        rng = jax.random.key(reset_seed(self.seed, EVAL_STREAM, point))
        fresh = jax.vmap(lambda a: a.initial_carry((self.slots,)))(agent)
        carry = fresh
        queue = [list(range(self.episodes)) for _ in range(self.seeds)]
        live = np.ones((self.seeds, self.slots), bool)
        for member, row in enumerate(self.envs):
            for slot in row:
                slot.seeds = (self.seed, EVAL_STREAM, member, point)
                slot.reset(queue[member].pop(0))
        rows: list[dict[str, Any]] = []
        while live.any():
            if stop():
                return None
            observations = self._stack()
            rng, key = jax.random.split(rng)
            actions, carry = _act(agent, normalizer, observations, carry, key, deterministic)
            over = outdated(carry, *self._step_all(np.asarray(actions), live, queue, rows))
            if carry is not None and over.any():
                carry = clear_carry(carry, fresh, over)
        return sorted(rows, key=lambda row: (row["seed"], row["episode"]))

    def until_stopped(
        self, agent: Any, normalizer: Normalizer | None, point: int, deterministic: bool = True
    ) -> list[dict[str, Any]] | None:
        """Play the episodes of a call; None once `should_stop` says so, no further step is played."""
        return self._play(agent, normalizer, point, deterministic, self.should_stop)

    def ask(
        self, agent: Any, normalizer: Normalizer | None, point: int, deterministic: bool = True, about: Any = None
    ) -> None:
        """Have the episodes of a call played; `take` hands their rows out, named by `about`.

        Once `should_stop` says so no further step is played, and there will be no rows.
        """
        rows = self.until_stopped(agent, normalizer, point, deterministic)
        if rows is not None:
            self._finished.append((about, rows))

    def under_way(self) -> list[Any]:
        """Return the `about` of what was asked for and is not known to have been played, in that order."""
        return []

    def take(self, wait: bool = False, leave: int = 0) -> list[tuple[Any, list[dict[str, Any]]]]:
        """Return (about, rows) of what has been played, in the order asked; `wait` for all but the last `leave`."""
        taken, self._finished = self._finished, []
        return taken

    def _stack(self) -> Any:
        per_seed = [jax.tree.map(lambda *leaves: np.stack(leaves), *(s.observation for s in row)) for row in self.envs]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *per_seed)

    def _step_all(
        self, actions: np.ndarray, live: np.ndarray, queue: list[list[int]], rows: list[dict[str, Any]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Step what is `live` and begin what is left in `queue`; where episodes ended, and where a human took over."""
        ended, intervened = np.zeros_like(live), np.zeros_like(live)
        for member, slot_row in enumerate(self.envs):
            for index, slot in enumerate(slot_row):
                if not live[member, index]:
                    continue
                step = slot.step(actions[member, index])
                intervened[member, index] = step.intervened
                if not step.ended:
                    continue
                ended[member, index] = True
                rows.append({"seed": member, **slot.row(step.terminated, self.normalized)})
                if queue[member]:
                    slot.reset(queue[member].pop(0))
                else:
                    live[member, index] = False
        return ended, intervened

    def close(self) -> None:
        """Close the environments, every one."""
        with ExitStack() as closing:
            for slot in (slot for row in self.envs for slot in row):
                closing.callback(slot.env.close)
            self.envs = []


def evaluate(
    agent: Any,
    env_fn: EnvFn,
    episodes: int = 20,
    seed: int = 0,
    normalizer: Normalizer | None = None,
    deterministic: bool = True,
    normalized: Callable[[float], float | None] | None = None,
) -> list[dict[str, Any]]:
    """Play `episodes` episodes of one (unstacked) agent; rows with return (raw reward), length, success, normalized."""
    evaluator = Evaluator(env_fn, 1, episodes, seed, normalized)
    with Closing() as closing:
        closing.callback(evaluator.close)
        return evaluator(jax.tree.map(lambda leaf: leaf[None], agent), normalizer, 0, deterministic)
