"""Plots: figures come back, one seed has no interval, one metric and one task per panel; short reprs."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from matplotlib.collections import FillBetweenPolyCollection
from matplotlib.figure import Figure

from o2o.agents import BC, BCConfig
from o2o.report.plots import panels, plot_curves, plot_runs


def write(folder: Path, seeds: int, dataset: str, **more: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"agent": "iql", "seed": 0, "dataset": [dataset]}))
    rows = [
        {"phase": "online", "env_steps": at, "gradient_steps": at, "seed": s, "return": float(at + s), "success": None}
        | more
        for at in (100, 200)
        for s in range(seeds)
    ]
    (folder / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def bands(figure: Figure) -> int:
    return sum(isinstance(item, FillBetweenPolyCollection) for axes in figure.axes for item in axes.collections)


def texts(figure: Figure) -> str:
    return " ".join(text.get_text() for part in (figure, *figure.subfigs) for text in part.texts)


def test_one_seed_no_interval(tmp_path: Path) -> None:
    """A single seed is a line and says n=1; three have a band."""
    one, three = write(tmp_path / "one", 1, "a/b-v0"), write(tmp_path / "three", 3, "a/c-v0")
    alone = plot_runs(str(one))
    assert isinstance(alone, Figure) and bands(alone) == 0 and "no interval" in texts(alone)
    assert alone.legends[0].get_texts()[0].get_text() == "iql (n=1)"
    many = plot_runs([three], str(tmp_path / "p.png"))
    assert bands(many) == 1 and (tmp_path / "p.png").exists()
    assert "over n seeds, 95 % bootstrap interval" in texts(many) and "where n > 1" not in texts(many)
    assert isinstance(plot_curves(panels([three])[0].curves), Figure)


def test_tasks_have_panels(tmp_path: Path) -> None:
    """Runs of two tasks are two rows, each with the metric that its task is judged by."""
    runs = [write(tmp_path / "r", 2, "a/b-v0"), write(tmp_path / "s", 2, "a/c-v0", success=1.0)]
    found = panels(runs)
    assert [(panel.task, panel.metric) for panel in found] == [("a/b-v0", "return"), ("a/c-v0", "success")]
    figure = plot_runs(runs)
    assert len(figure.axes) == 2 and len(figure.subfigs) == 2
    assert [axes.get_ylabel() for axes in figure.axes] == ["return", "success rate"]


def test_agent_repr_is_short() -> None:
    """An agent shows its class and its settings, not its parameters."""
    agent = BC.create(jax.random.key(0), jnp.zeros((1, 3)), jnp.zeros((1, 2)), BCConfig(actor_hidden_dims=(4,)))
    assert repr(agent).startswith("BC(") and "Array" not in repr(agent) and "\n" not in repr(agent)
    assert len(repr(agent)) < 1_000
