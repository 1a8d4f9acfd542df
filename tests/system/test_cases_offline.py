"""Runs without an environment: data of any format train, are judged on held-out episodes, resume and act."""

import dataclasses
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from o2o import envs
from o2o.config import LoopConfig, RunConfig
from o2o.data import datasets
from o2o.data.holdout import split
from o2o.data.importers import write as importing
from o2o.data.importers.plan import Options
from o2o.errors import ConfigError, EnvironmentMismatchError
from o2o.report.plots import panels, read_rows
from o2o.runs import session
from tests.conftest import narrow
from tests.helpers import foreign

SOURCES: dict[str, Any] = {
    "lerobot": (foreign.write_lerobot, "pick", ("observation.state",)),
    "robomimic": (foreign.write_robomimic, "low_dim.hdf5", ()),
    "d4rl": (foreign.write_d4rl, "hopper.hdf5", ()),
    "ogbench": (foreign.write_ogbench, "cube.npz", ()),
}


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fail where a test makes an environment."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "root"))

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("an environment was made")

    monkeypatch.setattr(envs, "make", refuse)
    monkeypatch.setattr(gym, "make", refuse)


def bring_in(tmp_path: Path, form: str) -> str:
    writer, name, keys = SOURCES[form]
    writer(tmp_path / name)
    options = Options(keys=keys, success="last" if form == "lerobot" else None)
    importing.import_dataset(tmp_path / name, "lab/set-v0", options=options, root=tmp_path / "root")
    return "lab/set-v0"


def small(agent: str, dataset: str, **changes: Any) -> RunConfig:
    run = session.preset_run(agent, dataset, "small", offline_steps=40, online_steps=0)
    config = session.with_fields(run.config, [("batch_size", 8), *narrow(run.config)])
    loop = LoopConfig(log_every=20, checkpoint_every=20, updates_per_dispatch=10)
    return dataclasses.replace(run, config=config, loop=loop, **{"holdout": 0.34, **changes})


@pytest.mark.parametrize("form", [*SOURCES])
def test_imported_trains(tmp_path: Path, form: str) -> None:
    """Data of every format are described and trained on, with a curve of held-out action errors and a policy."""
    name = bring_in(tmp_path, form)
    about = datasets.describe(name)
    assert about["episodes"] == 3 and about["env"] is None
    assert session.train(small("bc", name), tmp_path / "run")
    rows = read_rows(tmp_path / "run/episodes.jsonl")
    assert [row["gradient_steps"] for row in rows] == list(range(2, 41, 2))
    assert all(row["score"] == -row["action_error"] and row["return"] is None for row in rows)
    assert all(np.isfinite(row["estimate/actor/loss"]) for row in rows)
    (panel,) = panels([tmp_path / "run"])
    assert panel.curves["bc"].offline.centre[-1] == pytest.approx(rows[-1]["action_error"])
    policy = session.load_policy(tmp_path / "run")
    policy.reset(seed=0)
    seen = next(iter(datasets.files.read_episodes(_storage(name), name))).observations
    first = {key: value[0] for key, value in seen.items()} if isinstance(seen, dict) else seen[0]
    assert datasets.info(name).action_space.contains(policy.act(first))


def _storage(name: str) -> Any:
    folder = datasets.files.locate(name)
    return datasets.files.open_storage(folder, datasets.files.read_metadata(folder))


def test_estimate_is_of_held_out(tmp_path: Path) -> None:
    """The action error is the one of the policy on the held-out rows, worked out by hand, and Q comes with critics."""
    name = bring_in(tmp_path, "robomimic")
    config = small("iql", name)
    assert session.train(config, tmp_path / "run")
    last = read_rows(tmp_path / "run/episodes.jsonl")[-1]
    rest, held = split(session.load_data(config), 0.34)
    assert rest.size + held.size == 16 and held.size in (4, 5, 7)
    _, trainer = session.open_run(tmp_path / "run")
    actions, _ = trainer.agent_of(0).sample_actions(held.arrays["observations"], None, foreign_key(), True)
    assert last["action_error"] == pytest.approx(np.abs(np.asarray(actions) - held.arrays["actions"]).mean(), abs=1e-5)
    assert trainer.data.size == rest.size
    assert any(key.startswith("estimate/") and key.split("/")[-1] == "q" for key in last), last
    trainer.close()


def foreign_key() -> Any:
    import jax

    return jax.random.key(0)


def test_stopped_run_resumes_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run without environment that stops half-way ends where an unbroken one ends."""
    name = bring_in(tmp_path, "d4rl")
    config = small("iql", name)
    assert session.train(config, tmp_path / "whole")
    calls = iter([False] * 3 + [True] * 100)
    with monkeypatch.context() as patch:
        patch.setattr(session.StopFlag, "__call__", lambda self: next(calls))
        assert not session.train(config, tmp_path / "halved")
    assert session.resume(tmp_path / "halved")
    one, two = (read_rows(tmp_path / run / "episodes.jsonl") for run in ("whole", "halved"))
    assert one == two
    with pytest.raises(ConfigError, match="was trained without an environment; to fine-tune, begin another run"):
        session.resume(tmp_path / "halved", online_steps=10)


def test_online_needs_environment(tmp_path: Path) -> None:
    """With online steps, data that name no environment are refused with both ways out; nothing is left behind."""
    name = bring_in(tmp_path, "ogbench")
    monkey = pytest.MonkeyPatch()
    monkey.setattr(envs, "make", lambda source, *_, **__: envs.specification(source))
    with pytest.raises(EnvironmentMismatchError, match="give one with `env`, or train on the data alone"):
        session.train(small("bc", name, online_steps=5), tmp_path / "run")
    monkey.undo()
    with pytest.raises(ConfigError, match="offline_estimate is for runs without an online phase"):
        session.train(small("bc", name, online_steps=5, offline_estimate=True), tmp_path / "run")
    with pytest.raises(ConfigError, match="holdout is 1.0"):
        session.train(small("bc", name, holdout=1.0), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_split_keeps_sources(tmp_path: Path) -> None:
    """Whole episodes are held out, the same ones every time, and each source keeps rows and its weight."""
    for form, key in (("robomimic", "actions"), ("d4rl", "actions")):
        writer, name, _ = SOURCES[form]
        writer(tmp_path / name)
        importing.import_dataset(
            tmp_path / name, f"lab/{form}-v0", options=Options(keys=(f"seen={key}",)), root=tmp_path / "root"
        )
    data = datasets.load(["lab/robomimic-v0", "lab/d4rl-v0"], weights=[3, 1], cache=False)
    rest, held = split(data, 0.34)
    assert held.arrays["ends"].sum() == 2 and rest.arrays["ends"].sum() == 4 and rest.size + held.size == data.size
    assert [source.weight for source in rest.sources] == [0.75, 0.25]
    assert sum(source.size for source in rest.sources) == rest.size and rest.sources[1].start == rest.sources[0].size
    np.testing.assert_array_equal(split(data, 0.34)[1].arrays["actions"], held.arrays["actions"])
    assert split(data, 0.0) == (data, data)
    with pytest.raises(ConfigError, match="holdout is -0.1"):
        split(data, -0.1)
