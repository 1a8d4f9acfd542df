"""Record a new dataset in an environment: a policy's episodes, a human's, or a policy's with takeovers.

An episode becomes a file (`o2o.data.recorder`) when it ends, in a hidden folder beside the target, so that a kill loses
the one under way. The same settings go on from there. When all are there the dataset appears under its id at once.
"""

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from filelock import FileLock, Timeout

from o2o import envs
from o2o.closing import Closing
from o2o.config import keyword_arguments, to_dict
from o2o.data import files, recorder
from o2o.data.datasets import Dataset, DatasetInfo
from o2o.data.recorder import EPISODES, Recorder, next_number, recorded
from o2o.data.rollout import Controller, OneEach, rollout
from o2o.data.spaces import ActionMap, ObservationSpec
from o2o.data.task import Task
from o2o.envs.devices import DEVICES, Device, TakeOver, resting
from o2o.errors import ConfigError, DatasetError
from o2o.files import read_object, write_atomically
from o2o.policies.base import Base, BasePolicy
from o2o.policies.python import PythonPolicy, named
from o2o.policies.video import check_window
from o2o.runs.folder import StopFlag
from o2o.runs.session import load_base
from o2o.settings import AboveZero, Count, Seed, Settings
from o2o.train.episode import TRAIN_STREAM, EnvSlot

_log = logging.getLogger(__name__)
SETTINGS, LOCK = "recording.json", "lock"
FREE = ("window", "rate")
"""Settings that a recording which goes on may change."""


@dataclass(frozen=True)
class RecordConfig(Settings):
    """What decides the episodes of a recording."""

    env: str
    """Gymnasium id of the environment, or module:ID."""
    policy: str
    """`keyboard`, `gamepad`, or what `load_base` takes: module:function, a run folder, an exported file."""
    takeover: str | None = None
    """`keyboard`, `gamepad` or module:Class (`o2o.envs.devices.Device`, made with the action space): a human takes
    over with it."""
    env_kwargs: tuple[str, ...] = ()
    """Arguments of the environment, NAME=VALUE each."""
    success_key: str | None = None
    """Entry of the infos that says whether a step succeeds, looked at before `success` and `is_success`."""
    episode_limit: Count | None = None
    """Steps after which an episode is cut; None: the environment's own limit."""
    cameras: tuple[str, ...] = ()
    """MuJoCo cameras to render into the observation."""
    image_size: Count = 64
    """Height and width of their images."""
    window: bool = False
    """Show the environment."""
    rate: AboveZero | None = None
    """Steps per second; None: with a human the environment's own (`render_fps`), else as fast as it goes."""
    seed: Seed = 0
    """Episode n begins with a reset seed that derives from (`seed`, n), and the policy is reset with n."""


@dataclass(frozen=True)
class Recorded:
    """What a recording has made."""

    folder: Path | None
    """The dataset; None if a signal stopped the recording before."""
    episodes: int


def record(
    config: RecordConfig,
    dataset_id: str,
    episodes: int,
    root: Path | None = None,
    progress: Callable[[int, dict[str, Any]], None] = lambda done, row: None,
    device: Device | None = None,
) -> Recorded:
    """Record until there are `episodes` whole episodes, and write them as the Minari dataset `dataset_id`.

    `progress(done, row)` is called after each (`EnvSlot.row`). `device` takes the place of the one that the settings
    name. Raises `ConfigError` for settings that lead nowhere, `DatasetError` if the id exists, or where a recording
    with other settings, or one that is under way, is in the way, and what environment and policy raise. What was
    recorded before stays, and the same call goes on.
    """
    if config.window:
        check_window("set DISPLAY, or leave `window` out")
    root = (root or files.default_root()).absolute()  # an environment may change the working folder
    target = files.check_new(dataset_id, root)
    work = files.work_folder(target, "recording")
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DatasetError(f"{work} cannot be made: {error.strerror}; give another root") from error
    try:
        with FileLock(work / LOCK).acquire(timeout=0), StopFlag() as stop:
            _begin(work, config, dataset_id)
            try:
                _play(config, dataset_id, episodes, work, progress, device, stop)
            finally:
                if not recorded(work):  # the corrected command may have the id
                    shutil.rmtree(work, ignore_errors=True)
            if (done := recorded(work)) < episodes:
                return Recorded(None, done)
            folder = recorder.export(work, dataset_id, root)
            shutil.rmtree(work, ignore_errors=True)
            return Recorded(folder, done)
    except Timeout as error:
        raise DatasetError(f"another recording into {dataset_id} is under way; wait for it") from error


def _begin(work: Path, config: RecordConfig, dataset_id: str) -> None:
    """Write the settings, or check that the recording began with them."""
    now = {key: value for key, value in to_dict(config).items() if key not in FREE}
    if not (work / SETTINGS).exists():
        write_atomically(work / SETTINGS, json.dumps(now, indent=2) + "\n")
        return
    before = read_object(work / SETTINGS)
    if changed := [key for key in now if before.get(key) != now[key]]:
        was = ", ".join(f"{key} {before.get(key)!r}" for key in changed)
        raise DatasetError(
            f"{recorded(work)} episodes for {dataset_id} were recorded with other settings ({was}): give the command "
            f"that began it, or delete {work}"
        )


def _play(
    config: RecordConfig,
    dataset_id: str,
    episodes: int,
    work: Path,
    progress: Callable[[int, dict[str, Any]], None],
    device: Device | None,
    stop: Callable[[], bool],
) -> None:
    task = envs.task_for(config.env)
    if config.success_key is not None:
        task = replace(task, success_key=config.success_key, has_success=True)
    alone = config.policy in DEVICES
    if alone and config.takeover is not None:
        raise ConfigError(f"policy {config.policy} is a human already: leave `takeover` out, or give another policy")
    word = config.policy if alone else config.takeover
    policy = None if alone else load_base(config.policy)
    about = {"algorithm_name": config.policy, "description": f"Recorded by o2o in {config.env}."}
    about |= {"takeover": config.takeover} if config.takeover else {}

    def inner(env: gym.Env) -> gym.Env:
        human = device or (None if word is None else _device(word, env.action_space))
        if human is not None:
            env = TakeOver(env, human, alone, config.success_key)
        return Recorder(env, work / EPISODES, task, about)

    with Closing() as closing:
        env = envs.make(
            config.env, task, inner=inner, own_units=True, env_kwargs=keyword_arguments(config.env_kwargs),
            episode_limit=config.episode_limit, cameras=config.cameras, image_size=config.image_size,
            render_mode="human" if config.window else None,
        )  # fmt: skip
        closing.callback(env.close)
        if files.storable(env.spec) is None:
            arguments = f" --env-kwargs {' '.join(config.env_kwargs)}" if config.env_kwargs else ""
            _log.warning(
                "%s is registered with a function, which a dataset cannot name: to train on %s give --env %s%s",
                config.env, dataset_id, config.env, arguments,
            )  # fmt: skip
        slot = EnvSlot(env, (config.seed, TRAIN_STREAM, 0))
        controller = _Resting(env) if policy is None else _acting(policy, env, task, dataset_id)
        rate = config.rate or (env.metadata.get("render_fps") if word or device else None)
        numbers = _numbers(work, slot.seeds, episodes)
        for _, step in rollout(OneEach(controller), [slot], [numbers], stop, _Pace(rate)):
            progress(recorded(work), slot.row(step.terminated))


def _numbers(work: Path, prefix: tuple[int, ...], episodes: int) -> Iterator[int]:
    """Yield the number of the next episode until there are enough; one that was thrown away is played again."""
    while recorded(work) < episodes:
        yield next_number(work / EPISODES, prefix)


def _device(word: str, space: gym.Space) -> Device:
    if word in DEVICES:
        return DEVICES[word](space)
    if ":" not in word:
        raise ConfigError(f"no device {word!r}; give {' or '.join(DEVICES)}, or module:Class of your own")
    return named(word, "device")(space)


def _acting(policy: BasePolicy, env: gym.Env, task: Task, dataset_id: str) -> Controller:
    """Return the policy at work in an environment of its own units."""
    spec = env.spec
    about = DatasetInfo(
        (dataset_id,), spec and spec.id, spec, spec, env.observation_space, env.action_space, None, None, 0, 0, {}
    )
    keep_goal = isinstance(policy, PythonPolicy) or task.achieved_goal  # code sees all that there is
    seen = ObservationSpec.from_space(env.observation_space, keep_goal)
    data = Dataset({}, about, "", (), seen, ActionMap.bounds_of(env.action_space), task)
    policy.check(data)
    return _Acting(Base(policy, data), seen)


@dataclass
class _Acting:
    """A base policy that sees the environment's own observations."""

    base: Base
    seen: ObservationSpec

    def reset(self, seed: int) -> None:
        self.base.place = f"episode {seed}"
        self.base.reset(seed)

    def interrupt(self) -> None:
        self.base.interrupt()

    def act(self, observation: Any) -> np.ndarray:
        return self.base.act_in_env(self.seen.flatten(observation))


class _Resting:
    """What acts while a human leaves the device alone."""

    def __init__(self, env: gym.Env) -> None:
        self._action = resting(env.action_space)

    def reset(self, seed: int) -> None:
        pass

    def interrupt(self) -> None:
        pass

    def act(self, observation: Any) -> np.ndarray:
        return self._action


class _Pace:
    """Waits before every step until it is due."""

    def __init__(self, rate: float | None) -> None:
        self._every, self._due = (1.0 / rate if rate else 0.0), 0.0

    def __call__(self) -> None:
        if not self._every:
            return
        now = time.monotonic()
        if self._due > now:
            time.sleep(self._due - now)
        self._due = max(self._due, now) + self._every
