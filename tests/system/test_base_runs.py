"""Run folders as base policies, and residual runs on top of bases: labels, seeds, levels, exact resume."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from gymnasium import spaces

from o2o import envs
from o2o.config import LoopConfig
from o2o.data import datasets
from o2o.data.datasets import Dataset
from o2o.envs.pointmaze import EMBEDDED
from o2o.errors import CheckpointError, ConfigError, EnvironmentMismatchError, RunError
from o2o.nn.encoders import EncoderConfig
from o2o.policies import run as run_policies
from o2o.policies.base import Base, base_labels
from o2o.report.plots import read_rows
from o2o.runs import session
from o2o.runs.session import load_base
from o2o.train.acting import act_side_by_side
from o2o.train.episode import FIXED_STREAM, EnvSlot
from tests.system.test_runs import StopAt, assert_same_runs, train_interrupted


@pytest.fixture(scope="module")
def maze_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a root with a small version of the embedded dataset."""
    root = tmp_path_factory.mktemp("maze")
    recipe = EMBEDDED["pointmaze-umaze"]
    EMBEDDED["pointmaze-umaze"] = dataclasses.replace(recipe, steps=500)
    try:
        envs.make_embedded("pointmaze-umaze", root)
    finally:
        EMBEDDED["pointmaze-umaze"] = recipe
    return root


LOOP = LoopConfig(eval_every=40, eval_episodes=1, log_every=10, checkpoint_every=10_000, updates_per_dispatch=10)
Runs = Callable[..., session.RunConfig]


@pytest.fixture
def maze_run(maze_root: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """Return a maker of tiny runs on it: `maze_run(agent, fields, **changes)`."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(maze_root))
    monkeypatch.setenv("O2O_CACHE", str(maze_root / "cache"))

    def make(agent: str, fields: Any = (), **changes: Any) -> session.RunConfig:
        run = session.preset_run(agent, envs.embedded_id("pointmaze-umaze"), "small")
        config = session.with_fields(run.config, [("batch_size", 16), *fields])
        return dataclasses.replace(run, **{"config": config, "loop": LOOP, **changes})

    return make


CHUNKED = [("horizon", 3), ("execute", 2), ("width", 16), ("blocks", 1)]
RESIDUAL = [
    *(("actor_hidden_dims", (16, 16)), ("critic_hidden_dims", (16, 16)), ("online.random_steps", 20)),
    *(("online.initial_updates", 10), ("online.utd_ratio", 2)),
]


@pytest.fixture(scope="module")
def chunked_run(maze_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a trained run of two diffusion policies that play chunks and see two observations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(maze_root))
        run = session.preset_run("diffusion_bc", envs.embedded_id("pointmaze-umaze"), "small")
        config = session.with_fields(run.config, [("batch_size", 16), *CHUNKED])
        run = dataclasses.replace(
            run, config=config, loop=LOOP, offline_steps=20, online_steps=0, seeds=2, history=2, normalize=True
        )
        path = tmp_path_factory.mktemp("base") / "chunked"
        assert session.train(run, path)
    return path


def test_side_by_side_labels(chunked_run: Path, maze_run: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run labels side by side what it does step by step."""
    data = datasets.load(envs.embedded_id("pointmaze-umaze"))
    source = load_base(chunked_run, seed_index=1)
    source.check(data)
    episode = data.arrays["observations"][:7]
    (together,) = source.actions(data, [episode]) or [None]
    calls = []
    monkeypatch.setattr(run_policies, "act_side_by_side", lambda *args: calls.append(1) or act_side_by_side(*args))
    alone = Base(source, data)
    calls.clear()  # of compiling
    for _ in range(2):  # the second time after a queue that was left half full
        alone.reset(0)
        actions = np.stack([alone.act_in_env(observation) for observation in episode])
        np.testing.assert_allclose(actions, together, atol=1e-5)
    assert len(calls) == 2 * 4  # one call to the device per chunk of two
    assert source.fingerprint != load_base(chunked_run, seed_index=0).fingerprint
    np.testing.assert_array_equal(
        *(np.concatenate(source.actions(data, [episode, data.arrays["observations"][9:12]]) or []) for _ in range(2))
    )


def test_sampling_base_seed(chunked_run: Path, maze_run: Runs) -> None:
    """A sampling base is a function of the reset's seed."""
    data = datasets.load(envs.embedded_id("pointmaze-umaze"))
    base = Base(load_base(chunked_run, sample=True), data)
    observation = data.arrays["observations"][0]
    first = []
    for seed in (1, 1, 2):
        base.reset(seed)
        first.append(base.act(observation))
    np.testing.assert_array_equal(first[0], first[1])
    assert np.any(first[0] != first[2])


def test_residual_resume(chunked_run: Path, maze_run: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A residual run resumes exactly and starts at its base's level."""
    run = maze_run("residual", RESIDUAL, base=str(chunked_run), base_sample=True, online_steps=80)
    assert (run.action_range, run.normalize, run.std_floor, run.offline_steps) == ("data", True, 0.1, 0)
    assert session.train(run, tmp_path / "whole")
    train_interrupted(run, tmp_path / "parts", monkeypatch, [StopAt("online", 50)])
    assert_same_runs(tmp_path / "whole", tmp_path / "parts", more_than=2)
    rows = read_rows(tmp_path / "whole" / "metrics.jsonl")
    assert rows[-1]["gradient_steps"] == 10 + 2 * 60
    assert rows[0]["phase"] == "warmup" and rows[-1]["actor/residual"] > 0
    config, trainer = session.open_run(tmp_path / "whole")
    assert config.base == str(chunked_run) and trainer.normalizer is not None
    stored = trainer.replay.buffer.rows  # pyright: ignore[reportOptionalMemberAccess]
    b, a = (np.asarray(leaf[0, :20]) for leaf in (stored["observations"]["base_action"], stored["actions"]))
    assert np.abs(a - b).max() <= 0.2 + 1e-5 and np.abs(a - b).mean() > 0.03  # base and noise in the warm-up
    after = np.asarray(stored["next_observations"]["base_action"][0, :19])
    np.testing.assert_array_equal(after, np.asarray(stored["observations"]["base_action"][0, 1:20]))
    trainer.close()
    assert len(session.evaluate_run(tmp_path / "whole", episodes=1)) == 1
    assert load_base(tmp_path / "whole").check(trainer.data) is None  # a residual run may be a base itself


def test_first_evaluation_is_base(chunked_run: Path, maze_run: Runs) -> None:
    """The first evaluation is the base's own."""
    run = maze_run("residual", RESIDUAL, base=str(chunked_run), base_seed_index=1)
    trainer = session.build(run)
    ours = trainer.evaluate()
    own = load_base(chunked_run, seed_index=1)
    env = envs.make(trainer.data.info, trainer.data.task, evaluation=True)
    base, data = Base(own, dataclasses.replace(trainer.data, action_map=own.data.action_map)), trainer.data
    slot = EnvSlot(env, (0, FIXED_STREAM, 0))
    observation, over = slot.reset(), False
    base.reset(0)
    while not over:
        step = slot.step(base.act(observation))
        observation, over = step.next_observation, step.ended
    assert (ours[0]["length"], ours[0]["success"]) == (len(slot.actions), slot.success) and data.size
    trainer.close()


def test_residual_needs_base(maze_run: Runs, chunked_run: Path, tmp_path: Path) -> None:
    """A residual run needs a base, and others take none."""
    with pytest.raises(ConfigError, match="agent residual corrects a base policy, and there is none: give `base`"):
        session.train(maze_run("residual", RESIDUAL), tmp_path / "none")
    with pytest.raises(ConfigError, match="agent bc takes no base policy"):
        session.train(maze_run("bc", base=str(chunked_run)), tmp_path / "bc")
    with pytest.raises(ConfigError, match=r"base_seed_index is 2; run .* has 2 seed\(s\)"):
        session.train(maze_run("residual", RESIDUAL, base=str(chunked_run), base_seed_index=2), tmp_path / "member")
    assert not any(tmp_path.iterdir())


def test_invalid_base_folders(
    chunked_run: Path, maze_run: Runs, world: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run folders that are no base are refused."""
    with pytest.raises(EnvironmentMismatchError, match=r"was trained on observations .*, here they are a\[1\] "):
        base_labels(load_base(chunked_run), world)
    with pytest.raises(RunError, match="no config.json"):
        load_base(tmp_path)
    shutil.copytree(chunked_run, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "checkpoints")
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        load_base(tmp_path / "copy")
    other = dataclasses.replace(world.info, action_space=spaces.Box(-3.0, 3.0, (2,), np.float32))
    source = load_base(chunked_run)
    there = dataclasses.replace(
        source.data, info=dataclasses.replace(source.data.info, action_space=other.action_space)
    )
    with pytest.raises(EnvironmentMismatchError, match="was trained with the action space"):
        source.check(there)


def test_changed_base_stops_resume(chunked_run: Path, maze_run: Runs, tmp_path: Path) -> None:
    """A base that changed stops a resume."""
    run = maze_run("residual", RESIDUAL, base=str(chunked_run), online_steps=30)
    assert session.train(run, tmp_path / "run")
    assert session.resume(tmp_path / "run")
    config = (tmp_path / "run" / "config.json").read_text()
    (tmp_path / "run" / "config.json").write_text(config.replace('"base_seed_index": 0', '"base_seed_index": 1'))
    with pytest.raises(ConfigError, match="changed since run"):
        session.resume(tmp_path / "run")


def test_label_cache(chunked_run: Path, maze_run: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels are cached by base and dataset."""
    data = datasets.load(envs.embedded_id("pointmaze-umaze"))
    source = load_base(chunked_run)
    one = base_labels(source, data)
    monkeypatch.setattr(type(source), "actions", lambda *_: pytest.fail("asked again"))
    for first, second in zip(one, base_labels(source, data), strict=True):
        np.testing.assert_array_equal(first, second)
    assert all(leaf.shape == (data.size, 2) for leaf in jax.tree.leaves(one))


def look(observation: dict[str, Any]) -> np.ndarray:
    """Return an action that depends on what a camera sees."""
    (image,) = [entry for entry in observation.values() if entry.dtype == np.uint8]
    assert image.ndim == 3
    return np.asarray([image.mean() / 255.0 - 0.5, 0.1], np.float32)


def test_pixel_residual_resume(pixels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A residual run on images resumes exactly."""
    run = session.preset_run("residual", pixels, "small", base="tests.system.test_base_runs:look")
    encoder = EncoderConfig(kind="conv", conv_features=(4, 4), conv_strides=(3, 2))
    tiny = [("encoder", encoder), ("trunk_width", 8), ("batch_size", 8)]
    config = session.with_fields(run.config, [*RESIDUAL, *tiny, ("num_critics", 2)])
    run = dataclasses.replace(run, config=config, loop=LOOP, online_steps=50)
    assert session.train(run, tmp_path / "whole")
    train_interrupted(run, tmp_path / "parts", monkeypatch, [StopAt("online", 30)])
    assert_same_runs(tmp_path / "whole", tmp_path / "parts", more_than=0, names=("metrics.jsonl",))
    assert read_rows(tmp_path / "whole" / "metrics.jsonl")[-1]["actor/residual"] > 0
