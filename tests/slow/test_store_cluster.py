"""A sweep on a cluster whose nodes share nothing but a bucket of an S3 server; a node is killed in the middle."""

import time
from pathlib import Path
from typing import Any

import pytest

from o2o.report.scores import read_cells
from o2o.runs.store import Store
from tests.helpers.command_line import run
from tests.helpers.s3 import bucket
from tests.slow.test_cluster import PATIENCE_S, SMALL, SWEEP, begin, cluster

__all__ = ["cluster"]


def test_killed_node_and_bucket(
    embedded: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A cell of a killed node goes on from the bucket's checkpoint, with the numbers of one process.

    Another folder, as on another machine, then gets the results and trains nothing.
    """
    monkeypatch.setenv("O2O_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "three.toml"
    file.write_text(SWEEP.format(dataset=embedded))
    with bucket() as address:
        started: Any = request.getfixturevalue("cluster")  # its nodes know the server
        dying = started.add_node(**SMALL)
        store = Store(f"{address}/tried")
        options = ("--store", store.address, "--where", "ray", "--ray", started.address)
        process = begin(file, tmp_path / "far", *options)
        end = time.monotonic() + PATIENCE_S
        while sum("/checkpoints/" in name for name in store.names("runs/three")) < 2 and process.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.2)
        started.remove_node(dying, allow_graceful=False)
        started.add_node(**SMALL)
        said, _ = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, said
        assert run("sweep", str(file), "--out", str(tmp_path / "near")) == 0
        scores = [(tmp_path / out / "three/scores.csv").read_text() for out in ("near", "far")]
        assert scores[0] == scores[1] and len(scores[0].splitlines()) > 4
        capsys.readouterr()
        assert run("sweep", str(file), "--out", str(tmp_path / "third"), *options) == 0
        assert capsys.readouterr().err.count("finished already") == 3
        assert [cell.seeds for cell in read_cells(tmp_path / "third/three")] == [(i, i) for i in range(3)]
