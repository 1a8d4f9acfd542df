"""The picture of the balance coefficient: a map in mazes, else a histogram; one clear line where there is none."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import matplotlib.image
import numpy as np
import pytest

from o2o import cli
from o2o.config import FORMAT, to_dict
from o2o.data.spaces import ObservationSpec
from o2o.data.task import Task
from o2o.errors import ConfigError
from o2o.runs import balance as balance_plot, session


def test_run_map(tiny_run: Callable[..., session.RunConfig], tmp_path: Path, capsys: Any) -> None:
    """The map of a run is drawn, and an unknown member or suffix is refused."""
    session.train(tiny_run("famo2o", offline_steps=10, online_steps=0), tmp_path / "run")
    with pytest.raises(SystemExit) as ended:
        cli.main(["balance", str(tmp_path / "run"), "--out", str(tmp_path / "new" / "balance.png")])
    assert not ended.value.code and "balance.png" in capsys.readouterr().out
    picture = matplotlib.image.imread(tmp_path / "new" / "balance.png")
    assert picture.shape[0] > 500 and picture.std() > 0.05
    with pytest.raises(ConfigError, match="no seed of index 1"):
        balance_plot.plot_balance(tmp_path / "run", tmp_path / "balance.png", seed_index=1)
    with pytest.raises(ConfigError, match="has no known suffix"):
        balance_plot.plot_balance(tmp_path / "run", tmp_path / "balance.txt")


def test_title_coefficients(
    tiny_run: Callable[..., session.RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The title names the coefficients that can be reached."""
    fields = [("released_range", True), ("num_critics", 2), ("conservative.n_actions", 2)]
    run = tiny_run("famo2o_cql", fields, offline_steps=1, online_steps=0)
    assert run.config.balance_range == (0.5, 1.5) and session.train(run, tmp_path / "run")
    titles, save = [], balance_plot.save_picture

    def saved(figure: Any, out: Path) -> None:
        titles.append(figure.get_suptitle())
        save(figure, out)

    monkeypatch.setattr(balance_plot, "save_picture", saved)
    balance_plot.plot_balance(tmp_path / "run", tmp_path / "balance.png")
    assert titles[0].startswith("Balance coefficient in [-0.5, 1.5] over states")


def test_run_without_balance(
    tiny_run: Callable[..., session.RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run without balance is refused in one line."""
    (tmp_path / "config.json").write_text(json.dumps({"format": FORMAT, **to_dict(tiny_run("bc"))}))
    with pytest.raises(SystemExit) as ended:
        cli.main(["balance", str(tmp_path), "--out", str(tmp_path / "balance.png")])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and "agent bc of run" in error and "no balance" in error and error.count("\n") == 1


def test_position_entries() -> None:
    """The position's entries stand where each task's observation has them."""
    box = lambda width: gym.spaces.Box(-1, 1, (width,))  # noqa: E731
    goals: dict[str, gym.Space] = {"observation": box(4), "desired_goal": box(2), "achieved_goal": box(2)}

    def at(family: Any, space: Any, width: int, kept: bool = False) -> list[int] | None:
        spec = ObservationSpec.from_space(space, kept)
        data: Any = SimpleNamespace(task=Task("t", family), observation_spec=spec)
        return balance_plot.position(data, width)

    nested = gym.spaces.Dict(goals)
    assert at("pointmaze", nested, 6) == [2, 3], "behind the goal: entries are in alphabetical order"
    assert at("pointmaze", nested, 12) == [8, 9], "the present one of two observations"
    assert at("antmaze", nested, 8, kept=True) == [0, 1] and at("antmaze", nested, 6) is None
    assert at("antmaze", box(29), 29) == [0, 1] and at("locomotion", box(11), 11) is None


def test_value_histogram(tmp_path: Path) -> None:
    """The histogram is drawn for coefficients that differ and for a single one."""
    betas, values = np.linspace(0.5, 1.5, 200), np.linspace(-3, 3, 200)
    balance_plot.draw_values(betas, values, (0.5, 1.5), "task").savefig(tmp_path / "spread.png")
    balance_plot.draw_values(np.ones(200), values, (1.0, 1.0), "task").savefig(tmp_path / "one.png")
    for name in ("spread", "one"):
        assert matplotlib.image.imread(tmp_path / f"{name}.png").std() > 0.02
