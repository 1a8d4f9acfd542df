"""Cameras in the observation, the pixel dataset, and what is said when the two do not fit."""

import dataclasses
import os
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from o2o import envs
from o2o.data import datasets
from o2o.envs import cameras
from o2o.envs.cameras import CameraObservation, camera_names
from o2o.envs.pointmaze import EMBEDDED, PixelRecipe
from o2o.errors import ConfigError, EnvironmentMismatchError

SIZE = (24, 32)


def bare(env_id="Hopper-v5"):
    return gym.make(env_id, disable_env_checker=True)


def test_state_beside_images(rendering):
    """A state becomes an entry beside the images."""
    env = CameraObservation(bare(), {"track": SIZE, "free": (16, 16)})
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    assert {key: value.shape for key, value in observation.items()} == {
        "state": (11,),
        "track": (24, 32, 3),
        "free": (16, 16, 3),
    }
    assert observation["track"].dtype == np.uint8 and observation["track"].std() > 10
    assert np.any(observation["track"][:16, :16] != observation["free"])
    env.close()


def test_images_show_present_state(rendering):
    """Images show the present state and are the same in another environment, whatever was before."""
    env, twin = (CameraObservation(bare(), {"track": (48, 48)}) for _ in range(2))
    first, _ = env.reset(seed=0)
    kept = first["track"].copy()
    for _ in range(12):
        later, *_ = env.step(np.asarray([1.0, -1.0, 1.0]))
    assert np.any(later["track"] != kept)
    np.testing.assert_array_equal(first["track"], kept)  # not overwritten by later frames
    np.testing.assert_array_equal(twin.reset(seed=0)[0]["track"], kept)
    np.testing.assert_array_equal(env.reset(seed=0)[0]["track"], kept)
    env.close()
    twin.close()


def test_maze_entries_and_goal(rendering):
    """The maze keeps its entries, and the goal is seen."""
    env = envs.make("PointMaze_UMaze-v3", cameras=("free",), image_size=48)
    here, _ = env.reset(seed=0)
    assert isinstance(here, dict) and here["state"].shape == (6,) and here["free"].shape == (48, 48, 3)
    images = {seed: env.reset(seed=seed)[0]["free"] for seed in (0, 1)}
    assert np.any(images[0] != images[1])
    env.close()


def test_unknown_camera(rendering):
    """The error for an unknown camera names those there are."""
    assert camera_names(bare()) == ("track", "free")
    with pytest.raises(ConfigError, match=r"Hopper-v5 has no camera 'wrist'; it has track, free$"):
        envs.make("Hopper-v5", cameras=("track", "wrist"))


def test_impossible_cameras(rendering):
    """Cameras of no pixels or without a MuJoCo simulation are refused."""
    with pytest.raises(ConfigError, match="camera 'free': images of 0x0 pixels"):
        envs.make("Hopper-v5", cameras=("free",), image_size=0)
    with pytest.raises(ConfigError, match="no MuJoCo simulation"):
        CameraObservation(gym.make("MountainCarContinuous-v0"), {"free": (8, 8)})


def test_missing_render_back_end():
    """A missing back end is reported with what to install."""
    code = (
        "from o2o import envs\n"
        "from o2o.errors import ConfigError\n"
        "try:\n    envs.make('InvertedPendulum-v5', cameras=('free',))\n"
        "except ConfigError as error:\n    print(error)\n"
    )
    clean = {key: value for key, value in os.environ.items() if key not in ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY")}
    environment = {**clean, "MUJOCO_GL": "off"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert "cameras cannot be rendered here" in result.stdout, result.stderr
    assert "libosmesa6" in result.stdout and "MUJOCO_GL=osmesa" in result.stdout
    assert result.stdout.count("\n") == 1


def test_unknown_mujoco_back_end():
    """An unknown back end of MuJoCo is a one-line error."""
    environment = {**os.environ, "MUJOCO_GL": "none-such"}
    command = [sys.executable, "-m", "o2o", "demo"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert "MUJOCO_GL='none-such'" in result.stderr and "unset it" in result.stderr


def test_pixel_dataset(pixels):
    """The pixel dataset is made, loaded and played."""
    data = datasets.load(pixels)
    observations = data.arrays["observations"]
    assert observations["free"].dtype == np.uint8 and observations["free"].shape == (data.size, 32, 32, 3)
    assert observations["state"].shape == (data.size, 6)
    follows = ~data.arrays["ends"][:-1]
    after = data.arrays["next_observations"]["free"][:-1][follows]
    np.testing.assert_array_equal(after, observations["free"][1:][follows])
    assert data.info.episode_success is not None and data.info.episode_success.any()
    env = envs.make(data.info)  # its cameras are the dataset's
    assert env.observation_space["free"].shape == (32, 32, 3)
    env.close()


def test_replayed_episode_images(pixels):
    """Playing a recorded episode again gives its images."""
    data = datasets.load(pixels)
    env = envs.make(data.info)
    rng = np.random.default_rng(EMBEDDED["pointmaze-pixels"].seed)
    observation, _ = env.reset(seed=int(rng.integers(2**31)))  # as `datasets.record` draws it
    for row in range(5):
        np.testing.assert_array_equal(observation["free"], data.arrays["observations"]["free"][row])
        observation, *_ = env.step(data.arrays["actions"][row])
    env.close()


def with_images(about, **sizes):
    images = {name: spaces.Box(0, 255, (size, size, 3), np.uint8) for name, size in sizes.items()}
    rest = {key: space for key, space in about.observation_space.spaces.items() if key != "free"}
    return dataclasses.replace(about, observation_space=spaces.Dict({**rest, **images}))


def test_camera_mismatch(pixels):
    """A camera in only one of dataset and environment is named with both."""
    about = datasets.info(pixels)
    with pytest.raises(EnvironmentMismatchError, match=r"pixels.*PointMaze_UMaze-v3.* has camera 'wrist'.* free"):
        envs.make(with_images(about, free=32, wrist=32))
    with pytest.raises(EnvironmentMismatchError, match="'free' is in the environment's observation and not"):
        envs.make(with_images(about), cameras=("free",))
    with pytest.raises(EnvironmentMismatchError, match="'wrist' is in the dataset and not in the environment's"):
        envs.make(with_images(about, free=32, wrist=32), cameras=("free",), image_size=32)
    with pytest.raises(EnvironmentMismatchError, match="'free' has 32x32x3 pixels in the dataset and 16x16x3"):
        envs.make(about, cameras=("free",), image_size=16)


def test_state_dataset_without_camera(embedded):
    """A state dataset gets no camera."""
    env = envs.make(datasets.info(embedded))
    assert isinstance(env.observation_space, spaces.Box)
    with pytest.raises(EnvironmentMismatchError, match="leave it out of `cameras`"):
        envs.make(datasets.info(embedded), cameras=("free",))
    env.close()


def test_pixel_dataset_recipe():
    """The recipe of the pixel dataset is small and its own."""
    recipe = EMBEDDED["pointmaze-pixels"]
    assert isinstance(recipe, PixelRecipe) and recipe.steps <= 2_000 and recipe.image_size <= 48
    assert "cameras=('free',)" in repr(recipe) and "cameras" not in repr(EMBEDDED["pointmaze-umaze"])
    assert cameras.FREE in recipe.cameras
