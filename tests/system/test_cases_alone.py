"""Runs whose dataset has been moved away: all that acts goes on acting, what learns from data asks for it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from o2o.cli import main
from o2o.errors import DatasetError, RunError
from o2o.runs import session
from o2o.runs.session import RunConfig

Maker = Callable[..., RunConfig]
ENV = "PointMaze_Open-v3"
RESIDUAL = [("online.random_steps", 10), ("online.initial_updates", 5)]


def first_actions(policy: Any, count: int = 6) -> np.ndarray:
    """Return the first actions of an episode in the plain environment."""
    env, actions = gym.make(ENV, continuing_task=True, reset_target=False), []
    observation, _ = env.reset(seed=3)
    policy.reset(3)
    for _ in range(count):
        actions.append(policy.act(observation))
        observation, *_ = env.step(actions[-1])
    env.close()
    return np.stack(actions)


def test_run_acts_without_data(tiny_run: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copied run, and one that corrects it, act, evaluate and export as with their dataset; resuming asks for it."""
    plain = {"env": ENV, "online_steps": 0, "offline_steps": 10}
    assert session.train(tiny_run("bc", normalize=True, action_range="data", **plain), tmp_path / "run")
    residual = tiny_run("residual", RESIDUAL, base=str(tmp_path / "base"), env=ENV, offline_steps=0, online_steps=20)
    shutil.copytree(tmp_path / "run", tmp_path / "base")
    assert session.train(residual, tmp_path / "upon")
    names = ("base", "upon")
    before = [first_actions(session.load_policy(tmp_path / name)) for name in names]
    rows = [session.evaluate_run(tmp_path / name, 1, seed=2) for name in names]
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "nowhere"))
    np.testing.assert_array_equal([first_actions(session.load_policy(tmp_path / name)) for name in names], before)
    assert [session.evaluate_run(tmp_path / name, 1, seed=2) for name in names] == rows
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["export", "upon", "out/policy.jax"])
    assert ended.value.code == 0 and sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "policy.base.jax", "policy.base.jax.json", "policy.jax", "policy.jax.json"
    ]  # fmt: skip
    with pytest.raises(DatasetError, match="is not under"):
        session.resume(tmp_path / "run")
    with pytest.raises(
        RunError, match=r"dataset.json cannot be read \(KeyError\('dataset'\)\): restore it from a copy"
    ):
        (tmp_path / "run" / "dataset.json").write_text("{}")
        session.load_policy(tmp_path / "run")


def test_start_from_a_run_alone(
    tiny_run: Maker, tmp_path: Path, embedded_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`init_from` needs the new run's dataset alone; that of the source may be gone."""
    root = tmp_path / "root"
    shutil.copytree(embedded_root / "o2o", root / "o2o")
    away = str(root / "o2o" / "embedded" / "pointmaze-umaze-v0")
    source = tiny_run("calql", offline_steps=10, online_steps=0, dataset=(away,))
    assert session.train(source, tmp_path / "source")
    shutil.rmtree(root)
    run = tiny_run("wsrl", online_steps=25, init_from=str(tmp_path / "source"))
    assert session.train(run, tmp_path / "run")
    taken, now = (session.open_agents(tmp_path / name) for name in ("source", "run"))
    assert now.counters.env_steps == 25 and taken.counters.offline_steps == 10


def test_exported_file_as_base(tiny_run: Maker, tmp_path: Path) -> None:
    """A residual run trains upon an exported file, and its first actions are those of the run that was exported."""
    chunks = [("horizon", 3), ("execute", 2), ("width", 16), ("blocks", 1)]
    base = tiny_run("diffusion_bc", chunks, history=2, env=ENV, offline_steps=10, online_steps=0)
    assert session.train(base, tmp_path / "base")
    session.load_policy(tmp_path / "base").export(tmp_path / "base.onnx")
    labels = []
    for spec in ("base", "base.onnx"):
        run = tiny_run("residual", RESIDUAL, base=str(tmp_path / spec), env=ENV, offline_steps=0, online_steps=20)
        labels.append(session.load_data(run).arrays["observations"]["base_action"][:500])
    np.testing.assert_allclose(labels[0], labels[1], atol=1e-4)
    assert session.train(run, tmp_path / "upon")
    session.load_policy(tmp_path / "upon").export(tmp_path / "upon.onnx")
    assert (tmp_path / "upon.base.onnx").read_bytes() == (tmp_path / "base.onnx").read_bytes()
