"""Evaluation in another process: the same rows to the last bit, nothing stalled, nothing lost; real MuJoCo."""

import dataclasses
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import jax.numpy as jnp
import numpy as np
import pytest

from o2o import envs
from o2o.data.normalizer import Normalizer
from o2o.errors import ConfigError, EnvironmentFaultError
from o2o.report.plots import read_rows
from o2o.runs import session
from o2o.runs.folder import RunFolder, guarded, read_status
from o2o.runs.session import RunConfig
from o2o.train import checkpoint
from o2o.train.evaluation import EnvFn, Evaluator
from o2o.train.remote_evaluation import MOST_IN_FLIGHT, RemoteEvaluator
from o2o.train.state import Hooks
from tests.system.test_evaluate import STEADY, STILL, Counting, Pendulum, stack
from tests.system.test_runs import StopAt, assert_same_runs, train_interrupted

SEEDS, EPISODES, SLOTS = 2, 3, 2
BAD = Counting(gains=jnp.full(4, 1.0))
"""Acts at the very limit, which the environment below does not survive."""


def fragile(limit: int) -> EnvFn:
    """Return a maker of pendulums that break where the action is at its limit; a closure with a class of its own."""

    class Fragile(gymnasium.Wrapper):
        def step(self, action: Any) -> Any:
            if abs(action[0]) >= 3.0:
                raise RuntimeError("gripper lost contact")
            return self.env.step(action)

    def make(evaluation: bool) -> gymnasium.Env:
        env = Fragile(gymnasium.make("InvertedPendulum-v5", max_episode_steps=limit))
        return envs.wrap(env, envs.task_for("InvertedPendulum-v5"), evaluation=evaluation)

    return make


def tenth(raw: float) -> float:
    return raw / 10


@pytest.fixture(scope="module")
def here() -> Iterator[Evaluator]:
    evaluator = Evaluator(fragile(40), SEEDS, EPISODES, 5, tenth, SLOTS)
    yield evaluator
    evaluator.close()


@pytest.fixture(scope="module")
def there() -> Iterator[RemoteEvaluator]:
    evaluator = RemoteEvaluator(fragile(40), SEEDS, EPISODES, 5, tenth, SLOTS)
    yield evaluator
    evaluator.close()


def pid_of(evaluator: RemoteEvaluator) -> int:
    child = evaluator._child
    assert child is not None
    return child.process.pid


def test_stop_before_episodes(here: Evaluator, there: RemoteEvaluator) -> None:
    """A stop is seen before the episodes of a call."""
    agents = stack(STILL, STEADY)
    assert there.until_stopped(agents, None, 3) == here.until_stopped(agents, None, 3) == here(agents, None, 3)
    for evaluator in (here, there):
        evaluator.should_stop = lambda: True
        assert evaluator.until_stopped(agents, None, 3) is None
        evaluator.should_stop = lambda: False


def test_rows_are_bitwise_equal(here: Evaluator, there: RemoteEvaluator) -> None:
    """Rows are the same to the last bit as without the process."""
    agents, others = stack(STILL, STEADY), stack(Counting(gains=jnp.full(4, 0.1)), Counting(gains=jnp.full(4, 0.2)))
    scale = Normalizer(mean=jnp.full(4, 0.01), std=jnp.full(4, 1.5))
    for agent, normalizer, point, deterministic in (
        (agents, None, 0, True),
        (agents, None, 8, False),
        (others, scale, 8, True),  # another structure, a carry, a normaliser
    ):
        expected = here(agent, normalizer, point, deterministic)
        assert there(agent, normalizer, point, deterministic) == expected
        assert len(expected) == SEEDS * EPISODES and len({row["return"] for row in expected}) > 1
        assert expected[0]["normalized"] == expected[0]["return"] / 10


def test_ask_does_not_wait(here: Evaluator, there: RemoteEvaluator) -> None:
    """Who asks does not wait, and rows come in order."""
    agents = stack(STILL, STEADY)
    there(agents, None, 0)
    os.kill(pid_of(there), signal.SIGSTOP)
    for point in range(MOST_IN_FLIGHT):
        there.ask(agents, None, point, about=point)
    assert there.take() == []
    threading.Timer(0.3, os.kill, (pid_of(there), signal.SIGCONT)).start()
    began = time.monotonic()
    there.ask(agents, None, 9, about=9)
    assert time.monotonic() - began > 0.2, "one too many waits for the first"
    assert there.take(wait=True) == [(point, here(agents, None, point)) for point in (*range(MOST_IN_FLIGHT), 9)]
    assert there.take(wait=True) == []


def test_failing_environment_named(here: Evaluator, there: RemoteEvaluator) -> None:
    """A failing environment is named, and the others' rows are not lost."""
    agents, bad = stack(STILL, STEADY), stack(BAD, BAD)
    there.ask(bad, None, 0, about={"env_steps": 5, "gradient_steps": 8})
    there.ask(agents, None, 1, about="kept")
    with pytest.raises(EnvironmentFaultError) as expected:
        here(bad, None, 0)
    with pytest.raises(EnvironmentFaultError) as caught:
        while there._asked:
            there.take()
            time.sleep(0.01)
    where = " (in the evaluation after 5 environment steps and 8 updates, whose rows are missing)"
    assert str(caught.value) == str(expected.value) + where and "gripper lost contact" in where + str(expected.value)
    assert there.take(wait=True) == [("kept", here(agents, None, 1))]


def test_killed_process_replaced(here: Evaluator, there: RemoteEvaluator) -> None:
    """A killed process is named and replaced."""
    agents = stack(STILL, STEADY)
    there.ask(agents, None, 0, about={"env_steps": 5, "gradient_steps": 8})
    os.kill(pid_of(there), signal.SIGKILL)
    with pytest.raises(EnvironmentFaultError) as caught:
        there.take(wait=True)
    assert str(caught.value).startswith("the evaluation process died (killed by SIGKILL)")
    assert "after 5 environment steps" in str(caught.value) and "\n" not in str(caught.value)
    assert there.take(wait=True) == []
    assert there(agents, None, 3) == here(agents, None, 3)
    pid = pid_of(there)
    there.ask(stack(*[Pendulum(gains=jnp.full(4, 0.1))] * SEEDS), None, 0, about="given up")
    there.close()
    assert not Path(f"/proc/{pid}").exists()


def test_unsendable_refused() -> None:
    """What cannot go to the process is refused at once."""
    env = envs.make("InvertedPendulum-v5")
    lock = threading.Lock()
    with pytest.raises(ConfigError, match=r"env_fn cannot go .* or set loop\.eval_process to False"):
        RemoteEvaluator(lambda _: (env, lock), 1, 1, 0)  # type: ignore[arg-type,return-value]
    env.close()


def test_training_during_evaluation(tiny_run: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Training goes on meanwhile, and a failure leaves the run saved."""
    run = tiny_run("bc", online_steps=100)
    run = dataclasses.replace(run, loop=dataclasses.replace(run.loop, eval_process=True, eval_every=10_000))
    reported: list[tuple[int, int]] = []
    hooks = Hooks(episodes=lambda rows: reported.append((rows[0]["env_steps"], trainer.counters.env_steps)))
    trainer = session.build(run, hooks=hooks)
    evaluator = trainer.evaluator
    assert isinstance(evaluator, RemoteEvaluator)
    trainer.offline(20)
    assert reported == [(0, 0)], "a phase's end waits"
    trainer.online(20)
    assert reported[1:] == [(20, 20)], "a phase's end waits"
    reported.clear()
    os.kill(pid_of(evaluator), signal.SIGSTOP)
    trainer.evaluate(wait=False)
    hooks.progress = lambda _, done, *__: os.kill(pid_of(evaluator), signal.SIGCONT) if done >= 60 else None
    trainer.online(80)
    assert [asked for asked, _ in reported] == [20, 80] and reported[0][1] >= 60
    hooks.progress = Hooks().progress
    folder = RunFolder.create(tmp_path / "run", {})
    evaluator.close()
    trainer.evaluator = RemoteEvaluator(broken, 1, 1, 0)
    trainer.evaluate(wait=False)
    with pytest.raises(KeyError):
        guarded(folder, trainer, lambda: {}["another failure"])
    assert (tmp_path / "run/checkpoints/100").is_dir(), "saved though an evaluation under way failed as well"
    assert trainer.counters.unscored and trainer.counters.asked_at == 100, "it would be played again at once"
    trainer.counters.asked_at = trainer.counters.scored_at
    with pytest.raises(EnvironmentFaultError, match=r"no such robot.*; the run is saved, go on with `o2o resume"):
        guarded(folder, trainer, lambda: trainer.online(90))
    assert read_status(tmp_path / "run") == "failed" and (tmp_path / "run/checkpoints/110").is_dir()
    trainer.close()
    folder.close()


def test_checkpoint_scored_later(
    tiny_run: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint waits for earlier evaluations only and has its score later."""
    run = tiny_run("wsrl", offline_steps=20, online_steps=120, keep_checkpoints=9)
    run = dataclasses.replace(run, loop=dataclasses.replace(run.loop, eval_every=40, checkpoint_every=40))
    assert session.train(run, tmp_path / "whole")
    ask, save = RemoteEvaluator.ask, RunFolder.save
    seen: list[tuple[list[int], int | None]] = []

    def asking(evaluator: RemoteEvaluator, *about: Any) -> None:
        if about[2] == 60 and not seen:
            evaluator._collect(0)
            os.kill(pid_of(evaluator), signal.SIGSTOP)
        ask(evaluator, *about)

    def saving(folder: RunFolder, trainer: Any) -> None:
        save(folder, trainer)
        if trainer.counters.point == 60 and not seen:
            points = [about["point"] for about in trainer.evaluator.under_way()]
            seen.append((points, checkpoint.best_step(folder.checkpoints)))
            shutil.copytree(folder.path, tmp_path / "killed")
            os.kill(pid_of(trainer.evaluator), signal.SIGCONT)

    monkeypatch.setattr(RemoteEvaluator, "ask", asking)
    monkeypatch.setattr(RunFolder, "save", saving)
    beside = dataclasses.replace(run, loop=dataclasses.replace(run.loop, eval_process=True))
    assert session.train(beside, tmp_path / "beside")
    assert seen == [([60], 20)], "saved while step 60 is still evaluated"
    assert session.resume(tmp_path / "killed"), "the evaluation under way is played again"
    best = checkpoint.best_step(tmp_path / "whole/checkpoints")
    for name in ("beside", "killed"):
        assert_same_runs(tmp_path / "whole", tmp_path / name, more_than=4)
        assert checkpoint.best_step(tmp_path / name / "checkpoints") == best
        rows = read_rows(tmp_path / name / "episodes.jsonl")
        known = [row["success"] for row in rows if row["env_steps"] == 40]
        late = json.loads((tmp_path / name / "checkpoints/60/score.json").read_text())
        assert late["score"] == np.mean(known) and len(known) == run.loop.eval_episodes


def broken(evaluation: bool) -> gymnasium.Env:
    raise EnvironmentFaultError("no such robot")


def test_run_with_processes(
    tiny_run: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run with processes equals one without."""
    run = tiny_run("wsrl", seeds=2, offline_steps=0, online_steps=240, record=True)
    loop = dataclasses.replace(run.loop, eval_every=60, log_every=15)
    assert session.train(dataclasses.replace(run, loop=loop), tmp_path / "whole")
    beside = dataclasses.replace(loop, eval_process=True, env_processes=2)
    parts = tmp_path / "parts"
    train_interrupted(dataclasses.replace(run, loop=beside), parts, monkeypatch, [StopAt("online", 180)])
    assert_same_runs(tmp_path / "whole", parts, more_than=4)
    recorded = {path.name: path for path in (tmp_path / "whole/episodes").glob("*.npz")}
    assert len(recorded) > 1 and set(recorded) == {path.name for path in (parts / "episodes").glob("*.npz")}
    for name, path in recorded.items():
        with np.load(path) as ours, np.load(parts / "episodes" / name) as theirs:
            assert set(ours) == set(theirs)
            for key in ours:
                np.testing.assert_array_equal(ours[key], theirs[key])
    assert {row["env_steps"] for row in read_rows(parts / "episodes.jsonl")} >= {0, 60, 120, 180, 240}
