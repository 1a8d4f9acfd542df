"""Mixtures of datasets that differ, and datasets without an environment: named in the right words, never refused."""

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

from o2o import envs
from o2o.cli import main
from o2o.data import datasets
from o2o.data.datasets import Episode
from o2o.data.importers.plan import Options
from o2o.data.importers.write import import_dataset
from o2o.data.lerobot_export import to_lerobot
from o2o.errors import ConfigError, DatasetError
from o2o.runs.presets import preset_run
from o2o.runs.session import task_of
from tests.helpers import foreign

T = 6
OBSERVATIONS, ACTIONS = spaces.Box(-10, 10, (3,), np.float32), spaces.Box(-1, 1, (2,), np.float32)


def put(root: Path, name: str, rewards: Any, spec: EnvSpec | None = None, **source: Any) -> None:
    """Write two episodes with these rewards; `source` is what their source says of itself."""
    ends = np.arange(T) == T - 1
    rng = np.random.default_rng(0)
    rows = Episode(
        rng.normal(size=(T + 1, 3)).astype(np.float32),
        rng.uniform(-1, 1, (T, 2)).astype(np.float32),
        np.asarray(rewards, np.float64),
        np.zeros(T, bool),
        ends,
    )
    kinds: Any = {"observation_space": OBSERVATIONS, "action_space": ACTIONS, "spec": spec}
    datasets.write(name, [rows, rows], root=root, metadata={"source": source} if source else None, **kinds)


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        (dict(fps=10), dict(fps=20), "steps per second 10.0 against 20.0"),
        (dict(robot_type="so100"), dict(robot_type="koch"), "robot so100 against koch"),
        (
            {"env_args": {"env_kwargs": {"control_freq": 20}}},
            {"fps": 50},
            "steps per second 20.0 against 50.0",
        ),
        (
            {"env_args": {"env_kwargs": {"controller_configs": {"type": "OSC_POSE"}}}},
            {"env_args": {"env_kwargs": {"controller_configs": {"type": "JOINT_POSITION"}}}},
            "controller {'type': 'OSC_POSE'} against {'type': 'JOINT_POSITION'}",
        ),
        ({"names": {"action": ["x", "y"]}}, {"names": {"action": ["y", "x"]}}, "names of entries"),
        (dict(fps=10), dict(robot_type="koch"), None),
        (dict(fps=10, format="a"), dict(fps=10, format="b"), None),
    ],
)
def test_sources_that_differ_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, ours: Any, theirs: Any, words: str | None
) -> None:
    """Rates, robots, controllers and names of entries that differ between the sets of a mixture are logged."""
    put(tmp_path, "lab/a-v0", np.arange(T), **ours)
    put(tmp_path, "lab/b-v0", np.arange(T), **theirs)
    assert datasets.load(["lab/a-v0", "lab/b-v0"], root=tmp_path, cache=False).size == 4 * T
    if words is None:
        assert "are mixed and differ" not in caplog.text
    else:
        assert "datasets lab/a-v0 and lab/b-v0 are mixed and differ" in caplog.text and words in caplog.text


@pytest.mark.parametrize(
    ("ours", "theirs", "told"),
    [
        ([0, 0, 0, 0, 0, 1], [-1, -1, -1, -1, -1, 0], True),
        ([0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0], False),
        ([0, 0, 0, 0, 0, 1], [0, 1, 2, 3, 4, 4], False),
        ([-1, -1, -1, -1, -1, 0], [1, 1, 2, 3, 4, 4], True),
        (np.linspace(0, 1, T), np.linspace(1, 2, T), False),
    ],
)
def test_reward_conventions_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, ours: Any, theirs: Any, told: bool
) -> None:
    """A set that pays 0 and 1 beside one that pays -1 and 0 is named; subsets and dense rewards are not."""
    put(tmp_path, "lab/a-v0", ours)
    put(tmp_path, "lab/b-v0", theirs)
    datasets.load(["lab/a-v0", "lab/b-v0"], root=tmp_path, cache=False)
    assert ("are mixed and differ: rewards" in caplog.text) == told


def test_second_names_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the first set of a mixture names no environment, that of the second counts, for data, task and preset."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setitem(gym.registry, "Mixed-v0", EnvSpec("Mixed-v0", entry_point="m:E", max_episode_steps=7))
    spec = EnvSpec("Mixed-v0", entry_point="m:E", max_episode_steps=7)
    put(tmp_path, "lab/log-v0", np.arange(T))
    put(tmp_path, "lab/sim-v0", np.arange(T), spec)
    pair = ["lab/log-v0", "lab/sim-v0"]
    about = datasets.load(pair, root=tmp_path, cache=False).info
    assert about.env_id == "Mixed-v0" and about.ids == tuple(pair) and envs.specification(about).max_episode_steps == 7
    assert task_of(preset_run("bc", pair, "small")).name == task_of(preset_run("bc", pair[1], "small")).name
    assert datasets.load(pair[::-1], root=tmp_path, cache=False).info.env_id == "Mixed-v0"


def test_check_without_environment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A sound set without an environment is no fault: a remark in the caller's words, and exit code 0."""
    put(tmp_path, "lab/log-v0", np.arange(T))
    assert datasets.check("lab/log-v0", tmp_path) == []
    assert "names no environment: train on the data alone (`online_steps` 0), or give one with `env`" in caplog.text
    with pytest.raises(SystemExit) as end:
        main(["data", "check", "lab/log-v0", "--root", str(tmp_path)])
    said = capsys.readouterr()
    assert end.value.code == 0 and "lab/log-v0: ok" in said.out
    assert "train on the data alone (--online-steps 0), or give one with --env" in said.err


def test_importers_speak_the_callers_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What an importer says names settings in Python and options on the command line."""
    foreign.write_robomimic(tmp_path / "a.hdf5")
    with pytest.raises(DatasetError, match=r"no column 'speed' for the action.*\(choose with `action`\)"):
        import_dataset(tmp_path / "a.hdf5", "lab/a-v0", options=Options(action="speed"), root=tmp_path)
    with pytest.raises(ConfigError, match="`reward` success needs to know of success"):
        foreign.write_robomimic(tmp_path / "b.hdf5", shaped=True)
        import_dataset(tmp_path / "b.hdf5", "lab/b-v0", options=Options(reward="success"), root=tmp_path)
    command = ["data", "import", str(tmp_path / "a.hdf5"), "lab/a-v0", "--root", str(tmp_path)]
    for more, words in (
        (["--action", "speed"], "(choose with --action)"),
        (["--episode-steps", "3"], "so --episode-steps has no use"),
        (["--keys", "obs/eef@9"], "--keys"),
    ):
        with pytest.raises(SystemExit) as end:
            main([*command, *more])
        err = capsys.readouterr().err
        assert end.value.code == 2 and words in err and "`" not in err
    foreign.write_ogbench(tmp_path / "cube.npz")
    with pytest.raises(SystemExit):
        main(["data", "import", str(tmp_path / "cube.npz"), "--dry-run"])
    out = " ".join(capsys.readouterr().out.split())
    assert "--keys takes them" in out and "`qpos`" in out and "give it with --license" in out


def test_rate_of_robomimic(tmp_path: Path) -> None:
    """robosuite's `control_freq` is the rate of an imported set, so that its export needs none; LeRobot keeps it."""
    pytest.importorskip("pyarrow")
    foreign.write_robomimic(tmp_path / "a.hdf5")
    import_dataset(tmp_path / "a.hdf5", "lab/a-v0", root=tmp_path)
    out = to_lerobot("lab/a-v0", tmp_path / "out", root=tmp_path)
    assert json.loads((out / "meta/info.json").read_text())["fps"] == 20
    put(tmp_path, "lab/none-v0", np.arange(T))
    with pytest.raises(ConfigError, match="does not say its steps per second .*give `fps`"):
        to_lerobot("lab/none-v0", tmp_path / "more", root=tmp_path)
    put(tmp_path, "lab/odd-v0", np.arange(T), fps="twenty", env_args="text")
    with pytest.raises(ConfigError, match="does not say its steps per second"):
        to_lerobot("lab/odd-v0", tmp_path / "more", root=tmp_path)
