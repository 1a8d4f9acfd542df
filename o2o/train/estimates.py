"""Offline estimates: what held-out episodes say of an agent where there is no environment to play in.

- `action_error`: mean absolute difference, in [-1, 1], between the policy's mode and the recorded action.
- `estimate/NAME`: the metrics of the agent's own update, losses and Q-values among them, on held-out minibatches. The
  update itself is thrown away.

Neither is a return: a good policy may act otherwise than the data.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from o2o.data.datasets import Dataset
from o2o.data.normalizer import Normalizer, normalized_rows
from o2o.keys import ACT, DATA, key_at
from o2o.nn.kernels import over_seeds, seeds_in_turn
from o2o.replay.buffer import OfflineData, check_window
from o2o.replay.source import Sampling
from o2o.types import Array, Info, Phase

BATCHES = 8
"""Held-out minibatches of one estimate; always the same."""
ACTED = 256
"""Rows that the policy acts on together."""
MOST_ROWS = 4096
"""Rows that are held on the device; of a longer held-out part the first ones."""


class Estimator:
    """Has the methods of an `Evaluator` that a `Trainer` calls; an evaluation is one row per seed."""

    def __init__(self, held: Dataset, agent: Any, seeds: int, batch_size: int, normalizer: Normalizer | None) -> None:
        """Take the held-out rows. Raises `ConfigError` if they are too few for the stacked `agent`'s windows."""
        count = min(held.size, MOST_ROWS)
        rows = jax.tree.map(lambda leaf: leaf[:count], held.arrays)
        self._data = OfflineData.create(normalized_rows(normalizer, rows), (*agent.needs.batch_keys, "ends"))
        check_window(agent, count, "the held-out part (holdout)")
        self._keys = jnp.stack([jax.random.key(0)] * seeds)  # the same rows for every seed and run
        self._sampling = Sampling(batch_size, window=agent.needs.window)
        self._seeds = seeds
        self._finished: list[tuple[Any, list[dict[str, Any]]]] = []
        self.phase: Callable[[], Phase | None] = lambda: None
        """The phase of pre-training whose metrics count."""
        self.should_stop: Callable[[], bool] = lambda: False
        self.normalized: Callable[[float], float | None] | None = None

    def prepare(self) -> None:
        """Do nothing: no environment has to be made."""

    def until_stopped(
        self, agent: Any, normalizer: Normalizer | None, point: int, deterministic: bool = True
    ) -> list[dict[str, Any]]:
        """Return one row per seed of the stacked `agent` `[S]`; `score` is minus the action error."""
        phase = self.phase()
        own = phase if phase is not None and phase.update is not None else None
        found = jax.device_get(_estimate(agent, self._data, self._keys, sampling=self._sampling, phase=own))
        return [_row(seed, {key: float(value[seed]) for key, value in found.items()}) for seed in range(self._seeds)]

    def ask(
        self, agent: Any, normalizer: Normalizer | None, point: int, deterministic: bool = True, about: Any = None
    ) -> None:
        """Estimate; `take` returns the rows together with `about`."""
        self._finished.append((about, self.until_stopped(agent, normalizer, point)))

    def under_way(self) -> list[Any]:
        """Return nothing: an estimate is finished when `ask` returns."""
        return []

    def take(self, wait: bool = False, leave: int = 0) -> list[tuple[Any, list[dict[str, Any]]]]:
        """Return (about, rows) of the estimates since the last call."""
        taken, self._finished = self._finished, []
        return taken

    def close(self) -> None:
        """Do nothing: there is no environment."""


def _row(seed: int, found: Mapping[str, float]) -> dict[str, Any]:
    unknown = ("return", "length", "success", "success_last", "normalized", "terminated", "intervention")
    return {"seed": seed, "episode": 0, **dict.fromkeys(unknown), "score": -found["action_error"], **found}


@partial(jax.jit, static_argnames=("sampling", "phase"))
def _estimate(agents: Any, data: OfflineData, keys: Array, *, sampling: Sampling, phase: Phase | None) -> Info:
    """Return the estimates of stacked agents, leaves `[S]`."""

    def one_seed(agent: Any, key: Array) -> Info:
        def batch(i: Array) -> Info:
            if phase is not None and phase.update is not None:
                return phase.update(agent, data, i / jnp.float32(BATCHES))[1]
            return agent.update(data.draw(key_at(key, DATA, i), (1, sampling.batch_size), sampling.window))[1]

        infos = jax.lax.map(batch, jnp.arange(BATCHES))
        means = {f"estimate/{name}": jnp.mean(value) for name, value in infos.items()}
        return {"action_error": _action_error(agent, data, key_at(key, ACT)), **means}

    return over_seeds(one_seed, keys.shape[0], in_turn=seeds_in_turn(agents))(agents, keys)


def _action_error(agent: Any, data: OfflineData, key: Array) -> Array:
    """Return the mean absolute difference between the mode of the policy and the actions of the rows."""
    rows = min(data.size, ACTED)
    parts = data.size // rows
    fold = lambda leaf: leaf[: parts * rows].reshape(parts, rows, *leaf.shape[1:])  # noqa: E731
    seen, done = jax.tree.map(fold, (data.rows["observations"], data.rows["actions"]))

    def part(chunk: tuple[Any, Array]) -> Array:
        actions, _ = agent.sample_actions(chunk[0], agent.initial_carry((rows,)), key, True)
        return jnp.mean(jnp.abs(actions - chunk[1]))

    return jnp.mean(jax.lax.map(part, (seen, done)))
