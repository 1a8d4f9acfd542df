"""Transitions that robots send (`o2o.train.link`) in place of environments that are stepped here."""

from collections.abc import Callable, Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from o2o.data.normalizer import Normalizer
from o2o.errors import ConfigError
from o2o.keys import is_key
from o2o.train.collect import Fleet
from o2o.train.link import Hub, Row, pack, unpack
from o2o.types import Agent, OnlineConfig

PUBLISH_EVERY = 20
"""Transitions between two versions of the parameters that are offered to the robots."""


def _sent(tree: Any) -> list[bool]:
    """Return which leaves act: all but the state of optimizers."""
    return ["opt_state" not in jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def packed_agents(agents: Any, normalizer: Normalizer | None, **about: Any) -> bytes:
    """Return the parameters that agents `[S]` act with, and `about` (JSON-able), as bytes."""
    tree = (agents, normalizer)
    leaves = [leaf for leaf, sent in zip(jax.tree.leaves(tree), _sent(tree), strict=True) if sent]
    host = jax.device_get([jax.random.key_data(leaf) if is_key(leaf) else leaf for leaf in leaves])
    return pack(about, {str(index): leaf for index, leaf in enumerate(host)})


def unpacked_agents(message: bytes, shapes: Any) -> tuple[Any, Normalizer | None, dict[str, Any]]:
    """Return agents, normaliser and what was said about them, for `shapes` of both; optimizers are zeros.

    Raises `ConfigError` if the parameters have other shapes.
    """
    about, found = unpack(message)
    wanted, structure = jax.tree.flatten(shapes)
    taken, leaves = iter(found.values()), []
    for shape, sent in zip(wanted, _sent(shapes), strict=True):
        if not sent:
            leaves.append(jnp.zeros(shape.shape, shape.dtype))
            continue
        values = next(taken, None)
        leaf = None if values is None else jax.random.wrap_key_data(values) if is_key(shape) else jnp.asarray(values)
        if leaf is None or leaf.shape != shape.shape or leaf.dtype != shape.dtype:
            raise ConfigError("the learner's agent has other parameters than this o2o makes of its settings")
        leaves.append(leaf)
    agents, normalizer = jax.tree.unflatten(structure, leaves)
    return agents, normalizer, about


class Feed(Fleet):
    """Stands where a `Fleet` does: a step takes the next transition that a robot has sent, whatever was chosen here.

    So the loop of training is the same: it updates by the transitions that it has received.
    """

    def __init__(
        self,
        hub: Hub,
        current: Callable[[], tuple[Agent, Normalizer | None, int, OnlineConfig]],
        stop: Callable[[], bool],
    ) -> None:
        """Take transitions from `hub`; `current` returns what acts now and the environment steps so far.

        Where `stop` is true while no transition comes, `step` raises `KeyboardInterrupt`, as an interrupted robot does.
        """
        self.hub, self._current, self._should_stop = hub, current, stop
        self.crew, self.slots, self.fault, self.displaced = None, [], None, False
        self.intervened = np.zeros(1, bool)
        self.stored: dict[str, int] = {}
        """The number up to which all rows of an actor were given to the trainer, by actor."""
        self._saved: dict[str, int] = {}
        self._whole, self._published = True, -PUBLISH_EVERY
        self.observations: Any = None

    def must_fit(self, row: Mapping[str, Any], shared: bool) -> Self:
        """Return itself. What the robots send is compared with a `row`, and refused there, when it comes."""
        zero = jax.tree.map(lambda leaf: np.zeros((1, *leaf.shape), leaf.dtype), row["observations"])
        self.observations = zero if self.observations is None else self.observations
        return self

    def send(self, actions: np.ndarray) -> None:
        """Offer newer parameters to the robots; `actions` are played by nobody."""
        agents, normalizer, steps, online = self._current()
        if steps - self._published >= PUBLISH_EVERY:
            self._published = steps
            random = max(online.random_steps - steps, 0)
            self.hub.publish(steps, packed_agents(agents, normalizer, env_steps=steps, random=random))

    def receive(self, finished: Callable[[int, dict[str, Any]], None]) -> tuple[dict[str, Any], np.ndarray]:
        """Wait for the next transition, and return it as `Fleet.receive` does."""
        while (found := self.hub.take(0.2)) is None:
            if self._should_stop():
                raise KeyboardInterrupt
        row, ended = found
        rows = {**row.values, "ends": np.asarray([ended], np.float32)}
        self.intervened = np.asarray([row.intervened])
        if row.result is not None:
            finished(0, row.result)
        self.observations, self._whole = rows["next_observations"], ended
        self.stored[row.actor] = row.number
        return rows, np.asarray([ended])

    def snapshot(self) -> dict[str, Any]:
        """Return what `restore` needs, JSON-able: which rows are stored."""
        return {"actors": dict(self.stored), "whole": self._whole}

    def restore(self, snapshot: dict[str, Any], observations: Any) -> list[bool]:
        """Go on behind the rows of the snapshot; whether the newest of them was the last of its episode."""
        self.stored, self.observations = dict(snapshot["actors"]), observations
        self._whole = True  # an episode under way ends there: its robot may not come back
        return [bool(snapshot["whole"])]

    def saved(self) -> None:
        """Note that all rows up to here are in a checkpoint. Robots may forget those of the checkpoint before it.

        So a run whose newest checkpoint is damaged goes on from the older one, and gets the rest again.
        """
        self.hub.durable, self._saved = self._saved, dict(self.stored)

    def finish(self) -> None:
        """Let the robots know that no more transitions are taken, and that none need be kept."""
        self.hub.finish(self.stored)

    def close(self) -> None:
        """Leave the robots to the hub, which outlives the trainer."""


def misfit(row: Row, example: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a received row, leaves `[1, ...]`, compared with one of the replay, leaves `[...]`."""
    keys = ("observations", "actions", "rewards", "masks", "next_observations", "ends")

    def shapes(rows: Mapping[str, Any], skip: int) -> Any:
        return {key: jax.tree.map(lambda leaf: leaf.shape[skip:], rows[key]) for key in keys}

    wanted = shapes({**example, "ends": np.zeros(())}, 0)
    if set(row.values) != set(keys):
        return f"the actor sends {sorted(row.values)}, the learner stores {sorted(keys)}: install one version on both"
    if (found := shapes(row.values, 1)) != wanted:
        wrong = [key for key in keys if found[key] != wanted[key]]
        told = ", ".join(f"{key} {found[key]}, the learner's are {wanted[key]}" for key in wrong)
        return f"the actor's environment has other spaces than the learner's: {told}; give the same environment"
    floats = [np.asarray(leaf) for leaf in jax.tree.leaves(row.values) if np.asarray(leaf).dtype.kind == "f"]
    if not all(np.isfinite(leaf).all() for leaf in floats):
        return "a transition of the actor has a number that is not finite: look at its sensors"
    return None
