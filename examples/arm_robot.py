"""A robot behind a socket as an environment, written as a lab would: the driver of `arm_controller.py`, and its guards.

o2o actor --env arm_robot:TableArm-v0 --learner ADDRESS
"""

import json
import socket
import threading
import time

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from o2o import envs
from o2o.data.task import Task
from o2o.envs.safety import guarded

ADDRESS = "127.0.0.1:7080"
HZ, WAIT = 50, 0.6  # of each period the arm moves this share, then it is read; the policy has the rest
LINKS = np.array([0.25, 0.2, 0.15])  # m
BOX = np.array([-0.45, -0.55]), np.array([0.65, 0.55])  # m; where the tip may be
CONNECT_S, HOMING_S = 5.0, 5.0


def tip(joints):
    """Return where the arm ends, m `[2]`."""
    angles = np.cumsum(joints)
    return np.array([LINKS @ np.cos(angles), LINKS @ np.sin(angles)])


class Driver:
    """The connection to the controller. A thread keeps the newest frame, so reading never waits."""

    def __init__(self, address):
        """Connect; the controller may still be starting."""
        (host, port), until = address.rsplit(":", 1), time.time() + CONNECT_S
        while True:
            try:
                self.socket = socket.create_connection((host, int(port)), 2.0)
                break
            except ConnectionRefusedError:
                if time.time() > until:
                    raise
                time.sleep(0.1)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.settimeout(None)
        self.frame, self.broken = None, False
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self):
        try:
            for line in self.socket.makefile():
                self.frame = json.loads(line)
        except (OSError, ValueError):
            pass
        self.broken = True

    def send(self, **message):
        """Send a command."""
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def read(self):
        """Return the newest frame; raises `ConnectionError` if the controller has gone."""
        if self.broken:
            raise ConnectionError("the controller hung up")
        return self.frame

    def home(self):
        """Go to where episodes begin, and wait until the arm is there."""
        sent, until = time.time(), time.time() + HOMING_S
        self.send(home=True)
        while not ((frame := self.read()) and frame["ready"] and frame["time"] > sent + 0.05):
            if time.time() > until:
                raise TimeoutError(f"the arm is not at home after {HOMING_S} s")
            time.sleep(0.005)

    def close(self):
        """Hang up: the arm holds still."""
        if not self.broken:
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


class TableArm(gym.Env):
    """Reach a point. Observation: joints, rad, their speeds, rad/s, tip and goal, m. Action: joint speeds, rad/s."""

    metadata = {"render_fps": HZ, "replayable": False}
    observation_space = spaces.Box(-20, 20, (10,), np.float32)
    action_space = spaces.Box(-2, 2, (3,), np.float32)

    def __init__(self, address=ADDRESS):
        """Drive the controller at `address`; it is connected to when an episode begins."""
        self.address, self.driver = address, None

    def reset(self, *, seed=None, options=None):
        """Connect if need be, go home, and draw a goal within reach."""
        super().reset(seed=seed)
        if self.driver is None or self.driver.broken:
            self.driver = Driver(self.address)
        self.driver.home()
        angle, radius = self.np_random.uniform(-1.0, 1.0), self.np_random.uniform(0.35, 0.5)
        self.goal = radius * np.array([np.cos(angle), np.sin(angle)])
        return self.seen(self.driver.read()), {}

    def step(self, action):
        """Send a command, wait, read; pay 1 in the step that arrives."""
        self.driver.send(speeds=[float(speed) for speed in action])
        time.sleep(WAIT / HZ)
        frame = self.driver.read()
        success = bool(np.linalg.norm(tip(frame["joints"]) - self.goal) < 0.04)
        info = {"success": success, "age_s": time.time() - frame["time"]}  # two machines: clocks set by NTP or PTP
        return self.seen(frame), float(success), success, False, info

    def seen(self, frame):
        """Return the observation `[10]`."""
        parts = frame["joints"], frame["speeds"], tip(frame["joints"]), self.goal
        return np.concatenate(parts).astype(np.float32)

    def stop(self):
        """Hold still: what guards and the end of a run call."""
        if self.driver is not None and not self.driver.broken:
            self.driver.send(hold=True)

    def close(self):
        """Hang up."""
        if self.driver is not None:
            self.driver.close()


def make(address=ADDRESS):
    """Return the arm within its limits."""
    return guarded(
        TableArm(address), max_change=0.6, forward=lambda seen, speed: tip(seen[:3] + speed / HZ), box=BOX, hz=HZ,
        max_repeats=5, age_s=lambda seen, info: info["age_s"], max_age_s=0.1, timeout_s=0.5,
    )  # fmt: skip


def demonstrate(observation):
    """Return what a person would do, rad/s `[3]`: move the tip towards the goal with a shaky hand."""
    joints, error = observation[:3], observation[8:] - observation[6:8]
    angles = np.cumsum(joints)
    parts = LINKS * np.stack([-np.sin(angles), np.cos(angles)])
    jacobian = np.cumsum(parts[:, ::-1], axis=1)[:, ::-1]
    speed = jacobian.T @ np.linalg.solve(jacobian @ jacobian.T + 0.01 * np.eye(2), 4 * error)
    return np.clip(speed + 0.2 * np.random.standard_normal(3), -2, 2).astype(np.float32)


if "TableArm-v0" not in gym.registry:
    gym.register("TableArm-v0", "arm_robot:make", max_episode_steps=100)
    envs.register(
        "TableArm-v0", Task("table-arm", sparse=True, has_success=True, terminate_on_success=True, metric="success")
    )
