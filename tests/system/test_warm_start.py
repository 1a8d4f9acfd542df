"""What `init_from` takes over, what it refuses, and that a run reopened acts as it was trained."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o2o.agents import AGENTS, WSRL
from o2o.agents.wsrl import SOURCES
from o2o.config import LoopConfig
from o2o.errors import CheckpointError, ConfigError
from o2o.runs import session
from o2o.runs.folder import RunFolder, read_config
from o2o.runs.session import RunConfig, TaskConfig
from tests.helpers.contract import Case

Maker = Callable[..., RunConfig]
OFFLINE: dict[str, Any] = {"offline_steps": 10, "online_steps": 0}
LOOP = LoopConfig(eval_every=0, eval_episodes=1, checkpoint_every=1000, updates_per_dispatch=10)
OTHER_CLASSES = [name for name, kind in AGENTS.items() if kind not in (*SOURCES, WSRL)]


@pytest.fixture
def calql(tiny_run: Maker, tmp_path: Path) -> Path:
    """Return the folder of a finished pre-training on the embedded maze."""
    assert session.train(tiny_run("calql", loop=LOOP, **OFFLINE), tmp_path / "calql")
    return tmp_path / "calql"


@pytest.mark.parametrize("name", OTHER_CLASSES)
def test_other_agent_classes_refused(name: str) -> None:
    """Agents of other classes are refused in one line.

    Those derived from IQL or CQL too: their policy is more than the actor.
    """
    agent = jax.eval_shape(Case(name, "offline").make, jax.random.key(0))
    words = f"cannot start from {type(agent).__name__}; expected SAC, RLPD, CQL, CalQL, IQL, BC or WSRL"
    with pytest.raises(ConfigError, match=words):
        WSRL.from_agent(agent, WSRL.preset("other", "small").config)


def test_mismatched_source_run_refused(tiny_run: Maker, tmp_path: Path) -> None:
    """Runs of other agents or sizes are refused before anything is written."""
    assert session.train(tiny_run("flow_bc", [("actor_hidden_dims", (8,))], loop=LOOP, **OFFLINE), tmp_path / "flow")
    wide = TaskConfig(achieved_goal=True)
    assert session.train(tiny_run("bc", task=wide, loop=LOOP, **OFFLINE), tmp_path / "wide")
    for source, error, words in (
        ("flow", ConfigError, "cannot start from FlowBC"),
        (
            "wide",
            CheckpointError,
            r"wide saw observations \(8,\) and took actions \(2,\), this run's dataset has \(6,\)",
        ),
    ):
        run = tiny_run("wsrl", loop=LOOP, init_from=str(tmp_path / source))
        with pytest.raises(error, match=words):
            session.train(run, tmp_path / "run")
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("task", "fields", "words"),
    [
        ({"terminate_on_success": False}, [], r"task.terminate_on_success True \(this run: False\): give --task.term"),
        ({}, [("discount", 0.9)], r"learnt with config.discount 0.99 \(this run: 0.9\): give --config.discount 0.99$"),
        (
            {"reward_scale": 10.0, "reward_bias": 1 / 3},
            [],
            r"reward_bias -5.0 \(this run: 0.333\d+\): give --task.reward-scale 10.0 --task.reward-bias -5.0",
        ),
    ],
)
def test_mismatched_rewards_refused(
    calql: Path, tiny_run: Maker, task: dict[str, Any], fields: Any, words: str
) -> None:
    """Critics of other rewards are refused with the flags that mend it."""
    run = tiny_run("wsrl", fields, loop=LOOP, init_from=str(calql))
    with pytest.raises(CheckpointError, match=words):
        session.build(dataclasses.replace(run, task=dataclasses.replace(run.task, **task)))


def test_equal_rewards_accepted(calql: Path, tiny_run: Maker) -> None:
    """Equal rewards are accepted, also where they were made from other raw ones.

    A maze of -1 and 0 with a bias of 5 has the rewards of one of 0 and 1 with -5.
    """
    run = tiny_run("wsrl", loop=LOOP, init_from=str(calql))
    data = session.load_data(run)
    task = dataclasses.replace(data.task, raw_failure_reward=-1.0, success_reward=0.0)
    with pytest.raises(CheckpointError, match=r"reward_bias 5.0 \(this run: -5.0\)"):
        session.build(run, dataclasses.replace(data, task=task))
    alike = dataclasses.replace(data, task=dataclasses.replace(task, reward_bias=5.0))
    session.build(run, alike).close()


def test_unfinished_source(calql: Path, tiny_run: Maker, caplog: pytest.LogCaptureFixture) -> None:
    """A stopped source is taken as it is with a warning; one whose pretraining is incomplete is refused."""
    run, folder = tiny_run("wsrl", loop=LOOP, init_from=str(calql)), RunFolder.open(calql)
    session.build(run).close()
    assert not caplog.messages
    folder.status("stopped")
    session.build(run).close()
    assert caplog.messages == [f"{calql} is stopped, not finished; taken as it is at step 10"]
    folder.change(offline_steps=20)
    with pytest.raises(CheckpointError, match=r"has made 10 of its 20 gradient steps of .*`o2o resume .*calql`"):
        session.build(run)


def test_resume_ignores_source_changes(
    calql: Path, tiny_run: Maker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A run goes on whatever its source has become.

    What it took is in its own checkpoints; a run from it does not ask about that source either.
    """
    run = tiny_run("wsrl", online_steps=5, loop=LOOP, init_from=str(calql))
    assert session.train(run, tmp_path / "run")
    folder = RunFolder.open(calql)
    folder.status("stopped")
    folder.change(offline_steps=20, config={**read_config(calql)["config"], "discount": 0.9})
    caplog.clear()
    assert session.resume(tmp_path / "run", online_steps=6)
    session.build(dataclasses.replace(run, init_from=str(tmp_path / "run"))).close()
    assert "calql" not in caplog.text
    with pytest.raises(CheckpointError, match="has made 10 of its 20"):
        session.train(run, tmp_path / "another")
    shutil.rmtree(calql)
    assert session.resume(tmp_path / "run", online_steps=7)
    assert RunFolder.open(tmp_path / "run").online


@pytest.mark.parametrize("source", ["bc", "iql"])
def test_reopened_run_samples_unchanged(
    source: str, tiny_run: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reopened run samples as it was trained.

    A source with sigma at its limits, which WSRL's own settings do not have; no update between.
    """
    limits = [("log_std_range", (-4.0, -3.0)), ("actor_layer_norm", True), ("std_mode", "uniform")]
    fits = [("critic_layer_norm", True), ("num_critics", 4), ("shared_output", True), ("squash", True)]
    names = {field.name for field in dataclasses.fields(session.config_class(source))}
    fields = [(name, value) for name, value in limits + fits if name in names]
    assert session.train(tiny_run(source, fields, loop=LOOP, **OFFLINE), tmp_path / "source")
    run = tiny_run("wsrl", online_steps=5, loop=LOOP, init_from=str(tmp_path / "source"))
    run = dataclasses.replace(run, task=session.load_config(tmp_path / "source").task)
    trained = session.build(run)
    trained.begin_online(5, play=False)
    logged = list[dict[str, Any]]()
    monkeypatch.setattr(session, "make_loggers", lambda names, path, config: logged.append(config) or [])
    assert session.train(run, tmp_path / "run")
    assert read_config(tmp_path / "run")["config"] == logged[0]["config"]
    assert logged[0]["config"]["finetune"]["log_std_range"] == [-4.0, -3.0]
    reopened = [session.open_run(tmp_path / name)[1] for name in ("source", "run")]
    observations = jnp.asarray(trained.data.arrays["observations"][:64])
    key = jax.random.key(3)
    drawn = [t.agent_of().sample_actions(observations, None, key)[0] for t in (trained, *reopened)]
    for sample in drawn[1:]:
        np.testing.assert_array_equal(sample, drawn[0])
    std = reopened[1].agent_of().actor(observations).std
    np.testing.assert_allclose(std, np.exp(-3.0), rtol=1e-5)
    assert session.resume(tmp_path / "run", online_steps=6)
