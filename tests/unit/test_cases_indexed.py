"""Rows that are held by index read as the array that they stand for, by every kind of key."""

from typing import Any

import numpy as np
import pytest

from o2o.data.rows import Indexed

FRAMES, INDEX = np.arange(24).reshape(8, 3), np.asarray([1, 2, 3, 5, 6, 7])
KEYS: dict[str, Any] = {
    "row": 2,
    "slice": np.s_[1:4],
    "rows": np.asarray([4, 0]),
    "mask": INDEX > 3,
    "grid": np.asarray([[0, 1], [2, 3]]),
    "entry": np.s_[2, 1],
    "columns": np.s_[:, 1:],
    "new": np.s_[None],
    "new_slice": np.s_[None, :4],
    "two_new": np.s_[None, None, 1:3, 0],
    "all": np.s_[...],
    "last": np.s_[..., 0],
    "new_last": np.s_[None, ..., 0],
    "none": (),
}


@pytest.mark.parametrize("key", KEYS.values(), ids=list(KEYS))
def test_reads_like_array(key: Any) -> None:
    """`x[key]` is what the array of the rows gives."""
    np.testing.assert_array_equal(Indexed(FRAMES, INDEX)[key], FRAMES[INDEX][key])
