"""Rows of episodes whose values are of the wrong kind: one line that names file, line and field."""

import json
from pathlib import Path
from typing import Any

import pytest

from o2o.errors import RunError
from o2o.report.plots import pool

ROW = {"seed": 0, "env_steps": 10, "gradient_steps": 5, "phase": "online", "return": 1.5, "success": None}


@pytest.mark.parametrize(
    ("key", "value"),
    [("return", []), ("return", "1"), ("success", {}), ("env_steps", 2**70), ("seed", "x"), ("phase", None)],
)
def test_values_of_wrong_kind(key: str, value: Any, tmp_path: Path) -> None:
    """A value that is no number, or a count that no run reaches, is refused by its line and name."""
    (tmp_path / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (ROW, {**ROW, key: value})))
    with pytest.raises(RunError, match=rf"episodes.jsonl, line 2: {key} is "):
        pool([tmp_path])


def test_right_rows(tmp_path: Path) -> None:
    """Numbers, flags and unknown values are read as they are."""
    (tmp_path / "episodes.jsonl").write_text(json.dumps({**ROW, "success": True, "return": -3}) + "\n")
    assert pool([tmp_path]) == [{**ROW, "success": True, "return": -3}]
