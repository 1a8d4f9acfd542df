"""Child processes: a fresh Python interpreter for work beside training, and the connection to it.

`multiprocessing.Process` does not serve: with "spawn" it runs a script without `if __name__ == "__main__"` again from
its first line, and it takes no closures. Nothing is left behind, whichever side ends first: the connection and the
shared memory have no name in a file system, and a child whose parent is gone ends itself.
"""

import contextlib
import importlib
import mmap
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle

from o2o.errors import ConfigError, EnvironmentFaultError, O2OError

ONE_CORE = {
    "JAX_PLATFORMS": "cpu",
    "NPROC": "1",  # the threads of XLA's CPU client
    "PJRT_NPROC": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
"""Environment variables of a child: it uses one core and no accelerator."""
PATIENCE_S = 30.0
"""Seconds that a child has to close its environments when it is told to end; a robot may have to park."""


@dataclass(frozen=True)
class Failure:
    """An exception on its way to the parent."""

    error: Exception
    trace: str


def packed(value: Any, what: str, instead: str) -> bytes:
    """Pickle `value`, closures and notebook functions too; raise `ConfigError` naming `what` if that fails."""
    try:
        return cloudpickle.dumps(value)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{what} cannot go to another process ({type(error).__name__}: {reason}): let env_fn itself make all that "
            f"it needs, in place of using what was opened before, or {instead}"
        ) from error


def loaded(raw: bytes, what: str, instead: str) -> Any:
    """Undo `packed`; raise `ConfigError` naming `what` if that fails in this process."""
    try:
        return pickle.loads(raw)
    except O2OError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ConfigError(
            f"{what} cannot be rebuilt in another process ({reason}): define what it is made of in a module that can "
            f"be imported, or {instead}"
        ) from error


class Memory:
    """Memory shared with a child. It has no name, so nothing is left behind."""

    def __init__(self) -> None:
        """Reserve nothing yet."""
        if hasattr(os, "memfd_create"):
            self.fd = os.memfd_create("o2o")
        else:
            with tempfile.TemporaryFile() as file:
                self.fd = os.dup(file.fileno())
        self._ended = weakref.finalize(self, os.close, self.fd)

    def mapped(self, size: int) -> mmap.mmap:
        """Make the memory `size` bytes of zeros and map it."""
        os.ftruncate(self.fd, size)
        return mmap.mmap(self.fd, size)

    def close(self) -> None:
        """Close the file; maps of it stay valid until they are deleted."""
        self._ended()


class Child:
    """A process that runs `function(connection, *fds)` of a module, and the connection to it."""

    def __init__(self, entry: str, what: str, *fds: int) -> None:
        """Start `entry`, "module:function"; `what` names the process in errors."""
        self.what, self._owed = what, False
        self.connection, theirs = Pipe()
        inherited = (theirs.fileno(), *fds)
        code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import run; run({entry!r}, *{inherited!r})"
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code],
                env={**os.environ, **ONE_CORE},
                stdin=subprocess.DEVNULL,
                pass_fds=inherited,
                start_new_session=True,  # Ctrl-C is for the parent, which ends its children
            )
        except BaseException:
            self.connection.close()
            raise
        finally:
            theirs.close()
        self._poll = select.poll()
        self._poll.register(self.connection.fileno(), select.POLLIN)
        self.close = weakref.finalize(self, _end, self.process, self.connection, os.getpid())
        """End the process: an idle one at once, a deaf one by force. Also called at exit and on garbage collection."""

    def send(self, message: Any) -> None:
        """Send bytes as they are, or any other object pickled; raise `EnvironmentFaultError` if the child died."""
        raw = message if isinstance(message, bytes) else pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        try:
            self.connection.send_bytes(raw)
        except OSError:
            raise self._died() from None

    def ask(self, message: Any) -> None:
        """Send a message that must be answered before the next one. If an answer was never taken, end the child."""
        if self._owed:
            self.close()
        self._owed = True
        self.send(message)

    def receive(self) -> Any:
        """Wait for the next answer; raise what the child raised, or `EnvironmentFaultError` if it died."""
        try:
            raw = self.connection.recv_bytes()
        except (EOFError, OSError):
            raise self._died() from None
        self._owed = False
        answer = pickle.loads(raw) if raw else None
        if isinstance(answer, Failure):
            answer.error.add_note(f"In {self.what}:\n{answer.trace}")
            raise answer.error
        return answer

    def ready(self, timeout_s: float | None = 0.0) -> bool:
        """Return whether `receive` would not block; wait up to `timeout_s` seconds for that (None: without limit)."""
        return self.connection.closed or bool(self._poll.poll(None if timeout_s is None else 1000 * timeout_s))

    def _died(self) -> EnvironmentFaultError:
        if not self.close.alive:
            return EnvironmentFaultError(f"{self.what} has been closed, or was interrupted: resume the run")
        self.close()
        code = self.process.returncode
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return EnvironmentFaultError(
            f"{self.what} died ({how}): see its last words above, if any, and the memory in use"
        )


def _end(process: subprocess.Popen[bytes], connection: Connection, owner: int) -> None:
    if os.getpid() != owner:  # in a fork of the parent: connection and child belong to the parent
        return
    connection.close()  # which tells the child
    try:
        process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        pass
    finally:
        process.kill()
        process.wait()


def end(children: Sequence[Child]) -> None:
    """End several children: they have `PATIENCE_S` together; an interruption of the wait ends them at once."""
    until = time.monotonic() + PATIENCE_S
    try:
        for child in children:
            child.connection.close()
        for child in children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(max(until - time.monotonic(), 0.0))
    finally:
        for child in children:  # all of them before one is waited for, which may be interrupted again
            child.process.kill()
        for child in children:
            child.close()


def run(entry: str, fd: int, *fds: int) -> None:
    """Run as the child: call `entry` with the connection to the parent, until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):  # a signal to a whole job is the parent's: it saves and ends
        signal.signal(number, signal.SIG_IGN)
    module, _, name = entry.partition(":")
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        getattr(importlib.import_module(module), name)(Connection(fd), *fds)


def answer(connection: Connection, work: Callable[[], Any]) -> None:
    """Send the parent what `work` returns (None as an empty message), or what it raises."""
    try:
        value = work()
        raw = b"" if value is None else pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        raw = _failure(error)
    connection.send_bytes(raw)


def _failure(error: Exception) -> bytes:
    trace = traceback.format_exc()
    try:
        raw = cloudpickle.dumps(Failure(error, trace))
        pickle.loads(raw)
    except Exception:  # it cannot be pickled, for instance if its arguments are not its message
        words = " ".join(f"{type(error).__name__}: {error}".split())
        raw = pickle.dumps(Failure(EnvironmentFaultError(words), trace))
    return raw
