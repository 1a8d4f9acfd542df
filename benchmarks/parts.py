"""Benchmarks of several parts: measure those that are named, keep the rows of the others, write the report anew."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from o2o.startup import prepare_process

HERE = Path(__file__).resolve().parent


def machine_here() -> dict[str, Any]:
    """Return what `throughput_machine.machine` says of this CPU; this process itself starts no JAX back end."""
    code = "import json, throughput_machine; print(json.dumps(throughput_machine.machine()))"
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, stdout=subprocess.PIPE, check=True, env=env)
    return json.loads(done.stdout)


def measure_parts(
    args: Sequence[str],
    parts: Mapping[str, Callable[[], Any]],
    report: Callable[[dict[str, Any]], str],
    name: str,
    called: str = "parts",
) -> int:
    """Measure the parts that `args` name, all where none is, into `results/NAME`; return the exit code.

    `rows.json` holds what each part returned, by its name, and the `machine`; `report` makes Markdown of that.
    """
    unknown = [arg for arg in args if arg not in parts]
    if unknown:
        print(f"{name}.py does not know {unknown[0]!r}; {called}: {', '.join(parts)}", file=sys.stderr)
        return 2
    prepare_process()
    folder = HERE / "results" / name
    path = folder / "rows.json"
    rows = json.loads(path.read_text()) if path.exists() else {}
    rows["machine"] = machine_here()["device"]
    for part in args or parts:
        rows[part] = parts[part]()
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows, indent=1) + "\n")
        (folder / "README.md").write_text(report(rows))
    print(report(rows))
    return 0
