"""Devices by which a human drives an environment or takes over from a policy: keyboard, gamepad, or one of your own."""

import os
import signal
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import gymnasium as gym
import numpy as np

from o2o.data.recorder import DISCARD
from o2o.data.spaces import ActionMap
from o2o.errors import ConfigError, EnvironmentFaultError

PAIRS = ("da", "ws", "eq", "rf", "tg", "yh", "uj", "ik")
"""Keys of each action entry: up and down."""
DEAD_ZONE = 0.1
"""Deflection of a stick, of 1, below which it counts as left alone."""


class Reading(NamedTuple):
    """What a device says in one step."""

    action: np.ndarray | None = None
    """The human's action `[*shape]` in the environment's units; None: the policy acts."""
    end: Literal["", "success", "failure", "again"] = ""
    """How the human ends the episode after this step; `again`: it is thrown away and played once more."""


class Device(Protocol):
    """What a human holds."""

    def read(self) -> Reading:
        """Return what is pressed now, without waiting."""
        ...

    def close(self) -> None:
        """Let go of the hardware."""
        ...


class TakeOver(gym.Wrapper):
    """Play the human's action where the device gives one; `info["intervene_action"]` says so.

    It belongs around the bare environment, inside a recorder. An episode that the human ends is truncated, and its last
    step has success true or false.
    """

    def __init__(self, env: gym.Env, device: Device, alone: bool = False, success_key: str | None = None) -> None:
        """Let `device` take over. `alone`: nobody else acts, so that every action counts as the human's.

        `success_key` is the task's, if it has one.
        """
        super().__init__(env)
        self.device, self._alone, self._success_key = device, alone, success_key or "success"

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step with the human's action or with `action`, in the environment's units."""
        human, end = self.device.read()
        if human is not None:
            action = np.asarray(human, self.action_space.dtype)
            if action.shape != self.action_space.shape or not np.isfinite(action).all():
                raise EnvironmentFaultError(
                    f"the device gave the action {' '.join(str(human).split())}; expected finite numbers of shape "
                    f"{self.action_space.shape}"
                )
        observation, reward, terminated, truncated, info = self.env.step(action)
        if human is not None or self._alone:
            info = {**info, "intervene_action": action}
        if end == "again":
            return observation, reward, terminated, True, {**info, DISCARD: True}
        if end:
            return observation, reward, terminated, True, {**info, self._success_key: end == "success"}
        return observation, reward, terminated, truncated, info

    def close(self) -> None:
        """Close the device and the environment."""
        try:
            self.device.close()
        finally:
            super().close()


def pygame_for(what: str) -> Any:
    """Import pygame; raises `ConfigError` where it is not installed."""
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    try:
        import pygame  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            f"{what} needs pygame: pip install 'o2o[devices]'; or give module:Class, a device of your own"
        ) from error
    return pygame


def _steered(space: gym.Space, entries: int, what: str) -> ActionMap:
    """Return the map of an action space that a device of so many entries can steer. Raises `ConfigError`."""
    found = ActionMap.from_space(space)
    if found.dim > entries:
        raise ConfigError(
            f"{what} steers {entries} action entries, the environment has {found.dim}: give module:Class, a device of "
            "your own"
        )
    return found


class Keyboard:
    """Keys held in a window: `d`/`a`, `w`/`s`, `e`/`q`, `r`/`f`, ... move entry 0, 1, 2, 3, ... to its end.

    Enter ends the episode as a success, Escape as a failure, Backspace throws it away.
    """

    def __init__(self, space: gym.Space) -> None:
        """Steer actions of `space`. Raises `ConfigError` without pygame or for too many entries."""
        self._map = _steered(space, len(PAIRS), "keyboard")
        self._pygame = game = pygame_for("keyboard")
        self._held = set[int]()
        self._ends = {game.K_RETURN: "success", game.K_ESCAPE: "failure", game.K_BACKSPACE: "again"}
        self._pairs = [[ord(key) for key in pair] for pair in PAIRS[: self._map.dim]]  # as pygame's

    def read(self) -> Reading:
        """Return the action of the keys that are held. Closing the window is Ctrl-C."""
        game, end = self._pygame, ""
        self._open()
        for event in game.event.get((game.KEYDOWN, game.KEYUP, game.QUIT)):
            if event.type == game.QUIT:
                signal.raise_signal(signal.SIGINT)
            elif event.type == game.KEYDOWN:
                self._held.add(event.key)
                end = self._ends.get(event.key, end)
            else:
                self._held.discard(event.key)
        moved = [(up in self._held) - (down in self._held) for up, down in self._pairs]
        return Reading(self._map.to_env(moved) if any(moved) else None, end)  # pyright: ignore[reportArgumentType]

    def _open(self) -> None:
        """Open a window of its own, unless the environment shows one of pygame's."""
        game = self._pygame
        if game.display.get_init() and game.display.get_surface() is not None:
            return
        try:
            game.display.init()
            game.display.set_mode((420, 60))
        except game.error as error:
            raise ConfigError(
                f"keyboard needs a display to take keys in ({error}): set DISPLAY, or use gamepad"
            ) from error
        game.display.set_caption("o2o record: keys go here; Enter success, Escape failure, Backspace again")

    def close(self) -> None:
        """Close the window."""
        self._pygame.display.quit()


class Gamepad:
    """Sticks and triggers: left x, left y, right y, right x, and right trigger minus left move entries 0 to 4.

    A ends the episode as a success, B as a failure, X throws it away.
    """

    def __init__(self, space: gym.Space, number: int = 0) -> None:
        """Steer actions of `space` by the gamepad of this number. Raises `ConfigError` if there is none."""
        self._map = _steered(space, 5, "gamepad")
        self._pygame = game = pygame_for("gamepad")
        from pygame._sdl2 import controller  # pyright: ignore[reportMissingImports]

        os.environ.setdefault("SDL_JOYSTICK_ALLOW_BACKGROUND_EVENTS", "1")
        game.init()
        controller.init()
        if not (number < controller.get_count() and controller.is_controller(number)):
            raise ConfigError(f"there is no gamepad {number}: {controller.get_count()} found; plug it in first")
        self._pad, self._down = controller.Controller(number), set[str]()
        self._ends = (
            (game.CONTROLLER_BUTTON_X, "again"), (game.CONTROLLER_BUTTON_B, "failure"),
            (game.CONTROLLER_BUTTON_A, "success"),
        )  # fmt: skip

    def read(self) -> Reading:
        """Return the action of the sticks, None while all are left alone."""
        game = self._pygame
        game.event.pump()
        axis = lambda name: self._pad.get_axis(getattr(game, f"CONTROLLER_AXIS_{name}")) / 32767  # noqa: E731
        moved = [axis("LEFTX"), -axis("LEFTY"), -axis("RIGHTY"), axis("RIGHTX")]
        moved = np.asarray([*moved, axis("TRIGGERRIGHT") - axis("TRIGGERLEFT")])[: self._map.dim]
        moved = np.where(np.abs(moved) < DEAD_ZONE, 0.0, moved)
        down = {word for button, word in self._ends if self._pad.get_button(button)}
        end = next((word for _, word in self._ends if word in down - self._down), "")
        self._down = down
        return Reading(self._map.to_env(moved) if moved.any() else None, end)  # pyright: ignore[reportArgumentType]

    def close(self) -> None:
        """Let go of the gamepad."""
        self._pad.quit()


DEVICES: dict[str, Callable[[gym.Space], Device]] = {"keyboard": Keyboard, "gamepad": Gamepad}
"""What the command line calls them; each is made with the action space."""


def resting(space: gym.Space) -> np.ndarray:
    """Return the action of nobody: the middle of the range."""
    found = ActionMap.from_space(space)
    return found.to_env(np.zeros(found.dim))
