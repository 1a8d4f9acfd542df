"""Safety wrappers: whatever is asked for, what reaches the robot keeps to the limits, and every change is told."""

import time
from typing import Any, cast

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays

from o2o import envs
from o2o.data.demonstrations import record
from o2o.data.task import Task
from o2o.envs.robot_check import check_robot_env
from o2o.envs.safety import (
    ActionBounds,
    ControlRate,
    DeadMan,
    FreshObservation,
    SlewLimit,
    VelocityLimit,
    Watchdog,
    WorkspaceBox,
    guarded,
    safety_counts,
)
from o2o.errors import ConfigError, EnvironmentFaultError

TINY = 1e-6
commands = st.lists(arrays(np.float32, 2, elements=st.floats(-5, 5, width=32)), min_size=1, max_size=12)


class Cart(gym.Env):
    """A point `[2]` that moves by its command; it remembers what it was sent, and can be made to misbehave."""

    metadata = {"render_fps": 50, "replayable": False}
    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, frozen_from: int = 10**9, delay_s: float = 0.0) -> None:
        self.frozen_from, self.delay_s, self.stops, self.sent = frozen_from, delay_s, 0, []
        self.at: Any = np.zeros(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at, self.sent = np.zeros(2), []
        return self.at.astype(np.float32), {}

    def step(self, action):
        self.sent.append(np.array(action, np.float64))
        time.sleep(self.delay_s)
        if len(self.sent) < self.frozen_from:
            self.at = self.at + 0.1 * np.asarray(action, np.float64) + 1e-4
        return self.at.astype(np.float32), 0.0, False, False, {}

    def stop(self):
        self.stops += 1


def cart(env: gym.Env) -> Cart:
    """Return the bare cart."""
    return cast(Cart, env.unwrapped)


def forward(observation, action):
    """Return where a command leads."""
    return observation + 0.1 * action + 1e-4


def played(env, actions):
    """Play actions from a reset; return what the robot was sent, `[T, 2]`, and where it was, `[T + 1, 2]`."""
    places = [env.reset()[0]]
    places += [env.step(action)[0] for action in actions]
    return np.asarray(cart(env).sent), np.asarray(places)


@given(commands)
@settings(max_examples=40, deadline=None)
def test_bounds_hold(actions) -> None:
    """No command leaves narrower bounds; one within them is not changed."""
    sent, _ = played(ActionBounds(Cart(), -0.5, [0.25, 2.0]), actions)
    assert (sent >= -0.5 - TINY).all() and (sent <= np.array([0.25, 1.0], np.float32) + TINY).all()
    inside = np.asarray([(a >= -0.5).all() and (a <= [0.25, 1.0]).all() for a in actions])
    assert np.array_equal(sent[inside], np.asarray(actions, np.float64)[inside])


@given(commands, st.floats(0, 1.5))
@settings(max_examples=40, deadline=None)
def test_slew_holds(actions, change) -> None:
    """Commands differ by at most `max_change`, from rest on, with and without the bounds inside."""
    for env in (SlewLimit(Cart(), change), guarded(Cart(), max_change=change)):
        sent, _ = played(env, actions)
        assert (np.abs(np.diff(np.vstack([np.zeros(2), sent]), axis=0)) <= change + TINY).all()


@given(commands)
@settings(max_examples=40, deadline=None)
def test_velocity_holds(actions) -> None:
    """A target stays within reach of where the robot is."""
    sent, places = played(VelocityLimit(Cart(), 0.3, lambda observation: observation), actions)
    assert (np.abs(sent - places[:-1]) <= 0.3 + TINY).all()


@given(commands)
@settings(max_examples=40, deadline=None)
def test_workspace_holds(actions) -> None:
    """The robot's point stays in the box, whatever is asked for."""
    _, places = played(guarded(Cart(), forward=forward, box=([-0.2, -0.2], [0.2, 0.2])), actions)
    assert (np.abs(places) <= 0.2 + 12e-4 + TINY).all()  # at the edge nothing but its drift moves it


def test_workspace_lets_go_up_to_its_edge_and_back() -> None:
    """A command is shortened to the edge, not refused; one that leads back from outside is played whole."""
    env = WorkspaceBox(Cart(), forward, [-1.0, -1.0], [0.05, 1.0])
    sent, places = played(env, [np.array([1.0, 0.0], np.float32)])
    assert sent[0, 0] == pytest.approx(0.499, abs=1e-3) and places[1, 0] == pytest.approx(0.05, abs=1e-4)
    cart(env).at = np.array([0.5, 0.0], np.float32)
    env.played(np.zeros(2), np.array([0.5, 0.0], np.float32))
    assert env.step(np.array([-1.0, 0.0], np.float32))[0][0] == pytest.approx(0.4001, abs=1e-4)
    assert env.step(np.array([1.0, 0.0], np.float32))[0][0] == pytest.approx(0.4002, abs=1e-3)  # it stays


def test_what_is_no_command_is_refused() -> None:
    """NaN, Inf and another shape stop the robot; nothing is sent, and it is counted."""
    env = ActionBounds(Cart())
    for bad in (np.array([np.nan, 0], np.float32), np.array([0, np.inf], np.float32), np.zeros(3, np.float32), "left"):
        env.reset()
        with pytest.raises(EnvironmentFaultError, match=r"bounds: the command .* is not \(2,\) finite numbers"):
            env.step(bad)
        assert not cart(env).sent
    assert cart(env).stops == 4 and safety_counts(env) == {"bounds": 4}


def test_counts_and_commanded_action() -> None:
    """Info tells the command and, by concern, how often it was changed in the episode."""
    env = guarded(Cart(), max_change=0.5)
    env.reset()
    info = env.step(np.array([3.0, 0.2], np.float32))[4]
    np.testing.assert_allclose(info["commanded_action"], [0.5, 0.2], rtol=1e-6)
    assert info["safety"] == {"bounds": 0, "slew": 1}
    env.step(np.array([0.4, 0.2], np.float32))
    env.reset()
    assert env.step(np.zeros(2, np.float32))[4]["safety"] == {"bounds": 0, "slew": 0}
    assert safety_counts(env) == {"bounds": 0, "slew": 1}


def test_run_stores_command() -> None:
    """What a run stores as executed, and what a recording holds, is the command, not the wish."""
    env = envs.wrap(guarded(Cart(), max_change=0.25), Task("cart"))
    env.reset()
    info = env.step(np.array([1.0, -1.0], np.float32))[4]
    np.testing.assert_allclose(info["executed_action"], [0.25, -0.25], rtol=1e-6)
    assert not info["intervened"]
    limited = gym.wrappers.TimeLimit(guarded(Cart(), max_change=0.25), 3)
    episode = next(iter(record(limited, lambda observation, rng: np.array([1.0, -1.0], np.float32), steps=3)))
    np.testing.assert_allclose(episode.actions, [[0.25, -0.25], [0.5, -0.5], [0.75, -0.75]], rtol=1e-6)


def test_dead_man_released() -> None:
    """A released switch, or one that fails, gives `stay`; after `patience` steps the episode is cut."""
    held = iter([True, False, True, False, False])
    env = DeadMan(Cart(), lambda: next(held), stay=0.0, patience=2)
    env.reset()
    cut = [env.step(np.array([0.5, 0.5], np.float32))[3] for _ in range(5)]
    assert cut == [False, False, False, False, True]
    assert [command[0] for command in cart(env).sent] == [0.5, 0.0, 0.5, 0.0, 0.0]
    broken = DeadMan(Cart(), lambda: 1 / 0)  # pyright: ignore[reportArgumentType]
    broken.reset()
    broken.step(np.array([0.5, 0.5], np.float32))
    assert cart(broken).sent[0].tolist() == [0.0, 0.0]


def test_frozen_sensor_stops_robot() -> None:
    """A frame that repeats is played on with `stay`, then the robot is stopped."""
    env = FreshObservation(Cart(frozen_from=3), max_repeats=3, stay=0.0)
    env.reset()
    action = np.array([0.5, 0.5], np.float32)
    for _ in range(4):
        env.step(action)
    with pytest.raises(EnvironmentFaultError, match="has not changed for 3 steps; the robot was stopped"):
        env.step(action)
    assert cart(env).stops == 1
    assert [command[0] for command in cart(env).sent] == [0.5, 0.5, 0.5, 0.0, 0.0]


def test_old_observation_stops_robot() -> None:
    """An observation that is older than allowed stops the robot at once."""
    ages = iter([0.01, 0.5])
    env = FreshObservation(Cart(), age_s=lambda observation, info: next(ages), max_age_s=0.2)
    env.reset()
    env.step(np.zeros(2, np.float32))
    with pytest.raises(EnvironmentFaultError, match=r"0\.5 s old, more than 0\.2 s"):
        env.step(np.zeros(2, np.float32))
    assert cart(env).stops == 1


def test_watchdog_notices_hung_policy_and_driver() -> None:
    """No step, or one that does not return, calls `stop()` while it hangs; a reset begins anew."""
    env = Watchdog(Cart(), 0.05)
    env.reset()
    env.step(np.zeros(2, np.float32))
    time.sleep(0.15)  # the policy thinks
    assert cart(env).stops == 1
    with pytest.raises(EnvironmentFaultError, match=r"watchdog: no step arrived within 0\.05 s"):
        env.step(np.zeros(2, np.float32))
    assert len(cart(env).sent) == 1
    env.reset()
    cart(env).delay_s = 0.15
    with pytest.raises(EnvironmentFaultError, match="a step did not return"):
        env.step(np.zeros(2, np.float32))
    assert cart(env).stops == 2
    env.close()
    time.sleep(0.1)
    assert cart(env).stops == 2


def test_rate_is_kept_and_overruns_told() -> None:
    """Steps begin a period apart; a late one is counted, and too many in a row stop the robot."""
    env = ControlRate(Cart(), 100)
    env.reset()
    start = time.monotonic()
    for _ in range(6):
        env.step(np.zeros(2, np.float32))
    assert time.monotonic() - start >= 0.05
    jitter = env.jitter()
    assert jitter["steps"] == 6 and 0 <= jitter["p50"] <= jitter["p99"] <= jitter["max"]
    late = ControlRate(Cart(), 100, overrun="fault", max_overruns=2)
    late.reset()
    late.step(np.zeros(2, np.float32))
    time.sleep(0.03)
    late.step(np.zeros(2, np.float32))
    with pytest.raises(EnvironmentFaultError, match=r"2 commands in a row came late, .* the robot was stopped"):
        for _ in range(2):
            time.sleep(0.03)
            late.step(np.zeros(2, np.float32))
    assert late.overruns == 2 and cart(late).stops == 1


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: SlewLimit(Cart(), -1.0),
        lambda: VelocityLimit(Cart(), np.nan, lambda observation: observation),
        lambda: WorkspaceBox(Cart(), forward, [1.0], [0.0]),
        lambda: guarded(Cart(), forward=forward),
        lambda: ControlRate(Cart(), 0),
        lambda: FreshObservation(Cart(), 0),
        lambda: Watchdog(gym.make("Pendulum-v1"), 1.0),
        lambda: ActionBounds(gym.make("CartPole-v1")),
    ],
)
def test_wrong_limits_refused(wrong) -> None:
    """Limits that mean nothing are refused when the wrapper is made."""
    with pytest.raises(ConfigError):
        wrong()


class Sloppy(Cart):
    """Everything that a driver can do wrong."""

    metadata = {}
    observation_space = spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self) -> None:
        super().__init__()
        self.frame = np.zeros(2, np.float32)

    def step(self, action) -> Any:
        action *= 2
        self.frame += 3.0
        return self.frame, np.nan, 0, False, {}

    stop: Any = None


def test_robot_check() -> None:
    """A guarded robot passes; each fault of a sloppy one is named, once."""
    robot = Watchdog(gym.wrappers.TimeLimit(guarded(Cart()), 30), 1.0)
    assert check_robot_env(robot) == []
    assert len(cart(robot).sent) == 0 and np.abs(cart(robot).at).max() == 0  # it was reset
    robot.close()
    found = "\n".join(check_robot_env(Sloppy()))
    for fault in (
        "'replayable'", "'render_fps'", "no method stop()", "no safety wrapper", "no watchdog",
        "changed the action array", "changed the observation",
        "outside its space (3.0 in entry 0, expected -1.0 to 1.0)", "reward nan", "0 as terminated",
    ):  # fmt: skip
        assert found.count(fault) == 1, (fault, found)
    assert "give a Box" in "\n".join(check_robot_env(gym.make("CartPole-v1")))
