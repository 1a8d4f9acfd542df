"""README's Python example runs as printed (with fewer steps) and is at most eight lines."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_example_works(embedded: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = BLOCKS[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 8
    shorter = code.replace("3_000", "30")
    assert shorter.count("(30)") == 2
    scope: dict[str, object] = {}
    exec(compile(shorter, "README.md", "exec"), scope)
    assert "'return'" in capsys.readouterr().out
    trainer = scope["trainer"]
    assert trainer.counters.offline_steps == 30 and trainer.counters.env_steps == 30  # pyright: ignore


def test_the_parts_below_work_on_their_own(embedded: str) -> None:
    assert embedded in BLOCKS[1]
    scope: dict[str, Any] = {}
    exec(compile(BLOCKS[1], "README.md", "exec"), scope)
    assert scope["actions"].shape == (1, 2) and np.all(np.abs(scope["actions"]) <= 1)
    assert set(np.unique(scope["data"].arrays["rewards"])) == {-5.0, 5.0}, "the task's, not the file's 0 and 1"
    assert scope["batch"]["observations"].shape == (1, 256, 6) and np.isfinite(scope["info"]["critic/loss"])
