"""A checkpoint is read by an agent that has got an optional field since, and not where an array is missing."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from o2o.errors import CheckpointError
from o2o.train import checkpoint


class Before(struct.PyTreeNode):
    weights: Any


class Since(struct.PyTreeNode):
    weights: Any
    counter: Any = None


def test_optional_field(tmp_path: Path) -> None:
    """Fields that are None may come and go; an array that the file lacks is named."""
    weights = jnp.arange(6.0).reshape(2, 3)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    checkpoint.save(tmp_path / "a", 1, {"agent": Before(weights)}, {}, None, 1)
    checkpoint.save(tmp_path / "b", 1, {"agent": Since(weights)}, {}, None, 1)
    zeros = jnp.zeros((2, 3))
    for folder, target in (("a", Since(zeros)), ("b", Before(zeros)), ("b", Since(zeros))):
        loaded = checkpoint.load_arrays(tmp_path / folder, 1, {"agent": target})["agent"]
        np.testing.assert_array_equal(loaded.weights, weights)
        assert type(loaded) is type(target) and getattr(loaded, "counter", None) is None
    with pytest.raises(CheckpointError, match="counter"):
        checkpoint.load_arrays(tmp_path / "a", 1, {"agent": Since(zeros, jnp.zeros(()))})
