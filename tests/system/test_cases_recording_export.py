"""An export that fails leaves the earlier one whole; what a killed one left is swept away."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from o2o.data import datasets
from o2o.data.recorder import EPISODES, HEADER, export
from o2o.data.task import Task
from o2o.errors import O2OError, RunError
from o2o.files import EARLIER
from tests.system.test_recorder import played

ROOT = Path(__file__).resolve().parents[2]
TASK = Task("bench", has_success=True)


def all_of(folder: Path) -> dict[str, bytes]:
    """Return the files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def damages(folder: Path) -> dict[str, dict[str, bytes]]:
    """Return, by name, files of the folder of episodes to put in place of what is there."""
    first = sorted(folder.glob("*.npz"))[-1]
    with np.load(first) as stored:
        arrays = dict(stored)
    header = json.loads((folder / HEADER).read_text())

    def episode(**changes: np.ndarray | None) -> dict[str, bytes]:
        path = folder.parent / "changed.npz"
        np.savez(path, **{key: value for key, value in {**arrays, **changes}.items() if value is not None})  # type: ignore[arg-type]
        content = path.read_bytes()
        path.unlink()
        return {first.name: content}

    def described(**changes: object) -> dict[str, bytes]:
        return {HEADER: json.dumps({**header, **changes}).encode()}

    content = first.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    return {
        "cut short": {first.name: content[: len(content) // 2]},
        "flipped": {first.name: bytes(flipped)},
        "empty": {first.name: b""},
        "no rewards": episode(rewards=None),
        "fewer actions": episode(actions=arrays["actions"][1:]),
        "wide actions": episode(actions=np.zeros((len(arrays["rewards"]), 3))),
        "fewer observations": episode(**{"observations/camera": arrays["observations/camera"][1:]}),
        "no camera": episode(**{"observations/camera": None}),
        "no steps": episode(**{key: value[:0] for key, value in arrays.items() if key != "seed"}),
        "words": episode(rewards=np.asarray(["a"] * len(arrays["rewards"]))),
        "objects": episode(rewards=np.asarray([{}] * len(arrays["rewards"]))),
        "no header": {HEADER: b""},
        "a list for a header": {HEADER: b"[]"},
        "no metadata": described(metadata=None),
        "no space": described(action_space=None),
        "another space": described(observation_space={"type": "Box"}),
        "no spec": described(env_spec="{"),
    }


def test_failed_export_keeps_earlier(tmp_path: Path) -> None:
    """Every damaged input gives one line of ours, and the earlier export stays as it was; a sound one replaces it."""
    played(tmp_path / EPISODES, TASK, 2)
    folder = export(tmp_path)
    before, sound = all_of(tmp_path / "recorded"), all_of(tmp_path / EPISODES)
    for name, damage in damages(tmp_path / EPISODES).items():
        for file, content in damage.items():
            (tmp_path / EPISODES / file).write_bytes(content)
        with pytest.raises(O2OError) as caught:
            export(tmp_path)
        assert "\n" not in str(caught.value), name
        assert all_of(tmp_path / "recorded") == before, name
        for file, content in sound.items():
            (tmp_path / EPISODES / file).write_bytes(content)
    (tmp_path / EPISODES / "notes-of-mine.npz").write_bytes(b"x")  # no episode of ours
    played(tmp_path / EPISODES, TASK, 1, names=False)
    assert export(tmp_path) == folder and datasets.info(folder).episodes == 3
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]


KILLED = """
import os, signal, sys
from pathlib import Path
from o2o.data import files, recorder
event, part, run = sys.argv[1], sys.argv[2], Path(sys.argv[3])

def kill(name, args):
    if name == event and part in str(args[0]):
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(kill)
recorder.export(run)
"""
MOMENTS = {
    "while writing": ("open", "metadata.json"),
    "before the earlier one is moved": ("os.rename", "recorded/"),
    "between the two moves": ("os.rename", "recorded/."),
    "before the earlier one is removed": ("shutil.rmtree", EARLIER),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_export(moment: str, tmp_path: Path) -> None:
    """A kill at any moment of an export loses nothing: the next one sweeps its scratch folders and is whole."""
    played(tmp_path / EPISODES, TASK, 2)
    folder = export(tmp_path)
    command = [sys.executable, "-c", KILLED, *MOMENTS[moment], str(tmp_path)]
    setting = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=setting, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list(folder.parent.iterdir())) > 1, "nothing was left"
    header = (tmp_path / EPISODES / HEADER).read_bytes()
    (tmp_path / EPISODES / HEADER).write_bytes(b"")
    with pytest.raises(RunError):
        export(tmp_path)
    (tmp_path / EPISODES / HEADER).write_bytes(header)
    first = sorted((tmp_path / EPISODES).glob("*.npz"))[0]
    content = first.read_bytes()
    first.write_bytes(b"")
    with pytest.raises(RunError):  # it sweeps, and puts back the earlier one
        export(tmp_path)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert datasets.info(folder).episodes == 2 and datasets.load(folder, cache=False).size == 12
    first.write_bytes(content)
    assert export(tmp_path) == folder and [path.name for path in folder.parent.iterdir()] == [folder.name]
