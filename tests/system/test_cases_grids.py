"""Sweeps and suites from the command line: what they train, print and refuse."""

import json
import sys
import threading
from pathlib import Path

import pytest

from o2o import __version__
from o2o.errors import BusyError
from o2o.report.jobs import plan
from o2o.report.scores import read_cells
from o2o.report.suite import load_suite
from o2o.runs import on_ray, session
from o2o.runs.folder import RunFolder, versions, wait_until_free
from tests.helpers.command_line import run

SWEEP = """
agents = ["bc"]
datasets = ["{dataset}"]
seeds = 2
seeds_per_cell = 1
offline_steps = 20
eval_episodes = 1
settings.config.actor_lr = {rates}
[fixed]
config.batch_size = 16
config.actor_hidden_dims = [16]
loop.updates_per_dispatch = 10
"""


def written(tmp_path: Path, dataset: str, rates: str = "[0.001, 0.01]") -> str:
    path = tmp_path / "rates.toml"
    path.write_text(SWEEP.format(dataset=dataset, rates=rates))
    return str(path)


def test_local_sweep(embedded: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sweep trains each combination and seed once, with its settings, and prints a table sorted by the metric.

    A value that is added later trains that value only.
    """
    out = tmp_path / "out"
    assert run("sweep", written(tmp_path, embedded, "[0.001]"), "--out", str(out)) == 0
    assert capsys.readouterr().err.count("starting") == 2
    assert run("sweep", written(tmp_path, embedded), "--out", str(out), "--json") == 0
    shown = capsys.readouterr()
    assert shown.err.count("finished already") == 2 and shown.err.count("starting") == 2
    lines = json.loads(shown.out)
    assert {line["label"] for line in lines} == {"bc actor_lr=0.001", "bc actor_lr=0.01"}
    assert all(len(line["scores"]) == 2 and line["metric"] == "success" for line in lines)
    assert lines[0]["mean"] >= lines[1]["mean"]
    for config in (json.loads(path.read_text()) for path in (out / "runs/rates").glob("*/config.json")):
        assert config["config"]["batch_size"] == 16 and config["seeds"] == 1 and config["offline_steps"] == 20
    assert [(cell.seeds, cell.method[1]) for cell in read_cells(out / "rates")] == [
        ((seed, seed), f"bc actor_lr={rate}") for rate in ("0.001", "0.01") for seed in (0, 1)
    ]


@pytest.mark.parametrize(
    ("rates", "said"),
    [("[-1.0]", "actor_lr is -1.0; expected"), ("['fast']", "actor_lr is 'fast'; expected float")],
)
def test_bad_values_train_nothing(
    rates: str, said: str, embedded: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A value that the setting cannot have is refused before anything is trained."""
    assert run("sweep", written(tmp_path, embedded, f"[0.1, {rates[1:]}"), "--out", str(tmp_path / "out")) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_bad_places(
    embedded: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An address without Ray, a silent one, an unwritable folder and no Ray at all: a line each and exit code 2."""
    file, out = written(tmp_path, embedded), str(tmp_path / "out")
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert run("sweep", file, "--out", out, "--ray", "127.0.0.1:1") == 2
    assert "--where ray" in capsys.readouterr().err
    assert run("sweep", file, "--out", out, "--ray", "127.0.0.1:1", "--where", "ray") == 2
    assert "nobody answers at the address of Ray, 127.0.0.1:1" in capsys.readouterr().err
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert run("sweep", file, "--out", out, "--where", "ray") == 2
    assert "nobody answers" in capsys.readouterr().err
    assert not Path(out).exists()
    Path(out).write_text("a file")
    assert run("sweep", file, "--out", out) == 2
    assert "give another folder with --out" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "ray", None)
    assert run("sweep", file, "--where", "ray") == 2
    assert "pip install 'o2o[ray]'" in capsys.readouterr().err


def test_node_refuses(embedded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node with another o2o, or without the shared folder, says so; one that is told to stop has the cell retried."""
    here = str(Path.cwd())
    job = plan(load_suite(written(tmp_path, embedded)), out=tmp_path / "out")[0]
    old = on_ray._work(job, {**versions(), "o2o": "0.0.1"}, here)
    assert f"other versions: o2o {__version__} for 0.0.1" in old.error and old.trace.startswith("Traceback")
    blind = on_ray._work(job, versions(), here)
    assert "does not see" in blind.error and str(job.run.parent) in blind.error and not job.run.exists()

    def stopped(config: object, path: Path, quiet: bool) -> bool:
        path.mkdir()
        (path / "status.json").write_text('{"status": "stopped"}')
        return False

    monkeypatch.setattr(session, "train", stopped)
    job.record.parent.mkdir(parents=True)
    job.record.write_text("{}")
    with pytest.raises(on_ray.Preempted):
        on_ray._work(job, versions(), here)


def test_waits_for_dead_nodes_process(embedded: str, tmp_path: Path) -> None:
    """A cell that begins again waits until the process of the dead node has let go of the run, but not for ever."""
    run_folder = RunFolder.create(tmp_path / "run", {})
    with pytest.raises(BusyError, match="trained by another process"):
        wait_until_free(tmp_path / "run", 0.0)
    timer = threading.Timer(0.3, run_folder.close)
    timer.start()
    wait_until_free(tmp_path / "run", 20.0)
    timer.join()
    RunFolder.open(tmp_path / "run").lock().close()
