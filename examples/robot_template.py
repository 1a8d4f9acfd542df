"""A robot of your own as an environment: fill in what `Driver` does, and keep the rest.

o2o check-robot robot_template:MyRobot-v0       # moves it gently; says what training could not rely on
"""

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from o2o import envs
from o2o.data.task import Task
from o2o.envs.safety import guarded

HZ = 20
REACH = np.array([0.3, 0.3])  # m; the box that the tool must stay in, on either side of 0


class Driver:
    """Speaks to the motors. This one is a point that follows its speed; put your own in its place."""

    def __init__(self):
        """Connect."""
        self.place = np.zeros(2)

    def home(self):
        """Go to where episodes begin."""
        self.place = np.zeros(2)

    def send(self, speed):
        """Move with this speed, m/s, until the next command."""
        self.place = self.place + speed / HZ

    def read(self):
        """Return the place of the tool, m."""
        return self.place.astype(np.float32)

    def halt(self):
        """Hold still."""


class MyRobot(gym.Env):
    """Observation: place of the tool, m, and the goal, m. Action: speed of the tool, m/s."""

    metadata = {"render_fps": HZ, "replayable": False}  # hardware: no stored action is ever played again
    observation_space = spaces.Box(-1, 1, (4,), np.float32)
    action_space = spaces.Box(-0.5, 0.5, (2,), np.float32)

    def __init__(self):
        """Connect to the robot."""
        self.driver = Driver()

    def reset(self, *, seed=None, options=None):
        """Go home, and draw a goal."""
        super().reset(seed=seed)
        self.goal = self.np_random.uniform(-0.2, 0.2, 2).astype(np.float32)
        self.driver.home()
        return self.seen(), {}

    def step(self, action):
        """Send a command; pay 1 in the step that arrives."""
        self.driver.send(action)
        success = bool(np.linalg.norm(self.driver.read() - self.goal) < 0.03)
        return self.seen(), float(success), success, False, {"success": success}

    def seen(self):
        """Return the observation `[4]`."""
        return np.concatenate([self.driver.read(), self.goal])

    def stop(self):
        """Hold still: what a watchdog calls."""
        self.driver.halt()


def make(render_mode=None):  # "rgb_array": give it to the class if it can draw itself, for `o2o play`
    """Return the robot within its limits; rate and watchdog are the outermost."""
    return guarded(
        MyRobot(), max_change=0.2, forward=lambda seen, speed: seen[:2] + speed / HZ, box=(-REACH, REACH), hz=HZ,
        timeout_s=1.0,
    )  # fmt: skip


if "MyRobot-v0" not in gym.registry:
    gym.register("MyRobot-v0", "robot_template:make", max_episode_steps=100)
    envs.register(
        "MyRobot-v0", Task("my-robot", sparse=True, has_success=True, terminate_on_success=True, metric="success")
    )
