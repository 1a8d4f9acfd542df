"""Camera images in the observation of a MuJoCo environment, rendered without a display (MUJOCO_GL=osmesa or egl)."""

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from o2o.data.datasets import DatasetInfo
from o2o.data.spaces import STATE, ObservationSpec
from o2o.errors import ConfigError, EnvironmentMismatchError
from o2o.startup import choose_renderer

HINT = (
    "without a display install OSMesa (apt-get install libosmesa6) and set MUJOCO_GL=osmesa, or use EGL with a GPU: "
    "MUJOCO_GL=egl; then restart Python, for MuJoCo reads it once"
)
choose_renderer()
try:
    import mujoco as _mujoco
except Exception as error:  # it loads the OpenGL that MUJOCO_GL names; each back end has errors of its own
    raise ConfigError(
        f"MuJoCo cannot be loaded with MUJOCO_GL={os.environ.get('MUJOCO_GL', '')!r} ({type(error).__name__}: "
        f"{' '.join(str(error).split())[:160]}); unset it where nothing is rendered; {HINT}"
    ) from error
mujoco: Any = _mujoco  # its names come from a compiled module that type checkers cannot see
FREE = "free"
"""MuJoCo's free camera, with the view that the environment itself gives it for `render`."""


def _name(env: gym.Env) -> str:
    return env.spec.id if env.spec is not None else type(env.unwrapped).__name__


def simulation(env: gym.Env) -> Any:
    """Return the object that holds an environment's MuJoCo `model` and `data`; raises `ConfigError` if there is none.

    Where an environment holds another one (mazes, kitchen), the inner one, which knows the view.
    """
    outer = env.unwrapped
    inner = [value for value in vars(outer).values() if isinstance(value, gym.Env)]
    for holder in (*(value.unwrapped for value in inner), outer):
        if isinstance(getattr(holder, "model", None), mujoco.MjModel) and hasattr(holder, "data"):
            return holder
    raise ConfigError(
        f"environment {_name(env)} is no MuJoCo simulation, so o2o cannot render cameras in it; "
        "let it put uint8 images into its observation itself, or leave `cameras` empty"
    )


def camera_names(env: gym.Env) -> tuple[str, ...]:
    """Return the cameras that `CameraObservation` can render: the model's named ones and `free`."""
    model = simulation(env).model
    return (*filter(None, (model.camera(i).name for i in range(model.ncam))), FREE)


def check_names(env: gym.Env, names: Iterable[str]) -> None:
    """Raise `ConfigError` for a camera that the environment does not have, naming those that it has."""
    known = camera_names(env)
    for name in names:
        if name not in known:
            raise ConfigError(f"environment {_name(env)} has no camera {name!r}; it has {', '.join(known)}")


class CameraObservation(gym.ObservationWrapper, gym.utils.RecordConstructorArgs):
    """Adds one uint8 image `[H, W, 3]` per camera to the observation, under the camera's name.

    A Dict observation keeps its entries; any other becomes the entry `state`. Shadows and reflections are left out.
    """

    def __init__(self, env: gym.Env, cameras: Mapping[str, tuple[int, int]]) -> None:
        """Render `cameras`, name to (height, width).

        Raises `ConfigError` for a name that the model does not have, and where nothing can be rendered.
        """
        gym.utils.RecordConstructorArgs.__init__(self, cameras=dict(cameras))
        super().__init__(env)
        check_names(env, cameras)
        space = env.observation_space
        own = space if isinstance(space, spaces.Dict) else {STATE: space}
        for name, size in cameras.items():
            if name in own:
                raise ConfigError(f"environment {_name(env)} has an observation {name!r} already; rename that entry")
            if min(size) < 1:
                raise ConfigError(f"camera {name!r}: images of {size[0]}x{size[1]} pixels; image_size must be positive")
        self.cameras = dict(cameras)
        images = {name: spaces.Box(0, 255, (*size, 3), np.uint8) for name, size in cameras.items()}
        self.observation_space = spaces.Dict({**own, **images})
        self._model = simulation(env).model
        self._renderers = {size: _renderer(self._model, size) for size in {*cameras.values()}}

    def observation(self, observation: Any) -> dict[str, Any]:
        """Return the observation with what the cameras see now."""
        entries = observation if isinstance(observation, dict) else {STATE: observation}
        return {**entries, **{name: self._image(name, size) for name, size in self.cameras.items()}}

    def _image(self, name: str, size: tuple[int, int]) -> np.ndarray:
        held = simulation(self.env)
        if held.model is not self._model:
            self._free_renderers()
            self._model = held.model
        if size not in self._renderers:
            self._renderers[size] = _renderer(held.model, size)
        renderer = self._renderers[size]
        renderer.update_scene(held.data, _free_camera(held) if name == FREE else name)
        return renderer.render().copy()

    def _free_renderers(self) -> None:
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers = {}

    def close(self) -> None:
        """Close renderers and environment."""
        self._free_renderers()
        super().close()


def _renderer(model: Any, size: tuple[int, int]) -> Any:
    try:
        model.vis.global_.offheight = max(model.vis.global_.offheight, size[0])
        model.vis.global_.offwidth = max(model.vis.global_.offwidth, size[1])
        with warnings.catch_warnings():  # the error below says it in one line
            warnings.simplefilter("ignore")
            renderer = mujoco.Renderer(model, *size)
    except Exception as error:  # each back end has errors of its own
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(f"cameras cannot be rendered here ({type(error).__name__}: {reason}); {HINT}") from error
    for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
        renderer.scene.flags[flag] = 0
    return renderer


def _free_camera(held: Any) -> Any:
    """Return the free camera with the environment's own settings for its viewer, if it has any."""
    camera = mujoco.MjvCamera()
    mujoco.mjv_defaultFreeCamera(held.model, camera)
    for key, value in (getattr(getattr(held, "mujoco_renderer", None), "default_cam_config", None) or {}).items():
        if isinstance(value, np.ndarray):
            getattr(camera, key)[:] = value
        else:
            setattr(camera, key, value)
    if camera.trackbodyid >= 0 and held.model.nbody > camera.trackbodyid:
        camera.type = mujoco.mjtCamera.mjCAMERA_TRACKING
    return camera


def images_of(space: gym.Space) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a space's images by name."""
    return ObservationSpec.from_space(space, True).images


def add_cameras(env: gym.Env, cameras: Sequence[str], image_size: int, dataset: DatasetInfo | None) -> gym.Env:
    """Render `cameras` at `image_size` squared into the observation; none named: those that the dataset has.

    Raises `EnvironmentMismatchError` naming the images that one of dataset and environment has and the other not, and
    `ConfigError` for an unknown camera.
    """
    own = images_of(env.observation_space)
    recorded = {} if dataset is None else images_of(dataset.observation_space)
    wanted = {name: (image_size, image_size) for name in cameras}
    if cameras:
        check_names(env, cameras)
    else:
        wanted = {name: (shape[0], shape[1]) for name, shape in recorded.items() if name not in own}
    if dataset is not None:
        given = {**own, **{name: (*size, 3) for name, size in wanted.items()}}
        _check_images(env, given, dataset, recorded, () if cameras else tuple(wanted))
    return CameraObservation(env, wanted) if wanted else env


def _check_images(
    env: gym.Env,
    given: Mapping[str, tuple[int, ...]],
    dataset: DatasetInfo,
    recorded: Mapping[str, tuple[int, ...]],
    derived: Sequence[str],
) -> None:
    """Compare the images of the environment with the dataset's; `derived` names were taken from the dataset."""
    where = f"dataset {dataset.name} and environment {_name(env)}"
    if derived:
        try:
            known = camera_names(env)
        except ConfigError:
            known = ()
        if absent := [name for name in derived if name not in known]:
            raise EnvironmentMismatchError(
                f"{where} do not fit: the dataset has camera {', '.join(map(repr, absent))}, the environment "
                f"{'has ' + ', '.join(known) if known else 'cannot render any'}; use the one it was recorded in"
            )
    for name in sorted({*given, *recorded}):
        if name not in given:
            raise EnvironmentMismatchError(
                f"{where} do not fit: camera {name!r} is in the dataset and not in the environment's observation "
                f"({', '.join(given) or 'no images'}); name it in `cameras`, or record a dataset without it"
            )
        if name not in recorded:
            raise EnvironmentMismatchError(
                f"{where} do not fit: camera {name!r} is in the environment's observation and not in the dataset "
                f"({', '.join(recorded) or 'no images'}); leave it out of `cameras`"
            )
        if given[name] != recorded[name]:
            raise EnvironmentMismatchError(
                f"{where} do not fit: camera {name!r} has {'x'.join(map(str, recorded[name]))} pixels in the dataset "
                f"and {'x'.join(map(str, given[name]))} in the environment; set image_size to the dataset's"
            )
