"""Notebooks: every source runs from top to bottom at toy size, and the committed notebooks are of these sources."""

import json
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from o2o.agents import AGENTS
from tests.conftest import narrow

ROOT = Path(__file__).parents[2]
BUILD = runpy.run_path(str(ROOT / "notebooks/build.py"))
BUILT = sorted(path.stem for path in (ROOT / "notebooks").glob("[0-9]_*.ipynb"))
SOURCES = sorted(path.stem for path in (ROOT / "notebooks").glob("[0-9]_*.py"))


def tiny(agent: str, **fields: Any) -> dict[str, Any]:
    """Return changes that make an agent's preset tiny."""
    config = AGENTS[agent].preset("pointmaze", "small").config
    return {"batch_size": 16, **dict(narrow(config)), "online.min_rows": 0, **fields}


def settings(name: str) -> dict[str, Any]:
    """Return toy values of a notebook's settings."""
    sizes: dict[str, Any] = {"OFFLINE": 20, "ONLINE": 40, "EVERY": 20, "EPISODES": 1, "SEEDS": 2, "STEPS": 20}
    if name.startswith("1"):
        return sizes | {"CHANGES": tiny("wsrl", **{"online.warmup_steps": 20})}
    if name.startswith("2"):
        return sizes | {"CHANGES": {"batch_size": 16, "actor_hidden_dims": (16,), "critic_hidden_dims": (16,)}}
    if name.startswith("3"):
        changes = {agent: tiny(agent) for agent in ("famo2o", "expo", "bc")}
        changes["residual"] = tiny("residual", **{"online.random_steps": 10, "online.initial_updates": 5})
        return sizes | {"CHANGES": changes | {"wsrl": tiny("wsrl", **{"online.warmup_steps": 20})}}
    if name.startswith("4"):
        return sizes | {"ONLINE": 0, "CHANGES": {"notebook_awr": {"hidden_dims": (16,)}, "bc": tiny("bc")}}
    return sizes | {"EPISODES": 12, "FILE": "policy.jax", "CHANGES": {"actor_hidden_dims": (16,), "batch_size": 16}}


@pytest.fixture
def own_agents() -> Iterator[None]:
    """Forget the agents that a notebook registers."""
    before = dict(AGENTS)
    yield
    for name in set(AGENTS) - set(before):
        del AGENTS[name]


@pytest.mark.parametrize("name", SOURCES)
def test_notebook_runs(
    name: str, embedded: str, own_agents: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source runs, without a warning, and draws."""
    monkeypatch.chdir(tmp_path)
    notebook = BUILD["run"]((ROOT / f"notebooks/{name}.py").read_text(), settings(name))
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert any(output["output_type"] == "stream" for output in outputs)


@pytest.mark.parametrize("name", BUILT)
def test_notebook_committed(name: str) -> None:
    """The notebook has the cells of its source, with outputs that are small and name no place of a machine."""
    path = ROOT / f"notebooks/{name}.ipynb"
    cells = json.loads(path.read_text())["cells"]
    source = list(BUILD["cells_of"]((ROOT / f"notebooks/{name}.py").read_text()))
    assert [(cell["cell_type"], cell["source"]) for cell in cells] == source, f"run notebooks/build.py {name}.py"
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    shown = [json.dumps(o) for cell in code for o in cell["outputs"] if "image/png" not in o.get("data", {})]
    assert shown and path.stat().st_size < 300_000
    for word in ("/home/", "/tmp/", "/work/", "/root/", "Warning", "Traceback"):
        assert not any(word in text for text in shown), word


def test_notebooks_are_listed() -> None:
    """There are five, numbered from 1."""
    assert [name[:2] for name in SOURCES] == ["1_", "2_", "3_", "4_", "5_"]
