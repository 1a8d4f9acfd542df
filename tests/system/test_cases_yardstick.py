"""The yardstick: what runs on a GPU that is at hand for minutes, seeds side by side, and names that nobody has."""

import dataclasses
import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from o2o import cli, envs
from o2o.data import datasets, files
from o2o.envs.ogbench import PLAYS
from o2o.envs.pointmaze import EMBEDDED
from o2o.errors import DatasetError
from o2o.report import scores
from o2o.report.suite import BenchTask, Suite, Variant
from tests.conftest import narrow

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))  # its scripts import each other by name

import gpu_parts
import throughput

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks/gpu.sh"


def test_names_have_recipes():
    """What a message says can be made is what has a recipe."""
    recipes = [f"{files.EMBEDDED_PREFIX}{name}" for name in EMBEDDED]
    assert set(files.CAN_BE_MADE) == {*recipes, *(f"{files.OGBENCH_PREFIX}{name}" for name in PLAYS)}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ogbench/scene-plai-singletask-task1", "o2o makes no 'ogbench/scene-plai', did you mean 'scene-play'"),
        ("ogbench/scene-singletask-task1-v0", "did you mean 'scene-play'"),
        ("ogbench/xyz-v0", "o2o makes no 'ogbench/xyz', there are cube-single-play"),
        (
            "o2o/embedded/pointmaze-umase-v0",
            "o2o makes no 'o2o/embedded/pointmaze-umase', did you mean 'pointmaze-umaze'",
        ),
        ("o2o/embedded/pointmaze-medium-v0", "get it with `o2o data make pointmaze-medium`"),
        ("ogbench/puzzle-3x3-play-singletask-task2", "get it with `o2o data make ogbench/puzzle-3x3-play`"),
    ],
)
def test_unknown_scene_named(name, text, tmp_path):
    """A dataset's name that o2o cannot make suggests the nearest, not a command that fails."""
    with pytest.raises(DatasetError, match=text):
        datasets.info(name, root=tmp_path)


def test_task_is_not_made(tmp_path):
    """Who asks for the data of a task is told of the set that all tasks share."""
    with pytest.raises(DatasetError, match=r"all its tasks share: `o2o data make ogbench/scene-play`"):
        envs.make_dataset("ogbench/scene-play-singletask-task1", tmp_path)


def test_made_by_other_versions(tmp_path, caplog, monkeypatch):
    """A set that is there is not made again; if other versions made it, that is said. A full disk stops before HDF5."""
    pytest.importorskip("ogbench", reason="OGBench is not installed: making its data goes UNTESTED here")
    from o2o.envs import ogbench as made

    name = "ogbench/cube-single-play"
    usage, free = shutil.disk_usage(tmp_path), []

    def disk_usage(_):
        free.append(0)
        return usage._replace(free=usage.free if len(free) == 1 else 1_000_000)  # full after the episodes

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", disk_usage)
        with pytest.raises(DatasetError, match=r"1 MB free, .* free some space and give the command again"):
            envs.make_dataset(name, tmp_path, steps=20, processes=1)
    assert datasets.list_datasets(tmp_path) == []
    ids = envs.make_dataset(name, tmp_path, steps=20, processes=1)
    path = tmp_path / ids[0] / "data/metadata.json"
    with caplog.at_level(logging.WARNING, "o2o"):
        assert envs.make_dataset(name, tmp_path, steps=20) == ids and not caplog.records
        path.write_text(path.read_text().replace(f'"mujoco": "{made.versions()["mujoco"]}"', '"mujoco": "3.0.1"'))
        assert envs.make_dataset(name, tmp_path, steps=20) == ids
    assert "was made with mujoco 3.0.1 (here " in caplog.records[0].message


def run_script(*args):
    return subprocess.run(["bash", str(SCRIPT), *args], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("args", [["--smoek"], ["--minutes"], ["--minutes", "1.5"], ["--seeds", "0"], ["--out"]])
def test_script_refuses(args):
    """What the script for a GPU does not know ends with code 2 before anything runs."""
    found = run_script(*args)
    assert found.returncode == 2 and found.stdout == "" and "gpu.sh" in found.stderr


def test_packed_versions():
    """All packages that are packed for a machine without a network have a pinned version."""
    names = re.search(r'names="([^"]+)"', SCRIPT.read_text())
    pins = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert names is not None and len(names[1].split()) > 15
    assert {name.lower() for name in names[1].split()} <= pins


def test_cut_data_counts(tmp_path):
    """Of data that are not whole the episodes count that follow each other from the first; validation's do not."""
    work = tmp_path / "ogbench/.scene-play-v0.making"
    work.mkdir(parents=True)
    for name in ("0-000000", "0-000001", "0-000002", "0-000004", "1-000003"):
        (work / f"{name}.npz").touch()
    assert gpu_parts.begun(tmp_path) == 3 and gpu_parts.made(tmp_path) == 0


def test_cells_of_suites():
    """The cells are those of the committed suites; those of a smaller set have no published figure beside them."""
    whole, part = (gpu_parts.suite_of(50_000, whole, False) for whole in (True, False))
    assert (whole.name, part.name) == ("ogbench", "ogbench_part")
    assert whole.published is not None and part.published is None and "SMALLER" in part.description
    committed = throughput_suites()["ogbench"].cells([*gpu_parts.METHODS], [*gpu_parts.TASKS])
    cells = [gpu_parts.cell_of(whole, label, task, 0, 1) for task in gpu_parts.TASKS for label in gpu_parts.METHODS]
    assert {cell.name: cell.settings() for cell in cells} == {cell.name: cell.settings() for cell in committed}
    assert gpu_parts.suite_of(200_000, True, False).offline_steps == 200_000
    order = list(gpu_parts.plan((50_000, 100_000)))
    assert [key[0] for key in order] == [50_000] * 12 + [100_000] * 12 and order[5][2] != order[6][2]


def throughput_suites():
    from o2o.user_code import run_file

    return run_file(ROOT / "benchmarks/suites.py").SUITES


def test_longer_goes_on(embedded, tmp_path):
    """A longer cell that goes on from the shorter one's run has the scores of one from the start; `take` keeps them."""
    from o2o.runs.presets import preset_run

    config = preset_run("ifql", embedded, "small").config
    fields = (("episode_limit", 10), ("config.batch_size", 8), ("loop.updates_per_dispatch", 2), ("loop.eval_envs", 1))
    variant = Variant("ifql", "ifql", tuple(narrow(config)), fields)
    about = {"tasks": (BenchTask(embedded),), "variants": (variant,), "preset": "small", "eval_episodes": 1}
    short = Suite(name="yard", description="", offline_steps=4, offline_eval_every=4, **about)
    long = dataclasses.replace(short, name="yard_long", offline_steps=8)
    cells = [gpu_parts.cell_of(suite, "ifql", embedded, 1, 2) for suite in (short, long)]
    assert gpu_parts.run_cell(short, cells[0], tmp_path / "parts", None) == 0
    assert gpu_parts.run_cell(long, cells[1], tmp_path / "parts", short.name) == 0
    assert gpu_parts.run_cell(long, cells[1], tmp_path / "whole", None) == 0
    parts, whole = ((tmp_path / name / "yard_long/scores.csv").read_text() for name in ("parts", "whole"))
    assert parts == whole and parts.count("\n") == 5, "two seeds, two evaluations"
    run = tmp_path / "parts/runs/yard_long" / cells[1].name
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert first["gradient_steps"] <= 4, "it begins with the shorter run's rows"

    target = tmp_path / "results"
    shutil.copytree(tmp_path / "whole/yard_long", target / "yard_long")
    other = dataclasses.replace(scores.read_cells(target / "yard_long")[0])
    other.cell.update(seed=0, seeds=1)
    rows = [row for row in scores.read_scores(target / "yard_long") if row["seed"] == 1]
    scores.write(target / "yard_long", [other], [{**row, "seed": 0} for row in rows])
    assert gpu_parts.take(tmp_path / "parts", target) == 0 == gpu_parts.take(tmp_path / "parts", target)
    assert [cell.seeds for cell in scores.read_cells(target / "yard_long")] == [(0, 0), (1, 2)]
    assert [row["seed"] for row in scores.read_scores(target / "yard_long")] == [0, 0, 1, 1, 2, 2]


def test_cost_of_seeds():
    """What n seeds cost is told in updates of one seed of the same round."""
    shared = {"device": "here", "agent": "ifql", "jax": "1", "date": "today"}
    rows = [{**shared, "seeds": str(n), "rates": rates} for n, rates in ((1, "4 2 2"), (2, "4 4 2"), (4, "8 4 2"))]
    text = throughput.seeds_text(rows)
    assert "| ifql | 2 [2, 4] | 2.00 [1.00, 2.00] | 2.00 [2.00, 4.00] |" in text
    assert {f"ifql/scene/{n}/offline" for n in throughput.PAY_SEEDS} <= set(throughput.all_cases())
    assert set(throughput.ON_GPU) <= set(throughput.all_cases())


def test_committed_costs():
    """The committed report on seeds side by side is what its rounds say."""
    folder = ROOT / "benchmarks/results/seeds_pay"
    assert throughput.seeds_text(throughput.read_table(folder / "rounds.csv")) == (folder / "README.md").read_text()


@pytest.mark.parametrize("command", [["bench", "run", "ogbench"], ["sweep", str(ROOT / "examples/sweep.py")]])
def test_place_refused(command, tmp_path, capsys):
    """Where cells run is said by the same options to both commands, and a bad value is one line that names its own."""
    for words, said in ((["--cpus", "-1"], "--cpus is -1.0; expected above 0"), (["--ray", "a:1"], "--where is local")):
        with pytest.raises(SystemExit) as ended:
            cli.main([*command, *words, "--out", str(tmp_path)])
        assert ended.value.code == 2 and said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
