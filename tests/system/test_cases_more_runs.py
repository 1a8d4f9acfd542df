"""More runs as people have them: hardware of one instance, foreign packages, environments that move away."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

from o2o import envs
from o2o.data import datasets
from o2o.data.task import Task
from o2o.errors import ConfigError, TrustError
from o2o.runs import session
from o2o.runs.session import RunConfig

Maker = Callable[..., RunConfig]


@pytest.fixture
def kind(embedded: str) -> Any:
    """Return the class of the embedded dataset's environment."""
    env = envs.make(datasets.info(embedded))
    found = type(env.unwrapped)
    env.close()
    return found


def test_robot_of_one_instance(kind: Any, tiny_run: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hardware that cannot be opened twice is refused before pre-training; on the dataset alone it is trained."""
    opened, make, close = [], kind.__init__, kind.close

    def one(self: Any, *args: Any, **kwargs: Any) -> None:
        if opened:
            raise OSError("port taken")
        make(self, *args, **kwargs)
        opened.append(self)

    def shut(self: Any) -> None:
        opened.remove(self)
        close(self)

    monkeypatch.setattr(kind, "__init__", one)
    monkeypatch.setattr(kind, "close", shut)
    monkeypatch.setitem(kind.metadata, "replayable", False)
    with pytest.raises(ConfigError, match=r"second object .* beside the first .*port taken.*share the connection"):
        session.train(tiny_run("sac", online_steps=20), tmp_path / "run")
    assert not (tmp_path / "run").exists() and not opened
    assert session.train(tiny_run("bc", offline_steps=5, online_steps=0), tmp_path / "run") and not opened


def test_picture_stays_where_it_was_named(
    rendering: None, kind: Any, tiny_run: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`o2o play --out` writes into the folder of the start, wherever the environment goes."""
    assert session.train(tiny_run("bc", offline_steps=5, online_steps=0), tmp_path / "run")
    reset = kind.reset
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)

    def moving(self: Any, **kwargs: Any) -> Any:
        os.chdir(tmp_path / "elsewhere")
        return reset(self, **kwargs)

    monkeypatch.setattr(kind, "reset", moving)
    session.play_run("run", "play.gif")
    assert (tmp_path / "play.gif").stat().st_size and not list((tmp_path / "elsewhere").iterdir())


def test_foreign_package_named_as_file(tiny_run: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A foreign run whose environment's module is a package beside it, called like a file, runs nothing."""
    assert session.train(tiny_run("bc", offline_steps=5, online_steps=0), tmp_path / "run")
    shutil.move(tmp_path / "run", tmp_path / "foreign")
    config = tmp_path / "foreign" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "env": "foreign_package.py:Theirs-v0"}))
    (package := tmp_path / "foreign" / "foreign_package").mkdir()
    (package / "__init__.py").write_text(f"open({str(tmp_path / 'harm')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path / "foreign")
    for door in (session.open_run, session.load_policy, session.resume):
        with pytest.raises(TrustError, match=r"would run foreign_package\.py:Theirs-v0"):
            door(".")
    assert not (tmp_path / "harm").exists()


def test_own_module_not_found_from_here(tmp_path: Path, embedded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dataset whose environment's module does not lie here is no matter of trust: the module is named."""
    shutil.copytree(datasets.default_root() / embedded, tmp_path / "mine-v0")
    path = tmp_path / "mine-v0" / "data" / "metadata.json"
    about = json.loads(path.read_text())
    spec = {**json.loads(about["env_spec"]), "id": "MineElsewhere-v0", "entry_point": "mine_elsewhere:Arm"}
    path.write_text(json.dumps({**about, "env_spec": json.dumps(spec), "eval_env_spec": None}))
    assert "MineElsewhere-v0" not in gym.registry
    with pytest.raises(ConfigError, match=r"in module mine_elsewhere, which is not found from here: start in"):
        envs.make(datasets.info(tmp_path / "mine-v0"), Task("x"))
