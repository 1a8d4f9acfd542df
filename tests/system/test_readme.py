"""The Python examples of README and docs run as printed (with fewer steps); README's is at most eight lines."""

import contextlib
import dataclasses
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from o2o import envs
from o2o.data import datasets
from o2o.errors import DatasetError
from o2o.runs import session

ROOT = Path(__file__).parents[2]


def example(page: str, word: str) -> str:
    """Return the one Python example of a page that has a word."""
    (found,) = [
        code for code in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL) if word in code
    ]
    return found


BLOCKS = [
    example("README.md", "trainer.offline"),
    example("docs/python.md", "IQL.create"),
    example("docs/export.md", "load_policy"),
    example("docs/robot.md", "teleoperate"),
]


def test_example_works(embedded: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's example works (here with one episode for each evaluation)."""
    preset_run = session.preset_run

    def fewer(*args: Any, **kwargs: Any) -> session.RunConfig:
        run = preset_run(*args, **kwargs)
        return dataclasses.replace(run, loop=dataclasses.replace(run.loop, eval_episodes=1))

    monkeypatch.setattr(session, "preset_run", fewer)
    code = BLOCKS[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 8
    shorter = code.replace("3_000", "30")
    assert shorter.count("(30)") == 2
    scope: dict[str, object] = {}
    exec(compile(shorter, "README.md", "exec"), scope)
    assert re.fullmatch(r"\[[01], [01]\]\n", capsys.readouterr().out), "one episode before, one behind"
    trainer = scope["trainer"]
    assert trainer.counters.offline_steps == 30 and trainer.counters.env_steps == 30  # pyright: ignore


def test_parts_work_alone(embedded: str) -> None:
    """The parts below the example work on their own."""
    assert embedded in BLOCKS[1]
    scope: dict[str, Any] = {}
    exec(compile(BLOCKS[1], "README.md", "exec"), scope)
    assert scope["actions"].shape == (1, 2) and np.all(np.abs(scope["actions"]) <= 1)
    assert set(np.unique(scope["data"].arrays["rewards"])) == {-5.0, 5.0}, "the task's, not the file's 0 and 1"
    assert scope["batch"]["observations"].shape == (1, 256, 6) and np.isfinite(scope["info"]["critic/loss"])


ROBOT = """
import gymnasium
import numpy as np

gymnasium.register("MyArm-v0", "gymnasium.envs.mujoco.reacher_v5:ReacherEnv", max_episode_steps=7)
asked = 0

def teleoperate(observation, rng):
    global asked
    asked += 1
    if asked > {patience}:
        raise {ends}("no words from the arm")
    return 0.1 * np.ones(2, np.float32)
"""


@pytest.mark.parametrize(
    ("patience", "ends", "kept"), [(1000, "", 28), (18, "KeyboardInterrupt", 14), (18, "OSError", 14)]
)
def test_demonstrations_become_dataset(
    patience: int, ends: str, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Demonstrations become a dataset of the robot."""
    (tmp_path / "my_robot.py").write_text(ROBOT.format(patience=patience, ends=ends))
    monkeypatch.syspath_prepend(tmp_path)
    for known, name in ((sys.modules, "my_robot"), (gymnasium.registry, "MyArm-v0")):
        monkeypatch.setitem(known, name, None)  # so that it is forgotten afterwards
        del known[name]
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    shorter = BLOCKS[3].replace("2_000", "25")
    assert "25" in shorter
    with pytest.raises(OSError, match="no words from the arm") if ends == "OSError" else contextlib.nullcontext():
        exec(compile(shorter, "README.md", "exec"), {})
    asked = sys.modules["my_robot"].asked
    with pytest.raises(DatasetError, match="lab/my-arm-v0 exists already"):  # the next day, before the first episode
        exec(compile(shorter, "README.md", "exec"), {})
    assert sys.modules["my_robot"].asked == asked
    data, task = datasets.load("lab/my-arm-v0", cache=False), envs.task_for("my_robot:MyArm-v0")
    assert data.size == kept and data.arrays["ends"].sum() == kept / 7
    env = envs.make("my_robot:MyArm-v0", task, dataset=data.info)
    assert env.reset(seed=0)[0].shape == data.arrays["observations"][0].shape
    env.close()


def test_policy_in_own_loop(
    tiny_run: Callable[..., session.RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trained policy acts in a loop of one's own."""
    monkeypatch.chdir(tmp_path)
    assert session.train(tiny_run("bc", online_steps=0), Path("runs/mine"))
    scope: dict[str, Any] = {}
    exec(compile(BLOCKS[2], "README.md", "exec"), scope)
    assert scope["over"] and np.isfinite(scope["reward"])
    scope["env"].close()
