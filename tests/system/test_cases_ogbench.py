"""OGBench's play data: any number of processes makes the same set; a stored set is read as any of its tasks."""

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import jax.numpy as jnp
import numpy as np
import pytest

from o2o import cli, envs
from o2o.data import datasets, files
from o2o.data.task import Part, Task, judge
from o2o.envs import ogbench as made
from o2o.errors import ConfigError, DatasetError
from o2o.rl.windows import chunk_rows

pytest.importorskip("ogbench", reason="OGBench is not installed: its data, rewards and environments go UNTESTED here")
SCENE, STEPS = "ogbench/scene-play", 120
SIZES = {"cube-double-play": (37, 2, 2), "scene-play": (40, 5, 2), "puzzle-3x3-play": (55, 9, 4)}
"""Numbers of an observation, parts of a goal, default task."""


@pytest.fixture(scope="session")
def play_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a root with a small set of the scene: an episode for training, one for validation."""
    root = tmp_path_factory.mktemp("play")
    assert envs.make_dataset(SCENE, root, steps=STEPS, processes=1) == (f"{SCENE}-v0", f"{SCENE}-val-v0")
    return root


@pytest.fixture
def play(play_root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(os.environ, "MINARI_DATASETS_PATH", str(play_root))
    return play_root


def rows(name: str, **options):
    """Return the arrays of a dataset as a run on it would see them."""
    return datasets.load(name, task=envs.run_task(datasets.info(name)), **options).arrays


def states(name: str) -> dict[str, np.ndarray]:
    """Return the simulator's states at the rows of a set of one episode."""
    about = files.read_info(folder := files.locate(name))
    wanted = made.STATES
    (episode,) = files.read_episodes(files.open_storage(folder, about.metadata), about.name, states=wanted)
    return {key: value[:-1] for key, value in episode.states.items()}


def content(folder: Path) -> dict[str, str]:
    """Return what a set's fingerprint is of, by id."""
    return {name: datasets.load(name, root=folder, cache=False).fingerprint for name in datasets.list_datasets(folder)}


def test_set_shape(play):
    """Train and validation sets have whole episodes, cut by the time limit; rows follow each other."""
    for name in (f"{SCENE}-v0", f"{SCENE}-val-v0"):
        found = rows(name)
        assert found["observations"].shape == (STEPS, 40) and found["actions"].shape == (STEPS, 5)
        assert np.array_equal(found["ends"], np.arange(STEPS) == STEPS - 1) and found["masks"].all()
        assert np.array_equal(found["observations"][1:], np.asarray(found["next_observations"])[:-1])
        assert np.abs(found["actions"]).max() <= np.float32(0.99999) and np.abs(found["actions"]).max() > 0.9
        assert datasets.check(name) == []
    assert not np.array_equal(rows(f"{SCENE}-v0")["actions"], rows(f"{SCENE}-val-v0")["actions"])
    about = datasets.info(f"{SCENE}-v0").metadata
    assert about["made_with"] == made.versions() and set(about["made_with"]) == {"ogbench", "mujoco"}
    assert about["recipe"]["episodes"] == 1 and about["recipe"]["seed"] == 0


@pytest.mark.parametrize("scene", SIZES)
def test_reward_is_the_environments(scene, tmp_path):
    """Relabelling equals replaying: the state of a row put into the live environment of a task has the same reward."""
    size, parts, default = SIZES[scene]
    player = made.Player(made.PLAYS[scene])
    episode = player.episode(0, 0, 0, 40)
    assert episode.observations.shape == (41, size)
    rng = np.random.default_rng(0)
    goals = made.goals(made.PLAYS[scene])
    assert list(goals) == ["singletask", *(f"singletask-task{number}" for number in range(1, 6))]
    assert goals["singletask"][1] == goals[f"singletask-task{default}"][1] != goals["singletask-task5"][1]
    for task in ("singletask", "singletask-task5"):
        spec, goal = goals[task]
        assert len(goal) == parts
        env = gym.make(spec, disable_env_checker=True)
        env.reset(seed=0)
        inner = env.unwrapped
        columns = {key: value.astype(np.float64) for key, value in episode.states.items()}
        for part in goal:  # some rows satisfy some of the conditions, the last row all of them
            chosen = rng.random(41) < 0.5
            chosen[-1] = True
            for entry, target in zip(part.entries, part.target, strict=True):
                columns[part.column][chosen, entry] = target + 0.02 * (part.within > 0)
        rewards, reached = judge(goal, columns)
        assert reached[-1] and rewards.min() < -1 and set(rewards) <= set(range(-parts, 1))
        for row in (*range(0, 40, 8), 40):
            buttons = [columns["button_states"][row].astype(int)] if "button_states" in columns else []
            inner.set_state(columns["qpos"][row], columns["qvel"][row], *buttons)
            assert inner.compute_reward() == rewards[row], (task, row)


def test_task_reads_same_rows(play):
    """Tasks share observations and differ in reward; r is 0 exactly where the mask is; sparse changes only r."""
    one, two = rows(f"{SCENE}-singletask-task1"), rows(f"{SCENE}-singletask-task3-v0")
    assert np.array_equal(one["observations"], two["observations"]) and np.array_equal(one["actions"], two["actions"])
    assert np.array_equal(rows(f"{SCENE}-singletask")["rewards"], rows(f"{SCENE}-singletask-task2")["rewards"])
    columns = {rows(f"{SCENE}-singletask-task{number}")["rewards"].tobytes() for number in range(1, 6)}
    assert len(columns) > 1
    for number in range(1, 6):
        dense, sparse = (rows(f"{SCENE}-singletask-task{number}{form}") for form in ("", "-sparse"))
        assert set(dense["rewards"]) <= set(range(-5, 1))
        assert np.array_equal(dense["rewards"] == 0, dense["masks"] == 0)
        assert np.array_equal(dense["masks"], sparse["masks"])
        assert np.array_equal(sparse["rewards"], -dense["masks"])
    wanted = f"{SCENE}-singletask-task1-sparse"
    for name in (wanted, f"{wanted}-v0", play / wanted, f"{play / wanted}-v0"):
        assert datasets.info(name).name == f"{wanted}-v0"
    shutil.copytree(play / f"{SCENE}-v0", play.parent / "scene-play-copied-v0")
    assert datasets.info(play.parent / "scene-play-copied-v0").name == f"{SCENE}-v0"
    assert datasets.info(play.parent / "scene-play-copied-singletask").name == f"{SCENE}-singletask-v0"


def changed(root: Path, into: Path, goal: list) -> Path:
    """Copy a root of datasets, with another goal for the scene's first task."""
    shutil.copytree(root, into)
    path = into / f"{SCENE}-v0/data/metadata.json"
    about = json.loads(path.read_text())
    about["tasks"]["singletask-task1"]["goal"] = goal
    path.write_text(json.dumps(about))
    return into


def test_mask_is_no_boundary(play_root, tmp_path, monkeypatch):
    """A goal inside an episode has mask 0 and does not end it: windows go across, and rewards behind it count."""
    monkeypatch.setitem(os.environ, "MINARI_DATASETS_PATH", str(play_root))
    height = states(f"{SCENE}-v0")["qpos"][:, made.ARM]
    goal = [{"column": "qpos", "entries": [made.ARM], "target": [float(height[50])], "within": 0.0}]
    root = changed(play_root, tmp_path / "sets", goal)
    monkeypatch.setitem(os.environ, "MINARI_DATASETS_PATH", str(root))
    found = rows(f"{SCENE}-singletask-task1", discount=0.9)
    reached = np.flatnonzero(found["masks"] == 0)
    assert 50 in reached and np.array_equal(np.flatnonzero(found["rewards"] == 0), reached)
    assert found["ends"].sum() == 1 and found["ends"][-1]
    row = reached[reached >= 50][0]
    before = int(row) - 3
    assert 0 not in found["masks"][before:row]
    assert found["mc_returns"][row] == 0 and found["mc_returns"][before] == pytest.approx(-1 - 0.9 - 0.81)
    window = {key: np.asarray(value)[before : before + 5][None] for key, value in found.items()}
    window["valid"] = np.ones((1, 5), np.float32)
    chunk = chunk_rows({key: jnp.asarray(value) for key, value in window.items()}, 0.9, pad_terminal=False)
    assert chunk.valid[0] == 1 and chunk.masks[0] == 0
    assert chunk.returns[0] == pytest.approx(float(np.sum(0.9 ** np.arange(5) * window["rewards"][0])))


def test_processes_make_same_set(tmp_path):
    """One process and two make identical sets, and so does a smaller set its part of a larger one."""
    steps, name = 30, "ogbench/cube-single-play"
    play = made.PLAYS["cube-single-play"]
    fingerprints = []
    for processes in (1, 2):
        root = tmp_path / str(processes)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(made, "EPISODE_STEPS", steps)
            made.make_play(name, root, steps=3 * steps, processes=processes)
        fingerprints.append(content(root))
    assert fingerprints[0] == fingerprints[1] and len(fingerprints[0]) == 2
    large, player = datasets.load(f"{name}-v0", root=tmp_path / "2"), made.Player(play)
    second = player.episode(0, 0, 1, steps)
    assert np.array_equal(large.arrays["observations"][steps : 2 * steps], second.observations[:-1])
    assert not np.array_equal(player.episode(1, 0, 1, steps).actions, second.actions)
    assert not any(path.name.startswith(".") for path in (tmp_path / "2/ogbench").iterdir())


def test_kill_resumes(tmp_path):
    """A killed make leaves no set, and the same command makes only the episodes that are missing."""
    command = [sys.executable, "-m", "o2o", "data", "make", SCENE, "--steps", "2000", "--root", str(tmp_path)]
    child = subprocess.Popen([*command, "--processes", "1"], stderr=subprocess.DEVNULL)
    work = tmp_path / "ogbench/.scene-play-v0.making"
    for _ in range(1200):
        if list(work.glob("*.npz")) or child.poll() is not None:
            break
        time.sleep(0.1)
    child.kill()
    child.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in work.glob("0-*.npz")}
    assert kept and datasets.list_datasets(tmp_path) == []
    with pytest.raises(DatasetError, match=r"begun with other settings \(seed 0, not 1\)"):
        envs.make_dataset(SCENE, tmp_path, steps=2000, seed=1, processes=1)
    (work / "0-000001.npz").write_bytes((work / next(iter(kept))).read_bytes())  # stands for those not made yet
    (work / "1-000000.npz").write_bytes((work / next(iter(kept))).read_bytes())
    told = []
    envs.make_dataset(SCENE, tmp_path, lambda done, total: told.append((done, total)), steps=2000, processes=2)
    assert told == [(3000, 3000)] and not work.exists()
    assert datasets.list_datasets(tmp_path) == [f"{SCENE}-v0", f"{SCENE}-val-v0"]
    assert envs.make_dataset(SCENE, tmp_path, told.append, steps=2000) == (f"{SCENE}-v0", f"{SCENE}-val-v0")
    assert len(told) == 1, "what is there is not made again"


def test_no_room(tmp_path, monkeypatch):
    """Too little space on disk is one line before the first episode, and one when it runs out; nothing is lost."""
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000_000))
        with pytest.raises(
            DatasetError, match=r"10 MB free, and making the sets takes about \d{3} MB: free some space"
        ):
            envs.make_dataset(SCENE, tmp_path, processes=1)
    with monkeypatch.context() as patch:
        patch.setattr(made, "write_episode", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(DatasetError, match="No space left on device; free some space, .* give the command again"):
            envs.make_dataset(SCENE, tmp_path, steps=20, processes=1)
    assert datasets.list_datasets(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ogbench/scen-play", "did you mean 'scene-play'"),
        ("ogbench/antmaze", "there are cube-single-play, cube-double-play"),
        ("pointmaze-umase", "did you mean 'pointmaze-umaze'"),
        ("nonsense", "there are pointmaze-umaze, .*ogbench/puzzle-4x4-play"),
    ],
)
def test_unknown_scene(name, text, tmp_path, capsys):
    """An unknown set to make is refused with the nearest, or a list."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["data", "make", name, "--root", str(tmp_path)])
    assert ended.value.code == 2
    with pytest.raises(DatasetError, match=text):
        envs.make_dataset(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_unknown_task(play):
    """An unknown task of a set is refused with the nearest; a set that is not there says how to make it."""
    with pytest.raises(DatasetError, match=r"no task 'singletask-task9'; did you mean 'singletask-task\d'"):
        datasets.info(f"{SCENE}-singletask-task9")
    with pytest.raises(DatasetError, match=r"did you mean 'singletask-task1-sparse'|did you mean 'singletask-task1'"):
        datasets.load(f"{SCENE}-singletask-task1-dense")
    with pytest.raises(DatasetError, match="get it with `o2o data make ogbench/cube-double-play`"):
        datasets.info("ogbench/cube-double-play-singletask-task1")
    with pytest.raises(ConfigError, match="pointmaze-umaze is small and always made whole: leave out steps"):
        envs.make_dataset("pointmaze-umaze", play, steps=10)


def test_other_settings_refused(play):
    """A set that was made with another seed or size is not taken for the one that is asked for."""
    with pytest.raises(DatasetError, match=r"made otherwise \(seed 0, not 3\): delete its folder"):
        envs.make_dataset(SCENE, play, steps=STEPS, seed=3)


def test_version_warning(play_root, tmp_path, monkeypatch, caplog):
    """Data of another MuJoCo give one warning that says what may differ; data of this one give none."""
    shutil.copytree(play_root, tmp_path / "sets")
    monkeypatch.setitem(os.environ, "MINARI_DATASETS_PATH", str(tmp_path / "sets"))
    path = tmp_path / f"sets/{SCENE}-v0/data/metadata.json"
    with caplog.at_level(logging.WARNING, "o2o"):
        rows(f"{SCENE}-singletask")
        assert not caplog.records
        path.write_text(path.read_text().replace(f'"mujoco": "{made.versions()["mujoco"]}"', '"mujoco": "3.0.1"'))
        rows(f"{SCENE}-singletask")
    (record,) = caplog.records
    assert "was made with mujoco 3.0.1 (here " in record.message and "contacts" in record.message


def test_without_ogbench(play, monkeypatch):
    """Without the wheel the data are read all the same; the environment and the making name the extra."""
    about = datasets.info(f"{SCENE}-singletask-task1")
    for name in [name for name in sys.modules if name == "ogbench" or name.startswith("ogbench.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ogbench", None)
    assert len(rows(f"{SCENE}-singletask-task1")["rewards"]) == STEPS
    with pytest.raises(ConfigError, match=r"pip install 'o2o\[ogbench\]'"):
        envs.make(about)
    with pytest.raises(ConfigError, match=r"pip install 'o2o\[ogbench\]'"):
        envs.make_dataset("ogbench/puzzle-3x3-play", play)


def test_live_task(play):
    """The live environment is the task's: its limit, a goal judged on s, where the episode ends with reward 0."""
    for form, least in (("", -5.0), ("-sparse", -1.0)):
        about = datasets.info(f"{SCENE}-singletask-task2{form}")
        env = envs.make(about, envs.run_task(about), dataset=about, evaluation=True, seed=0)
        assert env.spec.max_episode_steps == 750
        env.reset(seed=1)
        inner, rng = env.unwrapped, np.random.default_rng(0)
        for _ in range(3):
            _, reward, terminated, _, info = env.step(rng.uniform(-1, 1, 5))
            assert not terminated and info["success"] is False and least <= reward < 0
        goal = inner.task_infos[1]["goal"]
        qpos, qvel = inner.data.qpos.copy(), np.zeros(inner.model.nv)
        qpos[made.ARM : made.ARM + 3], qpos[-2:] = goal["block_xyzs"][0], (goal["drawer_pos"], goal["window_pos"])
        inner.set_state(qpos, qvel, np.asarray(goal["button_states"]))
        inner.post_step()  # the goal is reached by this step; the next one says so
        assert judge(envs.run_task(about).goal, {"qpos": qpos[None], "button_states": inner._cur_button_states[None]})[
            1
        ]
        _, reward, terminated, truncated, info = env.step(np.zeros(5))
        assert (reward, terminated, truncated, info["success"]) == (0.0, True, False, True)


def test_explicit_env(play):
    """`env` of the same task keeps the data's rewards; that of another task is refused."""
    about = datasets.info(f"{SCENE}-singletask-task1-sparse")
    task = envs.run_task(about, "ogbench:scene-singletask-task1-v0")
    assert task == replace(envs.run_task(about), env_id="ogbench:scene-singletask-task1-v0") and task.binary
    with pytest.raises(ConfigError, match="reward_task_id is 2, 1 in"):
        envs.run_task(about, "ogbench:scene-singletask-task2-v0")
    with pytest.raises(ConfigError, match="binary reward is for environments that report success"):
        envs.run_task(about, binary=True)


def test_task_survives_json(play):
    """What a run keeps of its data holds the goal."""
    data = datasets.load(name := f"{SCENE}-singletask-task1-sparse", task=envs.run_task(datasets.info(name)))
    again = datasets.Dataset.from_json(json.loads(json.dumps(data.to_json())), Path("."))
    assert again.task == data.task and again.task.goal and again.info.env_id == "scene-singletask-task1-v0"


def test_commands_know_tasks(play, capsys):
    """`data list`, `describe` and `check` work on the set and on its tasks."""
    for args in (["list"], ["check", f"{SCENE}-v0"], ["check", f"{SCENE}-singletask-task4"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(["data", *args])
        assert ended.value.code == 0
    assert f"{SCENE}-v0" in (out := capsys.readouterr().out) and out.count(": ok") == 2
    with pytest.raises(SystemExit):
        cli.main(["data", "describe", f"{SCENE}-singletask-task4", "--json"])
    described = json.loads(capsys.readouterr().out)
    masks = rows(f"{SCENE}-singletask-task4")["masks"]
    assert described["goal_rows"] == (masks == 0).sum() == described["tasks"][f"{SCENE}-singletask-task4"]
    assert described["terminated"] == 0, "its episodes go on"
    assert described["env"] == "scene-singletask-task4-v0" and len(described["tasks"]) == 6


def test_names_of_other_sets(tmp_path, monkeypatch):
    """A set without tasks does not answer to longer names."""
    monkeypatch.setitem(os.environ, "MINARI_DATASETS_PATH", str(tmp_path))
    episode = datasets.Episode(np.zeros((2, 1)), np.zeros((1, 1)), np.zeros(1), np.zeros(1, bool), np.ones(1, bool))
    box = gym.spaces.Box(-1, 1, (1,), np.float32)
    datasets.write("mine/arm-v0", [episode], observation_space=box, action_space=box, spec=None)
    with pytest.raises(DatasetError, match="'mine/arm-task-v0' is not under"):
        datasets.info("mine/arm-task-v0")


def test_goal_needs_states(tmp_path):
    """A goal on states that a dataset lacks is one line."""
    episode = datasets.Episode(np.zeros((2, 1)), np.zeros((1, 1)), np.zeros(1), np.zeros(1, bool), np.ones(1, bool))
    box = gym.spaces.Box(-1, 1, (1,), np.float32)
    datasets.write("mine/arm-v0", [episode], observation_space=box, action_space=box, spec=None, root=tmp_path)
    task = Task("mine", goal=(Part("qpos", (0,), (0.0,)),), has_success=True)
    with pytest.raises(DatasetError, match=r"has no states \['qpos'\], by which its task is judged"):
        datasets.load("mine/arm-v0", root=tmp_path, task=task)
