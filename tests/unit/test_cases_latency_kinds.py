"""The latency of exported policies is measured for every family of policies."""

import re
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from export_latency import KINDS

from o2o.agents import AGENTS


def test_every_agent_in_a_row() -> None:
    """Each agent has a row, or one says that it acts alike."""
    named = set(re.findall(r"`(\w+)`", " ".join(KINDS.values())))
    assert set(KINDS) | named == set(AGENTS)
