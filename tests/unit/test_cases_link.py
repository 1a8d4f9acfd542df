"""Between robots and a learner: every transition arrives once, whoever dies in the middle."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from o2o.errors import ConfigError, RunError
from o2o.train import link, spool as spools
from o2o.train.link import Hub, Link, Row, address_of, pack, unpack
from o2o.train.spool import Spool

KEY = b"a key"
WELCOME = {"run": "one"}


def row(episode: int, step: int, ends: bool = False) -> Row:
    """Return a transition that says who it is."""
    seen = np.asarray([[episode, step]], np.float32)
    return Row("", 0, episode, step, {"observations": seen, "ends": np.asarray([ends], np.float32)})


def ids(rows: list[tuple[Row, bool]]) -> list[tuple[int, int]]:
    return [(one.episode, one.step) for one, _ in rows]


def taken(hub: Hub, count: int, wait_s: float = 10.0) -> list[tuple[Row, bool]]:
    """Return the next `count` rows, fewer if they do not come."""
    found = []
    while len(found) < count and (one := hub.take(wait_s)) is not None:
        found.append(one)
    return found


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub(("127.0.0.1", 0), KEY, silent_s=0.3)
    hub.start(WELCOME, {})
    yield hub
    hub.close()


def joined(hub: Hub, folder: Path) -> tuple[Link, Spool]:
    spool = Spool(folder)
    peer = Link(hub.address, KEY, spool)
    peer.connect()
    peer.start()
    return peer, spool


def test_pack_round_trip() -> None:
    """Nested arrays of any type come back; other bytes are refused."""
    tree = {
        "observations": {"state": np.arange(3.0), "cam": np.zeros((1, 2, 2), np.uint8)},
        "flag": np.ones(1, np.float32),
    }
    about, back = unpack(pack({"a": [1, None]}, tree))
    assert about == {"a": [1, None]} and back["observations"]["cam"].dtype == np.uint8
    np.testing.assert_array_equal(back["observations"]["state"], [0, 1, 2])
    with pytest.raises(ValueError):
        unpack(pack({}, tree)[:-1])


def test_spool_torn_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A torn last entry is cut off, whole segments are dropped, numbers go on."""
    monkeypatch.setattr(spools, "SEGMENT", 4)
    spool = Spool(tmp_path)
    assert [spool.append(b"%d" % n) for n in range(1, 11)] == list(range(1, 11))
    assert spool.read(3, 4) == [b"4", b"5", b"6", b"7"]
    spool.drop(9)
    assert (spool.first, spool.last, spool.read(0, 99)) == (9, 10, [b"9", b"10"])
    with pytest.raises(RunError, match="in use"):
        Spool(tmp_path)
    spool.close()
    last = tmp_path / "rows-9.bin"
    last.write_bytes(last.read_bytes()[:-1])
    spool = Spool(tmp_path, limit=2)
    assert spool.last == 9 and spool.append(b"new") == 10
    with pytest.raises(RunError, match="full: 2 transitions wait"):
        spool.append(b"more")
    spool.close()


def test_lost_connections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections that break at any byte lose nothing and store nothing twice."""
    monkeypatch.setattr(link, "AT_ONCE", 3)
    hub = Hub(("127.0.0.1", 0), KEY)
    hub.start(WELCOME, {})
    proxy = socket.create_server(("127.0.0.1", 0))

    def pump(a: socket.socket, b: socket.socket, left: int) -> None:
        with contextlib.suppress(OSError):
            while left > 0 and (part := a.recv(min(64, left))):
                b.sendall(part)
                left -= len(part)
        for sock in (a, b):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def forward() -> None:  # each connection ends after a number of bytes of its own
        for budget in (150, 400, 700, 1500, 900, 10**9):
            near, _ = proxy.accept()
            far = socket.create_connection(hub.address)
            threading.Thread(target=pump, args=(far, near, 10**9), daemon=True).start()
            pump(near, far, budget)

    threading.Thread(target=forward, daemon=True).start()
    spool = Spool(tmp_path)
    for step in range(40):
        spool.append(row(0, step, step == 39).packed())
    spool.about["run"] = "one"
    peer = Link(proxy.getsockname()[:2], KEY, spool)
    peer.start()
    found = taken(hub, 40)
    assert ids(found) == [(0, step) for step in range(40)] and [end for _, end in found] == [False] * 39 + [True]
    assert hub.take(0.2) is None
    peer.close()
    hub.close()


def test_episodes_stay_whole(hub: Hub, tmp_path: Path) -> None:
    """Rows of two robots do not mix within an episode; an episode whose robot is silent ends."""
    (first, one), (second, two) = joined(hub, tmp_path / "a"), joined(hub, tmp_path / "b")
    one.append(row(0, 0).packed())
    one.append(row(0, 1).packed())
    assert ids(taken(hub, 1)) == [(0, 0)]
    for step in range(3):
        two.append(row(7, step, step == 2).packed())
    found = taken(hub, 4)
    assert [(r.episode, r.step, end) for r, end in found] == [(0, 1, True), (7, 0, False), (7, 1, False), (7, 2, True)]
    one.append(row(0, 2).packed())  # the silent one goes on, and then begins another episode
    one.append(row(1, 0, True).packed())
    assert [(r.step, end) for r, end in taken(hub, 2)] == [(2, True), (0, True)]
    for peer in (first, second):
        peer.close()


def test_queue_is_bounded(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A learner that takes nothing holds so many rows and no more; the rest waits on the robot's disk."""
    monkeypatch.setattr(link, "QUEUE", 5)
    peer, spool = joined(hub, tmp_path)
    for step in range(12):
        spool.append(row(0, step, step == 11).packed())
    time.sleep(0.4)
    assert peer.received == 5 and hub.received == {spool.about["actor"]: 5}
    assert ids(taken(hub, 12)) == [(0, step) for step in range(12)]
    peer.close()


def test_durable_rows_leave_disk(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in a checkpoint leaves the robot's disk; a learner that has forgotten the rest gets it again."""
    monkeypatch.setattr(spools, "SEGMENT", 2)
    peer, spool = joined(hub, tmp_path)
    for step in range(6):
        spool.append(row(0, step).packed())
    assert len(taken(hub, 5)) == 5
    hub.durable = {spool.about["actor"]: 4}
    while spool.first != 5:
        time.sleep(0.01)
    port = hub.address[1]
    peer.close()
    hub.close()
    again = Hub(("127.0.0.1", port), KEY, silent_s=0.1)
    again.start(WELCOME, {spool.about["actor"]: 4})
    peer = Link(again.address, KEY, spool)
    peer.start()
    assert [r.number for r, _ in taken(again, 2)] == [5, 6] and again.take(0.2) is None
    peer.close()
    again.close()


ACTOR = """
import sys, time
import numpy as np
from pathlib import Path
from o2o.train.link import Link, Row
from o2o.train.spool import Spool
spool = Spool(Path(sys.argv[1]))
peer = Link(("127.0.0.1", int(sys.argv[2])), b"a key", spool)
peer.connect(); peer.start()
life, total = int(sys.argv[3]), int(sys.argv[4])
while spool.last < total:
    step = spool.last
    values = {"observations": np.full((1, 2), step, np.float32), "ends": np.float32([step == total - 1])}
    spool.append(Row("", 0, 0, step, values).packed())
    time.sleep(0.001)
peer.close(20)
assert "jax" not in sys.modules
"""


def test_killed_actor(hub: Hub, tmp_path: Path) -> None:
    """A robot's process that is killed three times in the middle loses nothing and sends nothing twice."""
    total, found = 500, list[tuple[Row, bool]]()
    reader = threading.Thread(target=lambda: found.extend(taken(hub, total, 20)))
    reader.start()
    for life, at in enumerate((100, 220, 390, None)):
        process = subprocess.Popen([sys.executable, "-c", ACTOR, tmp_path, str(hub.address[1]), str(life), str(total)])
        if at is None:
            assert process.wait(20) == 0
            break
        while sum(hub.received.values()) < at:
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    reader.join(20)
    assert [one.number for one, _ in found] == list(range(1, total + 1))
    assert [one.step for one, _ in found] == list(range(total)) and hub.take(0.2) is None


def test_refusals(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each refusal is one line: nobody there, another key, version, run; rows of another shape; a port in use."""
    spool = Spool(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as other:
        free = other.getsockname()[1]
    with pytest.raises(RunError, match=f"no learner answers at 127.0.0.1:{free} .*refused"):
        Link(("127.0.0.1", free), KEY, spool).connect()
    with pytest.raises(RunError, match="has another key"):
        Link(hub.address, b"other", spool).connect()
    with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{hub.address[1]}"):
        Hub(hub.address, KEY)
    for text in ("here", "a:b", "1:99999"):
        with pytest.raises(ConfigError, match="expected HOST:PORT"):
            address_of(text)
    assert address_of("7077") == ("127.0.0.1", 7077) and address_of("[::1]:5") == ("::1", 5)
    spool.belong("another")
    spool.append(b"")
    with pytest.raises(RunError, match="trains another run"):
        Link(hub.address, KEY, spool).connect()
    spool.close()
    spool = Spool(tmp_path / "new")
    monkeypatch.setattr(
        link, "_heard", lambda connection, heard=link._heard: heard(connection).replace(b'"o2o": "', b'"o2o": "9')
    )
    with pytest.raises(RunError, match=r"the learner runs o2o .* and the actor 9"):
        Link(hub.address, KEY, spool).connect()
    monkeypatch.undo()
    hub._check = lambda row: "the rows are of another shape"
    peer = Link(hub.address, KEY, spool)
    peer.connect()
    spool.append(row(0, 0).packed())
    peer.start()
    until = time.monotonic() + 5
    while peer.refused is None and time.monotonic() < until:
        time.sleep(0.01)
    assert peer.refused == "the rows are of another shape"
    peer.close()
