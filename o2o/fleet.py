"""The training environments of a run, stepped side by side, and the episodes under way in them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from o2o.datasets import monte_carlo_returns
from o2o.episode import TRAIN_STREAM, EnvSlot, Step
from o2o.evaluate import EnvFn


def stack(observations: Sequence[Any]) -> Any:
    """Stack observations of one structure: leaves `[n, ...]`."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *observations)


class Fleet:
    """Environments of `seeds` members; knows rewards waiting for their episode's end where `mc_returns` are wanted."""

    def __init__(self, env_fn: EnvFn, seed: int, seeds: int, waits: bool, per_seed: int = 1) -> None:
        """Make and reset the environments, `per_seed` in a row for each seed: all of them are "members" here, `[S]`.

        `waits`: the agent needs Monte-Carlo returns of what it samples.
        """
        names = [(member,) if per_seed == 1 else (member, k) for member in range(seeds) for k in range(per_seed)]
        self.slots = [EnvSlot(env_fn(False), (seed, TRAIN_STREAM, *name)) for name in names]
        self.waits = waits
        self.waiting: list[list[tuple[float, float]]] = [[] for _ in names]
        """(reward, mask) of the episode under way, per member."""
        for slot in self.slots:
            slot.reset()
        self.observations = stack([slot.observation for slot in self.slots])
        """What the policy sees next, leaves `[S, ...]`."""

    def step(
        self, actions: np.ndarray, finished: Callable[[int, dict[str, Any]], None]
    ) -> tuple[dict[str, Any], np.ndarray]:
        """Play `actions` `[S, A]`; return the transitions, leaves `[S, ...]`, and which episodes ended `[S]`.

        Ended episodes are reported to `finished(member, row)` and reset; transitions keep the true last observation.
        If an environment fails, the others' steps are taken back, so that the run can be saved as it stood.
        """
        results: list[Step] = []
        before = [(slot.observation, slot.raw_return, slot.success, slot.success_last) for slot in self.slots]
        try:
            for slot, action in zip(self.slots, actions, strict=True):
                results.append(slot.step(action))
        except Exception:
            for slot, old in zip(self.slots, before, strict=True):
                slot.observation, slot.raw_return, slot.success, slot.success_last = old
            for slot in self.slots[: len(results)]:
                slot.actions.pop()
            raise
        rows = {
            "observations": self.observations,
            "actions": np.stack([result.action for result in results]),
            "rewards": np.asarray([result.reward for result in results], np.float32),
            "masks": np.asarray([1.0 - result.terminated for result in results], np.float32),
            "next_observations": stack([result.next_observation for result in results]),
            "ends": np.asarray([result.ended for result in results], np.float32),
        }
        if self.waits:
            rows["mc_returns"] = np.zeros(len(results), np.float32)
        for member, (slot, result) in enumerate(zip(self.slots, results, strict=True)):
            self.waiting[member].append((result.reward, 1.0 - result.terminated))
            if result.ended:
                finished(member, slot.row(result.terminated))
                slot.reset()
        self.observations = stack([slot.observation for slot in self.slots])
        return rows, np.asarray([result.ended for result in results])

    def take_returns(
        self, members: np.ndarray, discount: float, failure: float | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the waiting rows' returns-to-go (Cal-QL) of these members, `[S, L]` padded, and their counts `[S]`.

        L is a power of two, so that few shapes are compiled; members that are not named have a count of 0.
        """
        longest = max((len(self.waiting[member]) for member in members), default=0)
        returns = np.zeros((len(self.slots), 1 << max(longest - 1, 0).bit_length()), np.float32)
        counts = np.zeros(len(self.slots), np.int32)
        for member in members:
            rewards, masks = np.asarray(self.waiting[member], np.float32).reshape(-1, 2).T
            ends = np.zeros(len(rewards), np.float32)
            ends[-1:] = 1.0
            counts[member] = len(rewards)
            returns[member, : len(rewards)] = monte_carlo_returns(rewards, masks, ends, discount, failure)
            self.waiting[member] = []
        return returns, counts

    def forget(self, members: np.ndarray) -> None:
        """Drop the waiting rewards of these members (nothing waits for them)."""
        for member in members:
            self.waiting[member] = []

    def snapshot(self) -> dict[str, Any]:
        """Return what `restore` needs, JSON-able."""
        return {"slots": [slot.snapshot() for slot in self.slots], "waiting": self.waiting if self.waits else []}

    def restore(self, snapshot: dict[str, Any], observations: Any) -> list[bool]:
        """Put every environment back; which of them stand exactly where they stood."""
        same = []
        for member, (slot, part) in enumerate(zip(self.slots, snapshot["slots"], strict=True)):
            seen = jax.tree.map(lambda leaf, m=member: np.asarray(leaf[m]), observations)
            same.append(slot.restore(part, seen))
        if self.waits:
            self.waiting = [[(reward, mask) for reward, mask in rows] for rows in snapshot["waiting"]]
        self.observations = stack([slot.observation for slot in self.slots])
        return same

    def close(self) -> None:
        """Close the environments."""
        for slot in self.slots:
            slot.env.close()
