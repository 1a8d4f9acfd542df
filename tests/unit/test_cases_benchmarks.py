"""The scripts in `benchmarks/`: both ends of the supported versions, and settings that every agent takes."""

import sys
import tomllib
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))  # its scripts import each other by name

import versions
from throughput import CHECKOUT, MeasureError, read_table, with_settings

from o2o.agents import AGENTS


def test_lower_bounds_held() -> None:
    """The oldest end holds each dependency at its lower bound, whatever else its line says."""
    found = versions.lower_bounds(["jax>=0.10", "orbax-checkpoint>=0.12,<0.13", "minari[hdf5]>=0.5.4"])
    assert found == ["jax==0.10", "orbax-checkpoint==0.12", "minari==0.5.4"]
    with pytest.raises(MeasureError, match="numpy<3 no lower bound"):
        versions.lower_bounds(["jax>=0.10", "numpy<3"])


def test_outcomes_read() -> None:
    """The last line of pytest gives the numbers of the row."""
    line = "1 failed, 91 passed, 3 skipped, 425 deselected, 2 errors in 266.92s (0:04:26)"
    assert versions.outcomes(line) == {"passed": "91", "failed": "1", "errors": "2", "skipped": "3"}
    assert versions.outcomes("1 error in 0.1s") == {"passed": "0", "failed": "0", "errors": "1", "skipped": "0"}


def test_switched_off_interpreter_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interpreter that does not start, such as a shim of pyenv, is passed over for the next on the PATH."""
    for name, code in (("shim", 127), ("real", 0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "python9").write_text(f"#!/bin/sh\nexit {code}\n")
        (tmp_path / name / "python9").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'shim'}:{tmp_path / 'real'}")
    assert versions.interpreter("python9") == str(tmp_path / "real" / "python9")
    with pytest.raises(MeasureError, match="no python8 on the PATH"):
        versions.interpreter("python8")


def test_committed_result_is_of_these_bounds() -> None:
    """The committed result passed, and its oldest end is the lower bounds that `pyproject.toml` has today."""
    rows = {row["end"]: row for row in read_table(versions.RESULTS / "rows.csv")}
    assert set(rows) == set(versions.ENDS)
    assert all(int(row["passed"]) > 0 and row["failed"] == row["errors"] == "0" for row in rows.values())
    dependencies = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["dependencies"]
    bounds = dict(each.split("==") for each in versions.lower_bounds(dependencies))
    for name in versions.SHOWN:
        assert f"{rows['oldest'][name]}.".startswith(f"{bounds[name]}."), (name, rows["oldest"][name], bounds[name])


PAPER = {name: kind.preset("locomotion", "paper").config for name, kind in AGENTS.items()}


@pytest.mark.parametrize("agent", [name for name, config in PAPER.items() if config.online.replay != "rollout"])
def test_settings_measured_for_every_agent(agent: str) -> None:
    """Every agent with a replay takes the settings of a speed case, those with an agent inside, such as WSRL, too."""
    config = PAPER[agent]
    changed = with_settings(config, batch_size=16, warmup_steps=7, initial_updates=0)
    assert changed.online.warmup_steps == 7 and changed.online.initial_updates == 0
    if hasattr(config, "cql"):
        assert changed.cql.online == config.cql.online
