"""Settings out of range, through every door: the class, JSON, dotted changes, functions and the command line."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest

from o2o import cli
from o2o.agents import AGENTS
from o2o.agents.cql import Conservative
from o2o.agents.sac import SACConfig
from o2o.config import LoopConfig, RunConfig, TaskConfig, from_dict, to_dict, with_fields
from o2o.errors import ConfigError
from o2o.runs import session
from o2o.settings import Count, Settings, checked

RUN: dict[str, Any] = {"agent": "bc", "config": None, "dataset": ("a/b-v0",)}


def parts(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every dataclass of settings inside `config`."""
    yield prefix, config
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(value := getattr(config, field.name)):
            yield from parts(value, f"{prefix}.{field.name}")


def members(kind: Any) -> tuple[Any, ...]:
    return (kind, *get_args(kind))


@pytest.mark.parametrize("agent", AGENTS)
def test_every_field_checked(agent: str) -> None:
    """No numeric setting of any agent takes NaN, a boolean, a text, or a count below zero or beyond 32 bits."""
    found = 0
    for where, part in parts(AGENTS[agent].preset("other", "small").config):
        assert isinstance(part, Settings), where
        for name in (field.name for field in dataclasses.fields(part)):
            kind = get_type_hints(type(part))[name]
            bad: list[Any] = []
            if int in members(kind):
                bad = [-1, 2**31, 10**40, 1.5, True, "x", math.nan]
            elif float in members(kind):
                bad = [math.nan, math.inf, True, "x", 10**400]
            elif bool in members(kind):
                bad = [1, "True", None]
            else:
                bad = [object()]
            for value in bad:
                found += 1
                with pytest.raises(ConfigError, match=rf"^{type(part).__name__}\.{name}.* expected ") as caught:
                    dataclasses.replace(part, **{name: value})
                assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert found > 50


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tau": 5}, "tau is 5; expected above 0, at most 1"),
        ({"actor_lr": -1}, "actor_lr is -1; expected 0 to 1"),
        ({"discount": math.nan}, "discount is nan; expected 0 to 1"),
        ({"actor_hidden_dims": [8, 0]}, "actor_hidden_dims[1] is 0; expected 1 to 65536"),
        ({"log_std_range": (2.0, -5.0)}, "log_std_range is (2.0, -5.0); expected two finite numbers, the lower first"),
        ({"log_std_range": (2.0,)}, "log_std_range is (2.0,); expected 2 values"),
        ({"std_mode": "expp"}, "std_mode is 'expp'; expected exp or scaled or uniform; did you mean 'exp'?"),
        ({"online": {"utd_ratio": 0}}, "online.utd_ratio is 0; expected at least 1"),
        ({"online": 3}, "online is 3; expected an object with the fields of OnlineConfig"),
        ({"target_subset": 5}, "target_subset is 5; expected 1 to num_critics=2, or None"),
        ({"batch_size": True}, "batch_size is True; expected int"),
    ],
)
def test_python_messages(change: dict[str, Any], message: str) -> None:
    """Python's message names the class, the field, the value and what was expected, without a word of options."""
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(SACConfig(), **change)
    assert str(caught.value) == f"SACConfig.{message}"


def test_values_converted() -> None:
    """Whole floats become ints, lists tuples, numpy's numbers Python's, paths texts, dicts dataclasses."""
    config = SACConfig(
        batch_size=1e2,  # type: ignore[arg-type]
        actor_hidden_dims=[8, np.int64(9)],  # type: ignore[arg-type]
        tau=np.float32(0.5),  # type: ignore[arg-type]
        critic_layer_norm=np.bool_(True),  # type: ignore[arg-type]
        log_std_range=[-5, 2],  # type: ignore[arg-type]
        online={"utd_ratio": 3},  # type: ignore[arg-type]
    )
    assert config.batch_size == 100 and type(config.batch_size) is int
    assert config.actor_hidden_dims == (8, 9) and type(config.actor_hidden_dims[1]) is int
    assert (config.tau, config.log_std_range, config.online.utd_ratio) == (0.5, (-5.0, 2.0), 3)
    assert hash(config) == hash(from_dict(SACConfig, to_dict(config))) and config.critic_layer_norm is True
    run = RunConfig(**{**RUN, "dataset": [Path("a") / "b"], "base": Path("runs") / "base", "offline_steps": 1e5})
    assert (run.dataset, run.base, run.offline_steps) == (("a/b",), "runs/base", 100_000)
    assert Conservative(gap_min=-math.inf).gap_min == -math.inf, "no clip at all"


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 2**31},
        {"seed": 2**31 - 1, "seeds": 2},
        {"seeds": 0},
        {"keep_checkpoints": 0},
        {"offline_steps": -5},
        {"weights": [math.nan]},
        {"weights": [-1.0]},
        {"weights": [0.0]},
        {"weights": [0.5, 0.5]},
        {"dataset": ()},
        {"dataset": ("",)},
        {"history": 0},
        {"image_size": 0},
        {"std_floor": 0.0},
        {"base_timeout_s": math.nan},
        {"base_seed_index": -1},
        {"action_range": "spcae"},
        {"task": {"reward_scale": 0}},
        {"task": {"reward_scale": math.nan}},
        {"task": {"reward_bias": -math.inf}},
        {"task": {"normalize_returns": -1}},
        {"loop": {"eval_every": -1}},
        {"loop": {"updates_per_dispatch": 0}},
        {"loop": {"env_processes": -1}},
        {"record": 1},
        {"record": "True"},
    ],
)
def test_run_settings_refused(change: dict[str, Any]) -> None:
    """Python, JSON and dotted changes refuse the same values of a run."""
    (name,) = list(change)[:1]
    for make in (
        lambda: RunConfig(**{**RUN, **change}),
        lambda: from_dict(RunConfig, {**RUN, **change}, "config.json"),
        lambda: with_fields(RunConfig(**RUN), change),
    ):
        with pytest.raises(ConfigError, match=rf"{name}|RunConfig|LoopConfig|TaskConfig") as caught:
            make()
        assert "--" not in str(caught.value)


def test_with_fields_takes_dicts() -> None:
    """Nested dicts change single fields, whether given alone or as pairs; what is no field is named."""
    run = RunConfig(**{**RUN, "config": SACConfig()})
    changed = with_fields(run, {"config": {"online": {"utd_ratio": 2}, "tau": 0.1}, "loop.log_every": 7})
    assert (changed.config.online.utd_ratio, changed.config.tau, changed.loop.log_every) == (2, 0.1, 7)
    assert changed.config.online.random_steps == SACConfig().online.random_steps
    for change, message in (
        ({"config": {"tua": 1}}, "SACConfig has no field 'tua'; did you mean 'tau'"),
        ({"seed.x": 1}, "no group of settings"),
        ({"loop": 3}, "RunConfig.loop is 3; expected an object"),
    ):
        with pytest.raises(ConfigError, match=message):
            with_fields(run, change)


def test_functions_checked() -> None:
    """Functions read their numbers as settings are read."""

    @checked
    def play(episodes: Count = 1, sample: bool = False) -> tuple[int, bool]:
        return episodes, sample

    assert play(1e2) == (100, False)  # type: ignore[arg-type]
    for change, message in (({"episodes": 0}, "episodes is 0; expected at least 1"), ({"sample": 1}, "sample is 1")):
        with pytest.raises(ConfigError, match=message):
            play(**change)
    for call in (session.evaluate_run, session.play_run):
        with pytest.raises(ConfigError, match="seed is -1; expected at least 0"):
            call("runs/absent", *(["x.gif"] if call is session.play_run else []), seed=-1)


def test_user_settings_checked() -> None:
    """The settings of an agent of one's own are read by their annotations too, with nothing added."""

    @dataclasses.dataclass(frozen=True)
    class Mine(SACConfig):
        width: Count = 3
        names: tuple[str, ...] = ()

    assert Mine(names=["a"]).names == ("a",)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^Mine\.width is 0; expected at least 1$"):
        Mine(width=0)


def test_preset_run_arguments(embedded: str) -> None:
    """Unknown arguments suggest; dicts and lists do; the message speaks Python."""
    run = session.preset_run("sac", [embedded], "small", loop={"log_every": 9}, task={"reward_scale": 2.0}, seed=1e1)
    assert (run.loop.log_every, run.loop.eval_every, run.task.reward_scale, run.seed) == (9, 2_500, 2.0, 10)
    assert run.dataset == (embedded,)
    for change, message in (
        ({"sead": 1}, "preset_run has no argument 'sead'; did you mean 'seed'"),
        ({"config": {"tau": 5}}, r"SACConfig\.tau is 5; expected"),
        ({"task": {"reward_scal": 1}}, "TaskConfig has no field 'reward_scal'; did you mean 'reward_scale'"),
    ):
        with pytest.raises(ConfigError, match=message):
            session.preset_run("sac", embedded, "small", **change)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--online-steps -5", "--online-steps is -5; expected at least 0"),
        ("--seed 99999999999999999999", "--seed is 99999999999999999999; expected at most 2147483647"),
        ("--weights nan", "--weights is nan; expected"),
        ("--task.reward-bias -inf", "--task.reward-bias is -inf; expected a finite number"),
        ("--task.reward-scale 0", "--task.reward-scale is 0.0; expected a finite number other than 0"),
        ("--config.actor-lr -1", "--config.actor-lr is -1.0; expected 0 to 1"),
        ("--config.tau 2", "--config.tau is 2.0; expected above 0, at most 1"),
        ("--config.online.utd-ratio 0", "--config.online.utd-ratio is 0; expected at least 1"),
        ("--config.log-std-range 2 -5", "--config.log-std-range is (2.0, -5.0); expected two"),
        ("--keep-checkpoints 0", "--keep-checkpoints is 0; expected at least 1"),
        ("--config.actor-hidden-dims 8 0", "--config.actor-hidden-dims is 0; expected 1 to 65536"),
        ("--config.num-critics 1.5", "--config.num-critics: expected a whole number, such as 10 or 1e5, not '1.5'"),
        ("--offline-steps 1e999999999", "expected a whole number, such as 10 or 1e5"),
        ("--config.target-subset 3", "--config.target-subset is 3; expected 1 to num_critics=2"),
    ],
)
def test_options_refused(
    args: str, message: str, embedded: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command line names the option, in one line, before any folder exists."""
    runs = tmp_path / "runs"
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "sac", "--dataset", embedded, "--preset", "small", *args.split(), "--runs", str(runs)])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and not runs.exists()
    assert message in error and error.count("\n") == 1 and error.startswith("o2o: error: ")


def test_one_syntax(embedded: str) -> None:
    """1e5 is an integer; every boolean takes --x, --no-x and --x True, nested and optional ones too."""
    for args, wanted in (
        (["--record", "--config.actor-layer-norm", "--task.only-successes"], (True, True, True)),
        (["--record", "true", "--config.actor-layer-norm=True", "--task.only-successes", "yes"], (True, True, True)),
        (["--no-record", "--config.no-actor-layer-norm", "--task.no-only-successes"], (False, False, False)),
        (["--no-record", "--no-config.actor-layer-norm", "--no-task.only-successes"], (False, False, False)),
        (
            ["--record", "False", "--config.actor-layer-norm", "0", "--task.only-successes", "FALSE"],
            (False, False, False),
        ),
    ):
        _, run = cli.parse_train("sac", ["--dataset", embedded, "--offline-steps", "1e5", *args])
        assert (run.record, run.config.actor_layer_norm, run.task.only_successes) == wanted, args
        assert run.offline_steps == 100_000


def test_defaults_are_in_range() -> None:
    """What is declared as a default can be used."""
    for make in (LoopConfig, TaskConfig, SACConfig):
        assert from_dict(make, to_dict(make())) == make()
