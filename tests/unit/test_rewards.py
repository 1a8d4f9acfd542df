"""Learnt rewards: a success classifier and a model of progress, judged on episodes that they have not seen."""

from pathlib import Path
from typing import Any, cast

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from o2o import cli
from o2o.data import datasets
from o2o.data.files import Episode
from o2o.errors import ConfigError, DatasetError, EnvironmentMismatchError
from o2o.rewards import (
    ClassifierReward,
    FrameModelConfig,
    ProgressModel,
    ProgressReward,
    SuccessClassifier,
    success_frames,
)

GOAL, STEPS = 0.8, 10
SMALL = FrameModelConfig(hidden_dims=(32,), updates=150, batch_size=32, learning_rate=5e-3)
STATE = spaces.Box(-np.inf, np.inf, (2,), np.float32)
CAMERA = spaces.Dict({"cam": spaces.Box(0, 255, (24, 24, 3), np.uint8), "noise": spaces.Box(-9, 9, (1,), np.float32)})


def seen(x: float, noise: float, images: bool) -> Any:
    """Return an observation: the place beside noise, or a picture with a bright bar as wide as the place."""
    if not images:
        return np.asarray([x, noise], np.float32)
    picture = np.zeros((24, 24, 3), np.uint8)
    picture[:, : int(24 * np.clip(x, 0, 1))] = 200
    return {"cam": picture, "noise": np.asarray([noise], np.float32)}


class Rail(gym.Env):
    """A cart that moves right by its command."""

    action_space = spaces.Box(-0.2, 0.2, (1,), np.float32)

    def __init__(self, images: bool = False) -> None:
        self.images = images
        self.observation_space = CAMERA if images else STATE

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = 0.0
        return seen(self.x, 0.0, self.images), {}

    def step(self, action) -> Any:
        self.x += float(action[0])
        return seen(self.x, 0.0, self.images), 7.0, False, False, {}


def recorded(root: Path, images: bool = False, episodes: int = 24) -> str:
    """Write episodes of which half reach the goal."""
    rng, made = np.random.default_rng(0), []
    for number in range(episodes):
        xs = np.linspace(0, 1.0 if number % 2 else 0.6, STEPS + 1) + 0.02 * rng.standard_normal(STEPS + 1)
        frames = [seen(x, rng.standard_normal(), images) for x in xs]
        stacked = {key: np.stack([f[key] for f in frames]) for key in CAMERA} if images else np.stack(frames)
        flags, zeros = xs[1:] > GOAL, np.zeros(STEPS)
        ends = np.arange(STEPS) == STEPS - 1
        made.append(Episode(stacked, np.zeros((STEPS, 1), np.float32), zeros, zeros > 0, ends, success=flags))
    space = CAMERA if images else STATE
    datasets.write("lab/rail-v0", made, observation_space=space, action_space=Rail.action_space, spec=None, root=root)
    return "lab/rail-v0"


def test_labels_of_frames(tmp_path: Path) -> None:
    """The flag of a step is that of the observation after it; progress ends at the first success."""
    frames = success_frames(recorded(tmp_path, episodes=4), tmp_path)
    assert len(frames) == 4 * (STEPS + 1)
    np.testing.assert_array_equal(frames.success, (frames.observations[:, 0] > GOAL) & (np.arange(44) % 11 > 0))
    first = int(frames.success[11:22].argmax())
    np.testing.assert_allclose(frames.progress[11 : 11 + first + 1], np.arange(first + 1) / first)
    assert np.isnan(frames.progress[:11]).all() and (frames.progress[11 + first : 22] == 1).all()


@pytest.mark.parametrize("images", [False, True])
def test_classifier_learns_and_is_reward(images: bool, tmp_path: Path) -> None:
    """It is right on held-out episodes; its file says the same; as a reward it ends the episode at the goal."""
    config = FrameModelConfig(hidden_dims=(32,), updates=80 if images else 150, batch_size=32, learning_rate=5e-3)
    frames = success_frames(recorded(tmp_path, images), tmp_path)
    judge = SuccessClassifier.fit(frames, config)
    assert judge.report["accuracy"] > 0.9 and judge.report["false"] <= 0.1
    judge.save(tmp_path / "success.model")
    again = SuccessClassifier.load(tmp_path / "success.model")
    np.testing.assert_allclose(again.outputs(frames.observations), judge.outputs(frames.observations), atol=1e-5)
    assert again.report == judge.report and again.threshold == judge.threshold
    env = ClassifierReward(Rail(images), again, hold=2)
    env.reset()
    places, rewards = [], []
    ended, info = False, {}
    while not ended and len(places) < 20:
        _, reward, ended, _, info = env.step(np.array([0.1], np.float32))
        places.append(cast(Rail, env.unwrapped).x)
        rewards.append(reward)
    assert ended and info["success"] and rewards[-1] == 1.0 and sum(rewards) == 1.0
    assert 0.75 < places[-1] <= 1.01


def test_progress_grows_along_the_way(tmp_path: Path) -> None:
    """Later frames are further; the reward's sum is about 1 on the way to the goal, and going back costs."""
    model = ProgressModel.fit(success_frames(recorded(tmp_path), tmp_path), SMALL)
    assert model.report["order"] > 0.85 and model.report["error"] < 0.12
    env = ProgressReward(Rail(), model, bonus=10.0)
    env.reset()
    forth = [env.step(np.array([0.1], np.float32))[1] for _ in range(6)]
    assert all(reward > 0 for reward in forth) and 0.4 < sum(forth) < 1.0
    assert env.step(np.array([-0.2], np.float32))[1] < 0
    reward, ended, info = 0.0, False, {}
    for _ in range(6):
        _, reward, ended, _, info = env.step(np.array([0.1], np.float32))
        if ended:
            break
    assert ended and reward > 10.0 and info["success"]


def test_wrong_inputs_say_what_they_are(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Too few episodes, no flags, a foreign file, another kind, and other observations are refused in a line."""
    root = tmp_path / "few"
    with pytest.raises(DatasetError, match="too few to hold some out"):
        SuccessClassifier.fit(success_frames(recorded(root, episodes=2), root), SMALL)
    (tmp_path / "text.model").write_text("hello")
    with pytest.raises(ConfigError, match="no file of a success classifier"):
        SuccessClassifier.load(tmp_path / "text.model")
    with pytest.raises(ConfigError, match="cannot be read"):
        SuccessClassifier.load(tmp_path / "missing.model")
    data = recorded(tmp_path)
    out = tmp_path / "progress.model"
    with pytest.raises(SystemExit) as ended:
        cli.main(["reward", data, str(out), "--kind", "progress", "--root", str(tmp_path), "--updates", "20"])
    assert not ended.value.code and "on held-out episodes frames" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="no file of a success classifier"):
        SuccessClassifier.load(out)
    with pytest.raises(EnvironmentMismatchError, match="the progress model sees observations"):
        ProgressReward(Rail(images=True), ProgressModel.load(out))
