"""Between robots and a learner: transitions one way, the newest parameters the other.

The transport is `multiprocessing.connection`: framed bytes over TCP and a challenge for a shared key, both of Python's
standard library. Ray would put a cluster's daemons, and a fixed Python version, on the machine of the robot; all that
is needed here is one connection that may break. No message is a pickle, so that a peer can send data but no code.

The actor asks and the learner answers, so neither can fill the other's memory. Each actor numbers its transitions. Of
each actor the learner knows one number: all up to it are received. It takes the next number only, so that nothing is
stored twice. It also tells the number up to which all is in a checkpoint, and the actor keeps the rest on its disk.

Nothing here needs JAX.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any

import numpy as np

from o2o import __version__, trust
from o2o.errors import ConfigError, O2OError, RunError
from o2o.train.spool import Spool

log = logging.getLogger("o2o")

KEY = "O2O_LEARNER_KEY"
"""Environment variable: what learner and actors on several machines know and nobody else."""
ANSWER_S = 60.0
"""Seconds without a word from the other side after which it is taken for dead."""
CONNECT_S = 5.0
"""Seconds in which a connection is made."""
POLL_S = 0.05
"""Seconds between two questions of an actor that has nothing to send."""
AT_ONCE = 64
"""Transitions in one message."""
QUEUE = 1024
"""Transitions of one actor that wait in the learner's memory; the rest waits on the actor's disk."""
TELL_S = 3.0
"""Seconds that a learner which has finished waits for its actors to hear of it."""
SILENT_S = 10.0
"""Seconds without a transition after which an episode counts as broken off, so that another robot's is learnt from."""
WRONG = (OSError, EOFError, ValueError, KeyError, TypeError, AuthenticationError)
"""What a connection that breaks, or a peer that speaks otherwise, raises."""


def pack(about: Mapping[str, Any], tree: Mapping[str, Any]) -> bytes:
    """Return JSON-able values and a nested dict of arrays as bytes."""
    leaves = [(path, np.ascontiguousarray(leaf)) for path, leaf in _leaves(tree, [])]
    head = json.dumps([about, [[path, leaf.dtype.str, leaf.shape] for path, leaf in leaves]]).encode()
    return b"".join([len(head).to_bytes(8, "little"), head, *(leaf.tobytes() for _, leaf in leaves)])


def unpack(message: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what `pack` was given. Raises `ValueError`, `KeyError` or `TypeError` for other bytes."""
    begin = 8 + int.from_bytes(message[:8], "little")
    about, leaves = json.loads(message[8:begin])
    tree: dict[str, Any] = {}
    for path, dtype, shape in leaves:
        kind, count = np.dtype(dtype), int(np.prod(shape))
        at = tree
        for key in path[:-1]:
            at = at.setdefault(key, {})
        at[path[-1]] = np.frombuffer(message, kind, count, begin).reshape(shape)
        begin += count * kind.itemsize
    if begin != len(message):
        raise ValueError(f"a message of {len(message)} bytes, expected {begin}")
    return about, tree


def _leaves(tree: Any, path: list[str]) -> Iterator[tuple[list[str], Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, [*path, key])
    else:
        yield path, np.asarray(tree)


def address_of(text: str) -> tuple[str, int]:
    """Return (host, port) of HOST:PORT, or of PORT alone on this machine. Raises `ConfigError`."""
    host, _, port = text.rpartition(":")
    if not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"{text!r} is no address; expected HOST:PORT, such as 127.0.0.1:7077")
    return host.strip("[]") or "127.0.0.1", int(port)


def shared_key(host: str) -> bytes:
    """Return the key that learner and actors share: `O2O_LEARNER_KEY`, or on one machine one of this user's own.

    Raises `ConfigError` if there is none.
    """
    if given := os.environ.get(KEY):
        return given.encode()
    own = trust.secret("learner") if host in ("127.0.0.1", "::1", "localhost") else None
    if own is None:
        raise ConfigError(f"{host} is another machine: set {KEY} to the same long random word on both")
    return own


def _connection(sock: socket.socket) -> Connection:
    """Return a connection whose peer is noticed to be dead."""
    sock.settimeout(None)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * ANSWER_S))
    return Connection(sock.detach())


def _heard(connection: Connection) -> bytes:
    """Return the next message; raises `TimeoutError` where none comes."""
    if not connection.poll(ANSWER_S):
        raise TimeoutError(f"no word in {ANSWER_S:g} s")
    return connection.recv_bytes()


@dataclass(frozen=True)
class Row:
    """One transition of one actor."""

    actor: str
    number: int
    """Counts this actor's transitions, from 1."""
    episode: int
    step: int
    values: dict[str, Any]
    """Leaves `[1, ...]`, as `Fleet.step` returns them."""
    result: dict[str, Any] | None = None
    """The row of an episode that ended with it (`EnvSlot.row`)."""
    intervened: bool = False
    """Whether a human took over."""

    @property
    def ended(self) -> bool:
        """Whether the episode ended with it."""
        return bool(self.values["ends"][0])

    def packed(self) -> bytes:
        """Return it as bytes, without the actor and its number."""
        about = {"episode": self.episode, "step": self.step, "result": self.result, "intervened": self.intervened}
        return pack(about, self.values)

    @classmethod
    def unpacked(cls, actor: str, number: int, message: bytes) -> "Row":
        """Return what `packed` made bytes of."""
        about, values = unpack(message)
        return cls(actor, number, **about, values=values)


class Hub:
    """The learner's side: receives transitions of any number of actors, and gives them one after another."""

    def __init__(self, address: tuple[str, int], key: bytes, silent_s: float = SILENT_S) -> None:
        """Bind `address`; port 0 takes a free one. Nobody is answered before `start`. Raises `ConfigError`."""
        try:
            family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
            self._socket = socket.create_server(address, family=family)
        except OSError as error:
            why = (error.strerror or str(error)).partition(" (while")[0]
            raise ConfigError(f"cannot listen on {address[0]}:{address[1]} ({why}); give another port") from error
        self._socket.settimeout(0.2)
        self.address: tuple[str, int] = self._socket.getsockname()[:2]
        self._key, self._silent_s, self._closed = key, silent_s, False
        self._thread: threading.Thread | None = None
        self._open: set[Connection] = set()
        self._change = threading.Condition()
        self._queues: dict[str, deque[Row]] = {}
        self._since: dict[str, float] = {}
        """When the newest row of each actor came."""
        self._turn: str | None = None
        """Whose episode is being given."""
        self.received: dict[str, int] = {}
        """The number up to which all rows of an actor are here, by actor."""
        self.durable: dict[str, int] = {}
        """The number up to which all rows of an actor are in a checkpoint, by actor."""
        self.finished = False
        """Whether the learner takes no more."""
        self._welcome: dict[str, Any] = {}
        self._check: Callable[[Row], str | None] = lambda row: None
        self._version, self._parameters = -1, b""

    def start(
        self, welcome: Mapping[str, Any], received: Mapping[str, int], check: Callable[[Row], str | None] | None = None
    ) -> None:
        """Answer from now on: with `welcome` (JSON-able, with the `run`), knowing the rows up to `received`.

        `check` returns what is wrong with a row, None if nothing is.
        """
        self._welcome, self.received = dict(welcome), dict(received)
        self._check = check or self._check
        self._thread = threading.Thread(target=self._accept, daemon=True, name="o2o-hub")
        self._thread.start()

    def _accept(self) -> None:
        while not self._closed:
            with contextlib.suppress(TimeoutError, OSError):
                sock, _ = self._socket.accept()
                threading.Thread(target=self._serve, args=(_connection(sock),), daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        """Answer one actor until its connection breaks; a stranger gets no answer."""
        with connection, contextlib.suppress(*WRONG), contextlib.ExitStack() as leaving:
            deliver_challenge(connection, self._key)
            answer_challenge(connection, self._key)
            hello = json.loads(_heard(connection))
            actor, refusal = str(hello["actor"]), self._refusal(hello)
            if refusal is None:
                with self._change:
                    have = self.received.setdefault(actor, 0)
                    if int(hello["first"]) > have + 1:
                        log.warning("actor %s has lost rows %d to %d", actor, have + 1, hello["first"] - 1)
                        self.received[actor] = int(hello["first"]) - 1
            connection.send_bytes(json.dumps({**self._welcome, "refused": refusal, **self._known(actor)}).encode())
            self._open.add(connection)
            leaving.callback(self._open.discard, connection)
            while refusal is None and not self._closed:
                asked = json.loads(_heard(connection))
                rows = [connection.recv_bytes() for _ in range(int(asked["count"]))]
                refusal = self._receive(actor, int(asked["first"]), rows)
                version, parameters = self._version, self._parameters
                newer = version > int(asked["version"])
                answer = {"refused": refusal, "version": version if newer else None, **self._known(actor)}
                connection.send_bytes(json.dumps(answer).encode())
                if newer:
                    connection.send_bytes(parameters)

    def _refusal(self, hello: Mapping[str, Any]) -> str | None:
        if hello.get("o2o") != __version__:
            return f"the learner runs o2o {__version__} and the actor {hello.get('o2o')}: install one version on both"
        if hello.get("run") not in (None, self._welcome.get("run")):
            return "this learner trains another run than the actor's transitions are for: give another spool folder"
        return None

    def _known(self, actor: str) -> dict[str, Any]:
        with self._change:
            known = {"received": self.received.get(actor, 0), "durable": self.durable.get(actor, 0)}
            return {**known, "finished": self.finished}

    def _receive(self, actor: str, first: int, messages: list[bytes]) -> str | None:
        """Queue the rows numbered from `first` on that are new and fit; return what is wrong with them, if anything."""
        with self._change:
            queue = self._queues.setdefault(actor, deque())
            for number, message in enumerate(messages, start=first):
                if number != self.received[actor] + 1 or len(queue) >= QUEUE or self.finished:
                    continue
                row = Row.unpacked(actor, number, message)
                if (wrong := self._check(row)) is not None:
                    return wrong
                queue.append(row)
                self.received[actor], self._since[actor] = number, time.monotonic()
                self._change.notify_all()
        return None

    def publish(self, version: int, parameters: bytes) -> None:
        """Offer newer parameters; actors get the newest only."""
        self._parameters, self._version = parameters, version

    def take(self, wait_s: float) -> tuple[Row, bool] | None:
        """Return the next row and whether its episode ends with it; None if none is ready in `wait_s` seconds.

        The rows of an episode follow each other, whoever else sends. A row is held until it is known whether another
        follows it; where none comes for `silent_s` seconds, or that of another episode, it ends the episode.
        """
        until = time.monotonic() + wait_s
        with self._change:
            while (found := self._next()) is None:
                left = until - time.monotonic()
                if left <= 0:
                    return None
                self._change.wait(min(left, 0.1))
            row, ended = found
            self._queues[row.actor].popleft()
            self._turn = None if ended else row.actor
            return found

    def _next(self) -> tuple[Row, bool] | None:
        waiting = [actor for actor, queue in self._queues.items() if queue]
        for actor in [self._turn] if self._turn is not None else sorted(waiting, key=self._since.__getitem__):
            queue = self._queues[actor]
            row = queue[0]
            if row.ended:
                return row, True
            if len(queue) > 1:
                return row, (queue[1].episode, queue[1].step) != (row.episode, row.step + 1)
            if time.monotonic() - self._since[actor] > self._silent_s:
                return row, True
        return None

    def finish(self, stored: Mapping[str, int]) -> None:
        """Take no more rows; of those that were received, robots need not keep the ones up to `stored`."""
        self.durable, self.finished = dict(stored), True

    def close(self) -> None:
        """Answer nobody any more. Actors that are connected hear first that the learner has finished, if it has."""
        until = time.monotonic() + (TELL_S if self.finished else 0.0)
        while self._open and time.monotonic() < until:
            time.sleep(0.01)
        self._closed = True
        if self._thread is not None:
            self._thread.join()
        self._socket.close()


class Link:
    """The actor's side: sends what its spool holds, from a thread of its own, and keeps the newest parameters."""

    def __init__(self, address: tuple[str, int], key: bytes, spool: Spool) -> None:
        """Prepare to connect to `address`; `connect` does it."""
        self._address, self._key, self.spool = address, key, spool
        self.connected = False
        self.finished = False
        """Whether the learner takes no more."""
        self.refused: str | None = None
        """Why the learner will have nothing to do with this actor."""
        self.read: Callable[[bytes], Any] = bytes
        """Makes parameters of their bytes, in the thread of the link."""
        self.parameters: Any = None
        """The newest parameters that were not `taken`."""
        self.received = 0
        """The number up to which the learner has the rows."""
        self._version = -1
        self._stop = threading.Event()
        self._connection: Connection | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="o2o-link")

    def connect(self) -> dict[str, Any]:
        """Connect, and return the learner's welcome. Raises `RunError` if nobody answers or the actor is refused."""
        host, port = self._address
        try:
            welcome = self._greet()
        except AuthenticationError as error:
            raise RunError(
                f"the learner at {host}:{port} has another key: give both machines the same O2O_LEARNER_KEY"
            ) from error
        except WRONG as error:
            raise RunError(
                f"no learner answers at {host}:{port} ({error or type(error).__name__}): start it with `o2o learner "
                f"... --listen {host}:{port}`, or look at the address"
            ) from error
        if self.refused is not None:
            raise RunError(self.refused)
        self.spool.belong(welcome["run"])
        return welcome

    def _greet(self) -> dict[str, Any]:
        self._connection = connection = _connection(socket.create_connection(self._address, CONNECT_S))
        if not connection.poll(ANSWER_S):
            raise TimeoutError(f"no word in {ANSWER_S:g} s")
        answer_challenge(connection, self._key)
        deliver_challenge(connection, self._key)
        about = self.spool.about
        hello = {"o2o": __version__, "actor": about["actor"], "run": about["run"], "first": self.spool.first}
        connection.send_bytes(json.dumps(hello).encode())
        welcome = json.loads(_heard(connection))
        self._noted(welcome)
        self.connected = self.refused is None
        return welcome

    def _noted(self, answer: Mapping[str, Any]) -> None:
        self.received, self.finished, self.refused = answer["received"], answer["finished"], answer["refused"]
        self.spool.drop(answer["durable"])

    def taken(self) -> Any:
        """Return the newest parameters, and forget them."""
        found, self.parameters = self.parameters, None
        return found

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set() and self.refused is None:
            try:
                if self._connection is None:
                    self._greet()
                    log.info("connected to the learner again")
                    continue
                progress = self._exchange(self._connection)
            except WRONG as error:
                if self.connected:
                    log.warning("the learner does not answer (%s); transitions are kept", error or type(error).__name__)
                self._drop()
                self._stop.wait(0.2)
                continue
            if not progress:
                self._stop.wait(POLL_S)

    def _exchange(self, connection: Connection) -> bool:
        """Send the next rows and hear the answer; whether rows were taken."""
        before = self.received
        rows = [] if self.finished else self.spool.read(before, AT_ONCE)
        asked = {"first": before + 1, "count": len(rows), "version": self._version}
        connection.send_bytes(json.dumps(asked).encode())
        for row in rows:
            connection.send_bytes(row)
        answer = json.loads(_heard(connection))
        if answer["version"] is not None:
            message = _heard(connection)
            try:
                self.parameters, self._version = self.read(message), answer["version"]
            except O2OError as error:
                answer["refused"] = str(error)
        self._noted(answer)
        return self.received > before

    def _drop(self) -> None:
        self.connected = False
        self._version = -1  # another learner process counts its versions anew
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def close(self, flush_s: float = 0.0) -> None:
        """Send what is left for at most `flush_s` seconds, and hang up. The spool stays open."""
        until = time.monotonic() + flush_s
        while self.connected and not self.finished and self.received < self.spool.last and time.monotonic() < until:
            time.sleep(0.01)
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(CONNECT_S)
        self._drop()
