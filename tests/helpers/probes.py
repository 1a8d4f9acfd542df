"""Probe environments as static datasets: tiny Markov decision processes whose values are known (after rejax's tests).

Each is a table of `ROWS` transitions with observations `[1]` and actions `[1]` in [-1, 1]; the discount is 0.5. No row
has a next action unless its table says so.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from o2o.types import Array, Batch

ROWS, DISCOUNT, BATCH = 512, 0.5, 64
LONG = {"xla_backend_optimization_level": 1}
"""Compiler options: unlike other toy programs these run longer than they compile (see `tests/conftest.py`)."""
BEST_ACTION = 0.5
"""The best action in state s of `best_action` is this times s."""


def _table(observations: np.ndarray, rewards: np.ndarray, masks: np.ndarray, **arrays: np.ndarray) -> Batch:
    """Return float32 columns of a table; next observations are the observations unless given."""
    columns = {
        "observations": observations,
        "actions": np.random.default_rng(0).uniform(-1.0, 1.0, (ROWS, 1)),
        "rewards": rewards,
        "masks": masks,
        "next_observations": observations,
        "mc_returns": rewards,
        "next_actions": np.zeros((ROWS, 1)),
        "next_valid": np.zeros(ROWS),
        **arrays,
    }
    return {name: jnp.asarray(column, jnp.float32) for name, column in columns.items()}


def _states() -> np.ndarray:
    """Return the states -1 and 1 in turn, `[ROWS, 1]`."""
    return np.where(np.arange(ROWS) % 2 == 0, -1.0, 1.0)[:, None]


def one_step() -> Batch:
    """Reward 0.7, terminal: Q = 0.7 everywhere; a learner that bootstraps there finds 1.4."""
    return _table(_states(), np.full(ROWS, 0.7), np.zeros(ROWS))


def two_steps() -> Batch:
    """State -1 leads to state 1 without reward; state 1 pays 1 and ends: Q(-1) = discount, Q(1) = 1."""
    states = _states()
    final = states[:, 0] > 0
    rewards = final.astype(float)
    returns = np.where(final, 1.0, DISCOUNT)
    return _table(states, rewards, 1.0 - final, next_observations=np.ones((ROWS, 1)), mc_returns=returns)


def endless() -> Batch:
    """Reward 1 for ever, cut by a time limit, which is no terminal: Q = 1 / (1 - discount)."""
    return _table(_states(), np.ones(ROWS), np.ones(ROWS), mc_returns=np.full(ROWS, 1.0 / (1.0 - DISCOUNT)))


def best_action() -> Batch:
    """Terminal; reward -4 (a - s / 2)^2: the best action is s / 2 and Q is the reward."""
    table = _table(_states(), np.zeros(ROWS), np.zeros(ROWS))
    rewards = -4.0 * jnp.square(table["actions"] - BEST_ACTION * table["observations"])[:, 0]
    return {**table, "rewards": rewards, "mc_returns": rewards}


def noisy_expert() -> Batch:
    """Actions around s / 2 with deviation 0.1, whatever the reward: what a cloner must find."""
    table = _table(_states(), np.zeros(ROWS), np.zeros(ROWS))
    noise = np.random.default_rng(1).normal(0.0, 0.1, (ROWS, 1))
    return {**table, "actions": BEST_ACTION * table["observations"] + jnp.asarray(noise, jnp.float32)}


@dataclass(frozen=True)
class Probe:
    """A learner at probe size and its jitted training."""

    agent: Any
    steps: int = 800

    def __post_init__(self) -> None:
        """Jit the training once for all tables."""
        object.__setattr__(self, "_train", jax.jit(self._run, compiler_options=LONG))

    def _run(self, agent: Any, table: Batch, rng: Array) -> Any:
        def step(agent: Any, key: Array) -> tuple[Any, None]:
            rows = jax.random.randint(key, (1, BATCH), 0, ROWS)
            return agent.update({name: column[rows] for name, column in table.items()})[0], None

        return jax.lax.scan(step, agent, jax.random.split(rng, self.steps))[0]

    def train(self, table: Batch) -> Any:
        """Return the agent after training on a table."""
        return self._train(self.agent, table, jax.random.key(7))  # type: ignore[attr-defined]


def q_values(agent: Any, state: float, actions: np.ndarray) -> np.ndarray:
    """Return all critics' values `[E, K]` of the actions `[K]` in a state."""
    observations = jnp.full((len(actions), 1), state, jnp.float32)
    return np.asarray(agent.critic(observations, jnp.asarray(actions, jnp.float32)[:, None]))


def mode(agent: Any, state: float) -> float:
    """Return the deterministic action in a state."""
    action, _ = agent.sample_actions(jnp.full((1,), state, jnp.float32), None, jax.random.key(0), True)
    return float(action[0])
