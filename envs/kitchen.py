"""FrankaKitchen: the raw reward is the number of subtasks completed so far, 0..4; the metric is that over 4."""

from typing import Any

import gymnasium as gym

SUBTASKS = ["microwave", "kettle", "light switch", "slide cabinet"]
"""D4RL's `complete` and `partial`; a dataset's own list wins."""


def spec_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments to add to those of a specification: the four subtasks, unless it has its own."""
    return {} if "tasks_to_complete" in kwargs else {"tasks_to_complete": SUBTASKS}


class CompletedSubtasks(gym.Wrapper):
    """Reward = subtasks completed in this episode; infos are copied, as the library changes them (its issue 336)."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset; no subtask is complete."""
        observation, info = self.env.reset(seed=seed, options=options)
        return observation, {key: list(value) for key, value in info.items()}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Step; `info["success"]` when all subtasks are complete."""
        observation, _, terminated, truncated, info = self.env.step(action)
        info = {key: list(value) if isinstance(value, list | set) else value for key, value in info.items()}
        done = len(info["episode_task_completions"])
        info["success"] = done == len(self.get_wrapper_attr("goal"))
        return observation, float(done), terminated, truncated, info
