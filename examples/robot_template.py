"""A robot of your own as an environment: put your driver in place of what `driver` marks, and keep the rest.

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


class MyRobot(gym.Env):
    """Observation: place of the tool, m, and the goal, m. Action: speed of the tool, m/s."""

    metadata = {"render_fps": HZ, "replayable": False}  # hardware: no stored action is ever played again
    observation_space = spaces.Box(-1, 1, (4,), np.float32)
    action_space = spaces.Box(-0.5, 0.5, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        """Go home, and draw a goal."""
        super().reset(seed=seed)
        self.goal = self.np_random.uniform(-0.2, 0.2, 2)
        self.place = np.zeros(2)  # driver: connect unless that was done, go home and wait until there
        return self.seen(), {}

    def step(self, action):
        """Send a command; pay 1 in the step that arrives."""
        self.place = self.place + action / HZ  # driver: send, wait most of a period, read the newest frame
        success = bool(np.linalg.norm(self.place - self.goal) < 0.03)
        return self.seen(), float(success), success, False, {"success": success}

    def seen(self):
        """Return the observation `[4]`, a new array."""
        return np.concatenate([self.place, self.goal]).astype(np.float32)

    def stop(self):
        """Hold still, at once: guards call it, and whatever ends a run."""  # driver


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
