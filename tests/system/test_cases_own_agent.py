"""An agent of one's own trains, evaluates, resumes, plots and is loaded by the command line and from Python."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from o2o import cli
from o2o.agents import AGENTS, BC, register_agent
from o2o.errors import ConfigError
from o2o.report.plots import panels
from o2o.runs import session

MODULE = '''
from dataclasses import dataclass, replace
from o2o.agents import BC, BCConfig, register_agent
from o2o.settings import Count

@dataclass(frozen=True)
class MineConfig(BCConfig):
    """Settings of mine."""
    extra: Count = 3
    """A number."""

@register_agent("mine")
class Mine(BC):
    """My own cloning."""
    @classmethod
    def preset(cls, family, size="paper"):
        base = BC.preset(family, size)
        return replace(base, config=MineConfig(actor_hidden_dims=(8,), batch_size=8), offline_steps=20, online_steps=0)

not_an_agent = 3
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "my_agents.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_agents", raising=False)
    yield "my_agents"
    AGENTS.pop("mine", None)


def run(*args: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(args)
    return int(ended.value.code or 0)


def test_every_door(module: str, embedded: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`module:Class` goes through train, eval, resume, plot, load and init by file, and keeps its name."""
    args = ["--dataset", embedded, "--loop.eval-episodes", "1", "--runs", str(tmp_path / "runs")]
    assert run("train", "my_agents:Mine", "--help") == 0
    assert "My own cloning." in (text := capsys.readouterr().out) and "--config.extra" in text
    assert run("train", "my_agents:Mine", *args, "--config.extra", "0") == 2
    assert "--config.extra is 0; expected at least 1" in capsys.readouterr().err
    assert run("train", "--agent", "my_agents:Mine", *args, "--name", "a", "--config.extra", "5") == 0
    path = tmp_path / "runs" / "a"
    config = session.load_config(str(path))
    assert config.agent == "my_agents:Mine" and config.config.extra == 5
    for command in (
        ["eval", str(path), "--episodes", "1"],
        ["resume", str(path)],
        ["plot", str(path), "--out", "p.png"],
    ):
        assert run(*command) == 0, command
    assert session.load_policy(str(path)) is not None
    assert list(panels([path])[0].curves) == ["my_agents:Mine"]
    assert session.preset_run("mine", embedded, "small").agent == "my_agents:Mine", "registered, found by any process"
    assert run("train", "my_agents:Mine", *args[:-2], "--runs", str(tmp_path / "again")) == 0
    assert [folder.name.partition("-")[0] for folder in (tmp_path / "again").iterdir()] == ["Mine"]


def test_wrong_agents_refused(module: str, embedded: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What is no agent, no module or taken is one line."""
    for name, message in (
        ("my_agents:not_an_agent", "is no agent: expected a class derived from o2o.types.Agent in module my_agents"),
        ("my_agents:Absent", "is no agent"),
        ("no_such_module:Mine", "'no_such_module' cannot be imported"),
        ("wsrll", "did you mean 'wsrl'?"),
    ):
        assert run("train", name, "--dataset", embedded) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    with pytest.raises(ConfigError, match="agent name 'bc' is taken by o2o.agents.bc:BC"):
        register_agent("bc")(type("Other", (BC,), {}))
    assert register_agent("bc")(BC) is BC
