"""Environments that are hardware: nothing is played blindly, no transition and no recorded episode is lost."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from o2o import envs
from o2o.config import LoopConfig
from o2o.data import datasets
from o2o.data.recorder import EPISODES, Recorder
from o2o.errors import ConfigError, EnvironmentFaultError, RunError
from o2o.report.plots import read_rows
from o2o.runs import session
from o2o.runs.folder import RunFolder
from o2o.runs.session import RunConfig
from o2o.train import checkpoint
from o2o.train.state import evaluation_steps
from o2o.types import OnlineConfig

Maker = Callable[..., RunConfig]


@pytest.fixture
def body(embedded: str, monkeypatch: pytest.MonkeyPatch) -> tuple[type, list[str]]:
    """Return the class of the bare environment and what is done to it from now on, by anybody."""
    env = envs.make(datasets.info(embedded))
    kind, done = type(env.unwrapped), list[str]()
    env.close()
    for name in ("reset", "step"):
        original = getattr(kind, name)

        def noting(self: Any, *args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            done.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(kind, name, noting)
    return kind, done


@pytest.mark.parametrize("agent", ["wsrl", "calql"])
def test_failing_reset_keeps_transitions(
    agent: str, body: tuple[type, list[str]], tiny_run: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failing reset costs no transition.

    Two seeds; the first ends an episode and cannot begin the next. What was played is stored, the other goes on.
    """
    kind, done = body
    run = tiny_run(agent, seeds=2, offline_steps=10, online_steps=600)
    first = session.build(run)
    monkeypatch.setattr(first, "evaluate", lambda *_, **__: [])
    first.offline(10)
    reset, step = kind.reset, kind.step  # type: ignore[attr-defined]

    def ending(self: Any, action: Any) -> Any:
        result = step(self, action)
        return (*result[:3], done.count("step") == 2 * 40 + 1 or result[3], result[4])

    def homing(self: Any, **kwargs: Any) -> Any:
        if done.count("reset") >= 2:
            raise OSError("homing failed")
        return reset(self, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "reset", homing)
        patch.setattr(kind, "step", ending)
        with pytest.raises(EnvironmentFaultError, match="homing failed on reset"):
            first.online(600)
        with pytest.raises(EnvironmentFaultError, match="homing failed on reset"):
            first.online(600)
    steps, replay, ended = first.counters.env_steps, first.replay, 0
    assert first.fleet is not None and first.counters.episodes == [1, 0] and steps == 41
    buffer = jax.tree.map(lambda leaf: np.asarray(leaf)[:, :steps], replay.buffer.rows)
    assert done.count("step") == 2 * steps and buffer["ends"][:, :-1].sum() == 0
    assert buffer["ends"][ended, -1] == 1 and buffer["ends"][1 - ended, -1] == 0
    if agent == "calql":
        assert replay.buffer.pending.tolist() == [0 if member == ended else steps for member in (0, 1)]
        assert [len(rows) for rows in replay.waiting] == replay.buffer.pending.tolist()
        failure = first.data.task.failure_reward
        own = {key: buffer[key][ended] for key in ("rewards", "masks", "ends")}
        returns = datasets.monte_carlo_returns(*own.values(), run.config.discount, failure)
        np.testing.assert_allclose(buffer["mc_returns"][ended], returns, rtol=1e-5)

    second = session.build(run)
    arrays, state = first.save()
    second.load(json.loads(json.dumps(state)), lambda _: arrays, 600)
    assert second.fleet is not None and second.counters.phase == "online"
    assert [len(slot.actions) for slot in second.fleet.slots] == [0 if member == ended else steps for member in (0, 1)]
    np.testing.assert_array_equal(second.fleet.slots[1 - ended].observation, first.fleet.slots[1 - ended].observation)
    after = np.asarray(second.replay.buffer.rows["ends"])[:, :steps]
    np.testing.assert_array_equal(after, buffer["ends"])
    second.online(steps + 5)
    assert second.counters.env_steps == steps + 5
    first.close()
    second.close()


def test_failing_first_reset(body: tuple[type, list[str]], tiny_run: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first reset that fails leaves the trainer before the switch."""
    trainer = session.build(tiny_run("wsrl", offline_steps=10))
    monkeypatch.setattr(trainer, "evaluate", lambda *_, **__: [])
    trainer.offline(10)

    def dead(self: Any, **_: Any) -> Any:
        raise OSError("no power")

    with monkeypatch.context() as patch:
        patch.setattr(body[0], "reset", dead)
        with pytest.raises(EnvironmentFaultError, match="no power on reset"):
            trainer.online(10)
    assert trainer.save()[1]["counters"]["phase"] == "offline" and "buffer" not in trainer.save()[0]
    assert trainer.online(10) and trainer.counters.env_steps == 10
    trainer.close()


def test_only_trainer_moves_environments(body: tuple[type, list[str]], tiny_run: Maker, tmp_path: Path) -> None:
    """Only who trains a run moves its environments."""
    run = tiny_run("calql", offline_steps=10, online_steps=40)
    assert session.train(run, tmp_path / "run")
    whole = session.build(run)
    whole.offline(10)
    whole.online(60)
    done = body[1]
    done.clear()
    _, trainer = session.open_run(tmp_path / "run")
    assert done == [] and trainer.fleet is None
    assert trainer.save()[1]["environments"]["slots"][0]["episode"] == 0  # it could be saved again as it is
    trainer.online(60)
    assert done.count("step") >= 40 + 20 and all(slot.exact for slot in trainer.fleet.slots)
    for ours, theirs in zip(*(jax.tree.leaves(t.replay.buffer) for t in (trainer, whole)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    trainer.close()
    whole.close()
    done.clear()
    rows = session.evaluate_run(tmp_path / "run", episodes=1)
    assert done.count("step") == rows[0]["length"] and done.count("reset") == 2  # one to see whether it can be had


def test_differing_reset_plays_no_action(
    body: tuple[type, list[str]], tiny_run: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the reset differs, no action is played.

    A robot never stands exactly where it stood, whether or not its metadata says that it cannot be replayed.
    """
    kind, done = body
    run = tiny_run("wsrl", offline_steps=10, online_steps=60)
    first = session.build(run)
    first.offline(10)
    first.online(30)
    reset = kind.reset  # type: ignore[attr-defined]

    def elsewhere(self: Any, **kwargs: Any) -> Any:
        observation, info = reset(self, **kwargs)
        return {**observation, "observation": observation["observation"] + 1e-4}, info

    monkeypatch.setattr(kind, "reset", elsewhere)
    second = session.build(run)
    done.clear()
    arrays, state = first.save()
    second.load(json.loads(json.dumps(state)), lambda _: arrays, 60)
    assert "step" not in done and not all(slot.exact for slot in second.fleet.slots)
    assert second.counters.phase == "online" and second.replay.buffer.rows["ends"][0, 29] == 1.0
    second.online(40)
    assert second.counters.env_steps == 40
    first.close()
    second.close()


@pytest.mark.parametrize("robot", [True, False])
def test_robot_recording_survives_kill(
    robot: bool, body: tuple[type, list[str]], tiny_run: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a robot recorded is kept when a killed run is resumed.

    The process dies behind two episodes and before any checkpoint online; only a simulator plays them again.
    """
    if robot:
        monkeypatch.setitem(body[0].metadata, "replayable", False)  # type: ignore[attr-defined]
    loop = LoopConfig(eval_every=0, eval_episodes=1, log_every=25, checkpoint_every=10_000, updates_per_dispatch=10)
    run = tiny_run("bc", offline_steps=10, online_steps=330, loop=loop, record=True)
    path, save = tmp_path / "run", RunFolder.save

    def dying(self: RunFolder, trainer: Any) -> None:
        if trainer.counters.env_steps:
            raise KeyboardInterrupt  # a kill saves nothing
        save(self, trainer)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save", dying)
        with pytest.raises(KeyboardInterrupt):
            session.train(run, path)
    before = {file.name: file.read_bytes() for file in (path / EPISODES).glob("*.npz")}
    assert len(before) >= 2
    assert session.resume(path)
    after = {file.name: file.read_bytes() for file in (path / EPISODES).glob("*.npz")}
    assert len(after) == (2 if robot else 1) * len(before)
    if robot:
        assert before.items() <= after.items()


def test_evaluation_ends_episode(
    body: tuple[type, list[str]], tiny_run: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluation ends the episode that it would spoil.

    One arm: one evaluation episode at a time, then training begins an episode; nothing of the half one is lost.
    """
    kind, _ = body
    monkeypatch.setitem(kind.metadata, "replayable", False)  # type: ignore[attr-defined]
    made = list[Any]()
    original = kind.__init__

    def counting(self: Any, *args: Any, **kwargs: Any) -> None:
        made.append(self)
        original(self, *args, **kwargs)

    monkeypatch.setattr(kind, "__init__", counting)
    loop = LoopConfig(eval_every=25, eval_episodes=3, log_every=25, checkpoint_every=10_000, updates_per_dispatch=10)
    run = tiny_run("calql", offline_steps=10, online_steps=60, loop=loop, record=True)
    data = session.load_data(run)
    recorder = lambda env: Recorder(env, tmp_path / EPISODES, data.task)  # noqa: E731
    trainer = session.build(run, data)
    trainer.env_fn = lambda evaluation: envs.make(data.info, data.task, inner=None if evaluation else recorder)
    trainer.evaluator.env_fn = trainer.env_fn
    trainer.offline(10)
    assert len(made) == 1, "an evaluation of three episodes in one environment"
    made.clear()
    trainer.online(60)
    assert len(made) == 1 and trainer.counters.phase == "online" and trainer.fleet is not None
    buffer = jax.tree.map(lambda leaf: np.asarray(leaf)[0, :60], trainer.replay.buffer.rows)
    points = sorted(evaluation_steps(loop, run.config.online, 60))
    ends = {point - 1 for point in points if point < 60} | {25}  # the first update, which is compiled there
    assert set(np.flatnonzero(buffer["ends"])) == ends
    joined = np.all(buffer["next_observations"][:-1] == buffer["observations"][1:], axis=-1)
    np.testing.assert_array_equal(joined, buffer["ends"][:-1] == 0)
    assert not buffer["masks"].min() == 0 and len(trainer.fleet.slots[0].actions) == 60 - max(
        p for p in points if p < 60
    )
    trainer.evaluate()  # by hand, and at the end of `online` before: the next step begins an episode
    trainer.online(70)
    after = jax.tree.map(lambda leaf: np.asarray(leaf)[0, 59:70], trainer.replay.buffer.rows)
    assert after["ends"].tolist() == [1.0] + [0.0] * 10
    joined = np.all(after["next_observations"][:-1] == after["observations"][1:], axis=-1)
    assert joined.tolist() == [False] + [True] * 9 and len(trainer.fleet.slots[0].actions) == 10
    trainer.close()
    recorded = [np.load(path)["rewards"].size for path in (tmp_path / EPISODES).glob("*.npz")]
    assert sum(recorded) == 70 and len(recorded) == len(points) + 2
    beside = dataclasses.replace(run, loop=dataclasses.replace(loop, eval_process=True))
    refused = session.build(beside, data)
    with pytest.raises(ConfigError, match="hardware"):
        refused.begin_online(10)
    refused.close()


def test_failing_second_reset(body: tuple[type, list[str]], tiny_run: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """A robot that cannot be put back is not moved on.

    The first reset works, the second fails; mended, it begins an episode and ends the half one.
    """
    kind, done = body
    monkeypatch.setitem(kind.metadata, "replayable", False)  # type: ignore[attr-defined]
    run = tiny_run("wsrl", offline_steps=10, online_steps=60)
    first = session.build(run)
    first.offline(10)
    first.online(15)
    second = session.build(run)
    arrays, state = first.save()
    second.load(json.loads(json.dumps(state)), lambda _: arrays, 60, play=False)
    done.clear()
    reset = kind.reset  # type: ignore[attr-defined]

    def homing(self: Any, **kwargs: Any) -> Any:
        if done.count("reset") == 1:
            raise OSError("homing failed")
        return reset(self, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "reset", homing)
        with pytest.raises(EnvironmentFaultError, match="homing failed"):
            second.online(18)
    assert second.fleet is None and "step" not in done
    second.online(18)
    assert second.counters.phase == "online" and np.flatnonzero(second.replay.buffer.rows["ends"][0]).tolist() == [14]
    first.close()
    second.close()


def test_half_episode_exported(
    body: tuple[type, list[str]], tiny_run: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A robot's last half episode is in the exported dataset."""
    monkeypatch.setitem(body[0].metadata, "replayable", False)  # type: ignore[attr-defined]
    run = tiny_run("bc", offline_steps=10, online_steps=30, record=True)
    assert session.train(run, tmp_path / "run")
    assert datasets.load(tmp_path / "run/recorded/run-v0", cache=False).size == 30
    beside = dataclasses.replace(run, loop=dataclasses.replace(run.loop, eval_process=True))
    with pytest.raises(ConfigError, match="hardware"):
        session.train(beside, tmp_path / "beside")
    assert not (tmp_path / "beside").exists()


def test_episode_count_after_resume(
    body: tuple[type, list[str]], tiny_run: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Episodes behind an inexact resume are counted on.

    Three lives of a simulator, the second of another version: nothing that is in the replay is deleted.
    """
    kind, _ = body
    loop = LoopConfig(eval_every=0, eval_episodes=1, log_every=25, checkpoint_every=200, updates_per_dispatch=10)
    run, path = tiny_run("bc", offline_steps=10, online_steps=1200, loop=loop, record=True), tmp_path / "run"
    save, reset = RunFolder.save, kind.reset  # type: ignore[attr-defined]

    def life(until: int, shift: float, start: Callable[[], bool]) -> set[str]:
        def dying(self: RunFolder, trainer: Any) -> None:
            if trainer.counters.env_steps >= until:
                raise KeyboardInterrupt  # a kill saves nothing
            save(self, trainer)

        def other(self: Any, **kwargs: Any) -> Any:
            observation, info = reset(self, **kwargs)
            return {**observation, "observation": observation["observation"] + shift}, info

        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, "save", dying)
            patch.setattr(kind, "reset", other)
            with pytest.raises(KeyboardInterrupt):
                start()
        return {file.name for file in (path / EPISODES).glob("*.npz")}

    one = life(600, 0.0, lambda: session.train(run, path))  # its last checkpoint: 400
    two = life(1000, 1e-4, lambda: session.resume(path))  # from 400 on, otherwise; its last checkpoint: 800
    assert one < two
    assert session.resume(path)  # from 800 on, and again otherwise
    three = {file.name for file in (path / EPISODES).glob("*.npz")}
    assert two < three
    numbers = sorted(int(name.split("-")[-1].removesuffix(".npz")) for name in three)
    assert numbers == list(range(len(numbers)))


def test_one_process_per_run(tiny_run: Maker, tmp_path: Path) -> None:
    """A run is trained by one process at a time."""
    run, path = tiny_run("bc", offline_steps=10, online_steps=0), tmp_path / "run"
    assert session.train(run, path)
    rows = read_rows(path / "metrics.jsonl")
    other = RunFolder.open(path).lock()
    with pytest.raises(RunError, match="is being trained by another process"):
        session.resume(path)
    assert read_rows(path / "metrics.jsonl") == rows
    assert session.open_run(path)[0] == run  # who looks need not wait
    other.close()
    assert session.resume(path)


def test_best_checkpoint_was_evaluated(tiny_run: Maker, tmp_path: Path) -> None:
    """Only a checkpoint that was evaluated can be the best."""
    loop = LoopConfig(eval_every=40, eval_episodes=1, log_every=25, checkpoint_every=30, updates_per_dispatch=10)
    run = tiny_run("bc", offline_steps=10, online_steps=130, loop=loop, keep_checkpoints=9)
    assert session.train(run, tmp_path / "run")
    folder = tmp_path / "run/checkpoints"
    assert checkpoint.steps(folder) == [10, 40, 70, 100, 130, 140]
    evaluated = {row["env_steps"] + 10 for row in read_rows(tmp_path / "run/episodes.jsonl")}
    assert {10, 140} <= evaluated and not {40, 70, 100} & evaluated
    with checkpoint._checkpointer(folder) as opened:
        scored = {entry.step for entry in opened.checkpoints if checkpoint._score(folder, entry) is not None}
    assert scored == {10, 130, 140} & evaluated


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [("eval_every", -1, "at least 0"), ("updates_per_dispatch", 0, "at least 1"), ("log_every", 0, "at least 1"),
     ("checkpoint_every", 0, "at least 1"), ("eval_episodes", 0, "at least 1"), ("device_bytes", -5, "at least 0"),
     ("env_processes", -1, "0 to 1024")],
)  # fmt: skip
def test_impossible_schedules_refused(field: str, value: int, expected: str) -> None:
    """Schedules that cannot be are refused at once."""
    with pytest.raises(ConfigError, match=rf"LoopConfig\.{field} is {value}; expected {expected}"):
        LoopConfig(**{field: value})


def test_no_regular_evaluation() -> None:
    """Evaluations at turning points remain where there are no regular ones."""
    points = evaluation_steps(LoopConfig(eval_every=0), OnlineConfig(utd_ratio=4, warmup_steps=5000), 10_000)
    assert points == {5000, 5001 + 250, 10_000}
