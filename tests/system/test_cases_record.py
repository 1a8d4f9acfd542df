"""Recording: a policy's episodes, a human's and takeovers, by files that a kill does not harm; success by any name."""

import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import gymnasium as gym
import h5py
import numpy as np
import pytest

from o2o import cli, envs
from o2o.config import LoopConfig, keyword_arguments
from o2o.data import datasets, files
from o2o.data.files import Episode
from o2o.data.recorder import EPISODES
from o2o.envs.devices import Gamepad, Keyboard, Reading
from o2o.errors import BaseFaultError, ConfigError, DatasetError, EnvironmentFaultError
from o2o.runs import session
from o2o.runs.recording import RecordConfig, record
from o2o.train.remote_evaluation import evaluator_of

ROOT = Path(__file__).parents[2]
LIMIT = 8
CODE = '''
import os, time
import gymnasium as gym
import numpy as np

class Arm(gym.Env):
    """It reports `solved` in its last step alone; the arm moves by what is commanded, and by some noise."""
    metadata = {"render_fps": 1000.0, "render_modes": []}
    observation_space = gym.spaces.Dict({
        "achieved_goal": gym.spaces.Box(-99, 99, (1,), np.float64), "arm": gym.spaces.Box(-99, 99, (2,), np.float64)})
    action_space = gym.spaces.Box(np.float32([-2, 0]), np.float32([6, 1]))
    starts, steps = [], 0

    def __init__(self, gain=1.0, reward_type="dense"):
        self.gain, self.reward_type = gain, reward_type

    def see(self):
        return {"achieved_goal": self.x[:1] + 7, "arm": self.x.copy()}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.count = self.np_random.uniform(-1, 1, 2), 0
        Arm.starts.append(float(self.x[0]))
        return self.see(), {}

    def step(self, action):
        time.sleep(float(os.environ.get("ARM_SLEEP", 0)))
        self.count, Arm.steps = self.count + 1, Arm.steps + 1
        self.x = self.x + self.gain * np.asarray(action) + 0.01 * self.np_random.standard_normal(2)
        last = self.count == 8
        return self.see(), float(self.x[0]), False, last, {"solved": bool(self.x[0] > 0)} if last else {}

gym.register("Arm-v0", entry_point="bench_arm:Arm", max_episode_steps=100)

gym.register("Free-v0", entry_point=lambda **kwargs: Arm(**kwargs))

class Noisy:
    """Its actions come from the seed of the episode."""
    def reset(self, seed):
        self.rng = np.random.default_rng(seed)
    def act(self, seen):
        assert set(seen) == {"achieved_goal", "arm"}
        return self.rng.uniform([-2, 0], [6, 1])

class Chunks:
    """Plans three steps; the first entry counts the plans."""
    plans = 0
    def act(self, seen):
        Chunks.plans += 1
        return np.tile(np.float32([Chunks.plans, 0.5]), (3, 1))

def diverged(seen):
    return np.float32([np.nan, 0])
'''


class Script:
    """A device that says what it is told, step by step, and nothing afterwards."""

    def __init__(self, *readings: Reading) -> None:
        self.rest, self.closed = list(readings), False

    def read(self) -> Reading:
        return self.rest.pop(0) if self.rest else Reading()

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return the module of an environment, in the working folder; datasets go to `tmp_path`."""
    (tmp_path / "bench_arm.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setenv("O2O_CACHE", str(tmp_path / "cache"))
    yield importlib.import_module("bench_arm")
    del sys.modules["bench_arm"]
    for name in ("Arm-v0", "Free-v0"):
        gym.registry.pop(name, None)


def config(policy: str = "bench_arm:Noisy", **changes: Any) -> RecordConfig:
    return RecordConfig("bench_arm:Arm-v0", policy, **{"success_key": "solved", **changes})


def episodes(folder: Path | None) -> list[Episode]:
    assert folder is not None
    about = files.read_info(folder / "data")
    return list(files.read_episodes(files.open_storage(folder / "data", about.metadata), about.name))


def same(ours: list[Episode], theirs: list[Episode]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a.observations["arm"], b.observations["arm"])
        np.testing.assert_array_equal(a.actions, b.actions)
        np.testing.assert_array_equal(a.rewards, b.rewards)


def on_command_line(*args: str) -> Any:
    with pytest.raises(SystemExit) as ended:
        cli.main(args)
    return ended.value.code


def test_killed_record_goes_on(bench: Any, tmp_path: Path) -> None:
    """A kill -9 loses the running episode alone; the same command goes on to what was recorded without a kill."""
    command = ["record", "lab/arm-v0", "--env", "bench_arm:Arm-v0", "--policy", "bench_arm:Noisy", "--episodes", "9"]
    command += ["--success-key", "solved"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ARM_SLEEP": "0.02"}
    process = subprocess.Popen([sys.executable, "-m", "o2o", *command], env=environment, cwd=tmp_path)
    kept = tmp_path / "lab" / ".arm-v0.recording" / EPISODES
    began = time.monotonic()
    while process.poll() is None and len(list(kept.glob("[0-9]*.npz"))) < 3 and time.monotonic() < began + 100:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    there = {path.name: path.read_bytes() for path in kept.glob("[0-9]*.npz")}
    assert 3 <= len(there) < 9 and not (tmp_path / "lab" / "arm-v0").exists()
    before = bench.Arm.steps
    assert on_command_line(*command) == 0
    assert bench.Arm.steps - before == LIMIT * (9 - len(there))  # nothing is played twice
    whole = record(config(), "lab/whole-v0", 9)
    same(episodes(tmp_path / "lab" / "arm-v0"), episodes(whole.folder))
    assert not kept.parent.exists()
    about = datasets.info("lab/arm-v0")
    assert about.env_spec is not None and about.metadata["algorithm_name"] == "bench_arm:Noisy"


def test_stop_and_fewer(bench: Any, tmp_path: Path) -> None:
    """Ctrl-C keeps whole episodes; with fewer asked for, the dataset is made of those that are there."""

    def stop(done: int, row: dict[str, Any]) -> None:
        if done == 2:
            signal.raise_signal(signal.SIGINT)

    assert record(config(), "lab/arm-v0", 5, progress=stop).folder is None
    done = record(config(), "lab/arm-v0", 2)
    assert done.episodes == 2 and done.folder == tmp_path / "lab" / "arm-v0"
    assert [len(episode.rewards) for episode in episodes(done.folder)] == [LIMIT, LIMIT]


def test_takeover_recorded(bench: Any) -> None:
    """A takeover's actions are recorded in the policy's place, and the policy plans anew after it."""
    human = np.float32([-1.5, 0.25])
    device = Script(*[Reading()] * 4, Reading(human), Reading(human))
    done = record(config("bench_arm:Chunks", takeover="keyboard"), "lab/arm-v0", 1, device=device)
    (episode,) = episodes(done.folder)
    assert device.closed
    np.testing.assert_array_equal(episode.actions[:, 0], [1, 1, 1, 2, -1.5, -1.5, 4, 4])
    storage = files.open_storage(Path(str(done.folder)) / "data", datasets.info("lab/arm-v0").metadata)
    (raw,) = storage.get_episodes([0])
    np.testing.assert_array_equal(raw["infos"]["intervened"][1:], np.isin(np.arange(LIMIT), (4, 5)))


def test_human_alone(bench: Any) -> None:
    """A human's demonstration rests in the middle, ends when they say so, and one thrown away is played again."""
    move = np.float32([5.0, 1.0])
    device = Script(
        Reading(move), Reading(None, "again"),
        Reading(move), Reading(), Reading(None, "success"),
        Reading(None, "failure"),
    )  # fmt: skip
    bench.Arm.starts.clear()
    done = record(config("keyboard"), "lab/arm-v0", 2, device=device)
    first, second = episodes(done.folder)
    starts = bench.Arm.starts
    assert starts[0] == starts[1] != starts[2] and first.observations["arm"][0, 0] == starts[1]
    np.testing.assert_array_equal(first.actions, [[5, 1], [2, 0.5], [2, 0.5]])
    assert first.success is not None and first.success.astype(bool).tolist()[-3:] == [False, False, True]
    assert second.success is not None and not second.success.any() and len(second.rewards) == 1
    assert not first.terminations.any() and first.truncations.tolist() == [False, False, True]


def test_success_key(bench: Any) -> None:
    """Success under a key of the task's, said in the last step alone, is recorded; the dataset remembers the key."""
    done = record(config(), "lab/arm-v0", 3)
    for episode in episodes(done.folder):
        assert episode.success is not None
        assert episode.success.tolist()[1:] == [False] * (LIMIT - 1) + [bool(episode.observations["arm"][-1, 0] > 0)]
    about = datasets.info("lab/arm-v0")
    assert envs.run_task(about).success_key == "solved"
    env = envs.make(about)
    env.reset(seed=0)
    outcomes = [env.step(np.ones(2))[-1]["success"] for _ in range(LIMIT)]
    assert outcomes == [None] * (LIMIT - 1) + [True]
    plain = envs.make("bench_arm:Arm-v0")
    plain.reset(seed=0)
    assert [plain.step(np.ones(2))[-1]["success"] for _ in range(LIMIT)] == [None] * LIMIT


def test_foreign_success_key(bench: Any, tmp_path: Path) -> None:
    """A dataset of others may hold success under the task's key; what is no flag there is refused by that name."""
    task = envs.task_for("bench_arm:Arm-v0")
    record(config(), "lab/arm-v0", 2)
    with h5py.File(files.locate("lab/arm-v0") / "main_data.hdf5", "a") as file:
        for group in file.values():
            group["infos"].move("success", "reached")
    assert datasets.load("lab/arm-v0", task=task, cache=False).info.episode_success is None
    named = replace(task, success_key="reached")
    found = datasets.load("lab/arm-v0", task=named).info.episode_success
    assert found is not None and len(found) == 2
    assert datasets.load("lab/arm-v0", task=task).info.episode_success is None  # of another key in the cache


def test_environment_settings(bench: Any) -> None:
    """Arguments and limit reach every environment of a run; a dataset has those that it was recorded with."""
    record(config(env_kwargs=("gain=2",), episode_limit=5), "lab/arm-v0", 2)
    about = datasets.info("lab/arm-v0")
    assert about.env_spec is not None
    assert (about.env_spec.kwargs, about.env_spec.max_episode_steps) == ({"gain": 2}, 5)
    run = session.preset_run("bc", "lab/arm-v0", "small", env_kwargs=("gain=0.5",), episode_limit=3)
    data = session.load_data(run)
    for evaluation in (False, True):
        env = session.make_env(run, data, evaluation=evaluation)
        env.reset(seed=0)
        assert env.unwrapped.gain == 0.5  # pyright: ignore[reportAttributeAccessIssue]
        assert [env.step(np.zeros(2))[3] for _ in range(3)] == [False, False, True]
    same_as = [envs.same_environment(None, about, kwargs, limit) for kwargs, limit in (({"gain": 2}, 5), ({}, 3))]
    assert same_as == [True, False] and not envs.same_environment("bench_arm:Arm-v0", about)


def test_unnamed_environment(bench: Any, caplog: pytest.LogCaptureFixture) -> None:
    """An environment that a dataset cannot name is said once, with what training on it needs; then it trains."""
    record(RecordConfig("bench_arm:Free-v0", "bench_arm:Noisy", env_kwargs=("gain=2",)), "lab/arm-v0", 1)
    assert [each.getMessage() for each in caplog.records if "cannot name" in each.getMessage()] == [
        "bench_arm:Free-v0 is registered with a function, which a dataset cannot name: to train on lab/arm-v0 give "
        "--env bench_arm:Free-v0 --env-kwargs gain=2"
    ]
    assert datasets.info("lab/arm-v0").env_spec is None
    run = session.preset_run("bc", "lab/arm-v0", "small", env="bench_arm:Free-v0", env_kwargs=("gain=2",))
    env = session.make_env(run, session.load_data(run))
    assert env.unwrapped.gain == 2  # pyright: ignore[reportAttributeAccessIssue]


def test_kwargs_of_reward_refused(bench: Any) -> None:
    """Arguments that change the reward are refused as another environment of another reward is."""
    record(config(env_kwargs=("reward_type=dense",)), "lab/arm-v0", 1)
    run = session.preset_run("bc", "lab/arm-v0", "small", env_kwargs=("reward_type=sparse",))
    with pytest.raises(ConfigError, match="reward_type is 'sparse', 'dense' in Arm-v0"):
        session.load_data(run)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("a=1", 1),
        ("a=x", "x"),
        ("a=True", True),
        ("a=false", False),
        ("a=[1]", [1]),
        ("a=", ""),
        ("a=b=c", "b=c"),
    ],
)
def test_keyword_arguments(entry: str, value: Any) -> None:
    """A value is JSON, a Python literal or a word."""
    assert keyword_arguments([entry]) == {"a": value}
    with pytest.raises(ConfigError, match="expected NAME=VALUE"):
        keyword_arguments([f"-{entry}"])


def test_evaluation_one_at_a_time(bench: Any) -> None:
    """With `eval_envs` 1 an evaluation holds one environment; its episodes are the same."""
    loop = LoopConfig(eval_envs=1, eval_episodes=4)
    evaluator = evaluator_of(loop, lambda evaluation: envs.make("bench_arm:Arm-v0"), 1, 0, lambda score: None)
    evaluator.prepare()
    assert len(evaluator.envs) == 1
    evaluator.close()


def refused() -> dict[str, tuple[Callable[[], Any], type[Exception], str]]:
    """Return recordings that cannot begin, by name: what is called, the error, and what it says."""
    device = Script(Reading(np.float32([1.0])))
    return {
        "environment": (
            lambda: record(RecordConfig("No-v0", "bench_arm:Noisy"), "lab/a-v0", 1),
            ConfigError,
            "unknown",
        ),
        "argument": (lambda: record(config(env_kwargs=("x=1",)), "lab/a-v0", 1), ConfigError, "'x'"),
        "policy": (lambda: record(config("bench_arm:No"), "lab/a-v0", 1), ConfigError, "no callable 'No'"),
        "no policy": (lambda: record(config("mouse"), "lab/a-v0", 1), ConfigError, "module:function"),
        "diverged": (
            lambda: record(config("bench_arm:diverged"), "lab/a-v0", 1),
            BaseFaultError,
            "nan .* episode 0",
        ),
        "device": (lambda: record(config(takeover="mouse"), "lab/a-v0", 1), ConfigError, "no device 'mouse'"),
        "two humans": (lambda: record(config("keyboard", takeover="gamepad"), "lab/a-v0", 1), ConfigError, "already"),
        "id": (lambda: record(config(), "a", 1), DatasetError, "namespace/name-v0"),
        "shape": (lambda: record(config(), "lab/a-v0", 1, device=device), EnvironmentFaultError, "the device gave"),
    }


@pytest.mark.parametrize(
    "name", ["environment", "argument", "policy", "no policy", "diverged", "device", "two humans", "id", "shape"]
)
def test_refused(name: str, bench: Any, tmp_path: Path) -> None:
    """A recording that cannot begin says why in one line and leaves nothing."""
    call, kind, said = refused()[name]
    with pytest.raises(kind, match=said) as error:
        call()
    assert "\n" not in str(error.value)
    assert not [path for path in tmp_path.rglob("*") if ".recording" in str(path)]


def test_other_settings_refused(bench: Any, tmp_path: Path) -> None:
    """A recording that was stopped goes on with its own settings only; an id that exists is refused."""

    def stop(done: int, row: dict[str, Any]) -> None:
        signal.raise_signal(signal.SIGINT)

    assert record(config(), "lab/arm-v0", 2, progress=stop).folder is None
    with pytest.raises(DatasetError, match=r"1 episodes .* other settings \(seed 0\)"):
        record(config(seed=1), "lab/arm-v0", 2)
    assert record(config(rate=500.0), "lab/arm-v0", 2).episodes == 2
    with pytest.raises(DatasetError, match="exists already"):
        record(config(), "lab/arm-v0", 3)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have a window without DISPLAY")
def test_window_without_display(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a display a window is refused before the simulator, which may end the process, is asked for one."""
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="no display for a window; set DISPLAY"):
        record(config(window=True), "lab/arm-v0", 1)
    assert not (tmp_path / "lab").exists()


@pytest.mark.parametrize("word", ["keyboard", "gamepad"])
def test_without_pygame(word: str, bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Where pygame is missing, one line says how to get it; nothing is left on disk."""
    monkeypatch.setitem(sys.modules, "pygame", None)
    args = ["record", "lab/arm-v0", "--env", "bench_arm:Arm-v0", "--policy", word, "--episodes", "1"]
    assert on_command_line(*args) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and f"{word} needs pygame: pip install 'o2o[devices]'" in said[0]


def test_keyboard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys held move the entries to their ends; Enter is success; an action of too many entries is refused."""
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    pygame = pytest.importorskip("pygame", reason="pip install 'o2o[devices]'")
    keys = Keyboard(gym.spaces.Box(np.float32([-2, 0]), np.float32([6, 1])))
    assert keys.read() == Reading()
    pygame.event.post(pygame.event.Event(pygame.KEYDOWN, key=pygame.K_d))
    for _ in range(2):  # held
        np.testing.assert_allclose(keys.read().action, [6, 0.5])
    pygame.event.post(pygame.event.Event(pygame.KEYUP, key=pygame.K_d))
    pygame.event.post(pygame.event.Event(pygame.KEYDOWN, key=pygame.K_s))
    pygame.event.post(pygame.event.Event(pygame.KEYDOWN, key=pygame.K_RETURN))
    read = keys.read()
    np.testing.assert_allclose(read.action, [2, 0])
    assert read.end == "success" and keys.read().end == ""
    keys.close()
    with pytest.raises(ConfigError, match="keyboard steers 8 action entries, the environment has 9"):
        Keyboard(gym.spaces.Box(-1, 1, (9,)))


class Pad:
    """A gamepad as pygame has it: numbers of 16 bits, up negative."""

    axes, down = dict[int, int](), set[int]()

    def __init__(self, number: int) -> None:
        assert number == 0

    def get_axis(self, axis: int) -> int:
        return self.axes.get(axis, 900)  # no stick rests at 0

    def get_button(self, button: int) -> bool:
        return button in self.down

    def quit(self) -> None:
        self.down.clear()


def test_gamepad(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sticks beyond their dead zone move the entries, up is up; a button that is held down ends one episode only."""
    game: Any = ModuleType("pygame")
    names = ("LEFTX", "LEFTY", "RIGHTX", "RIGHTY", "TRIGGERLEFT", "TRIGGERRIGHT")
    vars(game).update({f"CONTROLLER_AXIS_{name}": i for i, name in enumerate(names)})
    vars(game).update({f"CONTROLLER_BUTTON_{name}": i for i, name in enumerate("ABX")})
    game.init, game.event = lambda: None, SimpleNamespace(pump=lambda: None)
    pads = SimpleNamespace(init=lambda: None, get_count=lambda: 1, is_controller=lambda number: True, Controller=Pad)
    monkeypatch.setitem(sys.modules, "pygame", game)
    monkeypatch.setitem(sys.modules, "pygame._sdl2", SimpleNamespace(controller=pads))
    pad = Gamepad(gym.spaces.Box(np.float32([-2, 0, -1, -1, -1]), np.float32([6, 1, 1, 1, 1])))
    assert pad.read() == Reading()
    monkeypatch.setattr(Pad, "axes", {0: 32767, 1: 32767, 2: 0, 3: -16384, 5: 32767})
    np.testing.assert_allclose(pad.read().action, [6, 0, 0.5, 0, 0.97], atol=0.01)
    monkeypatch.setattr(Pad, "down", {0})
    assert [pad.read().end for _ in range(3)] == ["success", "", ""]
    with pytest.raises(ConfigError, match="gamepad steers 5 action entries, the environment has 6"):
        Gamepad(gym.spaces.Box(-1, 1, (6,)))
    pads.get_count = lambda: 0
    with pytest.raises(ConfigError, match="no gamepad 0: 0 found"):
        Gamepad(gym.spaces.Box(-1, 1, (2,)))
