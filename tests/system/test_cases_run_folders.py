"""Runs whose path, environment or numbers go wrong: what was done is saved, and what is read back is right."""

import dataclasses
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from o2o import envs
from o2o.config import LoopConfig
from o2o.data import datasets
from o2o.errors import ConfigError, DivergenceError, EnvironmentFaultError
from o2o.files import read_rows
from o2o.runs import session
from o2o.runs.folder import read_status
from o2o.runs.session import RunConfig
from o2o.train import checkpoint

Maker = Callable[..., RunConfig]
LOOP = LoopConfig(eval_every=0, eval_episodes=1, log_every=10, checkpoint_every=20, updates_per_dispatch=10)


@pytest.fixture
def world(embedded: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Count the steps of all environments in `made`; before step number `at` call `then`."""
    env = envs.make(datasets.info(embedded))
    kind, seen = type(env.unwrapped), SimpleNamespace(made=0, at=0, then=lambda: None)
    env.close()
    original, here = kind.step, Path.cwd()

    def step(self: Any, action: Any) -> Any:
        seen.made += 1
        if seen.made == seen.at:
            seen.then()
        return original(self, action)

    monkeypatch.setattr(kind, "step", step)
    yield seen
    os.chdir(here)


def broken_off(run: RunConfig, world: SimpleNamespace, path: Path, then: Callable[[], Any]) -> None:
    """Train a run twice: to its end as `whole`, then into `path`, calling `then` in step 38 of its online phase."""
    assert session.train(run, path.with_name("whole"))
    lengths = [row["length"] for row in read_rows(path.with_name("whole") / "episodes.jsonl")]
    assert world.made == sum(lengths) + 60
    world.made, world.at, world.then = 0, lengths[0] + 38, then
    session.train(run, path)


def leave() -> None:
    sys.exit("EMERGENCY STOP")


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("how", [leave, interrupt])
def test_environment_ends_process(
    how: Callable[[], None], tiny_run: Maker, world: SimpleNamespace, tmp_path: Path
) -> None:
    """`sys.exit` in a step is a fault like any exception, a KeyboardInterrupt is a stop; all steps before are saved."""
    run, path = tiny_run("bc", offline_steps=10, online_steps=60, loop=LOOP), tmp_path / "run"
    if how is leave:
        with pytest.raises(EnvironmentFaultError, match=r"SystemExit: EMERGENCY STOP.*; the run is saved, go on with"):
            broken_off(run, world, path, how)
    else:
        broken_off(run, world, path, how)
    assert read_status(path) == ("failed" if how is leave else "stopped")
    assert checkpoint.steps(path / "checkpoints")[-1] == 10 + 37
    assert session.resume(path) and read_status(path) == "finished"
    whole, parts = (read_rows(tmp_path / name / "episodes.jsonl") for name in ("whole", "run"))
    assert whole == parts


def test_foreign_handler_and_folder(
    tiny_run: Maker, world: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An environment takes SIGINT for itself and changes the working folder: Ctrl-C saves, all in one folder."""
    (tmp_path / "home").mkdir()
    (tmp_path / "sdk").mkdir()
    monkeypatch.chdir(tmp_path / "home")

    def take_over() -> None:
        os.chdir(tmp_path / "sdk")
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        world.at, world.then = world.made + 5, lambda: signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    broken_off(tiny_run("bc", offline_steps=10, online_steps=60, loop=LOOP), world, Path("run"), take_over)
    assert signal.getsignal(signal.SIGINT) == before
    path = tmp_path / "home" / "run"
    assert read_status(path) == "stopped" and checkpoint.steps(path / "checkpoints")[-1] == 10 + 43
    assert list((tmp_path / "sdk").iterdir()) == []
    assert session.resume(path)


def test_odd_path_trains_and_opens(tiny_run: Maker, tmp_path: Path) -> None:
    """A run in folders with brackets is trained, evaluated and resumed."""
    path = tmp_path / "sweep[a,b]" / "lr=0.1[3]*"
    assert session.train(tiny_run("bc", offline_steps=10, online_steps=0, loop=LOOP), path)
    assert len(session.evaluate_run(path, episodes=1)) == 1 and session.resume(path)
    assert checkpoint.steps(path / "checkpoints") == [10]


@pytest.mark.parametrize("phase", ["offline", "online"])
def test_divergence_ends_run(phase: str, tiny_run: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first metrics row that is not finite ends the run, in both phases; every checkpoint kept is finite."""
    steps = {"offline_steps": 1000, "online_steps": 0} if phase == "offline" else {"offline_steps": 0}
    loop = LOOP if phase == "offline" else dataclasses.replace(LOOP, log_every=1)
    run = tiny_run("rlpd", loop=loop, keep_checkpoints=9, **{"online_steps": 1000, **steps})
    finite = session.Trainer.check_finite
    poisoned = []

    def poison(self: Any) -> None:
        finite(self)
        if len(poisoned) == 2:  # behind the second checkpoint
            bad = jax.tree.map(lambda leaf: leaf * np.nan, self.agent.critic.params)
            self.state.agent = self.agent.replace(critic=self.agent.critic.replace(params=bad))
        poisoned.append(self.counters.point)

    monkeypatch.setattr(session.Trainer, "check_finite", poison)
    with pytest.raises(DivergenceError, match=r"/.* is not finite by update .*seed 0.*checkpoints are kept"):
        session.train(run, tmp_path / "run")
    assert read_status(tmp_path / "run") == "failed"
    rows = [row for row in read_rows(tmp_path / "run/metrics.jsonl") if "critic/loss" in row]
    assert rows[-1]["critic/loss"] is None and all(row["critic/loss"] is not None for row in rows[:-1])
    assert rows[-1]["gradient_steps" if phase == "offline" else "env_steps"] <= poisoned[2] + 10
    kept = checkpoint.steps(tmp_path / "run/checkpoints")
    assert kept == poisoned[:2] or kept == poisoned[:3]
    for step in kept[:2]:
        _, trainer = session.open_run(tmp_path / "run", str(step))
        finite(trainer)
        trainer.close()


def test_oversized_batch_refused(tiny_run: Maker, tmp_path: Path) -> None:
    """A batch that no memory holds is refused before anything is made, with both numbers."""
    with pytest.raises(ConfigError, match=r"the run needs about .* GiB more memory .*batch_size 100000000 .*are free"):
        session.train(tiny_run("bc", [("batch_size", 100_000_000)], loop=LOOP), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_each_row_sent_once(
    tiny_run: Maker, world: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that died behind its checkpoint is resumed: W&B gets every row once, as from a run that never died."""
    sent: list[dict[str, Any]] = []

    class Wandb:
        @staticmethod
        def init(**_: Any) -> Any:
            return SimpleNamespace(log=sent.append, finish=lambda: None, define_metric=lambda *_, **__: None)

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    run = tiny_run("bc", offline_steps=10, online_steps=60, loop=LOOP, loggers=("wandb",))

    save = session.RunFolder.save
    monkeypatch.setattr(session.RunFolder, "save", lambda *args: None if sent[-1:] == [{"died": True}] else save(*args))

    def die() -> None:  # as by kill -9: nothing is saved any more
        sent.append({"died": True})
        sys.exit()

    with pytest.raises(EnvironmentFaultError):
        broken_off(run, world, tmp_path / "run", die)
    death = len(sent) - 1
    sent.append({})
    assert session.resume(tmp_path / "run")
    sent.remove({})
    key = lambda row: (row["env_steps"], row["gradient_steps"], *sorted(k for k in row if "/" in k))  # noqa: E731
    ends = [i for i, row in enumerate(sent) if row.get("env_steps") == 60 and any("eval/" in k for k in row)]
    whole, parts = sent[: ends[0] + 1], [*sent[ends[0] + 1 : death], *sent[death + 1 :]]
    assert Counter(map(key, whole)) == Counter(map(key, parts)) and max(Counter(map(key, parts)).values()) == 1
