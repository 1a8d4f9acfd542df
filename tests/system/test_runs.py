"""Run folders: exact resume, signals, kills, and every kind of bad input; real MuJoCo, tiny networks."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import jax
import numpy as np
import pytest

from o2o import __version__
from o2o.config import LoopConfig, from_dict, to_dict
from o2o.errors import CheckpointError, ConfigError, EnvironmentFaultError, RunError
from o2o.replay.device import insert
from o2o.report.plots import read_rows
from o2o.runs import session
from o2o.runs.folder import RunFolder, StopFlag, read_config, read_status
from o2o.runs.session import RunConfig
from o2o.train import checkpoint
from o2o.train.evaluation import Evaluator
from o2o.train.programs import learn_and_act, updates
from o2o.train.remote_evaluation import RemoteEvaluator
from o2o.types import OnlineConfig

Maker = Callable[..., RunConfig]


def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "time_s"} for row in rows]


def agent_leaves(path: Path) -> list[np.ndarray]:
    _, trainer = session.open_run(path)
    assert trainer.counters.phase == "online"
    agent = trainer.agent
    trainer.close()
    data = lambda x: jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x  # noqa: E731
    return [np.asarray(data(leaf)) for leaf in jax.tree.leaves(agent)]


class StopAt:
    """Sends the process a signal when a metrics row of a phase passes a step."""

    def __init__(self, phase: str, step: int) -> None:
        self.phase, self.step, self.fired = phase, step, False

    def __call__(self, row: dict[str, Any]) -> None:
        at = row["gradient_steps"] if row["phase"] == "offline" else row["env_steps"]
        if row["phase"] == self.phase and at >= self.step and not self.fired:
            self.fired = True
            os.kill(os.getpid(), signal.SIGTERM)


def test_hang_up_signal() -> None:
    """A hang-up is a signal to stop unless it is ignored."""
    before = signal.signal(signal.SIGHUP, lambda *_: None)
    try:
        with StopFlag() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
        with StopFlag() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def train_interrupted(run: RunConfig, path: Path, monkeypatch: pytest.MonkeyPatch, stops: list[StopAt]) -> None:
    """Train with a SIGTERM at each stop, resuming after each."""
    original = session.Session._metrics

    def listening(self: session.Session, row: dict[str, Any]) -> None:
        original(self, row)
        for stop in stops:
            stop(row)

    monkeypatch.setattr(session.Session, "_metrics", listening)
    finished = session.train(run, path)
    for _ in range(len(stops)):
        assert not finished
        assert read_status(path) == "stopped"
        finished = session.resume(path)
    assert finished and all(stop.fired for stop in stops)
    assert read_status(path) == "finished"


def assert_same_runs(
    whole: Path, parts: Path, more_than: int, names: tuple[str, ...] = ("metrics.jsonl", "episodes.jsonl")
) -> None:
    """Compare two runs: their rows, of which there are `more_than` that many, and their agents bit for bit."""
    for name in names:
        expected, rows = read_rows(whole / name), read_rows(parts / name)
        assert untimed(rows) == untimed(expected) and len(expected) > more_than
    for ours, theirs in zip(agent_leaves(parts), agent_leaves(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("agent", ["wsrl", "calql"])
def test_stop_and_resume(agent: str, tiny_run: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run stopped and resumed equals one never stopped."""
    loop = LoopConfig(eval_every=60, eval_episodes=1, log_every=15, checkpoint_every=10_000, updates_per_dispatch=10)
    run = tiny_run(agent, seeds=2, offline_steps=60, online_steps=240, loop=loop)
    assert session.train(run, tmp_path / "whole")
    programs = (updates, insert, learn_and_act)
    compiled = [program._cache_size() for program in programs]
    train_interrupted(run, tmp_path / "parts", monkeypatch, [StopAt("offline", 30), StopAt("online", 180)])
    assert [program._cache_size() for program in programs] == compiled, "nothing is compiled again"
    assert_same_runs(tmp_path / "whole", tmp_path / "parts", more_than=4)


def test_kill_and_resume(tiny_run: Maker, tmp_path: Path) -> None:
    """A run killed at any instant goes on from the last checkpoint."""
    loop = LoopConfig(eval_every=100, eval_episodes=1, log_every=20, checkpoint_every=50, updates_per_dispatch=10)
    run = tiny_run("wsrl", offline_steps=100, online_steps=300, loop=loop)
    assert session.train(run, tmp_path / "whole")
    killed = tmp_path / "killed"
    code = (
        "import sys; from pathlib import Path; from o2o.runs import session\n"
        "config = session.load_config(Path(sys.argv[1])); session.train(config, Path(sys.argv[2]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "whole"), str(killed)], env=environment)
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and process.poll() is None:
        rows = read_rows(killed / "metrics.jsonl") if (killed / "metrics.jsonl").exists() else []
        if any(row["phase"] == "online" and row["env_steps"] >= 120 for row in rows):
            break
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert read_status(killed) == "running", "the kill came before the end"
    assert session.resume(killed)
    for name in ("metrics.jsonl", "episodes.jsonl"):
        assert untimed(read_rows(killed / name)) == untimed(read_rows(tmp_path / "whole" / name))


@pytest.mark.parametrize("beside", [False, True])
def test_failed_evaluation_resumed(
    beside: bool, tiny_run: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation that fails at a phase's end is played when the run is resumed."""
    run = tiny_run("bc", offline_steps=20, online_steps=30)
    run = dataclasses.replace(run, loop=dataclasses.replace(run.loop, eval_process=beside))
    assert session.train(run, tmp_path / "whole")
    kind = RemoteEvaluator if beside else Evaluator
    take = kind.take

    def failing(evaluator: Evaluator, wait: bool = False, leave: int = 0) -> list[tuple[Any, list[dict[str, Any]]]]:
        taken = take(evaluator, wait, leave)
        if any(about["env_steps"] == 30 for about, _ in taken):
            raise EnvironmentFaultError("gripper lost contact")
        return taken

    monkeypatch.setattr(kind, "take", failing)
    with pytest.raises(EnvironmentFaultError, match=r"gripper lost contact; the run is saved, go on with `o2o resume"):
        session.train(run, tmp_path / "parts")
    assert checkpoint.steps(tmp_path / "parts/checkpoints")[-1] == 50 and read_status(tmp_path / "parts") == "failed"
    monkeypatch.setattr(kind, "take", take)
    assert session.resume(tmp_path / "parts")
    assert_same_runs(tmp_path / "whole", tmp_path / "parts", more_than=1)
    best = checkpoint.best_step(tmp_path / "whole/checkpoints")
    assert checkpoint.best_step(tmp_path / "parts/checkpoints") == best is not None


def test_run_folder_contents(tiny_run: Maker, tmp_path: Path) -> None:
    """A run folder holds what it should."""
    loop = LoopConfig(eval_every=50, eval_episodes=2, log_every=20, checkpoint_every=20, updates_per_dispatch=10)
    run = tiny_run("wsrl", online_steps=60, loop=loop, keep_checkpoints=1)
    session.train(run, tmp_path / "run")
    config = read_config(tmp_path / "run")
    assert len(config["fingerprint"]) >= 16 and config["versions"]["jax"] == jax.__version__
    assert config["versions"]["o2o"] == __version__
    here = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    if shutil.which("git") and (head := subprocess.run(here, capture_output=True, text=True).stdout.strip()):
        assert config["versions"]["commit"].removesuffix("-dirty") == head
    assert session.load_config(tmp_path / "run") == run
    rows = read_rows(tmp_path / "run" / "episodes.jsonl")
    assert {(row["phase"], row["env_steps"]) for row in rows} >= {("offline", 0), ("warmup", 20), ("online", 60)}
    assert len([row for row in rows if row["phase"] == "warmup" and row["env_steps"] == 20]) == 2
    assert 1 <= len(checkpoint.steps(tmp_path / "run" / "checkpoints")) <= 2
    evaluated = session.evaluate_run(tmp_path / "run", episodes=2, which="best")
    assert len(evaluated) == 2 and all(row["length"] > 0 for row in evaluated)
    with pytest.raises(RunError, match="exists already: continue it with `o2o resume"):
        session.train(run, tmp_path / "run")
    assert untimed(read_rows(tmp_path / "run" / "episodes.jsonl")) == untimed(rows)


def test_other_checkpoint_refused(tiny_run: Maker, tmp_path: Path) -> None:
    """A checkpoint of another shape or agent is refused."""
    loop = LoopConfig(eval_every=1000, eval_episodes=1, checkpoint_every=10, updates_per_dispatch=10)
    session.train(tiny_run("wsrl", offline_steps=10, online_steps=0, loop=loop), tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    for change, expected in (
        (
            {part: {**config["config"][part], "actor_hidden_dims": [24, 24]} for part in ("cql", "finetune")},
            "belongs to another agent or shape",
        ),
        ({"pretrain": "sac"}, "belongs to another"),
    ):
        path.write_text(json.dumps({**config, "config": {**config["config"], **change}}))
        with pytest.raises(CheckpointError, match=expected):
            session.open_run(tmp_path / "run")
    path.write_text(json.dumps({**config, "config": {**config["config"], "finetune": {"actor_hiden_dims": [8]}}}))
    with pytest.raises(ConfigError, match="did you mean 'actor_hidden_dims'"):
        session.open_run(tmp_path / "run")


def test_wsrl_from_other_run(tiny_run: Maker, tmp_path: Path) -> None:
    """WSRL starts from another run."""
    loop = LoopConfig(eval_every=1000, eval_episodes=1, checkpoint_every=1000, updates_per_dispatch=10)
    source = tiny_run("calql", offline_steps=20, online_steps=0, loop=loop)
    session.train(source, tmp_path / "calql")
    run = tiny_run("wsrl", online_steps=10, loop=loop, init_from=str(tmp_path / "calql"))
    session.train(run, tmp_path / "wsrl")
    _, before = session.open_run(tmp_path / "calql")
    _, after = session.open_run(tmp_path / "wsrl")
    observations = before.data.arrays["observations"][:8]
    ours, theirs = (
        t.agent_of().sample_actions(observations, None, jax.random.key(0), True)[0] for t in (after, before)
    )
    np.testing.assert_array_equal(ours, theirs)
    rows = read_rows(tmp_path / "wsrl" / "episodes.jsonl")
    assert rows[0]["phase"] == "offline" and rows[0]["env_steps"] == 0
    with pytest.raises(RunError, match="no run folder"):
        session.train(dataclasses.replace(run, init_from=str(tmp_path / "nothing")), tmp_path / "other")
    shifted = dataclasses.replace(run, task=dataclasses.replace(run.task, reward_scale=1.0, reward_bias=-1.0))
    with pytest.raises(CheckpointError, match=r"reward_scale 10.0 \(this run: 1.0\), task.reward_bias -5.0 \(this"):
        session.train(shifted, tmp_path / "shifted")
    with pytest.raises(CheckpointError, match="has normalize False, this run True"):
        session.train(dataclasses.replace(run, normalize=True), tmp_path / "normalised")
    with pytest.raises(CheckpointError, match="has action_range space, this run data"):
        session.train(dataclasses.replace(run, action_range="data"), tmp_path / "actions")
    assert not any((tmp_path / name).exists() for name in ("other", "shifted", "normalised", "actions"))


def test_normalisers_not_mixed(tiny_run: Maker, tmp_path: Path) -> None:
    """Rows of two normalisers are not mixed.

    The policy goes on under its own run's statistics: a dataset of other statistics may not join its batches.
    """
    session.train(tiny_run("calql", offline_steps=10, online_steps=0, normalize=True), tmp_path / "calql")
    about = {"online_steps": 30, "normalize": True, "init_from": str(tmp_path / "calql"), "std_floor": 1.0}
    mixed = tiny_run("wsrl", [("online.replay", "mixed")], **about)
    with pytest.raises(CheckpointError, match="spread otherwise: use that dataset, or config.online.replay online"):
        session.train(mixed, tmp_path / "mixed")
    assert session.train(dataclasses.replace(mixed, std_floor=None), tmp_path / "alike")
    assert session.train(tiny_run("wsrl", **about), tmp_path / "own")


class Breaking(gymnasium.Wrapper):
    """A real environment that fails at a given step of its life: raises, or returns a NaN."""

    def __init__(self, env: gymnasium.Env, at: int, how: str) -> None:
        super().__init__(env)
        self.at, self.how, self.count = at, how, 0

    def step(self, action: Any) -> Any:
        self.count += 1
        observation, reward, terminated, truncated, info = self.env.step(action)
        if self.count == self.at and self.how == "raise":
            raise RuntimeError("gripper lost contact")
        if self.count == self.at:
            observation = {**observation, "observation": observation["observation"] * np.nan}
        return observation, reward, terminated, truncated, info


@pytest.mark.parametrize(("how", "words"), [("raise", "gripper lost contact"), ("nan", "returned nan")])
def test_failing_environment_saves_run(
    how: str, words: str, tiny_run: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failing environment leaves the run saved."""
    run = tiny_run("wsrl", offline_steps=10, online_steps=60)
    built, made = gymnasium.make, []

    def breaking(*args: Any, **kwargs: Any) -> gymnasium.Env:
        made.append(built(*args, **kwargs))
        training = len(made) == 3  # after the probe and the one for evaluation
        return Breaking(made[-1], 41, how) if training else made[-1]

    monkeypatch.setattr(gymnasium, "make", breaking)
    with pytest.raises(EnvironmentFaultError, match=words):
        session.train(run, tmp_path / "run")
    assert read_status(tmp_path / "run") == "failed"
    monkeypatch.setattr(gymnasium, "make", built)
    _, trainer = session.open_run(tmp_path / "run")
    assert trainer.counters.env_steps == 40
    trainer.close()
    assert session.resume(tmp_path / "run")
    assert read_status(tmp_path / "run") == "finished"


def test_no_space_keeps_checkpoint(tiny_run: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old checkpoint is kept when no space is left."""
    session.train(tiny_run("wsrl", offline_steps=10, online_steps=0), tmp_path / "run")
    config, trainer = session.open_run(tmp_path / "run")
    full = os.statvfs(tmp_path)
    none = os.statvfs_result((*full[:3], 0, 0, *full[5:]))
    monkeypatch.setattr(os, "statvfs", lambda _: none)
    folder = RunFolder.open(tmp_path / "run")
    trainer.offline(20)
    with pytest.raises(CheckpointError, match="no space left"):
        folder.save(trainer)
    monkeypatch.undo()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(Path(config.dataset[0]).parent))
    assert checkpoint.steps(folder.checkpoints) == [10]
    trainer.close()


def test_bad_folders_and_fields(tmp_path: Path, tiny_run: Maker) -> None:
    with pytest.raises(RunError, match="no run folder"):
        session.resume(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="no agent 'wsrll'; did you mean 'wsrl'"):
        session.agent_class("wsrll")
    with pytest.raises(ConfigError, match="did you mean 'utd_ratio'"):
        session.with_fields(OnlineConfig(), [("utd_ration", 2)])
    with pytest.raises(ConfigError, match="did you mean 'warmup_steps'"):
        from_dict(OnlineConfig, {"warmup_step": 3})
    run = tiny_run("rlpd")
    with pytest.raises(ConfigError, match=r"^run/config.json.online.utd_ratio is 0; expected at least 1$"):
        from_dict(type(run.config), {"online": {"utd_ratio": 0}}, "run/config.json")
    assert from_dict(type(run.config), to_dict(run.config)) == run.config


def test_changed_dataset_noticed(tiny_run: Maker, tmp_path: Path) -> None:
    """A changed dataset is noticed at resume."""
    session.train(tiny_run("bc", offline_steps=10, online_steps=0), tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    path.write_text(path.read_text().replace(json.loads(path.read_text())["fingerprint"], "0" * 16))
    with pytest.raises(ConfigError, match="changed since run"):
        session.resume(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
