"""Install o2o at both ends of the supported versions, run a choice of tests there, and write what came out.

    python benchmarks/versions.py [--only oldest|newest] [--keep FOLDER]

`oldest` is the oldest Python with every direct dependency at its lower bound in `pyproject.toml`; `newest` is Python
3.13 with the newest versions that these bounds allow. Each range has both its ends there, MuJoCo's, too.
The tests import all doors, run the contract of two agents, stop and resume a run, and open environments and cameras.

Each end gets a virtual environment of its own: about 1 GB and some minutes, over the network. Interpreters are looked
for on the PATH, as `python3.11` and `python3.13`; on Debian 12 `debootstrap trixie` brings the second.
The table goes to `benchmarks/results/versions/`, beside the exact versions of each end as `pip freeze` names them.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

from throughput import CHECKOUT, HERE, MeasureError, markdown_table, read_table, write_table

RESULTS = HERE / "results" / "versions"
ENDS = {"oldest": "python3.11", "newest": "python3.13"}
"""The interpreter of each end."""
SHOWN = ("jax", "flax", "numpy", "scipy", "mujoco", "gymnasium", "h5py", "tyro")
"""Packages that have a column."""
TESTS = (
    "tests/unit/test_startup.py", "tests/unit/test_cases_help.py", "tests/unit/test_envs.py",
    "tests/agents/test_contract.py", "tests/system/test_cameras.py", "tests/system/test_runs.py",
)  # fmt: skip
CHOSEN = "startup or help or test_envs or cameras or iql-offline or rlpd-offline or test_stop_and_resume[calql]"
TOOLS = ("pytest>", "hypothesis>", "setuptools>")
"""What the tests need of the extra `dev`."""
OUTCOMES = ("passed", "failed", "errors", "skipped")
COLUMNS = ("end", "python", *SHOWN, *OUTCOMES, "commit", "date")


def lower_bounds(dependencies: list[str]) -> list[str]:
    """Return constraints that hold each dependency at its lower bound: `minari[hdf5]>=0.5.4` gives `minari==0.5.4`."""
    found = [re.match(r"([\w.-]+)(?:\[[^]]*\])?\s*>=\s*([\w.]+)", each) for each in dependencies]
    without = [each for each, match in zip(dependencies, found, strict=True) if match is None]
    if without:
        raise MeasureError(f"pyproject.toml gives {', '.join(without)} no lower bound; write one as NAME>=VERSION")
    return [f"{match[1]}=={match[2]}" for match in found if match]


def interpreter(name: str) -> str:
    """Return the first interpreter of this name on the PATH that starts; raises `MeasureError` without one."""
    for folder in os.get_exec_path():
        path = shutil.which(name, path=folder)
        if path and subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode == 0:
            return path  # pyenv has shims of versions that are switched off: they do not start
    raise MeasureError(f"no {name} on the PATH; install it, or put the folder that has it on the PATH")


def call(*command: str | Path) -> str:
    """Run a command in the checkout and return its output; raises `MeasureError` with the last lines of its errors."""
    done = subprocess.run([str(part) for part in command], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join(done.stderr.strip().splitlines()[-3:])
        raise MeasureError(f"`{' '.join(map(str, command[1:5]))} ...` ended with code {done.returncode}: {said}")
    return done.stdout


def install(end: str, folder: Path) -> Path:
    """Install o2o for one end into `folder`; return its interpreter."""
    venv, constraints = folder / end, folder / f"{end}.txt"
    call(interpreter(ENDS[end]), "-m", "venv", "--clear", venv)
    about = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    constraints.write_text("\n".join(lower_bounds(about["dependencies"]) if end == "oldest" else []))
    tools = [each for each in about["optional-dependencies"]["dev"] if each.startswith(TOOLS)]
    python = venv / "bin" / "python"
    call(python, "-m", "pip", "install", "--quiet", "-c", constraints, "-e", CHECKOUT, *tools)
    return python


def outcomes(summary: str) -> dict[str, str]:
    """Return how many tests had each outcome, out of the last line that pytest prints."""
    found = {outcome: re.search(rf"(\d+) {outcome.rstrip('s')}", summary) for outcome in OUTCOMES}
    return {outcome: match[1] if match else "0" for outcome, match in found.items()}


def check(end: str, folder: Path) -> dict[str, str]:
    """Install and test one end; return its row, and keep its versions beside the table."""
    python = install(end, folder)
    freeze = call(python, "-m", "pip", "freeze", "--exclude-editable")
    versions = dict(line.split("==") for line in freeze.lower().splitlines() if "==" in line)
    tested = subprocess.run(
        [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS, "-k", CHOSEN],
        cwd=CHECKOUT, env={**os.environ, "PYTHONPATH": str(CHECKOUT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = tested.stdout.strip().splitlines() or [""]
    print(*(line for line in lines if line.startswith(("FAILED", "ERROR"))), lines[-1], sep="\n", flush=True)
    if tested.returncode > 1:
        raise MeasureError(f"pytest ended with code {tested.returncode}: {tested.stderr[-300:].strip() or lines[-1]}")
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{end}.txt").write_text(freeze)
    number = call(python, "-c", "import platform; print(platform.python_version())").strip()
    commit = call("git", "describe", "--always", "--dirty").strip()
    row = {"end": end, "python": number, "commit": commit, "date": time.strftime("%Y-%m-%d")}
    return row | {name: versions[name] for name in SHOWN} | outcomes(lines[-1])


def main() -> int:
    """Check the ends and write the table; exit code 1 if one of them did not pass."""
    about, *_ = (__doc__ or "").split("\n\n")
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--only", choices=ENDS, help="one end; the row of the other stays")
    parser.add_argument("--keep", type=Path, help="folder for the virtual environments; default: a temporary one")
    args = parser.parse_args()
    rows, failed = {row["end"]: row for row in read_table(RESULTS / "rows.csv")}, False
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for end in [args.only] if args.only else ENDS:
            try:
                rows[end] = check(end, folder.resolve())
            except MeasureError as error:
                print(f"{end}: {error}", flush=True)
                failed = True
                continue
            failed |= rows[end]["failed"] != "0" or rows[end]["errors"] != "0" or rows[end]["passed"] == "0"
            kept = [rows[name] for name in ENDS if name in rows]
            write_table(RESULTS, "rows.csv", kept, report(kept))
    return int(failed)


def report(rows: list[dict[str, str]]) -> str:
    """Return the text that stands beside the rows."""
    return (
        "# Both ends of the supported versions\n\n"
        "Made by `python benchmarks/versions.py`, whose docstring says what an end is. Exact versions: `oldest.txt`, "
        f"`newest.txt`.\nTests: `{' '.join(TESTS)}`, of these `-k '{CHOSEN}'`.\n\n{markdown_table(COLUMNS, rows)}"
    )


if __name__ == "__main__":
    sys.exit(main())
