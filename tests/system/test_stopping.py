"""Stopped, killed and continued runs: a signal in an evaluation, no checkpoint yet, more steps, what diverged."""

import dataclasses
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o2o import envs
from o2o.config import LoopConfig
from o2o.data import datasets
from o2o.data.recorder import EPISODES
from o2o.errors import CheckpointError, ConfigError, DivergenceError
from o2o.replay import buffer
from o2o.replay.buffer import ReplayBuffer
from o2o.report.plots import read_rows
from o2o.runs import session
from o2o.runs.folder import RunFolder, read_status
from o2o.runs.session import RunConfig
from o2o.train import checkpoint
from o2o.train.trainer import Trainer
from tests.system.test_rollouts import STAGED

Maker = Callable[..., RunConfig]
LOOP = LoopConfig(eval_every=0, eval_episodes=1, log_every=20, checkpoint_every=10_000, updates_per_dispatch=10)


def written(path: Path) -> list[list[dict[str, Any]]]:
    """Return the rows of a run, without what a clock says."""
    rows = [read_rows(path / name) for name in ("metrics.jsonl", "episodes.jsonl")]
    return [[{k: v for k, v in row.items() if not k.startswith("time")} for row in part] for part in rows]


def recorded(path: Path) -> dict[str, list[np.ndarray]]:
    found = {}
    for file in (path / EPISODES).glob("*.npz"):
        with np.load(file) as arrays:
            found[file.name] = [arrays[name] for name in sorted(arrays.files)]
    return found


def same(ours: Any, theirs: Any) -> None:
    data = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x  # noqa: E731
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(data(a), data(b))


@pytest.fixture
def steps(embedded: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Count the steps of all environments in `made`; at step `at` a SIGTERM comes."""
    env = envs.make(datasets.info(embedded))
    kind, seen = type(env.unwrapped), {"made": 0, "at": 0}
    env.close()
    original = kind.step

    def step(self: Any, action: Any) -> Any:
        seen["made"] += 1
        if seen["made"] == seen["at"]:
            signal.raise_signal(signal.SIGTERM)
        return original(self, action)

    monkeypatch.setattr(kind, "step", step)
    return seen


@pytest.mark.parametrize("agent", ["bc", "rlpd"])
@pytest.mark.parametrize("which", [0, 1], ids=["the first evaluation", "the last one"])
def test_signal_ends_evaluation(which: int, agent: str, steps: dict[str, int], tiny_run: Maker, tmp_path: Path) -> None:
    """A signal ends an evaluation at its next step.

    The first one comes behind pre-training, or without any before all else; the last one behind all steps.
    """
    run = tiny_run(agent, offline_steps=10 if agent == "bc" else 0, online_steps=40, loop=LOOP)
    assert session.train(run, tmp_path / "whole")
    lengths = [row["length"] for row in read_rows(tmp_path / "whole" / "episodes.jsonl")]
    assert len(lengths) >= 2 and steps["made"] == sum(lengths) + 40
    steps["at"], steps["made"] = 3 if which == 0 else sum(lengths[:-1]) + 40 + 3, 0
    assert not session.train(run, tmp_path / "run")
    assert steps["made"] == steps["at"] and read_status(tmp_path / "run") == "stopped"
    assert len(read_rows(tmp_path / "run" / "episodes.jsonl")) == (0 if which == 0 else len(lengths) - 1)
    steps["at"] = 0
    assert session.resume(tmp_path / "run") and read_status(tmp_path / "run") == "finished"
    assert written(tmp_path / "run") == written(tmp_path / "whole")


def test_signal_ends_candidate_choice(steps: dict[str, int], tiny_run: Maker, tmp_path: Path) -> None:
    """A signal ends the choice of candidates, and a resume makes it anew.

    It comes one step before the second of two candidates has played its episode.
    """
    run = tiny_run("uni_o4", STAGED, offline_steps=45, online_steps=48, loop=LOOP)
    assert session.train(run, tmp_path / "whole")
    lengths = [row["length"] for row in read_rows(tmp_path / "whole" / "episodes.jsonl")]
    played = steps["made"] - sum(lengths) - 48
    assert len(lengths) == 2 and played > 10
    steps["at"], steps["made"] = lengths[0] + played - 1, 0
    assert not session.train(run, tmp_path / "run")
    assert steps["made"] == steps["at"] and read_status(tmp_path / "run") == "stopped"
    _, stopped = session.open_run(tmp_path / "run")
    assert stopped.counters.phase == "offline" and (stopped.phase_name, stopped.counters.offline_steps) == (
        "offline",
        45,
    )
    stopped.close()
    steps["at"] = 0
    assert session.resume(tmp_path / "run") and read_status(tmp_path / "run") == "finished"
    assert written(tmp_path / "run") == written(tmp_path / "whole")
    (_, ours), (_, theirs) = (session.open_run(tmp_path / name) for name in ("run", "whole"))
    assert ours.counters.phase == "online" and theirs.counters.phase == "online"
    same(ours.agent, theirs.agent)
    ours.close()
    theirs.close()


def test_kill_before_first_checkpoint(tiny_run: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run killed before its first checkpoint begins again."""
    run = tiny_run("rlpd", offline_steps=0, online_steps=200, loop=LOOP, record=True)
    assert session.train(run, tmp_path / "whole") and recorded(tmp_path / "whole")

    def dying(*_: Any) -> None:
        raise KeyboardInterrupt  # a kill saves nothing

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save", dying)
        with pytest.raises(KeyboardInterrupt):
            session.train(run, tmp_path / "run")
    assert read_rows(tmp_path / "run" / "metrics.jsonl") and checkpoint.steps(tmp_path / "run" / "checkpoints") == []
    assert session.resume(tmp_path / "run")
    assert written(tmp_path / "run") == written(tmp_path / "whole")
    ours, theirs = recorded(tmp_path / "run"), recorded(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    same([ours[name] for name in sorted(ours)], [theirs[name] for name in sorted(theirs)])

    before = written(tmp_path / "run")
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="no checkpoint in"):  # it had finished: nothing begins again
        session.resume(tmp_path / "run")
    assert written(tmp_path / "run") == before


@pytest.mark.parametrize("agent", ["wsrl", "iql"])
def test_buffer_grows_with_run(agent: str, tiny_run: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The replay buffer grows with the run.

    Played in two parts or in one, a run learns the same; `iql`'s buffer holds the dataset, too.
    """
    monkeypatch.setattr(buffer, "SMALLEST_BUFFER", 20)
    trainers = [session.build(tiny_run(agent, offline_steps=10)) for _ in range(2)]
    for trainer, parts in zip(trainers, ([30, 70], [70]), strict=True):
        monkeypatch.setattr(trainer, "evaluate", lambda *_, **__: [])
        trainer.offline(10)
        assert all(trainer.online(until) for until in parts)
    grown, whole = trainers
    rows = trainers[0].replay.data.size if agent == "iql" else 0
    capacities = [trainer.replay.buffer.capacity for trainer in trainers]
    assert capacities == [rows + 70] * 2 and int(grown.replay.buffer.size[0]) == rows + 70
    same([grown.agent, grown.replay.buffer], [whole.agent, whole.replay.buffer])
    for trainer in trainers:
        trainer.close()


def test_wrapped_ring_grows() -> None:
    """A ring that went round grows in order of age."""
    ring = ReplayBuffer.create({"rewards": np.float32(0)}, 4)
    for value in range(6):
        ring = ring.add({"rewards": np.float32(value)})
    stacked = jax.tree.map(lambda leaf: leaf[None], ring).grown(6)
    assert stacked.rows["rewards"].tolist() == [[2, 3, 4, 5, 0, 0]] and int(stacked.cursor[0]) == 4
    assert jax.tree.map(lambda leaf: leaf[0], stacked).add({"rewards": np.float32(6)}).rows["rewards"][4] == 6


def test_host_replay_cannot_grow(tiny_run: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay in host memory says that it cannot grow."""
    monkeypatch.setattr(buffer, "SMALLEST_BUFFER", 20)
    loop = LoopConfig(eval_every=0, eval_episodes=1, device_bytes=0)
    trainer = session.build(tiny_run("wsrl", offline_steps=0, loop=loop))
    monkeypatch.setattr(trainer, "evaluate", lambda *_, **__: [])
    assert trainer.online(25)
    with pytest.raises(ConfigError, match=r"begun for 25 steps, .* cannot grow to 40: call begin_online\(40\)"):
        trainer.online(40)
    assert trainer.online(25)
    trainer.close()


def test_finished_run_extended(tiny_run: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished run goes on for longer."""
    monkeypatch.setattr(buffer, "SMALLEST_BUFFER", 20)
    for name, until in (("run", 30), ("whole", 70)):
        assert session.train(tiny_run("wsrl", offline_steps=10, online_steps=until, loop=LOOP), tmp_path / name)
    config = (tmp_path / "run" / "config.json").read_text()
    with pytest.raises(ConfigError, match="has made 30 environment steps"):
        session.resume(tmp_path / "run", online_steps=20)
    assert (tmp_path / "run" / "config.json").read_text() == config
    assert session.resume(tmp_path / "run", online_steps=70)
    changed = json.loads((tmp_path / "run" / "config.json").read_text())
    assert changed == {**json.loads(config), "online_steps": 70}
    (_, ours), (_, theirs) = (session.open_run(tmp_path / name) for name in ("run", "whole"))
    assert ours.counters.phase == "online" and theirs.counters.phase == "online"
    same([ours.agent, ours.replay.buffer], [theirs.agent, theirs.replay.buffer])
    assert [row["env_steps"] for row in read_rows(tmp_path / "run" / "episodes.jsonl")][-1] == 70
    ours.close()
    theirs.close()


def test_disk_replay_cannot_grow(
    tiny_run: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: dict[str, int]
) -> None:
    """A replay on disk that cannot grow is refused before anything is changed."""
    monkeypatch.setattr(buffer, "SMALLEST_BUFFER", 20)
    loop, path = dataclasses.replace(LOOP, device_bytes=0), tmp_path / "run"
    assert session.train(tiny_run("wsrl", offline_steps=10, online_steps=30, loop=loop), path)
    files = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    steps["made"] = 0
    with pytest.raises(ConfigError, match=r"run was begun for 30 environment steps, .* cannot grow to 70: go on"):
        session.resume(path, online_steps=70)
    assert steps["made"] == 0
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == files
    assert session.resume(path) and steps["made"] > 0
    shutil.rmtree(path / "checkpoints" / "40")  # killed online before any checkpoint there: it begins anew
    assert checkpoint.steps(path / "checkpoints") == [10]
    assert session.resume(path, online_steps=70)
    assert read_rows(path / "episodes.jsonl")[-1]["env_steps"] == 70


def test_diverged_not_saved(tiny_run: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What diverged is not saved."""
    loop = LoopConfig(eval_every=0, eval_episodes=1, log_every=20, checkpoint_every=20, updates_per_dispatch=10)
    step = Trainer.step

    def diverging(self: Trainer) -> None:
        if self.counters.env_steps == 30:
            self.state.action = jnp.full_like(self.state.action, jnp.nan)
        step(self)

    monkeypatch.setattr(Trainer, "step", diverging)
    with pytest.raises(DivergenceError, match="online step 30"):
        session.train(tiny_run("bc", offline_steps=10, online_steps=60, loop=loop), tmp_path / "run")
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [10, 30] and read_status(tmp_path / "run") == "failed"
