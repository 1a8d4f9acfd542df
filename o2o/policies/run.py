"""The policy of a run: as a base policy for other runs, and for loops and robots outside of o2o.

`RunPolicy` is one agent of a run, opened by `o2o.runs.session`. `RunController` is that agent acting in one
environment. `TrainedPolicy` is the same behind the environment's own observations.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from o2o.data.datasets import Dataset
from o2o.data.history import join, past
from o2o.data.normalizer import Normalizer
from o2o.data.rollout import Controller
from o2o.data.spaces import STATE, ActionMap, with_base_action
from o2o.errors import DivergenceError, EnvironmentFaultError, EnvironmentMismatchError
from o2o.policies.base import Base, BasePolicy, Planner, episode_actions, first_bad, length_of, recorded_actions
from o2o.rl.chunks import ActionQueue
from o2o.train.acting import Agents, act_side_by_side, stack_of_one
from o2o.types import Array

EPISODES_AT_ONCE = 64
"""Dataset episodes that an agent labels side by side."""


@dataclass(frozen=True, eq=False)
class RunPolicy(BasePolicy):
    """One agent of a run, which acts as it does in its own run."""

    agent: Any
    normalizer: Normalizer | None
    data: Dataset = field(repr=False)
    """The dataset that it was trained on, without its rows."""
    history: int
    deterministic: bool
    inner: BasePolicy | None
    """The base policy that the agent itself corrects."""

    @classmethod
    def of(
        cls,
        name: str,
        agent: Any,
        normalizer: Normalizer | None,
        data: Dataset,
        *,
        history: int = 1,
        deterministic: bool = True,
        inner: BasePolicy | None = None,
    ) -> Self:
        """Return the policy with its fingerprint, which is None if that of `inner` is."""
        parts = [agent.config, not deterministic, history, data.action_map, inner and inner.fingerprint]
        digest = hashlib.sha256(repr(parts).encode())
        for leaf in jax.tree.leaves((agent, normalizer)):
            raw = jax.random.key_data(leaf) if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
            digest.update(np.ascontiguousarray(raw).tobytes())
        known = inner is None or inner.fingerprint is not None
        fingerprint = digest.hexdigest() if known else None
        return cls(name, fingerprint, agent, normalizer, data.without_rows(), history, deterministic, inner)

    def check(self, data: Dataset) -> None:
        """Raise `EnvironmentMismatchError` unless observations and action space are those it was trained on."""
        if self.data.observation_spec != data.observation_spec:
            raise EnvironmentMismatchError(
                f"base {self.name} was trained on observations {self.data.observation_spec}, here they are "
                f"{data.observation_spec}; use a base of this environment (and the same achieved_goal)"
            )
        theirs, ours = (ActionMap.bounds_of(d.info.action_space) for d in (self.data, data))
        if theirs != ours:
            raise EnvironmentMismatchError(
                f"base {self.name} was trained with the action space {self.data.info.action_space}, this environment "
                f"has {data.info.action_space}; use a base of this environment"
            )

    def controller(self, data: Dataset) -> Controller:
        """Return the agent with a queue and a memory of its own."""
        return RunController(self)

    def observation_of(self, observation: Any, base_action: Any) -> Any:
        """Return what the agent takes: observations `[..., D]` with their history, and its base's action if any."""
        return observation if self.inner is None else with_base_action(observation, base_action)

    def actions(self, data: Dataset, episodes: list[Any]) -> list[np.ndarray]:
        """Return the actions `[T, *shape]` of whole episodes `[T, ...]`, many side by side in one call per step."""
        below: list[Any] = [None] * len(episodes)
        if self.inner is not None:
            raw = episode_actions(self.inner, self.data, episodes)
            below = [self.data.action_map.from_env(actions) for actions in raw]
        seen = [self.observation_of(joined(e, self.history), b) for e, b in zip(episodes, below, strict=True)]
        found: list[Any] = [None] * len(seen)
        order = sorted(range(len(seen)), key=lambda number: length_of(seen[number]))
        agents = stack_of_one(self.agent)
        for first in range(0, len(order), EPISODES_AT_ONCE):
            block = order[first : first + EPISODES_AT_ONCE]
            policy = Agents(agents, self.normalizer, len(block), _label_keys(), self.deterministic)
            played = recorded_actions(policy, [seen[number] for number in block], side_by_side=True)
            for number, actions in zip(block, played, strict=True):
                found[number] = self.data.action_map.to_env(actions)
        return found


def _label_keys() -> Iterator[Array]:
    """Yield the random keys `[1]` of every step of a block of episodes."""
    key, step = jax.random.key(0), 0
    while True:
        yield jax.random.fold_in(key, step)[None]
        step += 1


def joined(episode: Any, history: int) -> Any:
    """Return an episode `[T, ...]` with every observation joined to those before it, as `History` does."""
    return join(past(episode, np.arange(length_of(episode)), 0, history))


class RunController(Planner):
    """One agent in one environment: one call to the device per action, or per chunk if it plays chunks."""

    def __init__(self, policy: RunPolicy) -> None:
        """Act with the agent of `policy`; it is compiled here, not in the first step."""
        super().__init__(policy.history, None if policy.inner is None else Base(policy.inner, policy.data))
        self._policy, self._agents = policy, stack_of_one(policy.agent)
        self._fresh = jax.vmap(lambda agent: agent.initial_carry((1,)))(self._agents)
        self.reset(0)
        self._call(jax.tree.map(lambda leaf: np.zeros(leaf.shape[1:], leaf.dtype), policy.data.arrays["observations"]))
        self.reset(0)

    def reset(self, seed: int) -> None:
        """Begin an episode, with a fresh memory."""
        super().reset(seed)
        self._key, self._calls, self._carry = jax.random.key(seed), 0, self._fresh

    def act(self, observation: Any) -> np.ndarray:
        """Return the action `[*shape]` for a flat observation `[D]`; raises `DivergenceError` if it is not finite."""
        policy, seen = self._policy, self.joined(observation)
        seen = policy.observation_of(seen, None if self._inner is None else self._inner.act(observation))
        return policy.data.action_map.to_env(self._queue.next(lambda: self._ask(seen)))

    def _ask(self, seen: Any) -> list[np.ndarray]:
        """Return the next action `[A]` in [-1, 1] and, of an agent that plays chunks, the rest of its chunk.

        Raises `DivergenceError` if a number of them is not finite.
        """
        actions, self._carry = self._call(seen)
        if (bad := first_bad(actions)) is not None:
            raise DivergenceError(
                f"the policy of {self._policy.name} has {bad} in its action: its learner diverged; take an earlier "
                "checkpoint, or train again with a lower learning rate"
            )
        return list(actions)

    def _call(self, seen: Any) -> tuple[np.ndarray, Any]:
        """Return the actions `[h, A]` of one call, and the next carry."""
        policy = self._policy
        rows = jax.tree.map(lambda leaf: np.asarray(leaf)[None, None], seen)
        keys = jax.random.fold_in(self._key, self._calls)[None]
        action, carry = act_side_by_side(self._agents, policy.normalizer, rows, self._carry, keys, policy.deterministic)
        self._calls += 1
        actions = np.asarray(action)[0]
        if not isinstance(carry, ActionQueue):
            return actions, carry
        queue, left = jax.device_get(carry)
        return np.concatenate([actions, queue[0, 0, : int(left[0, 0])]]), self._fresh


class TrainedPolicy:
    """One agent of a run that acts as in o2o's evaluations, for any loop or robot (`o2o.runs.session.load_policy`).

    It does itself what o2o's environments do around an agent. It flattens and normalises observations, joins them to
    their history, asks the base policy and plays chunks to their end. Its actions are in the environment's units and
    within its bounds. An evaluation of several episodes side by side may differ in the last bits of its actions.
    """

    def __init__(self, policy: RunPolicy, rate: float | None = None) -> None:
        """Act with the agent of `policy`; an episode has begun."""
        self._policy, self._controller, self._spec = policy, RunController(policy), policy.data.observation_spec
        self._rate = rate
        self.reset()

    def export(self, path: str | Path) -> Path:
        """Write the policy to a file that needs no o2o, `.onnx` or `.jax`; return where its contract is.

        See `o2o.policies.export.export_policy`, also for what it raises.
        """
        from o2o.policies.export import export_policy

        return export_policy(self._policy, Path(path), self._rate)

    def reset(self, seed: int = 0) -> None:
        """Begin an episode: forget history, chunk and base. Call it after every reset of the environment.

        `seed` is that of the reset. It matters only to policies that draw even in evaluation (EXPO, PEX, a sampling
        base).
        """
        self._controller.reset(int(np.random.default_rng(seed).integers(2**31)))  # as `o2o.envs.BaseAction` does

    def interrupt(self) -> None:
        """Drop the rest of a chunk, the base's too: a human has taken over since it was planned."""
        self._controller.interrupt()

    def act(self, observation: Any) -> np.ndarray:
        """Return the action `[*shape]`, float32, for one observation as the environment gives it (a dict for a Dict).

        Raises `EnvironmentMismatchError` unless it has the entries and shapes of the run's dataset, images as uint8.
        Raises `EnvironmentFaultError` if a number of it is not finite; nothing of such an observation is remembered.
        Raises `DivergenceError` if the action is not finite.
        """
        seen = self._spec.flatten(observation)
        state = seen.get(STATE) if isinstance(seen, dict) else seen
        if state is not None and (bad := first_bad(state)) is not None:
            raise EnvironmentFaultError(
                f"the observation has {bad}, for which there is no action: look at the sensors, and act again when all "
                "of them have readings"
            )
        return np.asarray(self._controller.act(seen))
