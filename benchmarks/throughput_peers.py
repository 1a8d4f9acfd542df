"""The comparison with SBX, Stable-Baselines3 and d3rlpy: their environment, and the rounds in which all take turns.

The libraries come from the package registry into a virtual environment of their own, `runs/peers` or the folder named
by `O2O_PEERS`. Everything runs on the CPU.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from throughput_report import AS_RUN, LIBRARIES, Contest, today

HERE = Path(__file__).resolve().parent
FOLDER = Path(os.environ.get("O2O_PEERS") or HERE.parent / "runs" / "peers")
PACKAGES = ("sbx-rl", "stable-baselines3", "d3rlpy", "gymnasium[mujoco]", "mujoco<3.12")
PEERS = tuple(name for name in LIBRARIES if name != "ours")
HIDDEN = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "XLA_FLAGS", "PYTHONPATH")
"""Variables that other libraries shall not inherit: they run with their own defaults."""
ROUNDS, SECONDS, PAUSE = 5, 2.0, 0.3
READY_SECONDS, ANSWER_SECONDS = 900.0, 300.0


class PeersError(Exception):
    """The other libraries cannot be installed, or one of them failed."""


@dataclass(frozen=True)
class Case:
    """One setting that several libraries run."""

    title: str
    algorithm: str
    critics: int = 2
    layer_norm: bool = False
    utd: int = 1
    env: str | None = None
    """Environment of a whole online loop; None for updates on synthetic rows."""
    unit: str = "updates"
    wanted: Mapping[str, float] = field(default_factory=dict)
    """Library to the ratio that equals the fastest published code, or beats it as a published experiment did."""

    def settings(self, quick: bool) -> dict[str, Any]:
        """Return what a contender is told."""
        sizes = {"observation": 45, "action": 24, "batch": 256, "hidden": [256, 256], "rows": 20_000, "square": 2048}
        if self.env:
            sizes |= {"observation": 17, "action": 6}
        if quick:
            sizes |= {"batch": 16, "hidden": [32, 32], "rows": 2_000, "square": 128}
        sizes["capacity"] = 1_000_000 if self.env and not quick else sizes["rows"]
        own = {name: getattr(self, name) for name in ("algorithm", "critics", "layer_norm", "utd", "env")}
        return {**sizes, **own}


CASES = {
    "sac-utd1": Case(
        "SAC as RLPD has it: 10 critics with layer norm, one update per step", "sac", 10, True, wanted={"sbx": 1.62}
    ),
    "sac-utd20": Case(
        "The same, 20 critic updates and one of actor and temperature per step", "sac", 10, True, 20,
        unit="critic updates", wanted={"sbx": 1.5},
    ),
    "iql": Case("IQL, 2 critics", "iql", wanted={"d3rlpy": 3.18}),
    "cql": Case("CQL, 2 critics, 10 actions of each kind", "cql", wanted={"d3rlpy": 1.89}),
    "loop": Case(
        "The whole online loop: SAC, 2 critics, one update per step of HalfCheetah-v5", "sac", env="HalfCheetah-v5",
        unit="environment steps", wanted={"sbx": 2.0},
    ),
}  # fmt: skip
"""Name to case; shapes but the loop's are those of Adroit's pen."""


def peers_python() -> Path:
    """Return the Python of the other libraries' environment, made and filled where it is not; raises `PeersError`.

    A folder that holds anything is replaced only where its `installed.json` says that it was made here.
    """
    python, stamp = FOLDER / "bin" / "python", FOLDER / "installed.json"
    if stamp.exists() and json.loads(stamp.read_text()) == list(PACKAGES) and python.exists():
        return python
    if FOLDER.exists() and not stamp.exists() and (not FOLDER.is_dir() or any(FOLDER.iterdir())):
        raise PeersError(
            f"{FOLDER} holds something else than this script's environment (no installed.json in it), and would be "
            "emptied; delete it, or name a new folder in O2O_PEERS"
        )
    print(f"installing {', '.join(PACKAGES)} into {FOLDER} (some minutes, about 2 GB) ...", flush=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for command in ([sys.executable, "-m", "venv", "--clear", str(FOLDER)], [*pip, *PACKAGES]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr or done.stdout).strip().splitlines()[-1:]
            raise PeersError(f"{' '.join(command)} failed: {''.join(last)}; make the environment by hand in {FOLDER}")
        stamp.write_text("[]")  # made here, not filled yet
    stamp.write_text(json.dumps(list(PACKAGES)))
    return python


class Worker:
    """A contender in a process of its own."""

    def __init__(self, who: str, case: Case, python: Path, quick: bool, script: Sequence[str] = ()) -> None:
        """Start the process; it makes itself ready meanwhile. Ours is served by `script` where one is given."""
        self.who, env = who, {**os.environ, "JAX_PLATFORMS": "cpu"}
        if who == "ours":
            command = [sys.executable, *(script or (str(HERE / "throughput_agents.py"), "serve"))]
        else:
            command = [str(python), str(HERE / "peers.py"), who]
            env = {name: value for name, value in env.items() if name not in HIDDEN}
        command.append(json.dumps(case.settings(quick)))
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
        )
        self.errors: list[str] = []
        self.reader = threading.Thread(target=self._keep_errors, daemon=True)
        self.reader.start()

    def _keep_errors(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.errors = [*self.errors[-20:], line.rstrip()]

    def answer(self, limit: float) -> dict[str, Any]:
        """Return the next answer; raises `PeersError` if there is none within so many seconds."""
        assert self.process.stdout is not None
        timer = threading.Timer(limit, self.process.kill)
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        if not line:
            self.reader.join(5.0)
            why = next((text for text in reversed(self.errors) if text.strip()), f"no answer in {limit:g} s")
            raise PeersError(f"{LIBRARIES[self.who]} failed: {why}")
        return json.loads(line)

    def rate(self, form: str, seconds: float) -> float:
        """Return the rate of a form, measured now."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([form, seconds]) + "\n")
        self.process.stdin.flush()
        return self.answer(ANSWER_SECONDS)["rate"]

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def contest(name: str, chosen: Sequence[str], device: str, quick: bool) -> list[Contest]:
    """Run a case's rounds: ours and the `chosen` libraries take turns, in another order each time."""
    case, python = CASES[name], peers_python()
    rounds, seconds = (2, 0.1) if quick else (ROUNDS, SECONDS)
    workers, found, turns = [], [], []
    try:
        for who in ("ours", *chosen):
            workers.append(Worker(who, case, python, quick))
            ready = workers[-1].answer(READY_SECONDS)  # one at a time: memory, and figures of the first calls
            if "missing" in ready:
                found.append(Contest(device, name, who, AS_RUN, "", [], ready["missing"], today()))
                continue
            print(f"{name}: {LIBRARIES[who]} is ready", flush=True)
            for form, includes in ready["forms"].items():
                note = "; ".join(part for part in (includes, ready["about"] if form == AS_RUN else "") if part)
                row = Contest(device, name, who, form, ready["version"], [], note, today())
                turns.append((workers[-1], row))
        for i in range(rounds):
            for worker, row in turns if i % 2 == 0 else reversed(turns):
                time.sleep(PAUSE)  # threads that spin for more work have given up by then
                row.rates.append(worker.rate(row.form, seconds))
    finally:
        for worker in workers:
            worker.close()
    return [*(row for _, row in turns), *found]
