"""The loop that plays episodes: evaluations, videos, base labels and demonstrations all go through it.

It stands below the training code, because environments record their embedded datasets with it too.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np


class Outcome(Protocol):
    """What the loop reads of a step."""

    @property
    def ended(self) -> bool:
        """Whether the episode is over."""
        ...

    @property
    def intervened(self) -> bool:
        """Whether a human took over in this step."""
        ...


class Played(NamedTuple):
    """An `Outcome` and nothing else."""

    ended: bool
    intervened: bool


def executed_action(info: Mapping[str, Any], action: Any) -> Any:
    """Return the action that was executed, in the environment's units: the `action` that was asked for, or another.

    A safety wrapper says what it sent (`commanded_action`), a human's device what the human wanted
    (`intervene_action`).
    """
    return info.get("commanded_action", info.get("intervene_action", action))


S = TypeVar("S", bound=Outcome)
S_co = TypeVar("S_co", bound=Outcome, covariant=True)


class Slot(Protocol[S_co]):
    """A place where episodes are played one after the other, such as an environment."""

    @property
    def observation(self) -> Any:
        """What the policy sees next."""
        ...

    def reset(self, episode: int) -> Any:
        """Begin the episode of this number."""
        ...

    def step(self, action: np.ndarray) -> S_co:
        """Play one action. An ended episode stays as it is until the next `reset`."""
        ...


class Policy(Protocol):
    """What acts in all slots at once; `E` is the number of slots."""

    def begin(self, episodes: Mapping[int, int]) -> None:
        """Forget the last episode of these slots: an episode has begun in each. Keys: slots; values: its number."""
        ...

    def interrupt(self, slots: Sequence[int]) -> None:
        """Forget what was planned for these slots: a human took over in their last step."""
        ...

    def act(self, observations: Sequence[Any]) -> Sequence[np.ndarray] | np.ndarray:
        """Return `E` actions for `E` observations. Those of finished slots are not played."""
        ...


class Controller(Protocol):
    """What acts in one environment."""

    def reset(self, seed: int) -> None:
        """Begin an episode: forget the last one and draw everything from `seed`."""
        ...

    def interrupt(self) -> None:
        """Forget what was planned for the steps to come: a human has taken over."""
        ...

    def act(self, observation: Any) -> Any:
        """Return the action for one observation."""
        ...


class OneEach:
    """A `Policy` of one controller per slot. The seed of an episode is its number."""

    def __init__(self, *controllers: Controller) -> None:
        """Let `controllers` act, one per slot."""
        self._controllers = controllers

    def begin(self, episodes: Mapping[int, int]) -> None:
        """Reset the controllers of these slots."""
        for slot, episode in episodes.items():
            self._controllers[slot].reset(episode)

    def interrupt(self, slots: Sequence[int]) -> None:
        """Interrupt the controllers of these slots."""
        for slot in slots:
            self._controllers[slot].interrupt()

    def act(self, observations: Sequence[Any]) -> list[np.ndarray]:
        """Ask every controller."""
        return [each.act(seen) for each, seen in zip(self._controllers, observations, strict=True)]


def rollout(
    policy: Policy,
    slots: Sequence[Slot[S]],
    episodes: Sequence[Iterator[int]],
    should_stop: Callable[[], bool] = lambda: False,
    before_step: Callable[[], None] = lambda: None,
) -> Iterator[tuple[int, S]]:
    """Play episodes side by side and yield (slot, last step) at each end, before that slot begins its next episode.

    Args:
        policy: Acts in all slots in one call.
        slots: Where the episodes are played.
        episodes: One iterator of episode numbers per slot; slots may share one. A slot whose iterator has run out is
            finished. The loop ends when all are.
        should_stop: Asked before every step. If true, the loop ends and no further step is played.
        before_step: Called when the actions are chosen and not yet played, for instance to draw a frame.
    """
    begun: dict[int, int] = {}

    def begin(slot: int) -> bool:
        episode = next(episodes[slot], None)
        if episode is None:
            return False
        slots[slot].reset(episode)
        begun[slot] = episode
        return True

    live = [slot for slot in range(len(slots)) if begin(slot)]
    while live and not should_stop():
        if begun:
            policy.begin(begun)
            begun.clear()
        actions = policy.act([slot.observation for slot in slots])
        before_step()
        finished, interrupted = set[int](), list[int]()
        for slot in live:
            step = slots[slot].step(actions[slot])
            if step.intervened:
                interrupted.append(slot)
            if step.ended:
                yield slot, step
                if not begin(slot):
                    finished.add(slot)
        live = [slot for slot in live if slot not in finished]
        if interrupted:
            policy.interrupt(interrupted)
