"""What a run's settings do to its task and its data: successes only, normalised returns, comparable scores."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from o2o import cli, envs
from o2o.agents import AGENTS, WSRL, PPOConfig
from o2o.config import FORMAT, RunConfig, TaskConfig, from_dict, to_dict, with_fields
from o2o.data import datasets
from o2o.data.checks import returns_scale
from o2o.data.datasets import Episode
from o2o.errors import ConfigError, DatasetError
from o2o.runs import session
from o2o.train import checkpoint

Maker = Callable[..., RunConfig]
OBSERVATIONS, ACTIONS = spaces.Box(-np.inf, np.inf, (11,), np.float64), spaces.Box(-1.0, 1.0, (3,), np.float32)


def episode(rewards: list[float], success: list[bool] | None = None, seed: int = 0) -> Episode:
    rng, steps = np.random.default_rng(seed), len(rewards)
    return Episode(
        observations=rng.normal(size=(steps + 1, 11)),
        actions=rng.uniform(-1, 1, (steps, 3)).astype(np.float32),
        rewards=np.asarray(rewards),
        terminations=np.zeros(steps, bool),
        truncations=np.arange(steps) == steps - 1,
        success=None if success is None else np.asarray(success),
    )


@pytest.fixture
def put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "data"))
    monkeypatch.setenv("O2O_CACHE", str(tmp_path / "cache"))

    def write(name: str, episodes: list[Episode], env_id: str | None = None, **metadata: float) -> str:
        datasets.write(
            name,
            episodes,
            observation_space=OBSERVATIONS,
            action_space=ACTIONS,
            metadata=metadata,
            spec=None if env_id is None else gym.spec(env_id),
        )
        return name

    return write


def test_changes_made_together() -> None:
    """Changes are made together, and of those to one field the last counts.

    1,000 steps do not go into the 8 environments of the preset, nor its 2,048 into 3.
    """
    config = with_fields(PPOConfig(), [("online.num_envs", 3), ("clip", 0.1), ("online.rollout_steps", 999)])
    assert (config.online.num_envs, config.online.rollout_steps, config.clip) == (3, 999, 0.1)
    assert with_fields(PPOConfig(), [("online.num_envs", 3), ("online.num_envs", 4)]).online.num_envs == 4
    other = dataclasses.replace(PPOConfig().online, num_envs=2)
    assert with_fields(PPOConfig(), [("online.num_envs", 4), ("online", other)]).online == other
    whole = with_fields(PPOConfig(), [("online", other), ("online.rollout_steps", 10)])
    assert whole.online == dataclasses.replace(other, rollout_steps=10) and with_fields(PPOConfig(), []) == PPOConfig()


def test_only_successes_drops_failures(put: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`only_successes` leaves failed episodes out."""
    flags = [[False, True, False], [False] * 4, [False, False, True, True]]
    name = put("test/door-v0", [episode([0.0] * len(f), f, i) for i, f in enumerate(flags)], "AdroitHandDoor-v1")
    every = session.preset_run("bc", name, "small")
    assert every.task.binary and every.task.only_successes is None
    assert int(session.load_data(every).arrays["ends"].sum()) == 3 + 1  # the last success is an end of its own
    only = dataclasses.replace(every, task=dataclasses.replace(every.task, only_successes=True))
    assert session.task_of(only).only_successes
    kept = session.load_data(only)
    assert kept.size == 2 + 4 and kept.arrays["rewards"].max() > kept.arrays["rewards"].min()
    assert kept.info.episodes == 3, "what the dataset is does not change"
    paper = dataclasses.replace(WSRL.preset("adroit", "small"), only_successes=True)
    with monkeypatch.context() as patch:
        patch.setattr(WSRL, "preset", lambda *_: paper)
        assert session.preset_run("wsrl", name, "small").task.only_successes
        for task in (TaskConfig(binary=False), TaskConfig(only_successes=False)):
            assert not session.preset_run("wsrl", name, "small", task=task).task.only_successes
    failed = put("test/failed-v0", [episode([0.0] * 3, [False] * 3)], "AdroitHandDoor-v1")
    with pytest.raises(DatasetError, match="no episode succeeds"):
        session.load_data(dataclasses.replace(only, dataset=(failed,)))


def test_returns_normalised_alike(put: Callable[..., str]) -> None:
    """Returns are normalised for the dataset and the environment alike."""
    name = put("test/hopper-v0", [episode([1.0, 2.0]), episode([4.0, 1.0, 2.0]), episode([2.0, 3.0])], "Hopper-v5")
    assert returns_scale([name], envs.task_for("Hopper-v5"), 1000.0) == 1000.0 / (7.0 - 3.0)
    run = session.preset_run("iql", name, "small")
    assert run.task.normalize_returns == 1000.0 and run.task.reward_scale is None
    data = session.load_data(run)
    np.testing.assert_allclose(data.arrays["rewards"][:3], [250.0, 500.0, 1000.0])
    env = session.make_env(run, data)
    env.reset(seed=0)
    _, reward, _, _, info = env.step(np.zeros(3, np.float32))
    np.testing.assert_allclose(float(reward), 250.0 * info["raw_reward"], rtol=1e-6)
    assert info["raw_reward"] != 0.0
    env.close()


def test_only_iql_normalises(put: Callable[..., str]) -> None:
    """Only IQL's locomotion preset normalises returns, and a given scale wins."""
    name = put("test/hopper-v0", [episode([1.0]), episode([2.0])], "Hopper-v5")
    for agent in ("bc", "calql", "sac", "rlpd", "wsrl"):
        assert session.preset_run(agent, name, "small").task.normalize_returns is None
    assert session.preset_run("iql", name, "paper").task.normalize_returns == 1000.0
    given = session.preset_run("iql", name, "small", task=TaskConfig(reward_scale=0.1))
    assert session.task_of(given).reward_scale == 0.1
    raw = session.preset_run("iql", name, "small", task=TaskConfig(reward_scale=1.0))
    assert session.load_data(raw).arrays["rewards"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"binary": False},
        {"reward_scale": 2.0},
        {"normalize_returns": 1000.0},
        {"binary": False, "normalize_returns": 10.0, "terminate_on_success": True},
        {"only_successes": False},
        {"binary": None, "reward_scale": None, "achieved_goal": True},
    ],
)
def test_cli_matches_python_run(given: dict[str, Any], put: Callable[..., str]) -> None:
    """The command line and Python make the same run."""
    flags = [[False, True, False], [False] * 4, [False, True]]
    door = put("test/door-v0", [episode([0.1] * len(f), f, i) for i, f in enumerate(flags)], "AdroitHandDoor-v1")
    hopper = put("test/hopper-v0", [episode([1.0]), episode([2.0])], "Hopper-v5")
    args = [f"--task.{key.replace('_', '-')}={value}" for key, value in given.items() if key != "achieved_goal"]
    args += ["--task.achieved-goal=True"] if given.get("achieved_goal") else []
    for agent, name, size in (("wsrl", door, "paper"), ("iql", door, "small"), ("iql", hopper, "paper")):
        _, parsed = cli.parse_train(agent, ["--seed", "3", *args, "--dataset", name, "--preset", size])
        assert parsed == session.preset_run(agent, name, size, task=TaskConfig(**given), seed=3)
        assert all(getattr(parsed.task, key) == value for key, value in given.items() if value is not None)


def test_task_flags_replace_preset_task(put: Callable[..., str]) -> None:
    """Task flags do not mix with what the preset has for another task."""
    flags = [[False, True, False], [False] * 4]
    door = put("test/door-v0", [episode([0.25] * len(f), f, i) for i, f in enumerate(flags)], "AdroitHandDoor-v1")
    assert session.preset_run("wsrl", door).task == TaskConfig(
        binary=True, reward_scale=10.0, reward_bias=5.0, only_successes=True
    )
    _, dense = cli.parse_train("wsrl", ["--dataset", door, "--task.binary", "False"])
    assert dense.task == TaskConfig(binary=False)
    assert session.load_data(dense).arrays["rewards"].tolist() == [0.25] * (3 + 4)


def test_normalised_despite_preset_scale(embedded: str) -> None:
    """Returns are normalised on request where the preset has a scale."""
    _, maze = cli.parse_train("wsrl", ["--dataset", embedded, "--task.normalize-returns", "1000"])
    assert maze.task == TaskConfig(normalize_returns=1000.0)
    assert session.task_of(maze).reward_scale == 1000.0, "the maze's returns are 0 and 1"


def test_help_shows_dataset_defaults(put: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    """The help shows the dataset's own defaults."""
    door = put("test/door-v0", [episode([0.0, 0.0], [False, True])], "AdroitHandDoor-v1")
    for args, reward_scale in ((["--dataset", door], "10.0"), ([], "None"), (["--task.reward-scale", "7"], "7.0")):
        with pytest.raises(SystemExit) as ended:
            cli.parse_train("wsrl", ["--help", *args])
        assert not ended.value.code
        shown = "".join(capsys.readouterr().out.split()).replace("│", "")
        about = shown[shown.index("--task.reward-scale") :]
        assert about[about.index("(default:") :].startswith(f"(default:{reward_scale})")


def test_conflicting_scale_refused(tiny_run: Maker, tmp_path: Path) -> None:
    """A scale that is not the normalised one is refused."""
    run = tiny_run("bc", offline_steps=10, online_steps=0, task=TaskConfig(normalize_returns=100.0, reward_scale=2.0))
    with pytest.raises(ConfigError, match=r"reward_scale is 2, but task.normalize_returns 100 asks for 100: give one"):
        session.train(run, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    again = dataclasses.replace(run, task=TaskConfig(normalize_returns=100.0, reward_scale=100.0))
    assert session.train(again, tmp_path / "again"), "the settings that a run wrote"


def test_equal_returns_have_no_scale(put: Callable[..., str]) -> None:
    """Returns that are all equal have no scale."""
    name = put("test/hopper-v0", [episode([1.0, 2.0]), episode([3.0])], "Hopper-v5")
    with pytest.raises(ConfigError, match="all episodes of test/hopper-v0 have the return 3, so there is no scale"):
        session.load_data(session.preset_run("iql", name, "small"))
    with pytest.raises(ConfigError, match="normalize_returns is 0.0; expected above 0"):
        session.load_data(session.preset_run("iql", name, "small", task=TaskConfig(normalize_returns=0.0)))


def test_scale_kept_with_run(tiny_run: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scale is kept with the run."""
    run = tiny_run("bc", offline_steps=10, online_steps=0, task=TaskConfig(normalize_returns=100.0, reward_bias=0.0))
    scale = session.task_of(run).reward_scale
    assert scale == 100.0, "the maze's returns are 0 and 1"
    assert session.train(run, tmp_path / "run")
    kept = json.loads((tmp_path / "run" / "config.json").read_text())["task"]
    assert (kept["normalize_returns"], kept["reward_scale"]) == (100.0, scale)
    monkeypatch.setattr(session, "returns_scale", None)  # never asked for again
    loaded, trainer = session.open_run(tmp_path / "run")
    assert trainer.data.task.reward_scale == scale and loaded.task.reward_scale == scale
    trainer.close()
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [10]


def test_load_data_checks_agent_settings(tiny_run: Maker) -> None:
    """`load_data` refuses an agent's settings that cannot be."""
    with pytest.raises(ConfigError, match="BCConfig.batch_size is 0; expected at least 1"):
        session.load_data(tiny_run("bc", [("batch_size", 0)]))
    with pytest.raises(ConfigError, match="BCConfig.discount is 1.5; expected 0 to 1"):
        session.load_data(tiny_run("bc", [("discount", 1.5)]))


def test_discount_of_one(tiny_run: Maker) -> None:
    """Only agents that learn from returns need a discount below one."""
    for agent in ("bc", "iql", "sac", "rlpd"):
        data = session.load_data(tiny_run(agent, [("discount", 1.0)]))
        assert data.task.sparse and "mc_returns" not in data.arrays
    assert session.build(tiny_run("iql", [("discount", 1.0)])).offline(10)
    for agent in ("calql", "wsrl", "ppo"):
        assert "mc_returns" in session.load_data(tiny_run(agent)).arrays
        with pytest.raises(ConfigError, match="discount is 1.0: the return of a failed sparse trajectory needs"):
            session.load_data(tiny_run(agent, [("discount", 1.0)]))


def test_scores_normalised_in_own_env(put: Callable[..., str]) -> None:
    """Scores are normalised only in the dataset's own environment."""
    episodes = [episode([1.0, 2.0]), episode([3.0])]
    name = put("test/hopper-v0", episodes, "Hopper-v5", ref_min_score=0.0, ref_max_score=200.0)

    def score(**changes: Any) -> float | None:
        run = session.preset_run("bc", name, "small", **changes)
        small = dataclasses.replace(run.config, actor_hidden_dims=(8,))
        normalized = session.build(dataclasses.replace(run, config=small)).evaluator.normalized
        return None if normalized is None else normalized(50.0)

    assert score() == 25.0
    assert score(env="Hopper-v5") == 25.0
    assert score(env="Hopper-v4") is None


def test_same_environment(put: Callable[..., str]) -> None:
    """Another environment is one of another id, other arguments or another time limit."""
    about = datasets.info(put("test/hopper-v0", [episode([1.0])], "Hopper-v5"))
    assert envs.same_environment("Hopper-v5", about) and not envs.same_environment("Walker2d-v5", about)
    spec = about.env_spec
    assert spec is not None
    longer = dataclasses.replace(about, env_spec=dataclasses.replace(spec, max_episode_steps=2000))
    lighter = dataclasses.replace(about, env_spec=dataclasses.replace(spec, kwargs={"healthy_reward": 0.0}))
    assert not envs.same_environment("Hopper-v5", longer) and not envs.same_environment("Hopper-v5", lighter)
    assert not envs.same_environment("Hopper-v5", dataclasses.replace(about, env_spec=None))


@pytest.mark.parametrize("agent", AGENTS)
def test_every_preset_survives_json(agent: str) -> None:
    """Every preset survives a round trip through JSON."""
    for family in ("pointmaze", "adroit", "locomotion", "other"):
        config = AGENTS[agent].preset(family, "paper").config
        again = from_dict(type(config), json.loads(json.dumps(to_dict(config))))
        assert again == config and hash(again) == hash(config)


RUN: dict[str, Any] = {"agent": "bc", "config": None, "dataset": ["a/b-v0"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": "x"}, "run.seeds is 'x'; expected int"),
        ({"seeds": True}, "run.seeds is True; expected int"),
        ({"seeds": 1.5}, "run.seeds is 1.5; expected int"),
        ({"normalize": 1}, "run.normalize is 1; expected bool"),
        ({"std_floor": "1"}, "run.std_floor is '1'; expected float"),
        ({"dataset": "a/b-v0"}, "run.dataset is 'a/b-v0'; expected a list"),
        ({"weights": [1, "2"]}, "run.weights[1] is '2'; expected float"),
        ({"action_range": "spce"}, "run.action_range is 'spce'; expected space or data; did you mean 'space'?"),
        ({"loop": {"eval_everi": 1}}, "run.loop: LoopConfig has no field 'eval_everi'; did you mean 'eval_every'?"),
        ({"loop": 3}, "run.loop is 3; expected an object with the fields of LoopConfig"),
        ({"loop": {"eval_every": -1}}, "run.loop.eval_every is -1; expected at least 0"),
        ({"loop": {"eval_every": None}}, "run.loop.eval_every is None; expected int"),
        ({"seeeds": 2}, "run: RunConfig has no field 'seeeds'; did you mean 'seeds'?"),
    ],
)
def test_bad_value_names_path(change: dict[str, Any], message: str) -> None:
    """A bad value is an error of one line with its path."""
    assert from_dict(RunConfig, RUN).seeds == 1
    with pytest.raises(ConfigError) as caught:
        from_dict(RunConfig, {**RUN, **change}, "run")
    assert str(caught.value) == message


def test_missing_field_named() -> None:
    """A missing field is named."""
    with pytest.raises(ConfigError, match="^run.agent: this field is missing$"):
        from_dict(RunConfig, {"config": None, "dataset": []}, "run")


@dataclasses.dataclass(frozen=True)
class Gauss:
    kind: Literal["gauss"] = "gauss"
    std: float = 1.0


@dataclasses.dataclass(frozen=True)
class Flow:
    kind: Literal["flow"] = "flow"
    widths: tuple[int, ...] = (8, 8)


@dataclasses.dataclass(frozen=True)
class Narrow:
    width: int = 1


@dataclasses.dataclass(frozen=True)
class Wide:
    width: int = 1
    depth: int = 2


@dataclasses.dataclass(frozen=True)
class Nested:
    policy: Gauss | Flow = Gauss()
    network: Narrow | Wide | None = None
    rule: Literal["never"] | Literal["auto"] = "auto"
    range: tuple[float, float] | None = None


def test_config_unions_told_apart() -> None:
    """Unions of configs are told apart. By the literal `kind`, or by the names of their fields."""
    for config in (
        Nested(),
        Nested(Flow(widths=(3,)), Narrow(5), "never", (0.0, 1.0)),
        Nested(Gauss(std=2.0), Wide(5, 6)),
    ):
        assert from_dict(Nested, to_dict(config)) == config
    for values, message in (
        ({"policy": {"kind": "flwo"}}, "run.policy.kind is 'flwo'; did you mean 'flow'?"),
        ({"policy": {"kind": "flow", "std": 1.0}}, "run.policy: Flow has no field 'std'; there are kind, widths"),
        ({"network": {"depth": 3, "widht": 1}}, "run.network: Wide has no field 'widht'; did you mean 'width'?"),
        ({"network": "wide"}, "run.network is 'wide'; expected one of Narrow, Wide"),
        ({"rule": "ever"}, "run.rule is 'ever'; expected never or auto; did you mean 'never'?"),
        ({"range": [1.0]}, "run.range is [1.0]; expected 2 values"),
    ):
        with pytest.raises(ConfigError) as caught:
            from_dict(Nested, values, "run")
        assert str(caught.value) == message


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "made by o2o of an older version in format 1, but o2o"),
        ({"versions": {"o2o": "0.1.0", "commit": "abc"}}, r"made by o2o 0.1.0 \(abc\) in format 1"),
        ({"format": FORMAT + 1}, f"in format {FORMAT + 1}, .* opens format {FORMAT} only"),
    ],
)
def test_other_run_folder_format(
    values: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run folder of another format is an error of one line."""
    (tmp_path / "config.json").write_text(json.dumps({**RUN, **values}))
    for command in ("resume", "eval"):
        with pytest.raises(SystemExit) as ended:
            cli.main([command, str(tmp_path)])
        error = capsys.readouterr().err
        assert ended.value.code == 2 and error.count("\n") == 1 and re.search(words, error)
