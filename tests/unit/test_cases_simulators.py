"""Simulators in JAX: the point maze against Gymnasium-Robotics', and batches against the wrappers of `o2o.envs`."""

from dataclasses import replace

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o2o import envs
from o2o.errors import ConfigError
from o2o.simulators import Batch
from o2o.simulators.pointmaze import RADIUS, Point, PointMaze
from o2o.train.simulated import batch_of

IDS = ("PointMaze_UMaze-v3", "jax/PointMaze_UMaze-v0")


@pytest.fixture(scope="module")
def both():
    """The maze of MuJoCo and ours, bare, with the task's arguments."""
    made = [gymnasium.make(name, continuing_task=False, disable_env_checker=True) for name in IDS]
    yield made
    for env in made:
        env.close()


def place(env, position, velocity, goal):
    """Put the point of MuJoCo's maze somewhere."""
    env.reset(seed=0)
    base = env.unwrapped
    base.goal = np.asarray(goal, np.float64)
    base.point_env.set_state(np.asarray(position, np.float64), np.asarray(velocity, np.float64))


def test_spaces_and_limit_are_the_same(both):
    """A dataset of one maze fits the other."""
    theirs, ours = both
    assert theirs.observation_space == ours.observation_space
    assert theirs.action_space == ours.action_space
    assert theirs.spec.max_episode_steps == ours.spec.max_episode_steps == 300
    observation, info = ours.reset(seed=1)
    assert ours.observation_space.contains(observation)
    again = ours.reset(seed=1)[0]
    assert all(np.array_equal(observation[key], again[key]) for key in again)
    assert envs.task_for(IDS[0]) == replace(envs.task_for(IDS[1]), name=IDS[0], env_id=IDS[0])


def test_moves_as_mujoco_does(both):
    """Off the walls 40 random pushes lead to the same place at the same speed, observation, reward and success."""
    maze, theirs = both[1].unwrapped.simulator, both[0]
    position, goal = np.array([-0.6, 1.05]), np.array([0.4, 1.0])
    place(theirs, position, (0.0, 0.0), goal)
    state = Point(jnp.asarray(position, jnp.float32), jnp.zeros(2), jnp.asarray(goal, jnp.float32), jax.random.key(0))
    step, rng, succeeded = jax.jit(maze.step), np.random.default_rng(0), 0
    for _ in range(40):
        action = np.array([1.0, 0.0]) * 0.9 + rng.uniform(-0.3, 0.3, 2)
        observation, reward, terminated, _, info = theirs.step(action)
        state, outcome = step(state, jnp.asarray(action, jnp.float32))
        ours = maze.observe(state)
        for key in observation:
            np.testing.assert_allclose(ours[key], observation[key], atol=2e-4)
        assert (float(outcome.reward), bool(outcome.terminated), bool(outcome.success)) == (
            reward,
            terminated,
            info["success"],
        )
        succeeded += info["success"]
    assert 0 < succeeded < 40


def test_walls_hold(both):
    """A point pushed into a wall rests beside it, within 0.02 of where MuJoCo's soft wall holds it; it slides along."""
    maze, theirs = both[1].unwrapped.simulator, both[0]
    place(theirs, (-1.0, 1.0), (0.0, 0.0), (1.0, -1.0))
    state = Point(jnp.array([-1.0, 1.0]), jnp.zeros(2), jnp.array([1.0, -1.0]), jax.random.key(0))
    step = jax.jit(maze.step)
    for push in ((-1.0, 0.0), (0.3, 1.0)):
        for _ in range(60):
            theirs.step(np.asarray(push))
            state, _ = step(state, jnp.asarray(push))
            gaps = np.abs(np.asarray(state.position) - maze._walls).max(axis=-1)
            assert gaps.min() >= 0.5 + RADIUS - 1e-4 or gaps.min() >= 0.5
        np.testing.assert_allclose(state.position, theirs.unwrapped.point_env.data.qpos, atol=0.02)


def test_starts_and_goals():
    """Both lie within 0.25 of the centre of a free cell, more than half a cell apart, and all cells occur."""
    maze = envs.bare(IDS[1]).unwrapped.simulator
    states = jax.vmap(maze.reset)(jax.random.split(jax.random.key(0), 500))
    for places in (states.position, states.goal):
        offsets = np.abs(np.asarray(places)[:, None] - maze._goals).max(axis=-1)
        assert offsets.min(axis=1).max() <= 0.25
        assert len(np.unique(offsets.argmin(axis=1))) == 7
    centres = maze._goals[np.abs(np.asarray(states.position)[:, None] - maze._goals).max(axis=-1).argmin(axis=1)]
    assert np.linalg.norm(centres - np.asarray(states.goal), axis=-1).min() > 0.5


def test_goal_moves_on():
    """In a continuing task with `reset_target` a goal that is reached moves away, and the episode goes on."""
    maze = replace(envs.bare(IDS[1]).unwrapped.simulator, continuing_task=True, reset_target=True)
    state = Point(jnp.array([1.0, 1.0]), jnp.zeros(2), jnp.array([1.0, 1.0]), jax.random.key(0))
    after, outcome = maze.step(state, jnp.zeros(2))
    assert float(outcome.reward) == 1.0 and not outcome.terminated
    assert np.linalg.norm(after.goal - after.position) > 0.45


def test_batch_is_the_wrapped_environment():
    """A batch gives what the wrappers give: rows, masks and ends, over a time limit and a success.

    The time limit ends an episode with mask 1, and the true last observation is kept."""
    env = envs.make(IDS[1], episode_limit=5)
    batch = batch_of(env)
    assert batch is not None and batch.limit == 5
    worlds = jax.jit(batch.reset, static_argnums=1)(jax.random.key(3), 3)
    step, rng, wrapped = jax.jit(batch.step), np.random.default_rng(0), env
    ends = 0
    for t in range(12):
        actions = rng.uniform(-1.2, 1.2, (3, 2)).astype(np.float32)
        if t == 7:  # beside the goal of environment 1
            state = worlds.state._replace(position=worlds.state.position.at[1].set(worlds.state.goal[1]))
            worlds = worlds.replace(state=state)
        before = worlds
        worlds, row, told = step(worlds, jnp.asarray(actions))
        for n in range(3):
            wrapped.reset(seed=0)
            simulator = wrapped.unwrapped
            simulator._state = jax.tree.map(lambda leaf, n=n: leaf[n], before.state)
            observation, reward, terminated, _, info = wrapped.step(actions[n])
            np.testing.assert_allclose(row["next_observations"][n], observation, atol=1e-6)
            assert float(row["rewards"][n]) == pytest.approx(reward)
            assert float(row["masks"][n]) == 1.0 - terminated
            np.testing.assert_allclose(row["actions"][n], info["executed_action"], atol=1e-6)
            limit = int(before.length[n]) + 1 == 5
            assert bool(row["ends"][n]) == (terminated or limit) == bool(told.ended[n])
            assert bool(told.success[n]) == bool(before.success[n] or info["success"])
            if row["ends"][n]:
                ends += 1
                assert int(told.lengths[n]) == int(before.length[n]) + 1 and int(worlds.length[n]) == 0
                assert not np.allclose(worlds.observations[n], row["next_observations"][n])
    assert ends >= 6
    env.close()


def test_what_is_no_batch():
    """An environment that is no simulator, or stands in other wrappers than o2o's own, is stepped from outside."""
    assert batch_of(envs.make(IDS[0])) is None
    assert batch_of(envs.make(IDS[1], history=2)) is None
    assert batch_of(envs.make(IDS[1], inner=gymnasium.wrappers.RecordEpisodeStatistics)) is None
    assert isinstance(batch_of(envs.make(IDS[1], evaluation=True)), Batch)
    assert hash(batch_of(envs.make(IDS[1]))) == hash(batch_of(envs.make(IDS[1])))


def test_bad_mazes_refused():
    """Bad arguments are one line."""
    with pytest.raises(ConfigError, match="fewer than two cells"):
        PointMaze(((1, 1, 1), (1, 0, 1), (1, 1, 1)))
    with pytest.raises(ConfigError, match="different lengths"):
        PointMaze(((1, 1, 1), (1, 0)))
    with pytest.raises(ConfigError, match="reward_type is 'none'"):
        envs.make(IDS[1], env_kwargs={"reward_type": "none"})
    with pytest.raises(ConfigError, match="draws no pictures"):
        envs.make(IDS[1], render_mode="rgb_array")
