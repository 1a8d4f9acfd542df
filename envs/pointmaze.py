"""PointMaze: the scripted waypoint controller, and the embedded datasets it makes in seconds, imperfect on purpose."""

import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np

from o2o.data import datasets
from o2o.envs.cameras import FREE, CameraObservation
from o2o.errors import DatasetError

Mood = Literal["direct", "slow", "detour", "lost", "short"]


class WaypointController:
    """Shortest path over the maze's cells, and a PD controller (gains 10 and -1) towards the next one.

    A mood spoils an episode: `slow` pushes weakly, `detour` visits a random cell first, `lost` visits random cells
    all the time, `short` stops a cell before the goal.
    """

    def __init__(self, env: gym.Env, noise: float = 0.0, moods: dict[Mood, float] | None = None) -> None:
        """Control a PointMaze environment: action noise N(0, noise), probability of each mood."""
        self._maze = env.get_wrapper_attr("maze")
        cells = np.asarray([[cell != 1 for cell in row] for row in self._maze.maze_map])
        self._free = [(int(i), int(j)) for i, j in np.argwhere(cells)]
        self._noise = noise
        self._moods = moods or {"direct": 1.0}
        self._mood: Mood = "direct"
        self._errand: tuple[int, int] | None = None
        self._distances: dict[tuple[int, int], dict[tuple[int, int], int]] = {}

    def reset(self, rng: np.random.Generator) -> None:
        """Draw the mood of the next episode."""
        names = list(self._moods)
        self._mood = names[rng.choice(len(names), p=np.asarray(list(self._moods.values())) / sum(self._moods.values()))]
        self._errand = self._draw(rng) if self._mood in ("detour", "lost") else None

    def __call__(self, observation: dict[str, np.ndarray], rng: np.random.Generator) -> np.ndarray:
        """Return the action `[2]`, float32 in [-1, 1], for an observation of the environment."""
        position, velocity = observation["observation"][:2], observation["observation"][2:]
        cell, goal = self._cell(position), self._cell(observation["desired_goal"])
        if self._errand == cell:
            self._errand = self._draw(rng) if self._mood == "lost" else None
        target = self._errand or goal
        if self._mood == "short" and self._steps_to(goal).get(cell, 99) <= 1:
            waypoint = self._maze.cell_rowcol_to_xy(np.asarray(cell)) if cell != goal else position
        elif cell == target:
            waypoint = observation["desired_goal"] if self._errand is None else position
        else:
            waypoint = self._maze.cell_rowcol_to_xy(np.asarray(self._next(cell, target)))
        action = np.clip(10.0 * (waypoint - position) - velocity, -1.0, 1.0)
        if self._mood == "slow":
            action = np.clip(1.2 * (waypoint - position) - 2.0 * velocity, -1.0, 1.0)
        action = action + self._noise * rng.standard_normal(2)
        return np.clip(action, -1.0, 1.0).astype(np.float32)

    def _draw(self, rng: np.random.Generator) -> tuple[int, int]:
        return self._free[rng.integers(len(self._free))]

    def _cell(self, position: np.ndarray) -> tuple[int, int]:
        row, column = self._maze.cell_xy_to_rowcol(position)
        return int(row), int(column)

    def _steps_to(self, target: tuple[int, int]) -> dict[tuple[int, int], int]:
        """Return every free cell's number of moves to `target`, by breadth-first search, remembered."""
        if target not in self._distances:
            distances, queue, free = {target: 0}, deque([target]), set(self._free)
            while queue:
                i, j = queue.popleft()
                for near in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)):
                    if near in free and near not in distances:
                        distances[near] = distances[(i, j)] + 1
                        queue.append(near)
            self._distances[target] = distances
        return self._distances[target]

    def _next(self, cell: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
        """Return the neighbour of `cell` on a shortest path to `target`."""
        distances, (i, j) = self._steps_to(target), cell
        return min(((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)), key=lambda near: distances.get(near, 10_000))


def remove_model_file(env: gym.Env) -> None:
    """Remove the model that a maze, once it is loaded, leaves in the temporary folder, one for each environment."""
    written = getattr(env.unwrapped, "tmp_xml_file_path", None)
    if written:
        Path(written).unlink(missing_ok=True)


@dataclass(frozen=True)
class Recipe:
    """How an embedded dataset is made."""

    env_id: str
    time_limit: int
    """Steps; direct paths fit, slow ones do not."""
    steps: int
    noise: float
    moods: tuple[tuple[Mood, float], ...]
    """Probability of each mood."""
    seed: int = 0
    version: int = 0

    def make_env(self) -> gym.Env:
        """Make the environment: the episode ends at the goal, or at the time limit."""
        env = gym.make(
            self.env_id,
            max_episode_steps=self.time_limit,
            continuing_task=False,
            reset_target=False,
            disable_env_checker=True,
        )
        remove_model_file(env)
        return env


@dataclass(frozen=True)
class PixelRecipe(Recipe):
    """A recipe whose observations have camera images besides."""

    cameras: tuple[str, ...] = (FREE,)
    image_size: int = 48
    """Height and width of the images."""

    def make_env(self) -> gym.Env:
        """Make the environment with its cameras."""
        return CameraObservation(
            super().make_env(), {name: (self.image_size, self.image_size) for name in self.cameras}
        )


MOODS: tuple[tuple[Mood, float], ...] = (
    ("direct", 0.1),
    ("slow", 0.4),
    ("detour", 0.15),
    ("lost", 0.15),
    ("short", 0.2),
)
PIXEL_MOODS: tuple[tuple[Mood, float], ...] = (("direct", 0.6), ("slow", 0.2), ("detour", 0.2))
EMBEDDED: dict[str, Recipe] = {
    "pointmaze-umaze": Recipe("PointMaze_UMaze-v3", 150, 25_000, 0.5, MOODS),
    "pointmaze-medium": Recipe("PointMaze_Medium-v3", 250, 40_000, 0.5, MOODS),
    "pointmaze-pixels": PixelRecipe("PointMaze_UMaze-v3", 150, 2_000, 0.3, PIXEL_MOODS),
}
"""Name (of `o2o data make NAME`) and recipe; the dataset's id is `embedded_id(name)`."""


def _name(name: str) -> str:
    return re.sub(r"-v\d+$", "", name.removeprefix(datasets.EMBEDDED_PREFIX))


def embedded_id(name: str) -> str:
    """Return the Minari id of an embedded dataset, given by name or id; raises `DatasetError` for an unknown one."""
    name = _name(name)
    if name not in EMBEDDED:
        raise DatasetError(f"no embedded dataset {name!r}; there are {', '.join(EMBEDDED)}")
    return f"{datasets.EMBEDDED_PREFIX}{name}-v{EMBEDDED[name].version}"


def make_embedded(name: str, root: str | Path | None = None, progress: Callable[[int, int], None] | None = None) -> str:
    """Make an embedded dataset under a root, if it is not there yet, and return its id.

    `progress(done, total)` is called with counts of steps. Raises `DatasetError` if the id holds something else.
    """
    dataset_id, recipe = embedded_id(name), EMBEDDED[_name(name)]
    if dataset_id in datasets.list_datasets(root):
        if datasets.info(dataset_id, root).metadata.get("recipe") != repr(recipe):
            raise DatasetError(
                f"dataset {dataset_id} exists but was made by another recipe; delete its folder to make it anew"
            )
        return dataset_id
    env = recipe.make_env()
    assert env.spec is not None
    spec = replace(env.spec, disable_env_checker=False)
    controller = WaypointController(env, recipe.noise, dict(recipe.moods))
    episodes, done = [], 0
    for episode in datasets.record(env, controller, recipe.steps, recipe.seed):
        episodes.append(episode)
        done += len(episode.rewards)
        if progress is not None:
            progress(min(done, recipe.steps), recipe.steps)
    datasets.write(
        dataset_id,
        episodes,
        observation_space=env.observation_space,
        action_space=env.action_space,
        spec=spec,
        eval_spec=spec,
        root=root,
        metadata={
            "recipe": repr(recipe),
            "ref_min_score": _mean_return(recipe, lambda _, rng: rng.uniform(-1, 1, 2).astype(np.float32)),
            "ref_max_score": _mean_return(recipe, WaypointController(env)),
            "num_episodes_average_score": REFERENCE_EPISODES,
            "algorithm_name": "shortest path and PD controller, imperfect on purpose",
            "author": {"o2o"},
            "description": f"Scripted waypoint controller: moods {dict(recipe.moods)}, action noise {recipe.noise}.",
            "requirements": ["gymnasium-robotics>=1.4"],
        },
    )
    env.close()
    return dataset_id


REFERENCE_EPISODES = 50
"""Episodes behind each reference score."""


def _mean_return(recipe: Recipe, policy: Callable[[Any, np.random.Generator], np.ndarray]) -> float:
    env, returns = Recipe.make_env(recipe), []  # without cameras, which scores do not need
    for episode in datasets.record(env, policy, 10**9, recipe.seed + 1):
        returns.append(float(episode.rewards.sum()))
        if len(returns) == REFERENCE_EPISODES:
            break
    env.close()
    return float(np.mean(returns))
