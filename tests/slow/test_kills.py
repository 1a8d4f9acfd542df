"""A dozen kills over five agents: what is resumed equals the run that was never killed, bit for bit."""

from pathlib import Path

import numpy as np
import pytest

from tests.slow.kills import AGENTS, kill_often


@pytest.mark.parametrize("number", range(len(AGENTS)))
def test_killed_equals_uninterrupted(number: int, embedded: str, tmp_path: Path) -> None:
    """A run that is killed two or three times at random instants ends as one that was not."""
    kill_often(AGENTS[number], embedded, tmp_path, 3 if number < 2 else 2, np.random.default_rng(number))
