"""Run the quick tests at both ends of the supported versions of Python, JAX and MuJoCo, and print a table.

Each end gets a virtual environment of its own: about 1 GB and some minutes, over the network. Interpreters are looked
for on the PATH, such as `python3.13`; on Debian 12 `debootstrap trixie` brings one.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENDS = {
    "oldest": ("python3.11", ("jax==0.9.*", "jaxlib==0.9.*", "mujoco==3.5.*")),
    "newest": ("python3.13", ("jax", "jaxlib", "mujoco<3.12")),
}
"""Of each end: the interpreter, and what is pinned beyond pyproject.toml."""
TESTS = ("tests/unit", "tests/agents/test_contract.py")


def check(name: str, folder: Path) -> list[str]:
    """Install and test one end in `folder`; return the cells of its row."""
    interpreter, pins = ENDS[name]
    found = shutil.which(interpreter)
    if found is None:
        return [name, interpreter, "-", "-", "not run: no such interpreter"]
    venv, constraints = folder / name, folder / f"{name}.txt"
    constraints.write_text("\n".join(pins) + "\n")
    subprocess.run([found, "-m", "venv", "--clear", str(venv)], check=True)
    python = str(venv / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", "-c", str(constraints), "-e", f"{ROOT}[dev]"]
    if subprocess.run(install, check=False).returncode:
        return [name, interpreter, "-", "-", "failed to install"]
    shown = "import sys, jax, mujoco; print(sys.version.split()[0], jax.__version__, mujoco.__version__)"
    versions = subprocess.run([python, "-c", shown], capture_output=True, text=True, check=True).stdout.split()
    tested = subprocess.run(
        [python, "-m", "pytest", "-q", *TESTS], cwd=ROOT, capture_output=True, text=True, check=False
    )
    last = (tested.stdout.strip().splitlines() or [tested.stderr[-200:]])[-1]
    return [name, *versions, last.strip("= ")]


def main() -> int:
    """Check the ends and print the table; exit code 1 if one of them did not pass."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--only", choices=ENDS, help="one end")
    parser.add_argument("--keep", type=Path, help="folder for the virtual environments; default: a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        rows = [check(name, folder) for name in ([args.only] if args.only else ENDS)]
    print("| end | Python | JAX | MuJoCo | quick tests |\n| --- | --- | --- | --- | --- |")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    return int(any("passed" not in row[-1] or "failed" in row[-1] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
