"""What a run records is what it lived through: the replay buffer's rows, once each, as a Minari dataset."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import gymnasium as gym
import jax
import minari
import numpy as np
import pytest
from gymnasium import spaces
from minari.dataset.minari_storage import MinariStorage

from o2o import envs
from o2o.config import LoopConfig
from o2o.data import datasets
from o2o.data.recorder import EPISODES, Recorder, export, forget
from o2o.data.task import Task
from o2o.errors import DatasetError, RunError
from o2o.runs import session
from o2o.runs.session import RunConfig
from o2o.train.episode import EnvSlot
from o2o.train.trainer import Trainer

Maker = Callable[..., RunConfig]
LOW, HIGH = np.asarray([-2.0, 0.0], np.float32), np.asarray([6.0, 1.0], np.float32)


class Bench(gym.Env):
    """A Dict observation with an image and a nested entry, a human who takes over at step 2, success at step 4."""

    action_space = spaces.Box(LOW, HIGH)
    observation_space = spaces.Dict(
        {
            "arm": spaces.Dict({"angle": spaces.Box(-9, 9, (2,), np.float64), "force": spaces.Box(-9, 9, (1,))}),
            "camera": spaces.Box(0, 255, (4, 5, 3), np.uint8),
        }
    )

    def __init__(self, limit: int = 6) -> None:
        self.limit, self.count = limit, 0
        self.rng = np.random.default_rng(0)
        self.shared = np.zeros((4, 5, 3), np.uint8)

    def _observe(self) -> dict[str, Any]:
        self.shared[:] = self.rng.integers(0, 256, self.shared.shape)  # the same array every time, as cameras do
        arm = {"angle": self.rng.uniform(-1, 1, 2), "force": self.rng.uniform(-1, 1, 1).astype(np.float32)}
        return {"arm": arm, "camera": self.shared}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.count = 0
        return self._observe(), {}

    def step(self, action: Any) -> Any:
        self.count += 1
        info: dict[str, Any] = {"success": self.count == 4}
        if self.count == 2:
            info["intervene_action"] = np.asarray([5.0, 0.25], np.float32)
        return self._observe(), 0.5 * self.count, False, self.count == self.limit, info


def played(folder: Path, task: Task, episodes: int, limit: int = 6, names: bool = True) -> dict[str, np.ndarray]:
    """Play whole episodes with random actions and return what a replay buffer would be given."""
    env = envs.wrap(Bench(limit), task, inner=lambda inside: Recorder(inside, folder, task))
    slot, rng, rows = EnvSlot(env, (3, 0, 1)), np.random.default_rng(1), []
    for episode in range(episodes):
        if names:
            before = jax.tree.map(np.copy, slot.reset(episode))
        else:
            before, _ = env.reset()
            slot.observation = before
        while True:
            step = slot.step(rng.uniform(-1, 1, 2).astype(np.float32))
            rows.append((before, step))
            before = jax.tree.map(np.copy, step.next_observation)
            if step.ended:
                break
    return {
        "state": np.stack([row["state"] for row, _ in rows]),
        "camera": np.stack([row["camera"] for row, _ in rows]),
        "next_state": np.stack([step.next_observation["state"] for _, step in rows]),  # a new array every time
        "actions": np.stack([step.action for _, step in rows]),
        "rewards": np.asarray([step.reward for _, step in rows], np.float32),
        "masks": np.asarray([1.0 - step.terminated for _, step in rows], np.float32),
        "ends": np.asarray([step.ended for _, step in rows]),
    }


@pytest.mark.parametrize("ends_on_success", [True, False])
def test_recorded_rows_match_buffer(ends_on_success: bool, tmp_path: Path) -> None:
    """Dicts, images, takeovers and ends come back as the buffer had them."""
    task = Task("bench", has_success=True, terminate_on_success=ends_on_success, reward_scale=10.0, reward_bias=-5.0)
    rows = played(tmp_path / EPISODES, task, 3)
    assert len(rows["rewards"]) == 3 * (4 if ends_on_success else 6)
    folder = export(tmp_path)
    data = datasets.load(folder, task=task, cache=False)
    np.testing.assert_array_equal(data.arrays["observations"]["state"], rows["state"])
    np.testing.assert_array_equal(data.arrays["observations"]["camera"], rows["camera"])
    np.testing.assert_array_equal(data.arrays["next_observations"]["state"], rows["next_state"])
    np.testing.assert_allclose(data.arrays["actions"], rows["actions"], atol=2e-5)
    np.testing.assert_allclose(data.arrays["actions"][1], [0.75, -0.5], atol=1e-6)  # the human's, not the policy's
    for key in ("rewards", "masks", "ends"):
        np.testing.assert_array_equal(data.arrays[key], rows[key])
    assert data.info.episodes == 3 and data.info.episode_success is not None and data.info.episode_success.all()
    for episode in MinariStorage.read(folder / "data").get_episodes(range(3)):
        human = [False, False, True, False, False, False, False][: len(episode["rewards"]) + 1]  # one per observation
        assert episode["infos"]["intervened"].tolist() == human
    raw = datasets.load(folder, cache=False)
    assert raw.arrays["rewards"][:4].tolist() == [0.5, 1.0, 1.5, 2.0] and raw.arrays["masks"].all()
    assert datasets.check(folder) == []


def test_broken_off_episode(tmp_path: Path) -> None:
    """An episode that is broken off is not recorded."""
    env = Recorder(Bench(), tmp_path / EPISODES, Task("bench"))
    env.reset()
    env.step(np.asarray([1.0, 0.5], np.float32))
    env.reset()
    assert not list((tmp_path / EPISODES).glob("*.npz"))
    with pytest.raises(RunError, match="no recorded episode: train with `record`"):
        export(tmp_path)


def test_unnamed_episodes_counted(tmp_path: Path) -> None:
    """Episodes without names are counted behind those there."""
    played(tmp_path / EPISODES, Task("bench", has_success=True), 2, names=False)
    played(tmp_path / EPISODES, Task("bench", has_success=True), 1, names=False)
    assert sorted(path.name for path in (tmp_path / EPISODES).glob("*.npz")) == ["0.npz", "1.npz", "2.npz"]
    assert datasets.info(export(tmp_path)).episodes == 3


def test_taken_episode_name(tmp_path: Path) -> None:
    """An episode of a name that is taken is kept beside the first."""
    task = Task("bench", has_success=True)
    played(tmp_path / EPISODES, task, 2)
    first = datasets.load(export(tmp_path), cache=False)
    played(tmp_path / EPISODES, task, 2, limit=5)
    second = datasets.load(export(tmp_path), cache=False)
    assert (first.info.episodes, second.info.episodes) == (2, 4) and (first.size, second.size) == (12, 12 + 10)


def test_forget_later_episodes(tmp_path: Path) -> None:
    """`forget` cuts behind the episode under way."""
    folder = tmp_path / EPISODES
    folder.mkdir()
    for name in ("0-0-0-2", "0-0-0-10", "0-0-0-11", "0-0-1-0", "0-0-2-0"):
        (folder / f"{name}.npz").touch()
    forget(tmp_path, {(0, 0, 0): 11, (0, 0, 1): 1})
    assert sorted(path.stem for path in folder.glob("*.npz")) == ["0-0-0-10", "0-0-0-2", "0-0-1-0"]


def test_no_half_episode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that breaks off leaves no half episode."""
    task = Task("bench", has_success=True)
    played(tmp_path / EPISODES, task, 1)
    whole = (tmp_path / EPISODES / "3-0-1-0.npz").read_bytes()

    def full(file: IO[bytes], **_: Any) -> None:
        file.write(whole[:50])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(RunError, match="cannot record to .*3-0-1-1.npz: No space left"):
        played(tmp_path / EPISODES, task, 1)
    assert (tmp_path / EPISODES / "3-0-1-0.npz").read_bytes() == whole
    assert datasets.info(export(tmp_path)).episodes == 1
    (tmp_path / EPISODES / "3-0-1-0.npz").write_bytes(whole[:50])
    with pytest.raises(RunError, match="3-0-1-0.npz cannot be read"):
        export(tmp_path)


def test_empty_header(tmp_path: Path) -> None:
    """A header that a power cut emptied is one clear line."""
    played(tmp_path / EPISODES, Task("bench", has_success=True), 1)
    (tmp_path / EPISODES / "environment.json").write_bytes(b"")
    for reading in (lambda: export(tmp_path), lambda: forget(tmp_path, {})):
        with pytest.raises(RunError, match=r"environment.json cannot be read \(Expecting value.*`o2o resume") as caught:
            reading()
        assert "\n" not in str(caught.value)
    assert len(list((tmp_path / EPISODES).glob("*.npz"))) == 1


def test_export_never_overwrites(tmp_path: Path) -> None:
    """Another root is never overwritten, and ids are checked."""
    played(tmp_path / "run" / EPISODES, Task("bench", has_success=True), 1)
    root = tmp_path / "elsewhere"
    assert export(tmp_path / "run", "mine/bench-v0", root) == root / "mine/bench-v0"
    with pytest.raises(DatasetError, match="exists already"):
        export(tmp_path / "run", "mine/bench-v0", root)
    for bad in ("bench", "../run-v0"):
        with pytest.raises(DatasetError, match="not of the form"):
            export(tmp_path / "run", bad)
    assert (tmp_path / "run" / EPISODES).is_dir()


def test_resumed_recording(tiny_run: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run stopped and resumed records what its buffer holds."""
    loop = LoopConfig(eval_every=1000, eval_episodes=1, log_every=15, checkpoint_every=10_000, updates_per_dispatch=10)
    run = tiny_run("wsrl", seeds=2, offline_steps=10, online_steps=320, loop=loop, record=True)
    original, trainers = session.Session._metrics, list[Trainer]()

    def listening(self: session.Session, row: dict[str, Any]) -> None:
        original(self, row)
        trainers[:] = [self.trainer]
        if row["env_steps"] == 210 and row["phase"] != "offline":
            os.kill(os.getpid(), signal.SIGTERM)

    path = tmp_path / "a run"
    with monkeypatch.context() as patch:
        patch.setattr(session.Session, "_metrics", listening)
        assert not session.train(run, path)
    assert not (path / "recorded").exists()
    early = {file.name: file.read_bytes() for file in (path / EPISODES).glob("*.npz")}
    for stale in ("0-0-0-7.npz", "0-0-1-9.npz", "0-0-0-1.npz.tmp"):  # what a kill after the checkpoint may leave
        (path / EPISODES / stale).write_bytes(b"stale")
    monkeypatch.setattr(session.Session, "_metrics", lambda self, row: trainers.__setitem__(0, self.trainer))
    assert session.resume(path) and early
    (trainer,) = trainers
    assert all((path / EPISODES / name).read_bytes() == old for name, old in early.items())

    folder = path / "recorded" / "a-run-v0"
    data = datasets.load(folder, task=session.task_of(run), cache=False)
    finished = trainer.counters.episodes
    assert data.info.episodes == sum(finished) and min(finished) >= 2
    assert trainer.counters.phase == "online"
    buffer, start = trainer.replay.buffer.rows, 0
    for member in range(2):
        count = int(np.flatnonzero(buffer["ends"][member, :320])[-1]) + 1
        part = slice(start, start + count)
        for key in ("observations", "next_observations", "rewards", "masks", "ends"):
            np.testing.assert_array_equal(data.arrays[key][part], np.asarray(buffer[key][member, :count]), key)
        executed = np.clip(buffer["actions"][member, :count], -0.99999, 0.99999)
        np.testing.assert_array_equal(data.arrays["actions"][part], executed)
        start += count
    assert start == data.size

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(path / "recorded"))
    theirs = minari.load_dataset("a-run-v0")
    assert len(theirs) == sum(finished) and theirs.total_steps == data.size
    recovered = theirs.recover_environment()
    assert recovered.observation_space == theirs.observation_space and recovered.spec is not None
    assert recovered.spec.kwargs["continuing_task"] is False
    metadata: list[dict[str, Any]] = list(theirs.storage.get_episode_metadata([0]))  # pyright: ignore
    observation, _ = recovered.reset(seed=int(metadata[0]["seed"]))
    np.testing.assert_array_equal(observation["observation"], theirs[0].observations["observation"][0])
    recovered.close()
    assert datasets.describe(folder)["ref_max_score"] is not None
    assert datasets.check(folder) == []
    again = json.loads((path / EPISODES / "environment.json").read_text())["metadata"]
    assert again["algorithm_name"] == "wsrl" and export(path) == folder


def test_no_recording_by_default(tiny_run: Maker, tmp_path: Path) -> None:
    """Nothing is written without `record`."""
    session.train(tiny_run("bc", offline_steps=10, online_steps=10), tmp_path / "run")
    assert not (tmp_path / "run" / EPISODES).exists()
