"""One run on several devices: seeds are spread over them first, then the rows of each minibatch.

Arrays with a seed axis are placed in parts; XLA divides the programs by that and adds what devices have to tell each
other. So the programs stay what they are, and on one device nothing here leaves a trace in them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import gcd
from typing import Any, TypeVar

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from o2o.errors import ConfigError
from o2o.types import Batch

T = TypeVar("T")
SEED, ROWS = "seed", "rows"
"""Axes of the mesh."""


class Devices:
    """The devices of a run, `S'` for groups of its seeds times `B'` for parts of each minibatch."""

    def __init__(self, count: int, seeds: int, batch_size: int) -> None:
        """Take the first `count` devices; raises `ConfigError` if there are fewer, or minibatches do not divide."""
        found = jax.devices()
        if count > len(found):
            raise ConfigError(
                f"loop.devices is {count}, and JAX has {len(found)} ({found[0].platform}); expected at most that"
            )
        groups = gcd(seeds, count)
        parts = count // groups
        if batch_size % parts:
            raise ConfigError(
                f"loop.devices is {count} with {seeds} seed(s), so a minibatch is divided by {parts}; batch_size is "
                f"{batch_size}, expected a multiple of {parts}"
            )
        auto = (AxisType.Auto, AxisType.Auto)
        self.mesh = None
        if count > 1:
            self.mesh = jax.make_mesh((groups, parts), (SEED, ROWS), auto, devices=found[:count])

    def by_seed(self, tree: T) -> T:
        """Return arrays `[S, ...]` placed in parts, each seed on the devices of its group."""
        return self._placed(tree, PartitionSpec(SEED))

    def everywhere(self, tree: T) -> T:
        """Return arrays placed whole on every device."""
        return self._placed(tree, PartitionSpec())

    def _placed(self, tree: T, parts: PartitionSpec) -> T:
        return tree if self.mesh is None else jax.device_put(tree, NamedSharding(self.mesh, parts))

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Let programs that are called inside divide their minibatches."""
        if self.mesh is None:
            yield
            return
        with jax.set_mesh(self.mesh):
            yield


def divided(batch: Batch, axis: int) -> Batch:
    """Return a minibatch whose rows, which `axis` of every leaf counts, are divided over the devices of the run."""
    mesh = jax.sharding.get_abstract_mesh()
    if ROWS not in mesh.axis_names or mesh.shape[ROWS] == 1:
        return batch
    free = [PartitionSpec.UNCONSTRAINED] * axis

    def divide(leaf: Any) -> Any:
        rest = [PartitionSpec.UNCONSTRAINED] * (leaf.ndim - axis - 1)
        return jax.lax.with_sharding_constraint(leaf, PartitionSpec(*free, ROWS, *rest))

    return jax.tree.map(divide, batch)
