"""A sweep whose runs are kept at an address, from the command line."""

import json
from pathlib import Path

import pytest

from o2o.report.scores import read_cells
from tests.helpers.command_line import run
from tests.system.test_cases_grids import written


def test_sweep_with_store(
    embedded: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another folder, as on another machine, takes the results from the address and trains what is missing."""
    monkeypatch.setenv("O2O_CACHE", str(tmp_path / "cache"))
    far, file = tmp_path / "far", written(tmp_path, embedded, "[0.001]")
    text = Path(file).read_text().replace("seeds = 2", "seeds = 1")
    Path(file).write_text(text)
    assert run("sweep", file, "--store", str(far), "--out", str(tmp_path / "one")) == 0
    (cell,) = (far / "runs/rates").glob("*/")
    assert json.loads((cell / "status.json").read_text())["status"] == "finished"
    assert (cell / "checkpoints/20").is_dir() and not (tmp_path / "one/runs/rates" / cell.name / "checkpoints").exists()
    Path(file).write_text(text.replace("[0.001]", "[0.001, 0.01]"))
    capsys.readouterr()
    assert run("sweep", file, "--store", str(far), "--out", str(tmp_path / "two")) == 0
    said = capsys.readouterr().err
    assert said.count("finished already") == said.count("starting") == 1
    for folder in (far, tmp_path / "two"):
        assert len(read_cells(folder / "rates")) == 2
    assert not [path for path in (tmp_path / "cache").glob("cells/*/*/*") if path.is_dir()], "scratch is gone"
