"""The point maze as pure functions: the task of Gymnasium-Robotics' PointMaze, without MuJoCo.

A sphere of radius 0.1 is pushed through a maze of unit cells. Off the walls it moves as MuJoCo moves it, to float
rounding: mass 4.19, damping 1, gear 100, steps of 0.01 with damping implicit, speed cut to 5 per axis before a step.
At a wall it loses its speed into the wall and slides along; MuJoCo's walls are a little soft. Observations, goals,
reward and success are the same; draws of starts and goals have the same support from other random numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np

from o2o.errors import ConfigError
from o2o.simulators.protocol import Outcome
from o2o.types import Array

RADIUS, NEAR = 0.1, 0.45
"""Of the point; the distance to the goal within which a step succeeds."""
MASS, DAMPING, FORCE, STEP, SPEED = 4.0 / 3.0 * np.pi, 1.0, 100.0, 0.01, 5.0
"""Density 1000 and radius 0.1; per axis; of action 1; seconds; largest speed per axis."""
WALL = 1
"""A cell of the map; `r` may be a start, `g` a goal, `c` both; if there is none of these, every free cell is both."""


class Point(NamedTuple):
    """State of one maze."""

    position: Array
    velocity: Array
    goal: Array
    key: Array
    """For the goals that follow in a continuing task."""


@dataclass(frozen=True)
class PointMaze:
    """A `Simulator`; the arguments are those of Gymnasium-Robotics."""

    maze_map: tuple[tuple[int | str, ...], ...]
    reward_type: Literal["sparse", "dense"] = "sparse"
    continuing_task: bool = True
    reset_target: bool = False
    position_noise_range: float = 0.25
    """Starts and goals lie within this of their cell's centre, per axis."""

    def __post_init__(self) -> None:
        """Take lists as tuples; raises `ConfigError` for a map without two places or an unknown reward."""
        rows: Sequence[Sequence[int | str]] = self.maze_map
        object.__setattr__(self, "maze_map", tuple(tuple(row) for row in rows))
        if self.reward_type not in ("sparse", "dense"):
            raise ConfigError(f"reward_type is {self.reward_type!r}; expected 'sparse' or 'dense'")
        if len({len(row) for row in self.maze_map}) != 1:
            raise ConfigError("maze_map has rows of different lengths; expected a rectangle of cells")
        if len({*map(tuple, self._goals.tolist()), *map(tuple, self._starts.tolist())}) < 2 or not len(self._goals):
            raise ConfigError("maze_map has fewer than two cells for start and goal; expected cells 0, 'r', 'g' or 'c'")

    @property
    def observation_space(self) -> gym.spaces.Dict:
        """Position and velocity `[4]`, position `[2]` and goal `[2]`."""
        widths = {"observation": 4, "achieved_goal": 2, "desired_goal": 2}
        return gym.spaces.Dict({key: gym.spaces.Box(-np.inf, np.inf, (n,), np.float64) for key, n in widths.items()})

    @property
    def action_space(self) -> gym.spaces.Box:
        """The force along both axes, in units of 100."""
        return gym.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def _centres(self, *kinds: int | str) -> np.ndarray:
        """Return the centres `[K, 2]` of the cells of these kinds; the maze's middle is the origin."""
        height, width = len(self.maze_map), len(self.maze_map[0])
        cells = [(i, j) for i, row in enumerate(self.maze_map) for j, cell in enumerate(row) if cell in kinds]
        return np.asarray([(j + 0.5 - width / 2, height / 2 - i - 0.5) for i, j in cells], np.float32).reshape(-1, 2)

    @cached_property
    def _walls(self) -> np.ndarray:
        return self._centres(WALL)

    @cached_property
    def _goals(self) -> np.ndarray:
        """Return the centres of the cells that may be goals; without any, of every free cell."""
        given = self._centres("g", "c")
        return given if len(given) else self._centres(0)

    @cached_property
    def _starts(self) -> np.ndarray:
        given = self._centres("r", "c")
        return given if len(given) else self._centres(0)

    def _near_centre(self, key: Array, centres: Any) -> Array:
        reach = self.position_noise_range
        return centres + jax.random.uniform(key, jnp.shape(centres), minval=-reach, maxval=reach)

    def reset(self, key: Array) -> Point:
        """Draw a goal, and a start whose cell's centre is more than half a cell away from it."""
        key, cell_key, goal_key, start_key, noise_key = jax.random.split(key, 5)
        goal = self._near_centre(goal_key, jax.random.choice(cell_key, jnp.asarray(self._goals)))
        far = jnp.linalg.norm(self._starts - goal, axis=-1) > 0.5
        start = jnp.asarray(self._starts)[jax.random.categorical(start_key, jnp.where(far, 0.0, -jnp.inf))]
        return Point(self._near_centre(noise_key, start), jnp.zeros(2), goal, key)

    def step(self, state: Point, action: Array) -> tuple[Point, Outcome]:
        """Push the point with `action` `[2]` for one step, and judge where it stands then."""
        speed = jnp.clip(state.velocity, -SPEED, SPEED)
        force = FORCE * jnp.clip(action, -1.0, 1.0) - DAMPING * speed
        velocity = speed + STEP * force / (MASS + STEP * DAMPING)
        position, velocity = self._off_walls(state.position + STEP * velocity, velocity)
        distance = jnp.linalg.norm(position - state.goal)
        there = distance <= NEAR
        reward = jnp.exp(-distance) if self.reward_type == "dense" else there.astype(jnp.float32)
        after = Point(position, velocity, state.goal, state.key)
        if self.continuing_task and self.reset_target and len(self._goals) > 1:
            after = self._with_next_goal(after, there)
        return after, Outcome(reward, jnp.zeros((), bool) if self.continuing_task else there, there)

    def observe(self, state: Point) -> dict[str, Array]:
        """Return the observation."""
        seen = jnp.concatenate([state.position, state.velocity])
        return {"observation": seen, "achieved_goal": state.position, "desired_goal": state.goal}

    def _with_next_goal(self, state: Point, there: Array) -> Point:
        """Move the goal where it was reached: to a place that the point does not stand at."""
        key, cell_key, noise_key = jax.random.split(state.key, 3)
        goals = self._near_centre(noise_key, self._goals)
        far = jnp.linalg.norm(goals - state.position, axis=-1) > NEAR
        goal = goals[jax.random.categorical(cell_key, jnp.where(far, 0.0, -jnp.inf))]
        return state._replace(goal=jnp.where(there, goal, state.goal), key=key)

    def _off_walls(self, position: Array, velocity: Array) -> tuple[Array, Array]:
        """Put the point beside the walls it entered, without its speed into them. Twice: a corner has two walls."""
        if not len(self._walls):
            return position, velocity
        for _ in range(2):
            apart = position - (self._walls + jnp.clip(position - self._walls, -0.5, 0.5))
            gaps = jnp.linalg.norm(apart, axis=-1)
            deepest = jnp.argmin(gaps)
            gap = gaps[deepest]
            normal = apart[deepest] / jnp.maximum(gap, 1e-6)
            inside = gap < RADIUS
            position = jnp.where(inside, position + (RADIUS - gap) * normal, position)
            velocity = jnp.where(inside, velocity - jnp.minimum(velocity @ normal, 0.0) * normal, velocity)
        return position, velocity
