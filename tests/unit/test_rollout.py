"""The loop that plays episodes: which slot plays which episode, when policies are told, and when it stops."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from o2o.data.rollout import OneEach, Played, rollout
from o2o.policies.base import ChunkQueue, RecordedEpisodes, recorded_actions


class Count:
    """Episode k lasts k + 1 steps; a human takes over in step `human`, counted from 0."""

    def __init__(self, human: int = -1) -> None:
        self.human, self.played = human, list[tuple[int, int]]()

    def reset(self, episode: int) -> None:
        self.episode, self.observation = episode, 0

    def step(self, action: np.ndarray) -> Played:
        human = self.observation == self.human
        self.played.append((self.episode, int(action)))
        self.observation += 1
        return Played(self.observation > self.episode, human)


class Told:
    """Acts by its observation, and remembers what it is told."""

    def __init__(self) -> None:
        self.told, self.calls = list[Any](), 0

    def begin(self, episodes: Mapping[int, int]) -> None:
        self.told.append(("begin", self.calls, dict(episodes)))

    def interrupt(self, slots: Sequence[int]) -> None:
        self.told.append(("interrupt", self.calls, list(slots)))

    def act(self, observations: Sequence[Any]) -> list[np.ndarray]:
        self.calls += 1
        return [np.asarray(10 * seen) for seen in observations]


def test_slots_share_episodes() -> None:
    """Slots share the episodes, and policies are told of them before they act."""
    slots, policy, numbers = [Count(), Count(human=1)], Told(), iter(range(4))
    ended = [(slot, slots[slot].episode) for slot, _ in rollout(policy, slots, [numbers, numbers])]
    assert ended == [(0, 0), (1, 1), (0, 2), (1, 3)]
    assert slots[0].played == [(0, 0), (2, 0), (2, 10), (2, 20)]
    assert slots[1].played == [(1, 0), (1, 10), (3, 0), (3, 10), (3, 20), (3, 30)]
    assert policy.calls == 6
    assert policy.told == [
        ("begin", 0, {0: 0, 1: 1}),
        ("begin", 1, {0: 2}),
        ("interrupt", 2, [1]),
        ("begin", 2, {1: 3}),
        ("interrupt", 4, [1]),
    ]


def test_stop_seen_before_every_step() -> None:
    """A stop is seen before every step, and no step follows."""
    slot, policy = Count(), Told()
    stops = iter([False, False, True])
    assert list(rollout(policy, [slot], [iter([5])], lambda: next(stops))) == []
    assert slot.played == [(5, 0), (5, 10)] and policy.calls == 2


def test_before_step_observation() -> None:
    """`before_step` sees what the policy saw."""
    slot, seen = Count(), list[int]()
    for _ in rollout(Told(), [slot], [iter([1, 0])], before_step=lambda: seen.append(slot.observation)):
        pass
    assert seen == [0, 1, 0]


def test_slot_without_episodes() -> None:
    """A slot without episodes plays nothing."""
    slots = [Count(), Count()]
    for slot in slots:
        slot.observation = 0
    assert [slot for slot, _ in rollout(Told(), slots, [iter([0]), iter([])])] == [0]
    assert slots[1].played == []


class Adding:
    """Plays chunks: its observation plus 0, 1, 2; every episode begins with an empty queue."""

    def __init__(self) -> None:
        self.queue, self.seeds = ChunkQueue(), list[int]()

    def reset(self, seed: int) -> None:
        self.queue.clear()
        self.seeds.append(seed)

    def interrupt(self) -> None:
        self.queue.clear()

    def act(self, observation: Any) -> np.ndarray:
        return self.queue.next(lambda: list(observation["x"] + np.arange(3)))


def test_recorded_episodes_in_parallel() -> None:
    """Recorded episodes give the same actions in turn and side by side."""
    episodes = [{"x": np.arange(10.0, 15.0)}, {"x": np.arange(2.0)}]
    expected = [[10, 11, 12, 13, 14], [0, 1]]
    alone = Adding()
    assert [found.tolist() for found in recorded_actions(OneEach(alone), episodes, False)] == expected
    assert alone.seeds == [0, 1]
    together = recorded_actions(OneEach(Adding(), Adding()), episodes, True)
    assert [found.tolist() for found in together] == expected
    slot = RecordedEpisodes(episodes)
    slot.reset(1)
    assert [slot.step(np.zeros(1)).ended for _ in range(2)] == [False, True]
    assert slot.observation == {"x": 1.0}, "an ended episode stays at its last observation"
