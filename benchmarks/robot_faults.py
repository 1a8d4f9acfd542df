"""Break a simulated robot, its actor and its learner, one after the other, and count what is left of what was recorded.

    python benchmarks/robot_faults.py    # into results/robot/, some minutes

`examples/arm_controller.py` is the robot: a MuJoCo arm in a process of its own, in real time, behind a socket.
`examples/arm_robot.py` is its driver with safety wrappers, at 50 Hz. `o2o learner` and `o2o actor` run as on two
machines. Each fault happens in the middle of a motion. The controller notes when its motors were told to stand still.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, cast

from throughput import CHECKOUT, HERE, markdown_table, write_table

OUT = HERE / "results" / "robot"
EXAMPLES = CHECKOUT / "examples"
DATASET, DEMONSTRATIONS = "lab/table-arm-v0", 5
LEARNING = (
    "rlpd", "--dataset", DATASET, "--env", "arm_robot:TableArm-v0", "--offline-estimate", "--preset", "small",
    "--offline-steps", "50", "--online-steps", "100000", "--config.batch-size", "64", "--loop.checkpoint-every", "100",
    "--config.online.min-rows", "0", "--config.actor-hidden-dims", "32", "32", "--config.critic-hidden-dims", "32",
    "32", "--loop.replay-capacity", "20000", "--runs", ".", "--name", "run",
)  # fmt: skip
ABOUT = """\
A MuJoCo arm in its own process behind a socket, in real time at 50 Hz; its driver with `guarded`, `o2o actor` and
`o2o learner` in processes of their own (`python benchmarks/robot_faults.py`). Each fault came in mid-motion.
`still after`: from the fault until the motors were told to stand still, by the controller's clock.

"""


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


class Arm:
    """The robot: its controller's process, and a connection to break it."""

    def __init__(self, port: int | None = None) -> None:
        """Start it; at once another can be started at its port when it has died."""
        self.port = port or free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.process = subprocess.Popen([sys.executable, str(EXAMPLES / "arm_controller.py"), str(self.port)])
        until = time.monotonic() + 30
        while True:
            try:
                self._socket = socket.create_connection(("127.0.0.1", self.port), 5.0)
                break
            except OSError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.02)
        self._lines = self._socket.makefile()

    def tell(self, **message: Any) -> None:
        """Send a message, such as a fault."""
        self._socket.sendall(json.dumps(message).encode() + b"\n")

    def report(self) -> dict[str, Any]:
        """Return what the arm has done since the newest fault; nothing if it is dead."""
        try:
            self.tell(report=True)
            return json.loads(self._lines.readline())
        except (OSError, ValueError):
            return {}

    def moving(self, commands: int = 30, alive: Callable[[], bool] = lambda: True, wait_s: float = 90.0) -> bool:
        """Wait until it has got so many commands from now on, and moves; False if who sends them is not `alive`."""
        self.tell(fault=None)
        until = time.monotonic() + wait_s
        while self.report().get("commands", 0) < commands:
            if time.monotonic() > until:
                raise TimeoutError("the arm gets no commands")
            if not alive():
                return False
            time.sleep(0.02)
        return True

    def close(self) -> None:
        """End the process."""
        self._socket.close()
        self.process.kill()
        self.process.wait()


@dataclass(frozen=True)
class Outcome:
    """A row of the table."""

    fault: str
    noticed: str
    still_after_ms: float | None
    """None: the motors were dead, or the robot went on."""
    robot: str
    recorded: int
    """Transitions that were recorded since the fault before: until it was known what became of this one."""
    lost: int = 0
    """Those of them that the learner has not stored."""


class Lab:
    """A folder with a dataset, a learner and an actor."""

    def __init__(self, folder: Path, *options: str) -> None:
        """Record demonstrations, as a lab would, and start the learner, with more `options` if you like."""
        self.folder, self.arm, self.port = folder, Arm(), free_port()
        paths = os.pathsep.join([str(CHECKOUT), str(EXAMPLES)])
        self.environment = {**os.environ, "PYTHONPATH": paths, "MINARI_DATASETS_PATH": str(folder / "datasets")}
        self.actor: subprocess.Popen[str] | None = None
        self.learner: subprocess.Popen[str] | None = None
        self._demonstrate()
        self.teach(*LEARNING, *options)

    def _demonstrate(self) -> None:
        words = ["record", DATASET, "--env", "arm_robot:TableArm-v0", "--env-kwargs", f"address={self.arm.address}"]
        words += ["--policy", "arm_robot:demonstrate", "--episodes", str(DEMONSTRATIONS)]
        if self._start("record", words).wait(120):
            raise RuntimeError((self.folder / "record.log").read_text()[-2000:])

    def _start(self, name: str, words: Sequence[str]) -> subprocess.Popen[str]:
        log = (self.folder / f"{name}.log").open("w")
        command = [sys.executable, "-c", "from o2o.cli import main; main()", *words]
        return subprocess.Popen(command, env=self.environment, cwd=self.folder, stdout=log, stderr=log, text=True)

    def teach(self, *words: str) -> None:
        """Start the learner, and wait until it listens."""
        self.learner = self._start("learner", ["learner", *words, "--listen", f"127.0.0.1:{self.port}"])
        until = time.monotonic() + 120
        while "robots: `o2o actor" not in (self.folder / "learner.log").read_text():
            if self.learner.poll() is not None or time.monotonic() > until:
                raise RuntimeError((self.folder / "learner.log").read_text()[-2000:])
            time.sleep(0.05)

    def act(self) -> None:
        """Start the actor unless it runs, and wait until the arm moves. On a busy machine it may fault by itself."""
        words = ["actor", "--env", "arm_robot:TableArm-v0", "--env-kwargs", f"address={self.arm.address}"]
        words += ["--learner", f"127.0.0.1:{self.port}", "--spool", "spool"]
        for _ in range(STARTS):
            if self.actor is None or self.actor.poll() is not None:
                self.actor = self._start("actor", words)
            if self.arm.moving(alive=lambda: self.actor is not None and self.actor.poll() is None):
                return self.link()
        raise RuntimeError(f"the actor does not go on: {self.said()}")

    def link(self) -> None:
        """Keep the files of the spool: it forgets what the learner has in two checkpoints."""
        (self.folder / "kept").mkdir(exist_ok=True)
        for path in (self.folder / "spool").glob("rows-*.bin"):
            if not (kept := self.folder / "kept" / path.name).exists():
                os.link(path, kept)

    def said(self) -> str:
        """Return the last line that the actor wrote."""
        lines = (self.folder / "actor.log").read_text().split("\n")
        text = next((line for line in reversed(lines) if line.strip()), "")
        return text.removeprefix("o2o: ").removeprefix("error: ").strip()

    def rows(self) -> dict[int, Any]:
        """Return all recorded transitions by number. Opens no file for writing: an actor may be at work."""
        from o2o.train.link import Row
        from o2o.train.spool import HEAD

        self.link()
        found: dict[int, Any] = {}
        for path in (self.folder / "kept").glob("rows-*.bin"):
            content, at = path.read_bytes(), 0
            while at + HEAD.size <= len(content):
                number, length, _ = HEAD.unpack_from(content, at)
                entry = content[at + HEAD.size : (at := at + HEAD.size + length)]
                if len(entry) == length:
                    found[number] = Row.unpacked("", number, entry)
        return found

    def close(self) -> None:
        """End all processes."""
        for process in (self.actor, self.learner):
            if process is not None and process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
                process.wait()
        self.arm.close()


@dataclass(frozen=True)
class Fault:
    """Something that breaks."""

    name: str
    message: dict[str, Any] | None = None
    """What the arm is told; None: a signal."""
    to: str = "arm"
    """Who gets the signal: `arm`, `actor` or `learner`."""
    sign: signal.Signals = signal.SIGKILL
    """SIGSTOP is taken back after a second."""


FAULTS = (
    Fault("frames 30 ms late", {"fault": "late", "value": 0.03}),
    Fault("30 % of the frames dropped", {"fault": "drop", "value": 0.3}),
    Fault("learner killed", to="learner"),
    Fault("learner killed again", to="learner"),
    Fault("frames 0.2 s late", {"fault": "late", "value": 0.2}),
    Fault("sensor hangs: the same values for ever", {"fault": "hang"}),
    Fault("sensor gives NaN", {"fault": "nan"}),
    Fault("cable out", {"fault": "mute"}),
    Fault("controller stalls for 1 s", to="arm", sign=signal.SIGSTOP),
    Fault("controller dies", {"fault": "die"}),
    Fault("actor stalls for 1 s", to="actor", sign=signal.SIGSTOP),
    Fault("actor killed", to="actor"),
)
STARTS = 4
"""Actors that are started at most, until one moves the arm."""
PATIENCE_S = 4.0
"""Seconds after a fault in which an actor that cannot go on has ended."""


def happen(lab: Lab, fault: Fault) -> None:
    """Let a fault happen."""
    if fault.message is not None:
        lab.arm.tell(**fault.message)
        return
    process = {"arm": lab.arm.process, "actor": lab.actor, "learner": lab.learner}[fault.to]
    assert process is not None
    lab.arm.tell(fault=None)  # the clock of its report starts
    lab.arm.report()
    process.send_signal(fault.sign)
    if fault.sign == signal.SIGSTOP:
        time.sleep(1.0)
        process.send_signal(signal.SIGCONT)


def tried(lab: Lab, fault: Fault) -> Outcome:
    """Break something, see what becomes of it, and mend it."""
    lab.act()
    assert lab.actor is not None and lab.learner is not None
    happen(lab, fault)
    if fault.to == "learner":
        lab.learner.wait()
        time.sleep(PATIENCE_S)
        report, waited = lab.arm.report(), "waits for the learner" in (lab.folder / "actor.log").read_text()
        noticed, robot = "no learner answers", "ended its episode, waited, went on" if waited else "went on"
        lab.teach("run")
        lab.act()
    else:
        until = time.monotonic() + PATIENCE_S
        while lab.actor.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        report, ended = lab.arm.report(), lab.actor.poll() is not None
        killed = fault.to == "actor" and fault.sign == signal.SIGKILL
        noticed = f"the controller: {report.get('why')}" if killed else lab.said() if ended else "-"
        robot = "went on" if not ended else "stopped, the actor ended" if report else "dead, the actor ended"
    if lab.arm.process.poll() is not None:
        port, _ = lab.arm.port, lab.arm.close()
        lab.arm = Arm(port)
    lab.arm.tell(fault=None)
    still = report.get("still_after_s") if robot != "went on" else None
    still = None if still is None else round(1e3 * still, 1)
    return Outcome(fault.name, noticed, still, robot, max(lab.rows(), default=0))


def stored_of(path: Path) -> list[bytes]:
    """Return what a run has stored of its transitions, in order, as bytes that tell them apart."""
    import numpy as np

    from o2o.replay.device import DeviceReplay
    from o2o.runs import session

    _, trainer = session.open_run(path)
    replay = cast(Any, trainer.replay)
    assert isinstance(replay, DeviceReplay) and replay.buffer is not None
    rows = {key: np.asarray(value)[0, : trainer.counters.env_steps] for key, value in replay.buffer.rows.items()}
    trainer.close()
    return [identity({key: value[i] for key, value in rows.items()}) for i in range(len(rows["rewards"]))]


def identity(values: dict[str, Any]) -> bytes:
    """Return what tells a transition from all others: encoders are noisy."""
    return b"".join(values[key].tobytes() for key in ("observations", "actions", "next_observations"))


def finish(lab: Lab) -> tuple[dict[int, bytes], list[bytes]]:
    """Let the learner have all that is recorded so far; return that, by number, and what the learner has stored."""
    assert lab.learner is not None
    os.environ.update(lab.environment)
    sys.path.append(str(EXAMPLES))
    if lab.actor is not None and lab.actor.poll() is None:
        lab.actor.send_signal(signal.SIGINT)
        lab.actor.wait(30)
    lab.learner.send_signal(signal.SIGTERM)
    lab.learner.wait(60)
    recorded = {number: identity({k: v[0] for k, v in row.values.items()}) for number, row in lab.rows().items()}
    lab.teach("run", "--online-steps", str(max(recorded)))
    lab.act()
    lab.learner.wait(120)
    return recorded, stored_of(lab.folder / "run")


def main(out: Path = OUT, faults: Sequence[Fault] = FAULTS) -> int:
    """Try all faults, count, and write the table. Return 1 if a transition was lost or stored twice."""
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder, closing(Lab(Path(folder))) as lab:
        for fault in faults:
            outcomes.append(tried(lab, fault))
            print(outcomes[-1], flush=True)
        recorded, stored = finish(lab)
    numbers, last, counted = set(stored), 0, list[Outcome]()
    for outcome in outcomes:
        own, last = range(last + 1, outcome.recorded + 1), outcome.recorded
        lost = sum(recorded[number] not in numbers for number in own)
        counted.append(replace(outcome, recorded=len(own), lost=lost))
    lost = sum(row not in numbers for row in recorded.values())
    twice = len(stored) - len(numbers)
    in_order = stored == [recorded[number] for number in sorted(recorded)][: len(stored)]
    total = {"recorded": len(recorded), "stored": len(stored), "lost": lost, "twice": twice, "in_order": in_order}
    columns = ("fault", "noticed by", "still after, ms", "the robot", "recorded", "lost")
    rows: list[dict[str, str]] = [
        dict(zip(columns, ("-" if value is None else str(value) for value in asdict(row).values()), strict=True))
        for row in counted
    ]
    about = f"Tried once, {date.today()}, {os.cpu_count()} cores, load average {os.getloadavg()[1]:.1f} at the end."
    text = f"# A robot that breaks\n\n{ABOUT}{markdown_table(columns, rows)}\n{summary(total)}\n\n{about}\n"
    write_table(out, "faults.csv", rows, text)
    (out / "faults.json").write_text(json.dumps({"faults": [asdict(row) for row in counted], **total}, indent=1) + "\n")
    print(summary(total))
    return int(bool(lost or twice or not in_order))


def summary(total: dict[str, Any]) -> str:
    """Return what came of it in a sentence."""
    return (
        f"Of {total['recorded']} recorded transitions the learner has stored {total['stored']}, {total['lost']} were "
        f"lost, {total['twice']} stored twice; they are {'' if total['in_order'] else 'not '}in their order."
    )


if __name__ == "__main__":
    sys.exit(main())
