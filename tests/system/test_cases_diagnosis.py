"""The diagnosis of a run: its numbers are those of evaluations and of a Q that is known, its files are whole."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

import o2o
from o2o.agents import AGENTS, BC
from o2o.data import datasets
from o2o.errors import CheckpointError, ConfigError, DivergenceError
from o2o.runs import session
from o2o.runs.diagnosis import CLIMB, ROWS, judge, spread
from o2o.train.episode import EnvSlot
from tests.helpers.command_line import run as command
from tests.system.test_runs import StopAt, assert_same_runs, train_interrupted

Maker = Callable[..., session.RunConfig]
LIMIT = 20


class Sevens(BC):
    """Cloning that has a Q: 7, whatever is done."""

    def q_value(self, observations: Any, actions: Any) -> Any:
        return jnp.full(actions.shape[:-1], 7.0)


class Slope(Sevens):
    """The same with a Q that rises with the first coordinate of the action."""

    def q_value(self, observations: Any, actions: Any) -> Any:
        return 7.0 + actions[..., 0]


class Broken(Sevens):
    """The same with a Q that is no number."""

    def q_value(self, observations: Any, actions: Any) -> Any:
        return jnp.full(actions.shape[:-1], jnp.nan)


@pytest.fixture
def trained(tiny_run: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return a maker of run folders pre-trained by 10 updates: `trained(agent, **changes)`."""

    def make(agent: Any, **changes: Any) -> Path:
        name = agent if isinstance(agent, str) else f"diagnosed_{agent.__name__}"
        if name != agent:
            monkeypatch.setitem(AGENTS, name, agent)
        fields = changes.pop("fields", ())
        run = tiny_run("bc" if name != agent else agent, fields, offline_steps=10, online_steps=0, episode_limit=LIMIT)
        path = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"
        assert session.train(dataclasses.replace(run, **{"agent": name, **changes}), path)
        return path

    return make


def means(rows: list[dict[str, Any]]) -> tuple[float, float, float]:
    return tuple(float(np.mean([row[key] for row in rows])) for key in ("return", "success", "length"))  # pyright: ignore


def test_policy_as_evaluated(trained: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    """The policy's numbers are those of an evaluation with the same seeds; the files and --json say the same."""
    path = trained("iql", seeds=2)
    found = o2o.diagnose(path, episodes=3, seed_index=1, seed=5)
    for form, deterministic in (("mode", True), ("sample", False)):
        rows = [row for row in session.evaluate_run(path, 3, seed=5, deterministic=deterministic) if row["seed"] == 1]
        assert tuple(found["policy"][form][key] for key in ("return", "success", "length")) == means(rows)
    about = session.load_data(session.load_config(path)).info
    assert about.episode_success is not None
    assert found["policy"]["data"]["success"] == pytest.approx(float(np.mean(about.episode_success)))
    assert set(found["policy"]) == {"data", "mode", "sample", "up", "random"} and found["judged_by"] == "success"
    assert found["q"]["rollouts"]["rows"] == len(spread(3 * LIMIT, ROWS)), "no episode ends before its limit"
    folder = path / "diagnosis"
    assert {file.name for file in folder.iterdir()} == {"README.md", "diagnosis.json", "diagnosis.png"}
    assert json.loads((folder / "diagnosis.json").read_text()) == found
    picture = matplotlib.image.imread(folder / "diagnosis.png")
    assert picture.shape[1] > 3 * picture.shape[0] and picture.std() > 0.05
    page = (folder / "README.md").read_text()
    assert len(page.splitlines()) < 50 and all(sign["says"] in page for sign in found["signs"])
    assert found["recommendation"]["command"] in page and "diagnosis.png" in page
    capsys.readouterr()
    assert command("diagnose", str(path), "--episodes", "3", "--seed-index", "1", "--seed", "5", "--json") == 0
    assert json.loads(capsys.readouterr().out) == found
    assert command("diagnose", str(path), "--episodes", "1") == 0
    text = capsys.readouterr().out
    assert text.startswith(f"# Diagnosis of {path.name}") and str(folder / "README.md") in text


def test_known_q(trained: Callable[..., Path]) -> None:
    """Bias, error and correlation of a Q that is known are those worked out from the dataset; so is its rise."""
    path = trained(Slope)
    found = o2o.diagnose(path, episodes=2)
    config = session.load_config(path)
    data = datasets.load(config.dataset, task=session.task_of(config), discount=config.config.discount)
    returns, rows = np.asarray(data.arrays["mc_returns"], float), spread(data.size, ROWS)
    q = 7.0 + np.asarray(data.arrays["actions"], float)[rows, 0]
    on_data, errors = found["q"]["data"], q - returns[rows]
    assert on_data["bias"] == pytest.approx(errors.mean(), rel=1e-4)
    assert on_data["relative_bias"] == pytest.approx(errors.mean() / returns.std(), rel=1e-4)
    assert on_data["rmse"] == pytest.approx(np.sqrt((errors**2).mean()), rel=1e-4)
    assert on_data["correlation"] == pytest.approx(np.corrcoef(q, returns[rows])[0, 1], abs=1e-4)
    failure = data.task.failure_reward
    assert failure is not None and found["policy"]["sample"]["success"] == 0.0
    assert found["q"]["rollouts"]["return"] == pytest.approx(failure / (1 - config.config.discount), rel=1e-4)
    around = found["actions"]
    assert around["walk_gain"][1] == pytest.approx(CLIMB * np.sqrt(2), rel=1e-3), "two coordinates, one of them counts"
    assert around["better"][0] == pytest.approx(0.5, abs=0.05) and abs(around["mean_gain"][0]) < 1e-3
    assert 0 < around["best_gain"][0] <= 0.02 * np.sqrt(2) + 1e-5
    assert around["policy_above_data"] == pytest.approx(around["q_policy"] - around["q_data"], abs=1e-5)


def test_time_limits_count_as_q_says(trained: Callable[..., Path], dense_maze: str) -> None:
    """In a task without failures a return is cut by a time limit: behind it stands what Q says."""
    path = trained(Sevens, dataset=(dense_maze,))
    found = o2o.diagnose(path, episodes=2)
    config = session.load_config(path)
    data = datasets.load(config.dataset, task=session.task_of(config))
    assert data.task.failure_reward is None
    arrays = {key: np.asarray(data.arrays[key], float) for key in ("rewards", "masks", "ends")}
    returns, value = np.zeros(data.size), 0.0
    for i in reversed(range(data.size)):
        value = arrays["rewards"][i] + config.config.discount * arrays["masks"][i] * (
            7.0 if arrays["ends"][i] else value
        )
        returns[i] = value
    assert found["q"]["data"]["return"] == pytest.approx(returns[spread(data.size, ROWS)].mean(), rel=1e-4)
    assert found["q"]["data"]["correlation"] is None, "a Q of one value tells nothing apart"
    assert found["judged_by"] in ("success", "return") and found["policy"]["up"] is not None


def test_no_q(trained: Callable[..., Path]) -> None:
    """Of an agent without Q it is said what can be said."""
    path = trained("bc")
    found = o2o.diagnose(path, episodes=2)
    assert found["q"] is None and found["actions"] is None and found["dip"] is None
    assert set(found["policy"]) == {"data", "mode", "sample", "random"}
    names = {sign["name"] for sign in found["signs"]}
    assert names == {"below_data", "noise_costs", "brittle", "noise"}
    assert json.loads((path / "diagnosis/diagnosis.json").read_text()) == found
    assert "cannot be said" in (path / "diagnosis/README.md").read_text()


def test_hardware_is_not_moved(trained: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """On hardware only the policy itself plays, not one that is moved away from it."""
    path = trained(Slope)
    monkeypatch.setattr(EnvSlot, "replayable", property(lambda _: False))
    assert set(o2o.diagnose(path, episodes=1)["policy"]) == {"data", "mode", "sample"}


def form(score: float, error: float = 0.05) -> dict[str, Any]:
    return {"score": score, "error": error, "success": score, "return": score, "normalized": None, "length": 100.0}


def numbers(up: float = 0.6, bias: float = 0.0, rise: float = 0.1, data: float = 0.6, mode: float = 0.6) -> Any:
    """Return the numbers of a diagnosis as judged."""
    q = {"relative_bias": bias, "correlation": 0.8}
    return {
        "judged_by": "success", "agent": "wsrl", "starts_wsrl": True, "dataset": ["a/b-v0"], "preset": "small",
        "policy": {"mode": form(mode), "sample": form(mode), "random": form(mode), "up": form(up), "data": form(data)},
        "q": {"scale": 2.0, "rollouts": q, "data": q},
        "actions": {"top_above_data": 2.0 * rise},
        "noise": {"policy_std": 0.1, "entropy": -1.0, "data_std": 0.3, "distance_to_data": 0.2},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "dip", "agent", "keep", "warmup"),
    [
        ({}, False, "wsrl", False, "off"),
        ({"up": 0.0}, True, "residual", True, "td"),
        ({"up": 0.0, "bias": 2.0}, True, "residual", True, "mc"),
        ({"rise": 3.0, "bias": -2.0}, True, "residual", True, "mc"),
        ({"rise": 3.0}, False, "wsrl", False, "off"),
        ({"bias": 2.0}, False, "wsrl", False, "mc"),
        ({"data": 0.9}, False, "wsrl", True, "off"),
        ({"mode": 0.0, "up": 0.0}, None, "rlpd", True, "off"),
    ],
)
def test_judgement(changes: dict[str, float], dip: Any, agent: str, keep: bool, warmup: str) -> None:
    """What is recommended follows from the signs."""
    judged = judge(numbers(**changes), "runs/a")
    advice = judged["recommendation"]
    assert (judged["dip"], advice["agent"], advice["keep_data"]) == (dip, agent, keep)
    assert advice["critic_warmup"] == warmup and (advice["critic_only_updates"] > 0) == (warmup != "off")
    assert advice["reasons"] and 1_000 <= advice["warmup_steps"] <= 20_000
    words = advice["command"].split()
    assert words[:3] == ["o2o", "train", agent] and ("mixed" in words) == (keep and agent == "wsrl")


def test_rare_success_lengthens_warm_up() -> None:
    """A warm-up holds ten successes where it can."""
    often, rare = (judge(numbers(mode=mode, up=mode), "a")["recommendation"]["warmup_steps"] for mode in (0.6, 0.1))
    assert (often, rare) == (2_000, 10_000)


def test_bad_runs_refused(
    trained: Callable[..., Path], tiny_run: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that cannot be diagnosed is one line that says why, and nothing is written."""
    run = tiny_run("bc", offline_steps=10, online_steps=0, offline_estimate=True)
    assert session.train(run, tmp_path / "alone")
    online = tiny_run("iql", offline_steps=10, online_steps=5, episode_limit=LIMIT)
    assert session.train(online, tmp_path / "online")
    with pytest.raises(ConfigError, match="online at step 15"):
        o2o.diagnose(tmp_path / "online")
    assert o2o.diagnose(tmp_path / "online", episodes=1, which=10)["checkpoint"] == 10
    with pytest.raises(ConfigError, match="no seed of index 2"):
        o2o.diagnose(tmp_path / "online", seed_index=2)
    with pytest.raises(ConfigError, match="episodes is 0; expected at least 1"):
        o2o.diagnose(tmp_path / "online", episodes=0)
    with pytest.raises(CheckpointError, match="no checkpoint 7"):
        o2o.diagnose(tmp_path / "online", which=7)
    broken = trained(Broken)
    with pytest.raises(DivergenceError, match="is not finite"):
        o2o.diagnose(broken, episodes=1)
    for path, words in ((tmp_path / "alone", "has no environment"), (tmp_path / "absent", "run folder")):
        capsys.readouterr()
        assert command("diagnose", str(path)) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and words in error
    assert not any((path / "diagnosis").exists() for path in (tmp_path / "alone", broken))


def test_unwritable_folder(trained: Callable[..., Path]) -> None:
    """Where the folder cannot be made, that is one line."""
    path = trained("bc")
    (path / "diagnosis").write_text("a file")
    with pytest.raises(o2o.O2OError, match="diagnosis"):
        o2o.diagnose(path, episodes=1)


def test_options_resume_exactly(tiny_run: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run with a critic-only phase on returns and a rising rate, stopped and resumed, equals one never stopped."""
    fields = [("online.initial_updates", 8), ("critic_warmup", "mc"), ("actor_lr_warmup", 200), ("num_critics", 2)]
    run = tiny_run("rlpd", [*fields, ("online.utd_ratio", 1)], offline_steps=0, online_steps=90, episode_limit=LIMIT)
    run = dataclasses.replace(run, loop=dataclasses.replace(run.loop, eval_every=0, log_every=15))
    assert session.train(run, tmp_path / "whole")
    train_interrupted(run, tmp_path / "parts", monkeypatch, [StopAt("online", 60)])
    assert_same_runs(tmp_path / "whole", tmp_path / "parts", more_than=1)
    rows = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert any(row["phase"] == "online" and row.get("actor/entropy") for row in rows)
