"""How evenly commands reach a robot at 50 Hz, while a learner works on the other core.

    python benchmarks/robot_jitter.py [--seconds 30]    # into results/robot/jitter.md; Linux, an idle machine

Robot, driver, actor and learner are those of `robot_faults.py`. The actor has one core to itself. Learner and simulated
arm share another one. A period is the time between two commands that leave the driver in one episode.
"""

import argparse
import datetime
import json
import os
import signal
import sys
import tempfile
import threading
import time
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from robot_faults import EXAMPLES, OUT, Lab
from throughput import machine, markdown_table

UTD = ("--config.online.utd-ratio", "32")
ABOUT = """\
Time between two commands at 50 Hz, in ms, and how late steps began (`ControlRate.jitter()`). `learns`: the learner
updates 32 times for each transition that it receives; `paused`: the learner's process is stopped.
Written by `python benchmarks/robot_jitter.py`.
"""


def cpu_s(pid: int) -> float:
    """Return the seconds that a process has worked."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def spread(values: np.ndarray) -> dict[str, str]:
    """Return three percentiles of values in ms."""
    return {name: f"{np.percentile(values, q):.2f}" for name, q in (("p50", 50), ("p99", 99), ("max", 100))}


def measure(lab: Lab, what: str, seconds: float) -> dict[str, str]:
    """Let the actor play for a while; return a row."""
    import arm_robot  # pyright: ignore[reportMissingImports]

    from o2o.envs.safety import ControlRate
    from o2o.runs import actor

    assert (process := lab.learner) is not None
    sent, rates, stop = list[tuple[int, float]](), list[ControlRate](), threading.Event()
    send, make, episode = arm_robot.Driver.send, ControlRate.__init__, 0

    def noting(self: Any, **message: Any) -> None:
        nonlocal episode
        send(self, **message)
        episode += "home" in message
        if "speeds" in message:
            sent.append((episode, time.monotonic()))

    def made(self: ControlRate, *args: Any, **options: Any) -> None:
        make(self, *args, **options)
        rates.append(self)

    def end() -> None:  # as a person does
        while len(sent) < 100 and not stop.is_set():
            time.sleep(0.01)
        sent.clear()
        if what == "paused":
            process.send_signal(signal.SIGSTOP)
        used, began = cpu_s(process.pid), time.monotonic()
        stop.wait(seconds)
        share.append((cpu_s(process.pid) - used) / (time.monotonic() - began))
        process.send_signal(signal.SIGCONT)
        os.kill(os.getpid(), signal.SIGINT)

    share: list[float] = []
    ending = threading.Thread(target=end)
    arm_robot.Driver.send, ControlRate.__init__ = noting, made
    try:
        ending.start()
        learner, where = f"127.0.0.1:{lab.port}", (f"address={lab.arm.address}",)
        actor.act("arm_robot:TableArm-v0", learner, lab.folder / what, env_kwargs=where)
    finally:
        stop.set()
        ending.join()
        arm_robot.Driver.send, ControlRate.__init__ = send, make
    periods = [1e3 * (b - a) for (one, a), (other, b) in pairwise(sent) if one == other]
    off = np.abs(np.asarray(periods) - 20.0)
    late = rates[-1].jitter()
    row = {"learner": what, "periods": str(len(periods))}
    row |= {f"period {name}": value for name, value in spread(np.asarray(periods)).items()}
    row |= {f"off 20 ms {name}": value for name, value in spread(off).items()}
    row |= {f"late {name}": f"{late[name]:.2f}" for name in ("p50", "p99", "max")}
    return row | {"overruns": f"{late['overruns']:.0f}", "learner's CPU": f"{share[0]:.2f}"}


def main(seconds: float, out: Path = OUT) -> None:
    """Measure with a learner that learns and one that is paused, and write the table."""
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        os.sched_setaffinity(0, cores[1:] or cores)  # what is started from here on
        with closing(Lab(Path(folder), *UTD)) as lab:
            os.sched_setaffinity(0, cores[:1])
            os.environ.update(lab.environment)
            sys.path.append(str(EXAMPLES))
            rows = [measure(lab, what, seconds) for what in ("learns", "paused")]
    os.sched_setaffinity(0, cores)
    load, day = os.getloadavg()[1], datetime.date.today().isoformat()
    about = {**machine(), "load_average": load, "date": day}
    line = f"Machine: {about['device']}, JAX {about['jax']}; load average {load:.1f} at the end, {day}. Measured once."
    out.mkdir(parents=True, exist_ok=True)
    table = markdown_table(tuple(rows[0]), rows)
    (out / "jitter.md").write_text(f"# Jitter of the control loop\n\n{ABOUT}\n{table}\n{line}\n")
    (out / "jitter.json").write_text(json.dumps({"rows": rows, "machine": about}, indent=1) + "\n")
    print(table + line)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each of the two measurements")
    main(parser.parse_args().seconds)
