"""A few hundred damaged files of every kind: each gives one line of ours or the right result, and nothing is lost."""

from pathlib import Path

import pytest

from tests.slow.fuzz import World, fuzz


@pytest.mark.filterwarnings("ignore")  # orbax leaves coroutines behind where a read fails
def test_damaged_files(tmp_path: Path) -> None:
    """No damaged file of a run or a dataset gives a foreign exception, a wrong result or a loss."""
    outcomes, faults = fuzz(World(tmp_path), 400, seed=0)
    assert not faults, "\n".join(faults)
    refused = sum(count for outcome, count in outcomes.items() if outcome.endswith("refused"))
    assert refused > 100, outcomes
