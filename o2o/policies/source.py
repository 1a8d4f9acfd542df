"""A frozen base policy at work in a run: asked once per step, checked, its actions in the run's own [-1, 1].

`Source` is where the policy comes from (`o2o.policies.base.load_base`); `Base` is one copy of it at work, with a queue
and a seed of its own. Labelling asks it about every observation of a dataset, episode by episode, each begun afresh.
"""

import hashlib
import time
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import jax
import numpy as np

from o2o.data.cache import cached
from o2o.data.datasets import Dataset
from o2o.data.spaces import ActionMap, with_base_action
from o2o.errors import BaseFaultError, ConfigError, DivergenceError, EnvironmentMismatchError, O2OError

Labels = Literal["policy", "demo"]
CACHE_VERSION = 1
SLOW_CALLS = 3
"""Slow answers in a row that end a run; a single one may be the machine's fault."""
TRIAL_STEPS = 16
"""Observations of the dataset's first episode that a base is tried on."""


class Policy(Protocol):
    """One controller at work, in the environment's own units."""

    def reset(self, seed: int) -> None:
        """Begin an episode: forget the last one, draw everything from `seed`."""
        ...

    def interrupt(self) -> None:
        """Forget what was planned for the steps to come: a human has taken over."""
        ...

    def act(self, observation: Any) -> Any:
        """Return the action `[*shape]`, or a chunk `[H, *shape]` to be played open loop, for a flat observation."""
        ...


@dataclass(frozen=True, eq=False)
class Source:
    """Where a base policy comes from."""

    name: str
    fingerprint: str | None
    """Digest of all that decides what it does; None where that cannot be known."""

    def check(self, data: Dataset) -> None:
        """Raise `EnvironmentMismatchError` if it cannot see or act in the world of `data`."""

    def policy(self, data: Dataset) -> Policy:
        """Return a fresh copy that acts in the world of `data`."""
        raise NotImplementedError

    def actions(self, data: Dataset, episodes: list[Any]) -> list[np.ndarray] | None:
        """Return the actions `[T, *shape]` of whole episodes at once, or None if it must be asked step by step."""
        return None


def first_bad(values: np.ndarray) -> float | None:
    """Return the first entry that is not finite, None if all are."""
    bad = ~np.isfinite(values)
    return float(values[bad][0]) if bad.any() else None


class Base:
    """One copy of a base policy at work in a run."""

    def __init__(self, source: Source, data: Dataset, timeout_s: float | None = None) -> None:
        """Act in the world of `data`, each answer within `timeout_s` seconds (None: whenever it comes)."""
        if timeout_s is not None and timeout_s <= 0:
            raise ConfigError(f"base_timeout_s is {timeout_s}; expected a positive number of seconds, or None")
        self.name, self.timeout_s = source.name, timeout_s
        self.action_map: ActionMap = data.action_map
        spec = data.info.eval_env_spec or data.info.env_spec
        self._limit = spec.max_episode_steps if spec is not None else None
        self._bounds = ActionMap.from_space(data.info.action_space)
        self._policy = source.policy(data)
        self._chunk: list[np.ndarray] = []
        self._step, self._slow, self._asked = -1, 0, False
        self.place = "the episode"
        """What errors call the episode under way."""

    def reset(self, seed: int) -> None:
        """Begin an episode; whatever is left of a chunk is dropped."""
        self._chunk, self._step = [], -1
        try:
            self._policy.reset(seed)
        except O2OError:
            raise
        except Exception as error:
            raise self._fault(f"raised {type(error).__name__}: {error}") from error

    def interrupt(self) -> None:
        """Drop what is left of a chunk: a human has taken over since it was planned."""
        self._chunk = []
        self._policy.interrupt()

    def act(self, observation: Any) -> np.ndarray:
        """Return the action `[A]` in [-1, 1] for a flat observation without history.

        Raises `BaseFaultError` naming the step, `EnvironmentMismatchError` for an action of another shape.
        """
        return self.action_map.from_env(self.act_in_env(observation))

    def act_in_env(self, observation: Any) -> np.ndarray:
        """Return the action `[*shape]` in the environment's units, as the policy gave it."""
        self._step += 1
        if not self._chunk:
            self._chunk = self._ask(observation)
        return self._chunk.pop(0)

    def _ask(self, observation: Any) -> list[np.ndarray]:
        began = time.perf_counter()
        try:
            answer = np.asarray(self._policy.act(observation), np.float32)
        except DivergenceError as error:  # the base's: a run's own learner may be sound
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
        """Try it on an episode `[T, ...]` before any step of a run: shape, finite numbers, units, time.

        Raises `BaseFaultError` or `EnvironmentMismatchError`.
        """
        observations = steps_of(episode)[:TRIAL_STEPS]
        self.place = "the dataset's first episode"
        self.reset(0)
        self._check_units(np.stack([self.act_in_env(observation) for observation in observations]))
        for _ in range(SLOW_CALLS):  # one that plays chunks is seldom asked above
            self.reset(0)
            self.act_in_env(observations[0])

    def _check_units(self, actions: np.ndarray) -> None:
        """Refuse a base most of whose actions lie beyond the action space by more than half of its width."""
        low, high = np.asarray(self._bounds.low), np.asarray(self._bounds.high)
        flat = actions.reshape(len(actions), -1)
        excess = (np.abs(flat - (low + high) / 2) / ((high - low) / 2)).max(axis=1)
        if np.median(excess) > 2.0:
            raise EnvironmentMismatchError(
                f"base {self.name} acts in other units: its actions reach {np.abs(flat).max():.4g}, the environment "
                f"takes [{low.min():g}, {high.max():g}]; let it return actions in the environment's own units"
            )


def steps_of(episode: Any) -> list[Any]:
    """Return the observations of an episode `[T, ...]` one by one."""
    count = len(jax.tree.leaves(episode)[0])
    return [jax.tree.map(lambda leaf, t=t: leaf[t], episode) for t in range(count)]


def episodes_of(data: Dataset) -> list[Any]:
    """Return the observations `[T + 1, ...]` of every episode of T rows, the last next-observation included."""
    stops = (np.flatnonzero(data.arrays["ends"]) + 1).tolist()
    if not stops or stops[-1] != data.size:
        stops.append(data.size)
    now, after = data.arrays["observations"], data.arrays["next_observations"]
    spans = zip([0, *stops[:-1]], stops, strict=True)
    return [jax.tree.map(lambda n, a, i=i, j=j: np.concatenate([n[i:j], a[j - 1 : j]]), now, after) for i, j in spans]


def episode_actions(source: Source, data: Dataset, episodes: list[Any]) -> list[np.ndarray]:
    """Return what the base does in each episode `[T, ...]`, begun afresh: actions `[T, *shape]`, environment's units.

    Raises `BaseFaultError` naming episode and step.
    """
    found = source.actions(data, episodes)
    if found is None:
        base, found = Base(source, data), []
        for number, episode in enumerate(episodes):
            base.place = f"dataset episode {number}"
            base.reset(number)
            found.append(np.stack([base.act_in_env(observation) for observation in steps_of(episode)]))
    for number, actions in enumerate(found):
        wrong = np.argwhere(~np.isfinite(actions.reshape(len(actions), -1)))
        if len(wrong):
            step = wrong[0][0]
            raise BaseFaultError(
                f"base {source.name} returned {first_bad(actions[step])} in its action (at step {step} of dataset "
                f"episode {number})"
            )
    return found


def _cached_actions(source: Source, data: Dataset, episodes: list[Any]) -> list[np.ndarray]:
    """Return `episode_actions`, kept in the cache for a base with a fingerprint."""
    if source.fingerprint is None:
        return episode_actions(source, data, episodes)
    ends = hashlib.sha256(np.asarray(data.arrays["ends"], bool).tobytes()).hexdigest()
    key = [CACHE_VERSION, source.fingerprint, data.fingerprint, repr(data.task), str(data.observation_spec), ends]
    cuts = np.cumsum([len(jax.tree.leaves(episode)[0]) for episode in episodes])
    found = cached(
        key,
        lambda: {"actions": np.concatenate(episode_actions(source, data, episodes))},
        prefix="base-",
        fits=lambda kept: kept["actions"].shape == (cuts[-1], *data.action_map.shape),
    )
    return np.split(found["actions"], cuts[:-1])


def base_labels(
    source: Source, data: Dataset, labels: Labels = "policy", timeout_s: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the base actions of every observation and next observation of `data`, `[N, A]` each in [-1, 1].

    `policy`: what the base does there, its queue begun afresh in every episode; `demo`: the dataset's own action, so
    that the residual of every row is 0 (an episode's last observation has none: there the base is asked). Tries the
    base first; raises `BaseFaultError` or `EnvironmentMismatchError`.
    """
    source.check(data)
    episodes = episodes_of(data)
    Base(source, data, timeout_s).trial(episodes[0])
    if labels == "demo":
        last = [jax.tree.map(lambda leaf: leaf[-1:], episode) for episode in episodes]
        final = data.action_map.from_env(np.concatenate(episode_actions(source, data, last)))
        now = np.asarray(data.arrays["actions"])
        after = np.concatenate([now[1:], now[-1:]])
        stops = np.cumsum([len(jax.tree.leaves(episode)[0]) - 1 for episode in episodes])
        after[stops - 1] = final
        return now, after
    mapped = [data.action_map.from_env(actions) for actions in _cached_actions(source, data, episodes)]
    return np.concatenate([actions[:-1] for actions in mapped]), np.concatenate([actions[1:] for actions in mapped])


def with_base_labels(data: Dataset, now: np.ndarray, after: np.ndarray) -> Dataset:
    """Return the dataset with base actions `[N, A]` beside its observations and next observations."""
    arrays = dict(data.arrays)
    arrays["observations"] = with_base_action(arrays["observations"], now)
    arrays["next_observations"] = with_base_action(arrays["next_observations"], after)
    return replace(data, arrays=arrays)
