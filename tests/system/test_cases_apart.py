"""Learner and robots apart: the same run as in one process, and no stored transition lost or there twice."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from o2o.config import LoopConfig, to_dict
from o2o.errors import ConfigError, EnvironmentMismatchError, RunError, TrustError
from o2o.nn.kernels import each_seed
from o2o.replay.device import DeviceReplay
from o2o.report.plots import read_rows
from o2o.runs import actor, session
from o2o.runs.folder import read_status
from o2o.runs.opened import shapes_of
from o2o.runs.session import RunConfig
from o2o.train.feed import misfit, packed_agents, unpacked_agents
from o2o.train.link import Hub, Row, shared_key
from o2o.train.programs import to_online
from o2o.train.spool import Spool
from tests.helpers.command_line import run

Maker = Callable[..., RunConfig]
LEARNER = """
import json, sys
from pathlib import Path
from o2o.runs import session
from o2o.runs.session import settings_of
from o2o.train.link import Hub, shared_key
port, path = int(sys.argv[1]), Path(sys.argv[2])
hub = Hub(("127.0.0.1", port), shared_key("127.0.0.1"), silent_s=2.0)
session.train(settings_of(json.loads(Path(sys.argv[3]).read_text()), "test"), path, quiet=True, hub=hub)
"""
LOOP = LoopConfig(
    eval_every=0, eval_episodes=1, eval_envs=1, log_every=50, checkpoint_every=40, updates_per_dispatch=10
)


def free_port() -> int:
    hub = Hub(("127.0.0.1", 0), b"")
    hub.close()
    return hub.address[1]


def stored(path: Path) -> Any:
    """Return the played rows of the replay in a run's last checkpoint, leaves `[N, ...]`, counters, normaliser."""
    _, trainer = session.open_run(path)
    steps = trainer.counters.env_steps
    assert isinstance(trainer.replay, DeviceReplay) and trainer.replay.buffer is not None
    before = trainer.replay.appended  # the dataset comes first
    rows = jax.tree.map(lambda value: np.asarray(value)[0, before : before + steps], dict(trainer.replay.buffer.rows))
    counters, normalizer = trainer.counters, trainer.normalizer
    trainer.close()
    return rows, counters, normalizer


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    """Return all transitions that actors of this process record from now on."""
    found = list[Row]()
    append = Spool.append

    def noting(self: Spool, entry: bytes) -> int:
        number = append(self, entry)
        found.append(Row.unpacked(self.about["actor"], number, entry))
        time.sleep(0.005)
        return number

    monkeypatch.setattr(Spool, "append", noting)
    return found


@pytest.fixture
def abreast(noted: list[Row], monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    """Return what two actors record; neither gets 10 transitions ahead of the other in their first 150."""
    append = Spool.append

    def appending(self: Spool, entry: bytes) -> int:
        ahead = lambda: sum(1 if row.actor == self.about["actor"] else -1 for row in list(noted))  # noqa: E731
        while len(noted) < 150 and ahead() >= 10:
            time.sleep(0.005)
        return append(self, entry)

    monkeypatch.setattr(Spool, "append", appending)
    return noted


def playing(noted: list[Row], port: int, spool: Path, **options: Any) -> tuple[threading.Thread, list[actor.Acted]]:
    """Return a thread that acts for the learner at `port`, and what it has done."""
    found = list[actor.Acted]()

    def play() -> None:
        while True:  # until the learner is there
            try:
                found.append(actor.act("PointMaze_UMaze-v3", f"127.0.0.1:{port}", spool, **options))
                return
            except RunError as error:
                assert "no learner answers" in str(error)
                time.sleep(0.1)

    thread = threading.Thread(target=play, daemon=True)
    thread.start()
    return thread, found


def test_learner_killed(tiny_run: Maker, noted: list[Row], tmp_path: Path) -> None:
    """A learner is killed in the middle and resumed: all that the robot played is stored, in its order, once."""
    config = tiny_run("rlpd", offline_steps=0, online_steps=160, loop=LOOP)
    (tmp_path / "settings.json").write_text(json.dumps(to_dict(config)))
    port, path = free_port(), tmp_path / "run"
    first = subprocess.Popen([sys.executable, "-c", LEARNER, str(port), str(path), str(tmp_path / "settings.json")])
    thread, done = playing(noted, port, tmp_path / "spool", lost="go-on")
    while len(noted) < 90 or not (path / "checkpoints" / "40").exists():
        assert first.poll() is None
        time.sleep(0.005)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    at = len(noted)
    with pytest.raises(ConfigError, match="learns from robots elsewhere: go on with `o2o learner"):
        session.resume(path, quiet=True)
    assert session.resume(path, quiet=True, hub=Hub(("127.0.0.1", port), shared_key("127.0.0.1"), silent_s=2.0))
    thread.join(20)
    rows, counters, _ = stored(path)
    assert counters.env_steps == 160 and counters.online_updates > 0
    assert [row.number for row in noted] == list(range(1, len(noted) + 1)) and len(noted) > max(at, 160)
    assert done[0].transitions == len(noted) and done[0].waiting <= len(noted) - 160
    for key in ("observations", "actions", "next_observations", "rewards"):
        np.testing.assert_array_equal(rows[key], np.concatenate([row.values[key] for row in noted[:160]]), key)


def test_two_robots(tiny_run: Maker, abreast: list[Row], tmp_path: Path) -> None:
    """Two robots feed one learner.

    Whole stretches of their episodes are stored, each row once. One of another environment is refused. Random actions
    come first, then the policy's. The learner makes no environment: held-out episodes judge it.
    """
    noted = abreast
    config = tiny_run(
        "rlpd",
        [("online.random_steps", 40)],
        offline_steps=10,
        online_steps=150,
        loop=LOOP,
        episode_limit=25,
        offline_estimate=True,
    )
    hub = Hub(("127.0.0.1", 0), shared_key("127.0.0.1"), silent_s=2.0)
    port, path = hub.address[1], tmp_path / "run"
    learner = threading.Thread(target=lambda: session.train(config, path, quiet=True, hub=hub), daemon=True)
    learner.start()
    robots = [playing(noted, port, tmp_path / name) for name in "ab"]
    with pytest.raises(EnvironmentMismatchError, match="environment Pendulum-v1 has"):
        actor.act("Pendulum-v1", f"127.0.0.1:{port}", tmp_path / "c")
    learner.join(60)
    for thread, done in robots:
        thread.join(20)
        assert done[0].transitions > 0
    rows, counters, _ = stored(path)
    judged = read_rows(path / "episodes.jsonl")
    assert {row["phase"] for row in judged} >= {"offline", "online"} and all(row["action_error"] > 0 for row in judged)
    by_id = {row.values["observations"].tobytes() + row.values["next_observations"].tobytes(): row for row in noted}
    found = [
        by_id[a.tobytes() + b.tobytes()] for a, b in zip(rows["observations"], rows["next_observations"], strict=True)
    ]
    numbers = {who: [row.number for row in found if row.actor == who] for who in {row.actor for row in noted}}
    assert len(numbers) == 2 and all(of == list(range(1, len(of) + 1)) for of in numbers.values())
    assert counters.env_steps == sum(map(len, numbers.values())) == 150 and all(numbers.values())
    for ended, before, after in zip(rows["ends"], found, found[1:], strict=False):
        follows = (before.actor, before.episode, before.step + 1) == (after.actor, after.episode, after.step)
        assert follows == (not ended)


@pytest.mark.parametrize("lost", ["finish", "stop", "go-on"])
def test_learner_away(lost: actor.Lost, tiny_run: Maker, noted: list[Row], tmp_path: Path) -> None:
    """While no learner answers, a robot finishes its episode, or stops at once, or goes on; then it is sent all.

    The learner here is a hub alone, which goes away in an episode of at most 100 steps and comes back.
    """
    config = tiny_run("rlpd", offline_estimate=True, episode_limit=100)
    data = session.load_data(config)
    welcome = {
        "run": "one",
        "settings": to_dict(config),
        "dataset": {"dataset": json.loads(json.dumps(data.to_json()))},
    }
    agents = session.build(dataclasses.replace(config, online_steps=0), data).agent
    message = packed_agents(each_seed(to_online, agents), None, env_steps=0, random=0)

    def begin(port: int, received: dict[str, int]) -> Hub:
        hub = Hub(("127.0.0.1", port), shared_key("127.0.0.1"))
        hub.publish(0, message)
        hub.start(welcome, received)
        return hub

    hub = begin(0, {})
    port = hub.address[1]
    thread, done = playing(noted, port, tmp_path / "spool", lost=lost, episodes=4)
    while sum(hub.received.values()) < 20:
        time.sleep(0.005)
    hub.close()
    while hub._open:
        time.sleep(0.005)
    before, at = dict(hub.received), len(noted)
    ends = lambda: sum(row.result is not None for row in noted[at:])  # noqa: E731
    while lost != "stop" and not (ends() if lost == "finish" else any(row.result for row in noted[at:-1])):
        time.sleep(0.005)
    time.sleep(0.2)
    away = len(noted)
    hub = begin(port, before)
    thread.join(20)
    assert done[0].episodes == 4 and done[0].waiting == 0 and sum(hub.received.values()) == len(noted)
    hub.close()
    lasts = [after.step == 0 for after in noted[1:]] + [True]
    unfinished = [row for row, last in zip(noted, lasts, strict=True) if last and row.result is None]
    if lost == "stop":
        assert away - at <= 2 and unfinished == [row for row in noted[away - 1 : away] if row.result is None]
    elif lost == "finish":
        assert noted[away - 1].result is not None and unfinished == [] and ends() >= 1
    else:
        assert any(row.result for row in noted[at : away - 1]) and unfinished == []


def test_commands(tiny_run: Maker, noted: list[Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`o2o learner` stops by a signal while it waits for robots, goes on with its folder, and ends with its steps."""
    (dataset,), port = tiny_run("rlpd").dataset, free_port()
    listen = ("--listen", f"127.0.0.1:{port}")
    begin = ["learner", "rlpd", "--dataset", dataset, "--offline-estimate", "--runs", str(tmp_path), "--name", "run"]
    begin += ["--preset", "small", "--offline-steps", "10", "--online-steps", "60", "--config.batch-size", "16"]
    begin += ["--config.online.random-steps", "20", "--config.online.min-rows", "0"]
    for network in ("actor", "critic"):
        begin += [f"--config.{network}-hidden-dims", "16", "16"]

    def stop_waiting() -> None:
        while not (tmp_path / "run" / "checkpoints" / "10").exists():
            time.sleep(0.05)
        time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_waiting, daemon=True).start()
    assert run(*begin, *listen) == 0 and read_status(tmp_path / "run") == "stopped"
    assert run("resume", str(tmp_path / "run")) == 2 and "go on with `o2o learner" in capsys.readouterr().err
    thread, done = playing(noted, port, tmp_path / "spool")
    assert run("learner", str(tmp_path / "run"), *listen, "--online-steps", "80") == 0
    thread.join(20)
    assert read_status(tmp_path / "run") == "finished" and stored(tmp_path / "run")[1].env_steps == 80
    assert done[0].transitions == len(noted) >= 80
    assert run("actor", "--env", "PointMaze_UMaze-v3", "--learner", listen[1], "--spool", str(tmp_path / "spool")) == 2
    assert f"no learner answers at 127.0.0.1:{port}" in capsys.readouterr().err


def test_parameters_arrive(tiny_run: Maker) -> None:
    """What acts arrives bit for bit; parameters of other settings are refused."""
    config = tiny_run("rlpd", normalize=True)
    trainer = session.build(config)
    agents, normalizer = each_seed(to_online, trainer.agent), trainer.normalizer
    shapes = shapes_of(config, trainer.data, online=True)
    found, norm, about = unpacked_agents(packed_agents(agents, normalizer, random=3), shapes)
    assert about == {"random": 3} and norm is not None and normalizer is not None
    np.testing.assert_array_equal(norm.std, normalizer.std)
    for ours, theirs in zip(jax.tree.leaves(agents.actor.params), jax.tree.leaves(found.actor.params), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    wider = tiny_run("rlpd", [("actor_hidden_dims", (8, 16))], normalize=True)
    with pytest.raises(ConfigError, match="other parameters than this o2o makes of its settings"):
        unpacked_agents(packed_agents(agents, normalizer), shapes_of(wider, trainer.data, online=True))
    trainer.close()


def test_learner_names_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A learner that names an agent of its own makes no actor import it."""
    (tmp_path / "evil_agent.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    hub = Hub(("127.0.0.1", 0), shared_key("127.0.0.1"))
    hub.start({"run": "one", "settings": {"agent": "evil_agent:Evil"}, "dataset": {}}, {})
    with pytest.raises(TrustError, match="is code .evil_agent:Evil., which an actor does not run"):
        actor.act("PointMaze_UMaze-v3", f"127.0.0.1:{hub.address[1]}", tmp_path / "spool")
    assert "evil_agent" not in sys.modules
    hub.close()


def test_bad_rows_refused() -> None:
    """A row of other shapes, or with a number that is not finite, is named before it is stored."""
    example = {"observations": np.zeros(3), "actions": np.zeros(2), "rewards": np.zeros(()), "masks": np.zeros(())}
    example["next_observations"] = np.zeros(3)
    values = {key: np.zeros((1, *value.shape)) for key, value in {**example, "ends": np.zeros(())}.items()}
    assert misfit(Row("a", 1, 0, 0, values), example) is None
    wrong = misfit(Row("a", 1, 0, 0, {**values, "actions": np.zeros((1, 4))}), example)
    assert wrong is not None and "other spaces than the learner's: actions (4,), the learner's are (2,)" in wrong
    nan = misfit(Row("a", 1, 0, 0, {**values, "rewards": np.full(1, np.nan)}), example)
    assert nan is not None and "not finite" in nan
    few = misfit(Row("a", 1, 0, 0, {"actions": values["actions"]}), example)
    assert few is not None and "install one version on both" in few


@pytest.mark.parametrize(("change", "wrong"), [
    ({"seeds": 2}, "seeds is 2"), ({"online_steps": 0}, "online_steps is 0"), ({"record": True}, "record is True"),
])  # fmt: skip
def test_learner_settings_refused(change: dict[str, Any], wrong: str, tiny_run: Maker, tmp_path: Path) -> None:
    """What cannot be done for robots elsewhere is refused before anything is written."""
    with pytest.raises(ConfigError, match=wrong + ", and the run is a learner's"):
        session.check_learner(tiny_run("rlpd", **change))
    with pytest.raises(ConfigError, match="agent is 'bc'"):
        session.check_learner(tiny_run("bc"))
    with pytest.raises(ConfigError, match="another machine: set O2O_LEARNER_KEY"):
        shared_key("10.0.0.1")
