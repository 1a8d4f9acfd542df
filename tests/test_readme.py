"""README's Python example runs as printed (with fewer steps) and is at most eight lines."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


def test_the_example_works(embedded: str, capsys: pytest.CaptureFixture[str]) -> None:
    block = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert block is not None
    code = block.group(1)
    assert len([line for line in code.splitlines() if line.strip()]) <= 8
    shorter = code.replace("3_000", "30")
    assert shorter.count("(30)") == 2
    scope: dict[str, object] = {}
    exec(compile(shorter, "README.md", "exec"), scope)
    assert "'return'" in capsys.readouterr().out
    trainer = scope["trainer"]
    assert trainer.counters.offline_steps == 30 and trainer.counters.env_steps == 30  # pyright: ignore
