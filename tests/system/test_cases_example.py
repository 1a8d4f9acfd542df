"""What `examples/` shows works as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_data.py"


def test_own_data(tmp_path: Path) -> None:
    """A lab's logs become a policy that reaches its goals without o2o (after 10 steps: 2 of 20)."""
    run = [sys.executable, str(EXAMPLE), "--out", str(tmp_path / "out")]
    done = subprocess.run([*run, "--steps", "300"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = re.search(r"reached (\d+) of 20 goals, with neither o2o nor JAX loaded", done.stdout)
    assert found and int(found[1]) >= 16, done.stdout
    assert "imported 60 episodes" in done.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.suffix) == [
        "logs.npz",
        "policy.onnx",
        "policy.onnx.json",
    ]
