"""An environment of your own, and a person's hand to begin with: a simulated arm that shall reach a point.

    o2o train flow_bc --dataset lab/my-arm-v0 --env my_robot:MyArm-v0      # in the folder of this file

Put your robot in place of `MyArm`, and your joystick in place of `teleoperate`. Everything else stays.
"""

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from o2o import envs
from o2o.data.task import Task

LINK, CLOSE, STEP = 0.5, 0.06, 0.15


class MyArm(gym.Env):
    """Two links of 0.5 m. Observation: cos and sin of both joints, and the goal. Action: both joints' speeds."""

    metadata = {"render_fps": 20}  # for hardware also "replayable": False, so that no stored action is played again
    observation_space = spaces.Box(-2, 2, (6,), np.float32)
    action_space = spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        """Draw joints and a goal within reach."""
        super().reset(seed=seed)
        self.joints = self.np_random.uniform(-np.pi, np.pi, 2)
        radius, angle = self.np_random.uniform(0.3, 0.9), self.np_random.uniform(-np.pi, np.pi)
        self.goal = radius * np.asarray([np.cos(angle), np.sin(angle)])
        return self.seen(), {}

    def step(self, action):
        """Move both joints; pay 1 in the step that arrives."""
        self.joints = self.joints + STEP * np.clip(action, -1, 1)
        success = bool(np.linalg.norm(tip(self.joints) - self.goal) < CLOSE)
        return self.seen(), float(success), success, False, {"success": success}

    def seen(self):
        """Return the observation `[6]`."""
        return np.concatenate([np.cos(self.joints), np.sin(self.joints), self.goal]).astype(np.float32)


def tip(joints):
    """Return where the arm ends, `[2]`."""
    angles = np.cumsum(joints)
    return LINK * np.asarray([np.cos(angles).sum(), np.sin(angles).sum()])


def teleoperate(observation, rng):
    """Return what a person would do, `[2]`: move the tip towards the goal, with a shaky and slow hand."""
    joints, goal = np.arctan2(observation[2:4], observation[:2]), observation[4:]
    angles = np.cumsum(joints)
    parts = LINK * np.stack([-np.sin(angles), np.cos(angles)])
    jacobian = np.stack([parts.sum(axis=1), parts[:, 1]], axis=1)
    error = goal - tip(joints)
    wanted = jacobian.T @ np.linalg.solve(jacobian @ jacobian.T + 0.02 * np.eye(2), error)
    return np.clip(2.0 * wanted + 0.4 * rng.standard_normal(2), -1, 1).astype(np.float32)


if "MyArm-v0" not in gym.registry:
    gym.register("MyArm-v0", "my_robot:MyArm", max_episode_steps=40)
    task = Task("my-arm", sparse=True, has_success=True, terminate_on_success=True, metric="success")
    envs.register("MyArm-v0", task)
