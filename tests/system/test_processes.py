"""Processes beside training: what goes there, what comes back, and that none is ever left behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from o2o.errors import ConfigError, EnvironmentFaultError
from o2o.train import processes
from o2o.train.processes import Child, Memory, end, loaded, packed


def gone(pid: int) -> bool:
    """Whether a process has ended and been waited for."""
    return not Path(f"/proc/{pid}").exists()


def within(seconds: float, happens: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not happens() and time.monotonic() < deadline:
        time.sleep(0.02)
    return happens()


class Stubborn(Exception):
    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)


def test_unsendable_refused() -> None:
    """What cannot travel is refused in one line."""
    lock = threading.Lock()
    with pytest.raises(
        ConfigError, match=r"env_fn cannot go to another process .*_thread.lock.*: let env_fn"
    ) as caught:
        packed(lambda: lock, "env_fn", "do without")
    assert str(caught.value).endswith("or do without") and "\n" not in str(caught.value)
    shift = 2
    assert loaded(packed(lambda x: x + shift, "f", ""), "f", "")(3) == 5, "a closure travels"
    with pytest.raises(ConfigError, match="f cannot be rebuilt in another process .*No module named 'nowhere'"):
        loaded(b"cnowhere\nthing\n.", "f", "do without")


def test_answers_failures_and_death() -> None:
    child = Child("tests.system.test_processes:echo", "the echo")
    child.send("word")
    assert child.receive() == "word"
    child.send(EnvironmentFaultError("lost contact"))
    with pytest.raises(EnvironmentFaultError) as caught:
        child.receive()
    assert str(caught.value) == "lost contact" and "In the echo" in caught.value.__notes__[0]
    child.send(None)  # it raises what cannot travel
    with pytest.raises(EnvironmentFaultError, match="^Stubborn: no reason"):
        child.receive()
    child.ask("first")
    child.receive()
    child.process.kill()
    with pytest.raises(EnvironmentFaultError, match=r"^the echo died \(killed by SIGKILL\)"):
        child.receive()
    with pytest.raises(EnvironmentFaultError, match="the echo has been closed"):
        child.send("word")
    assert gone(child.process.pid)


def echo(connection: object) -> None:
    """Send back what comes; raise it if it is an exception."""
    from o2o.train.processes import answer

    while True:
        message = connection.recv()  # type: ignore[attr-defined]

        def work(message: object = message) -> object:
            if message is None:
                raise Stubborn(1, "no reason")
            if isinstance(message, Exception):
                raise message
            return message

        answer(connection, work)  # type: ignore[arg-type]


def test_killed_parent_ends_child() -> None:
    """No process outlives a killed parent."""
    code = (
        "import time; from o2o.train.processes import Child\n"
        "child = Child('tests.system.test_processes:echo', 'x'); child.send(1); child.receive()\n"
        "print(child.process.pid, flush=True); time.sleep(60)"
    )
    root = str(Path(__file__).parents[2])
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": root}
    )
    assert parent.stdout is not None
    with parent.stdout:
        pid = int(parent.stdout.readline())
    assert not gone(pid)
    os.kill(pid, signal.SIGINT)  # as Ctrl-C would, and SIGTERM or SIGHUP to a whole job
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGHUP)
    parent.kill()
    parent.wait()
    stopped = lambda: gone(pid) or Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"  # noqa: E731
    assert within(10, stopped), "nobody waits for an orphan here but init"


def test_broken_off_answer() -> None:
    """An answer that was broken off is never taken for another."""
    child = Child("tests.system.test_processes:echo", "the echo")
    child.ask("first")
    with pytest.raises(EnvironmentFaultError, match="was interrupted: resume the run"):
        child.ask("second")


def hang(_: object) -> None:
    """Take no notice of the parent."""
    time.sleep(60)


def test_shared_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several processes that hang have their patience together."""
    monkeypatch.setattr(processes, "PATIENCE_S", 2.0)
    children = [Child("tests.system.test_processes:hang", "the deaf") for _ in range(4)]
    began = time.monotonic()
    end(children)
    assert 2.0 <= time.monotonic() - began < 6.0, "8 one after the other"
    assert all(gone(child.process.pid) and not child.close.alive for child in children)


def test_interrupted_wait_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted wait ends all processes at once."""
    children = [Child("tests.system.test_processes:hang", "the deaf") for _ in range(3)]

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(processes, "PATIENCE_S", 60.0)
    wait = children[0].process.wait
    monkeypatch.setattr(children[0].process, "wait", lambda t=None: interrupt(t) if t else wait())
    with pytest.raises(KeyboardInterrupt):
        end(children)
    assert within(10, lambda: all(child.process.poll() is not None for child in children))


def test_forgotten_child_ends() -> None:
    """A process that is forgotten ends."""
    child = Child("tests.system.test_processes:echo", "the echo")
    pid, closed = child.process.pid, child.close
    del child
    assert not closed.alive and within(10, lambda: gone(pid))


def test_shared_memory_has_no_name() -> None:
    memory = Memory()
    here = memory.mapped(100)
    here[:3] = b"abc"
    assert os.fstat(memory.fd).st_nlink == 0, "nothing to leave behind"
    memory.close()
    memory.close()
    assert bytes(here[:3]) == b"abc"
