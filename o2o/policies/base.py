"""Base policies: frozen policies that an agent corrects. Their interface, and how a run asks them.

A base policy acts on the host, in the environment's own units, and is never trained. `BasePolicy` is a policy as it is
given: a run (`o2o.policies.run`), a Python callable (`o2o.policies.python`) or a file (`o2o.policies.exported`). `Base`
is one copy of it at work in one environment: asked once per step, checked, with a queue and a seed of its own.
`base_labels` asks it about every observation of a dataset.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import numpy as np

from o2o.data.cache import cached
from o2o.data.datasets import Dataset
from o2o.data.history import History
from o2o.data.rollout import Controller, OneEach, Played, Policy, rollout
from o2o.data.spaces import ActionMap, with_base_action
from o2o.errors import BaseFaultError, ConfigError, DivergenceError, EnvironmentMismatchError, O2OError

Labels = Literal["policy", "demo"]
CACHE_VERSION = 1
SLOW_CALLS = 3
"""Slow answers in a row that end a run; a single one may be the machine's fault."""
TRIAL_STEPS = 16
"""Observations of the dataset's first episode that a base policy is tried on."""


@dataclass(frozen=True, eq=False)
class BasePolicy:
    """A base policy as it is given; `controller` makes a copy that acts."""

    name: str
    fingerprint: str | None
    """Digest of everything that decides how it acts; None if that cannot be known."""

    def check(self, data: Dataset) -> None:
        """Raise `EnvironmentMismatchError` if it cannot observe or act in the environment of `data`."""

    def controller(self, data: Dataset) -> Controller:
        """Return a fresh copy that acts in the environment of `data`.

        Its `act` takes a flat observation without history and returns an action `[*shape]` in the environment's units,
        or a chunk `[H, *shape]` that is played open loop.
        """
        raise NotImplementedError

    def actions(self, data: Dataset, episodes: list[Any]) -> list[np.ndarray] | None:
        """Return the actions `[T, *shape]` of whole episodes at once, or None if it must be asked step by step."""
        return None


def first_bad(values: np.ndarray) -> float | None:
    """Return the first entry that is not finite, None if all are finite."""
    bad = ~np.isfinite(values)
    return float(values[bad][0]) if bad.any() else None


class ChunkQueue:
    """On the host: what is still to be played of a chunk of actions. (Inside jitted code: `o2o.rl.chunks`.)"""

    def __init__(self) -> None:
        """Begin empty."""
        self._rest: list[np.ndarray] = []

    def clear(self) -> None:
        """Drop what is left: an episode begins, or a human has taken over since it was planned."""
        self._rest = []

    def next(self, propose: Callable[[], Sequence[np.ndarray]]) -> np.ndarray:
        """Return the next action; an empty queue first takes the chunk that `propose` returns."""
        if not self._rest:
            self._rest = list(propose())
        return self._rest.pop(0)


class Base:
    """One copy of a base policy at work in one environment."""

    def __init__(self, policy: BasePolicy, data: Dataset, timeout_s: float | None = None) -> None:
        """Act in the environment of `data`, each answer within `timeout_s` seconds (None: no limit).

        Raises `ConfigError` if `timeout_s` is not positive.
        """
        if timeout_s is not None and timeout_s <= 0:
            raise ConfigError(f"base_timeout_s is {timeout_s}; expected a positive number of seconds, or None")
        self.name, self.timeout_s = policy.name, timeout_s
        self.action_map: ActionMap = data.action_map
        spec = data.info.eval_env_spec or data.info.env_spec
        self._limit = spec.max_episode_steps if spec is not None else None
        self._bounds = ActionMap.bounds_of(data.info.action_space)
        self._controller = policy.controller(data)
        self._queue = ChunkQueue()
        self._step, self._slow, self._asked = -1, 0, False
        self.place = "the episode"
        """What errors call the episode under way."""

    def reset(self, seed: int) -> None:
        """Begin an episode; the rest of a chunk is dropped. Raises `BaseFaultError` if the policy's reset fails."""
        self._queue.clear()
        self._step = -1
        try:
            self._controller.reset(seed)
        except O2OError:
            raise
        except Exception as error:
            raise self._fault(f"raised {type(error).__name__}: {error}") from error

    def interrupt(self) -> None:
        """Drop the rest of a chunk: a human has taken over since it was planned."""
        self._queue.clear()
        self._controller.interrupt()

    def act(self, observation: Any) -> np.ndarray:
        """Return the action `[A]` in [-1, 1] for a flat observation without history.

        Raises `BaseFaultError` naming the step, `EnvironmentMismatchError` for an action of another shape.
        """
        return self.action_map.from_env(self.act_in_env(observation))

    def act_in_env(self, observation: Any) -> np.ndarray:
        """Return the action `[*shape]` in the environment's units, as the policy gave it."""
        self._step += 1
        return self._queue.next(lambda: self._ask(observation))

    def _ask(self, observation: Any) -> list[np.ndarray]:
        began = time.perf_counter()
        try:
            answer = np.asarray(self._controller.act(observation), np.float32)
        except DivergenceError as error:  # of the base; the run's own learner may be sound
            raise self._fault(f"diverged: {error}") from error
        except O2OError:
            raise
        except Exception as error:
            raise self._fault(f"raised {type(error).__name__}: {error}") from error
        seconds = time.perf_counter() - began
        late = self._asked and self.timeout_s is not None and seconds > self.timeout_s  # the first answer may compile
        self._slow, self._asked = (self._slow + 1 if late else 0), True
        if self._slow >= SLOW_CALLS:
            raise self._fault(
                f"took {seconds:.3g} s for an action, {SLOW_CALLS} times in a row; {self.timeout_s} s are allowed: "
                "make it faster or raise base_timeout_s"
            )
        actions = self._split(answer)
        bad = first_bad(answer)
        if bad is not None:
            raise self._fault(f"returned {bad} in its action")
        return actions

    def _split(self, answer: np.ndarray) -> list[np.ndarray]:
        shape = self.action_map.shape
        if answer.ndim == len(shape) + 2 and answer.shape[0] == 1:
            answer = answer[0]
        if answer.shape == (1, *shape) or answer.shape == shape:
            return [answer.reshape(shape)]
        if answer.shape[1:] != shape or answer.ndim != len(shape) + 1 or not len(answer):
            raise EnvironmentMismatchError(
                f"base {self.name} returned an action of shape {answer.shape}; this environment takes {shape}, or a "
                f"chunk of them [H, {', '.join(map(str, shape))}]: use a base for this environment"
            )
        if self._limit is not None and len(answer) > self._limit:
            raise EnvironmentMismatchError(
                f"base {self.name} returned a chunk of {len(answer)} actions; episodes end after {self._limit} steps: "
                "return a shorter chunk"
            )
        return list(answer)

    def _fault(self, what: str) -> BaseFaultError:
        when = f"at step {self._step} of {self.place}" if self._step >= 0 else f"at the start of {self.place}"
        return BaseFaultError(f"base {self.name} {' '.join(what.split())} ({when})")

    def trial(self, episode: Any) -> None:
        """Try it on a dataset's episode `[T, ...]` before any step of a run: shape, finite numbers, units, time.

        Raises `BaseFaultError` or `EnvironmentMismatchError`.
        """
        observations = steps_of(episode)[:TRIAL_STEPS]
        self.place = "the dataset's first episode"
        self.reset(0)
        self._check_units(np.stack([self.act_in_env(observation) for observation in observations]))
        for _ in range(SLOW_CALLS):  # a policy of chunks was asked only a few times above
            self.reset(0)
            self.act_in_env(observations[0])

    def _check_units(self, actions: np.ndarray) -> None:
        """Raise `EnvironmentMismatchError` if most actions exceed the action space by more than half of its width."""
        low, high = np.asarray(self._bounds.low), np.asarray(self._bounds.high)
        flat = actions.reshape(len(actions), -1)
        excess = (np.abs(flat - (low + high) / 2) / ((high - low) / 2)).max(axis=1)
        if np.median(excess) > 2.0:
            raise EnvironmentMismatchError(
                f"base {self.name} acts in other units: its actions reach {np.abs(flat).max():.4g}, the environment "
                f"takes [{low.min():g}, {high.max():g}]; let it return actions in the environment's own units"
            )


class Planner:
    """What acts in one environment with a history, a queue of planned actions, and the base that it corrects, if any.

    Whoever derives from it says how the queue is filled.
    """

    def __init__(self, history: int, inner: Base | None) -> None:
        """Join `history` observations, act upon `inner`."""
        self._length, self._inner, self._queue = history, inner, ChunkQueue()
        self._history: History | None = None

    def reset(self, seed: int) -> None:
        """Begin an episode with empty queues; everything that is drawn in it comes from `seed`."""
        self._queue.clear()
        self._history = None
        if self._inner is not None:
            self._inner.reset(seed)

    def interrupt(self) -> None:
        """Empty the queues, that of its base too."""
        self._queue.clear()
        if self._inner is not None:
            self._inner.interrupt()

    def joined(self, observation: Any) -> Any:
        """Return a flat observation with those before it in the episode."""
        if self._history is None:
            self._history = History(self._length)
            return self._history.reset(observation)
        return self._history.push(observation)


def steps_of(episode: Any) -> list[Any]:
    """Return the observations of an episode `[T, ...]` one by one."""
    return [step_of(episode, t) for t in range(length_of(episode))]


def step_of(episode: Any, t: int) -> Any:
    """Return observation `t` of an episode `[T, ...]`."""
    return jax.tree.map(lambda leaf: leaf[t], episode)


def length_of(episode: Any) -> int:
    """Return the number T of observations of an episode `[T, ...]`."""
    return len(jax.tree.leaves(episode)[0])


def episodes_of(data: Dataset) -> list[Any]:
    """Return the observations `[T + 1, ...]` of every episode of T rows, the last next-observation included."""
    stops = (np.flatnonzero(data.arrays["ends"]) + 1).tolist()
    if not stops or stops[-1] != data.size:
        stops.append(data.size)
    now, after = data.arrays["observations"], data.arrays["next_observations"]
    spans = zip([0, *stops[:-1]], stops, strict=True)
    return [jax.tree.map(lambda n, a, i=i, j=j: np.concatenate([n[i:j], a[j - 1 : j]]), now, after) for i, j in spans]


class RecordedEpisodes:
    """A `Slot` (`o2o.data.rollout`) that plays recorded episodes again: the actions change no observation."""

    def __init__(self, episodes: Sequence[Any]) -> None:
        """Play observations `[T, ...]` of each episode; an episode has T steps."""
        self._episodes = episodes
        self.number = 0
        """The episode under way."""
        self.actions: list[np.ndarray] = []
        """What the policy did in it."""

    @property
    def observation(self) -> Any:
        """What the policy sees next; at an episode's end still the last observation."""
        episode = self._episodes[self.number]
        return step_of(episode, min(len(self.actions), length_of(episode) - 1))

    def reset(self, episode: int) -> None:
        """Begin the episode of this number."""
        self.number, self.actions = episode, []

    def step(self, action: np.ndarray) -> Played:
        """Keep the action and go on to the next observation."""
        self.actions.append(np.asarray(action))
        return Played(len(self.actions) == length_of(self._episodes[self.number]), False)


def recorded_actions(policy: Policy, episodes: Sequence[Any], side_by_side: bool) -> list[np.ndarray]:
    """Return the actions `[T, *]` of a policy at every observation of recorded episodes `[T, ...]`.

    `side_by_side`: the policy has one slot per episode. Otherwise it has one slot for all, one after the other.
    """
    numbers = range(len(episodes))
    shares = [[number] for number in numbers] if side_by_side else [list(numbers)]
    slots = [RecordedEpisodes(episodes) for _ in shares]
    found = {}
    for index, _ in rollout(policy, slots, [iter(share) for share in shares]):
        found[slots[index].number] = np.stack(slots[index].actions)
    return [found[number] for number in numbers]


class _InEnvironmentUnits:
    """A base at work on a dataset: its actions as they are, and errors that name the episode."""

    def __init__(self, base: Base) -> None:
        self._base = base

    def reset(self, seed: int) -> None:
        self._base.place = f"dataset episode {seed}"
        self._base.reset(seed)

    def interrupt(self) -> None:
        self._base.interrupt()

    def act(self, observation: Any) -> np.ndarray:
        return self._base.act_in_env(observation)


def episode_actions(policy: BasePolicy, data: Dataset, episodes: list[Any]) -> list[np.ndarray]:
    """Return what the base does in each episode `[T, ...]`: actions `[T, *shape]` in the environment's units.

    Every episode begins with a reset. Raises `BaseFaultError` naming episode and step.
    """
    found = policy.actions(data, episodes)
    if found is None:
        found = recorded_actions(OneEach(_InEnvironmentUnits(Base(policy, data))), episodes, side_by_side=False)
    for number, actions in enumerate(found):
        wrong = np.argwhere(~np.isfinite(actions.reshape(len(actions), -1)))
        if len(wrong):
            step = wrong[0][0]
            raise BaseFaultError(
                f"base {policy.name} returned {first_bad(actions[step])} in its action (at step {step} of dataset "
                f"episode {number})"
            )
    return found


def _cached_actions(policy: BasePolicy, data: Dataset, episodes: list[Any]) -> list[np.ndarray]:
    """Return `episode_actions`; a base with a fingerprint keeps them in the cache."""
    if policy.fingerprint is None:
        return episode_actions(policy, data, episodes)
    ends = hashlib.sha256(np.asarray(data.arrays["ends"], bool).tobytes()).hexdigest()
    key = [CACHE_VERSION, policy.fingerprint, data.fingerprint, repr(data.task), str(data.observation_spec), ends]
    cuts = np.cumsum([length_of(episode) for episode in episodes])
    found = cached(
        key,
        lambda: {"actions": np.concatenate(episode_actions(policy, data, episodes))},
        prefix="base-",
        fits=lambda kept: kept["actions"].shape == (cuts[-1], *data.action_map.shape),
    )
    return np.split(found["actions"], cuts[:-1])


def base_labels(
    policy: BasePolicy, data: Dataset, labels: Labels = "policy", timeout_s: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the base actions of every observation and next observation of `data`, `[N, A]` each in [-1, 1].

    With `labels` "policy" it is what the base does there; every episode begins with an empty queue. With "demo" it is
    the dataset's own action, so the residual of every row is 0. (The last observation of an episode has no action:
    there the base is asked.) `timeout_s` is the time allowed for one answer. The base is tried on the first episode
    before. Raises `BaseFaultError` or `EnvironmentMismatchError`.
    """
    policy.check(data)
    episodes = episodes_of(data)
    Base(policy, data, timeout_s).trial(episodes[0])
    if labels == "demo":
        last = [jax.tree.map(lambda leaf: leaf[-1:], episode) for episode in episodes]
        final = data.action_map.from_env(np.concatenate(episode_actions(policy, data, last)))
        now = np.asarray(data.arrays["actions"])
        after = np.concatenate([now[1:], now[-1:]])
        stops = np.cumsum([length_of(episode) - 1 for episode in episodes])
        after[stops - 1] = final
        return now, after
    mapped = [data.action_map.from_env(actions) for actions in _cached_actions(policy, data, episodes)]
    return np.concatenate([actions[:-1] for actions in mapped]), np.concatenate([actions[1:] for actions in mapped])


def with_base_labels(data: Dataset, now: np.ndarray, after: np.ndarray) -> Dataset:
    """Return the dataset with base actions `[N, A]` beside its observations and next observations."""
    arrays = dict(data.arrays)
    arrays["observations"] = with_base_action(arrays["observations"], now)
    arrays["next_observations"] = with_base_action(arrays["next_observations"], after)
    return replace(data, arrays=arrays)
