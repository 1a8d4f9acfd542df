"""Checkpoints: bitwise round trips, which ones are kept, and what damage, a full disk or a kill leave behind."""

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from o2o.errors import CheckpointError
from o2o.train import checkpoint

ROOT = Path(__file__).resolve().parents[2]


def arrays(value: float = 1.0, width: int = 3) -> dict[str, Any]:
    """Return pytrees such as a run has: parameters, an optimiser's state, typed keys, integers, images."""
    params = {"kernel": jnp.full((2, width), value) / 3, "bias": jnp.zeros(width)}
    agent = {"params": params, "opt_state": optax.adam(1e-3).init(params), "rng": jax.random.key(int(value))}
    loop = {"rng": jax.random.split(jax.random.key(7), 2), "seen": np.full((2, 4), value, np.float32), "none": None}
    buffer = {"image": np.full((2, 3, 3), 250, np.uint8), "cursor": jnp.asarray(5, jnp.int32), "empty": {}}
    return {"agent": agent, "loop": loop, "buffer": buffer}


def save(folder: Path, step: int, value: float = 1.0, score: float | None = None, keep_last: int = 1) -> dict[str, Any]:
    tree = arrays(value)
    checkpoint.save(folder, step, tree, {"counters": {"env_steps": step}, "value": value}, score, keep_last)
    return tree


def assert_bitwise(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, two in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert one.dtype == two.dtype
        if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, two = jax.random.key_data(one), jax.random.key_data(two)
        assert np.asarray(one).tobytes() == np.asarray(two).tobytes()


def test_round_trip_is_bitwise(tmp_path: Path) -> None:
    saved = save(tmp_path / "c", 12, value=0.1, score=0.5)
    step, state, _ = checkpoint.load_state(tmp_path / "c")
    assert (step, state) == (12, {"counters": {"env_steps": 12}, "value": 0.1})
    loaded = checkpoint.load_arrays(tmp_path / "c", 12, arrays(9.0))
    assert_bitwise(loaded, saved)
    drawn = [jax.random.normal(tree["agent"]["rng"], (3,)) for tree in (loaded, saved)]
    np.testing.assert_array_equal(*drawn)
    only = checkpoint.load_arrays(tmp_path / "c", 12, {"agent": arrays(9.0)["agent"]})
    assert_bitwise(only["agent"], saved["agent"])


def test_last_and_best_kept(tmp_path: Path) -> None:
    """The last checkpoints and the best one are kept."""
    for step, score in [(1, 0.2), (2, 0.9), (3, 0.4), (4, 0.9), (5, 0.1), (6, 0.3), (7, None)]:
        save(tmp_path, step, value=step, score=score, keep_last=2)
    kept = checkpoint.steps(tmp_path)
    best = checkpoint.best_step(tmp_path)
    assert best in (2, 4) and kept == [best, 6, 7]
    assert checkpoint.load_state(tmp_path)[0] == 7
    assert checkpoint.load_state(tmp_path, best)[1]["value"] == best
    assert_bitwise(checkpoint.load_arrays(tmp_path, best, arrays()), arrays(best))


def test_late_score_counts(tmp_path: Path) -> None:
    """A score that comes later decides as well."""
    save(tmp_path, 1, score=0.2)
    save(tmp_path, 2, value=2.0)
    assert checkpoint.best_step(tmp_path) == 1
    checkpoint.add_score(tmp_path, 2, 0.9)
    checkpoint.add_score(tmp_path, 7, 1.0)  # there is none
    assert checkpoint.best_step(tmp_path) == 2 and not (tmp_path / "7").exists()
    save(tmp_path, 3, score=0.4)
    save(tmp_path, 4)
    assert checkpoint.steps(tmp_path) == [2, 4] and checkpoint.best_step(tmp_path) == 2
    assert_bitwise(checkpoint.load_arrays(tmp_path, 2, arrays()), arrays(2.0))
    (tmp_path / "4" / "score.json").mkdir()  # in the way of the file
    with pytest.raises(CheckpointError, match="cannot write the score of checkpoint 4 in .*; the checkpoint is intact"):
        checkpoint.add_score(tmp_path, 4, 0.5)
    assert checkpoint.load_state(tmp_path)[0] == 4
    (tmp_path / "2" / "score.json").write_text("")  # by half, after a power cut
    assert checkpoint.best_step(tmp_path) is None
    save(tmp_path, 5, keep_last=0)
    assert checkpoint.steps(tmp_path) == [5]


def test_only_last_without_scores(tmp_path: Path) -> None:
    """Only the last checkpoints are kept where there are no scores."""
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert checkpoint.steps(tmp_path) == [3] and checkpoint.best_step(tmp_path) is None


def test_existing_step_not_rewritten(tmp_path: Path) -> None:
    """A step that exists is not written again."""
    save(tmp_path, 5, value=1.0)
    save(tmp_path, 5, value=2.0)
    assert checkpoint.load_state(tmp_path, 5)[1]["value"] == 1.0


def test_other_shape_refused(tmp_path: Path) -> None:
    """Another shape is refused by the leaf's name."""
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"agent.*\['bias'\] is \(3,\) float32 there, expected \(5,\) float32"):
        checkpoint.load_arrays(tmp_path, 1, {"agent": arrays(width=5)["agent"]})
    other = arrays()["agent"]
    other["params"]["scale"] = jnp.ones(2)
    with pytest.raises(CheckpointError, match=r"agent\['params'\]\['scale'\] is absent there, expected \(2,\) float32"):
        checkpoint.load_arrays(tmp_path, 1, {"agent": other})
    fewer = {"rng": arrays()["agent"]["rng"]}
    with pytest.raises(CheckpointError, match="expected absent"):
        checkpoint.load_arrays(tmp_path, 1, {"agent": fewer})
    cast = {**arrays()["buffer"], "image": np.zeros((2, 3, 3), np.float32)}
    with pytest.raises(CheckpointError, match=r"\(2, 3, 3\) uint8 there, expected \(2, 3, 3\) float32"):
        checkpoint.load_arrays(tmp_path, 1, {"buffer": cast})
    with pytest.raises(CheckpointError, match="holds no normalizer"):
        checkpoint.load_arrays(tmp_path, 1, {"normalizer": jnp.zeros(3)})


def test_missing_checkpoints(tmp_path: Path) -> None:
    nowhere = tmp_path / "none"
    assert checkpoint.steps(nowhere) == [] and checkpoint.best_step(nowhere) is None
    with pytest.raises(CheckpointError, match="no checkpoint in .*none.*begins it again"):
        checkpoint.load_state(nowhere)
    assert not nowhere.exists()
    save(tmp_path / "c", 1, keep_last=2)
    save(tmp_path / "c", 2, keep_last=2)
    with pytest.raises(CheckpointError, match="no checkpoint 3 in .*; there are 1, 2"):
        checkpoint.load_state(tmp_path / "c", 3)


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_truncated_file(tmp_path: Path) -> None:
    """A truncated file is reported or does not matter."""
    save(tmp_path, 1, value=2.0, keep_last=2)
    saved = save(tmp_path, 2, value=3.0, keep_last=2)
    files = [path for path in sorted((tmp_path / "2").rglob("*")) if path.is_file() and path.stat().st_size]
    refused = 0
    for path in files:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        try:
            loaded = checkpoint.load_arrays(tmp_path, 2, arrays())
        except CheckpointError as error:
            assert "checkpoint 2 in" in str(error) and "\n" not in str(error), error
            refused += 1
        else:
            assert_bitwise(loaded, saved)
        path.write_bytes(content)
    gc.collect()  # orbax leaves coroutines behind where a read fails
    assert refused >= 6, f"{refused} of {len(files)}"
    assert_bitwise(checkpoint.load_arrays(tmp_path, 2, arrays()), saved)


def test_no_space_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lack of space is reported before anything is written."""
    saved = save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=3, f_frsize=10))
        with pytest.raises(CheckpointError, match="cannot save checkpoint 2 .*no space left.*earlier checkpoints are"):
            save(tmp_path, 2)
    assert checkpoint.steps(tmp_path) == [1]
    assert_bitwise(checkpoint.load_arrays(tmp_path, 1, arrays()), saved)


def run(code: str, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run code that knows `folder` in a fresh interpreter."""
    setting = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **env}
    command = [sys.executable, "-c", code, str(folder)]
    return subprocess.run(command, env=setting, cwd=ROOT, capture_output=True, text=True, timeout=180)


FULL_DISK = """
import resource, sys
from pathlib import Path
import numpy as np
from o2o.train import checkpoint
from o2o.errors import CheckpointError
folder, noise = Path(sys.argv[1]), np.random.default_rng(0).random((512, 512)).astype(np.float32)
checkpoint.save(folder, 1, {"agent": noise}, {}, None, 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))  # no file may grow beyond this
try:
    checkpoint.save(folder, 2, {"agent": noise + 1}, {}, None, 1)
except CheckpointError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX resource limits")
def test_failed_write_keeps_earlier(tmp_path: Path) -> None:
    """A write that fails half-way leaves the earlier checkpoint."""
    result = run(FULL_DISK, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("cannot save checkpoint 2") and result.stdout.count("\n") == 1, result.stdout
    assert "earlier checkpoints are intact" in result.stdout
    assert "Traceback" not in result.stderr and sorted(path.name for path in tmp_path.iterdir()) == ["1"]
    assert checkpoint.steps(tmp_path) == [1]
    noise = np.random.default_rng(0).random((512, 512)).astype(np.float32)
    np.testing.assert_array_equal(checkpoint.load_arrays(tmp_path, 1, {"agent": noise})["agent"], noise)


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.system.test_checkpoint import save
folder, event, part = Path(sys.argv[1]), {event!r}, {part!r}
save(folder, 1, value=4.0)

def kill(name, args):
    if name == event and str(folder) in str(args[0]) and str(args[0]).endswith(part):
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(kill)
save(folder, 2, value=5.0)
"""
MOMENTS = {"arrays half written": ("open", "process_0"), "all written, not yet renamed": ("os.rename", "-tmp")}


@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_keeps_earlier(moment: str, tmp_path: Path) -> None:
    """A kill while saving leaves the earlier checkpoint."""
    event, part = MOMENTS[moment]
    result = run(KILLED.format(event=event, part=part), tmp_path)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert any(path.name.startswith("2.") for path in tmp_path.iterdir()), "nothing half-written was left"
    assert checkpoint.steps(tmp_path) == [1]
    assert checkpoint.load_state(tmp_path)[1]["value"] == 4.0
    assert_bitwise(checkpoint.load_arrays(tmp_path, 1, arrays()), arrays(4.0))
    saved = save(tmp_path, 2, value=6.0)  # the next save clears away what was left
    assert_bitwise(checkpoint.load_arrays(tmp_path, 2, arrays()), saved)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2"]


OTHER_DEVICE = """
import sys
from pathlib import Path
import jax
from o2o.train import checkpoint
from tests.system.test_checkpoint import arrays
tree = jax.device_put(arrays(8.0), jax.devices()[1])
checkpoint.save(Path(sys.argv[1]), 1, tree, {}, None, 1)
"""


def test_load_from_other_device(tmp_path: Path) -> None:
    """A checkpoint written on another device loads here."""
    result = run(OTHER_DEVICE, tmp_path, XLA_FLAGS="--xla_force_host_platform_device_count=2")
    assert result.returncode == 0, result.stderr
    assert jax.device_count() == 1
    assert_bitwise(checkpoint.load_arrays(tmp_path, 1, arrays()), arrays(8.0))
