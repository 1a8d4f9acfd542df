"""Sweeps on Ray: here with a cell that fails, and on a cluster whose node is killed while another one is added."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from o2o.report.jobs import in_turn, plan, run_jobs
from o2o.report.scores import read_cells
from o2o.report.suite import BenchTask, Suite, Variant, load_suite
from o2o.runs import session
from o2o.runs.on_ray import Resources, on_ray
from tests.helpers.command_line import run
from tests.system.test_runs import assert_same_runs

ROOT = Path(__file__).parents[2]
SWEEP = """
agents = ["iql"]
datasets = ["{dataset}"]
seeds = 3
seeds_per_cell = 1
offline_steps = 800
online_steps = 50
eval_every = 50
eval_episodes = 1
[fixed]
config.batch_size = 16
config.actor_hidden_dims = [16, 16]
config.critic_hidden_dims = [16, 16]
config.value_hidden_dims = [16, 16]
config.online.min_rows = 0
loop.updates_per_dispatch = 10
loop.log_every = 10
loop.checkpoint_every = 100
"""
FAILING = """
agents = ["bc"]
datasets = ["{dataset}"]
seeds = 1
offline_steps = 20
eval_episodes = 1
settings.config.actor_lr = [0.001, -1.0]
[fixed]
config.batch_size = 16
config.actor_hidden_dims = [16]
"""
SMALL: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80_000_000}
PATIENCE_S = 240


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Return a cluster of one node with one CPU that soon finds out about dead nodes."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    health = {"initial_delay_ms": 0, "period_ms": 500, "failure_threshold": 3}
    config = {f"health_check_{name}": value for name, value in health.items()}
    made = Cluster(initialize_head=True, head_node_args={**SMALL, "include_dashboard": False, "_system_config": config})
    yield made
    made.shutdown()


def begin(file: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    """Start the command in a process of its own."""
    command = [sys.executable, "-m", "o2o", "sweep", str(file), "--out", str(out), *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def raylet(node: Any) -> int:
    """Return the process id of a node."""
    return node.all_processes["raylet"][0].process.pid


def parent(pid: int) -> int:
    """Return the parent of a process, 0 if it has ended."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return int(stat.read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


class Watch:
    """Notes which process of which node has trained which cell."""

    def __init__(self, runs: Path, process: subprocess.Popen[str]) -> None:
        self.runs, self.process, self.seen = runs, process, dict[tuple[str, int], int]()

    def until(self, reached: Any) -> None:
        """Look until `reached()`, or fail."""
        end = time.monotonic() + PATIENCE_S
        while not reached():
            assert time.monotonic() < end, self.seen
            for path in self.runs.glob("*/status.json"):
                status = json.loads(path.read_text())
                if "pid" in status and (above := parent(status["pid"])):
                    self.seen.setdefault((path.parent.name, status["pid"]), above)
            time.sleep(0.1)

    def cells(self, node: int) -> set[str]:
        """Return the cells that a node has trained."""
        return {cell for (cell, _), above in self.seen.items() if above == node}

    def saved(self, cell: str) -> bool:
        """Whether a cell has a checkpoint."""
        folder = self.runs / cell / "checkpoints"
        return folder.is_dir() and any(entry.name.isdigit() for entry in folder.iterdir())


def test_killed_and_added_nodes(
    cluster: Any, embedded: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cell of a killed node goes on from its checkpoint elsewhere, an added node takes cells, the numbers stay.

    A second call does nothing.
    """
    file = tmp_path / "three.toml"
    file.write_text(SWEEP.format(dataset=embedded))
    dying = cluster.add_node(**SMALL)
    victim, out = raylet(dying), tmp_path / "far"
    command = ("--where", "ray", "--ray", cluster.address)
    process = begin(file, out, *command)
    watch = Watch(out / "runs/three", process)
    watch.until(lambda: any(map(watch.saved, watch.cells(victim))))
    (lost,) = watch.cells(victim)
    begun = (watch.runs / lost / "config.json").stat().st_mtime_ns
    cluster.remove_node(dying, allow_graceful=False)
    added = raylet(cluster.add_node(**SMALL))
    watch.until(lambda: process.poll() is not None)
    assert process.stdout is not None
    said = process.stdout.read()
    assert process.returncode == 0, said
    assert len({pid for cell, pid in watch.seen if cell == lost}) == 2, "it was begun twice"
    assert (watch.runs / lost / "config.json").stat().st_mtime_ns == begun, "the second time it was resumed"
    assert watch.cells(added), "the added node has trained"
    assert [cell.seeds for cell in read_cells(out / "three")] == [(i, i) for i in range(3)]

    assert run("sweep", str(file), "--out", str(tmp_path / "near")) == 0
    scores = [(folder / "three/scores.csv").read_text() for folder in (tmp_path / "near", out)]
    assert scores[0] == scores[1] and len(scores[0].splitlines()) > 4
    for cell in ("0-0", "1-1", "2-2"):
        (one,), (other,) = ((path / "runs/three").glob(f"*seeds{cell}") for path in (tmp_path / "near", out))
        assert_same_runs(one, other, 0)

    assert run("sweep", str(file), "--out", str(out), *command) == 0
    assert capsys.readouterr().err.count("finished already") == 3


def test_ray_of_this_machine(embedded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Ray the cells give the numbers that they give here; a cell that fails spares the others and is not 0."""
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    file = tmp_path / "rates.toml"
    file.write_text(FAILING.format(dataset=embedded))
    suite = load_suite(str(file))
    for out, work in {
        "far": on_ray(None, Resources(cpus=0.5, retries=0), print),
        "near": in_turn(
            lambda cell, path: session.train(session.cell_run(cell, path), path),
            lambda path: session.resume(path),
            print,
        ),
    }.items():
        planned = plan(suite, out=tmp_path / out)
        assert run_jobs(planned, work) == 1, "one cell has a rate that none can have"
        failures = [job.failure.read_text() for job in planned if job.failure.exists()]
        assert len(failures) == 1 and all("actor_lr is -1.0" in text for text in failures)
    far, near = ((tmp_path / out / "rates/scores.csv").read_text() for out in ("far", "near"))
    assert far == near and len(far.splitlines()) == 2


def test_dead_worker(embedded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell whose process dies is begun again as often as asked for, and then is a failed one."""
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)
    Path("dying_arm.py").write_text("import os\nopen('tries', 'a').write('x')\nos._exit(3)\n")
    variant = Variant("dies", "bc", fields=(("env", "dying_arm:Arm-v0"),))
    suite = Suite("s", "", (BenchTask(embedded),), (variant,), seeds=1, offline_steps=10)
    (job,) = plan(suite, out=tmp_path / "out")
    said: list[str] = []
    assert run_jobs([job], on_ray(None, Resources(cpus=0.5, retries=1), said.append), said.append) == 1
    assert Path("tries").read_text() == "xx"
    assert "Ray gave the cell up (WorkerCrashedError" in job.failure.read_text()
    assert len(said) == 1 and "failed: Ray gave" in said[0]
