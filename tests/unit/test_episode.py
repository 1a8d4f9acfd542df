"""An episode under way: seeds of resets, counters, and standing at the same point again in real MuJoCo."""

import json
from typing import Any

import gymnasium
import numpy as np
import pytest

from o2o import envs
from o2o.train.episode import EVAL_STREAM, TRAIN_STREAM, EnvSlot, reset_seed


def slot_of(env_id: str = "Hopper-v5", seeds: tuple[int, ...] = (0, TRAIN_STREAM, 0)) -> EnvSlot:
    return EnvSlot(envs.make(env_id), seeds)


def play(slot: EnvSlot, steps: int, seed: int = 0) -> list[Any]:
    """Play random actions, resetting at ends; return what each step gave."""
    rng, seen = np.random.default_rng(seed), []
    size = slot.env.action_space.shape
    for _ in range(steps):
        step = slot.step(rng.uniform(-1, 1, size).astype(np.float32))
        seen.append(step)
        if step.ended:
            slot.reset()
    return seen


def test_reset_seeds_use_all_parts() -> None:
    """Reset seeds are functions of all their parts."""
    parts = [
        (s, stream, m, e) for s in (0, 1) for stream in (TRAIN_STREAM, EVAL_STREAM) for m in range(3) for e in (0, 7)
    ]
    seeds = [reset_seed(*part) for part in parts]
    assert seeds == [reset_seed(*part) for part in parts]
    assert len(set(seeds)) == len(parts)
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_episode_starts_follow_seeds() -> None:
    """Episodes begin alike only with the same seeds."""
    one, same, other = slot_of(), slot_of(), slot_of(seeds=(0, TRAIN_STREAM, 1))
    first = one.reset()
    np.testing.assert_array_equal(first, same.reset())
    assert not np.array_equal(first, other.reset())
    second = one.reset()
    assert one.episode == 1 and not np.array_equal(first, second)
    np.testing.assert_array_equal(one.reset(0), first)
    np.testing.assert_array_equal(same.reset(), second)


def test_counters_reset_with_episode() -> None:
    """The counters belong to the episode."""
    slot = slot_of("InvertedPendulum-v5")
    slot.reset()
    steps = [slot.step(np.ones(1, np.float32)) for _ in range(3)]
    assert steps[0].action.dtype == np.float32 and not steps[0].ended
    np.testing.assert_array_equal(slot.observation, steps[-1].next_observation)
    row = slot.row(False, lambda raw: raw / 10)
    expected = sum(step.info["raw_reward"] for step in steps)
    assert row == {
        "episode": 0,
        "return": expected,
        "length": 3,
        "success": None,
        "success_last": None,
        "normalized": expected / 10,
        "score": expected,
        "terminated": False,
        "intervention": 0.0,
    }
    slot.reset()
    assert slot.row(False) == {**row, "episode": 1, "return": 0.0, "length": 0, "normalized": None, "score": 0.0}


def test_success_any_and_last_step() -> None:
    """Success in any step counts, and so does the last step's."""
    slot = slot_of("PointMaze_UMaze-v3")
    slot.reset()
    assert slot.success is None
    slot.step(np.zeros(2, np.float32))
    assert slot.success is False and slot.success_last is False
    point: Any = slot.env.unwrapped
    goal = point.goal.copy()
    point.goal = point.point_env.data.qpos[:2].copy()
    point.update_target_site_pos()
    slot.step(np.zeros(2, np.float32))
    assert slot.success is True and slot.success_last is True
    point.goal = goal
    slot.step(np.zeros(2, np.float32))
    assert slot.success is True and slot.success_last is False


@pytest.mark.parametrize("env_id", ["Hopper-v5", "InvertedPendulum-v5"])
def test_restore_matches_snapshot(env_id: str) -> None:
    """A restored slot stands exactly where the snapshot was taken."""
    slot = slot_of(env_id)
    slot.reset()
    play(slot, 60)
    while not slot.actions:
        play(slot, 1)
    snapshot, observation = json.loads(json.dumps(slot.snapshot())), np.array(slot.observation)
    summary = slot.row(False)
    ahead = play(slot, 40, seed=1)

    again = slot_of(env_id)
    again.reset()
    play(again, 7, seed=2)  # wherever it stands
    assert again.restore(snapshot, observation)
    assert again.row(False) == summary and again.snapshot() == snapshot
    for before, after in zip(ahead, play(again, 40, seed=1), strict=True):
        np.testing.assert_array_equal(before.next_observation, after.next_observation)
        assert (before.reward, before.terminated, before.truncated) == (after.reward, after.terminated, after.truncated)


def test_restore_at_episode_start() -> None:
    """A slot is restored at the start of an episode too."""
    slot = slot_of()
    slot.reset()
    observation = slot.reset()
    again = slot_of()
    assert again.restore(slot.snapshot(), observation)
    assert again.episode == 1 and again.actions == []


def test_other_observation_starts_anew() -> None:
    """Another observation than the snapshot's begins a new episode."""
    slot = slot_of()
    slot.reset()
    play(slot, 3)
    snapshot, moved = slot.snapshot(), slot.observation + np.float32(1e-6)
    again = slot_of()
    assert not again.restore(snapshot, moved)
    assert again.episode == snapshot["episode"] + 1 and again.actions == []
    np.testing.assert_array_equal(again.observation, slot_of().reset(snapshot["episode"] + 1))


def test_unreplayable_env_starts_anew() -> None:
    """An environment that cannot be replayed begins a new episode."""
    env = gymnasium.make("InvertedPendulum-v5")
    base: Any = env.unwrapped
    base.metadata = {**base.metadata, "replayable": False}
    slot = EnvSlot(envs.wrap(env, envs.task_for("InvertedPendulum-v5")), (0, TRAIN_STREAM, 0))
    slot.reset()
    for _ in range(3):
        slot.step(np.zeros(1, np.float32))
    snapshot, observation = slot.snapshot(), slot.observation
    assert len(snapshot["actions"]) == 3
    assert not slot.restore(snapshot, observation)
    assert slot.episode == 1 and slot.actions == [] and slot.raw_return == 0.0


def test_inplace_image_keeps_first_frame() -> None:
    """An image that is written in place does not spoil what the episode began with."""

    class Camera(gymnasium.Wrapper):
        """Its frame is one array, as cameras have it."""

        frame = np.zeros((2, 2), np.uint8)

        def reset(self, **kwargs: Any) -> Any:
            _, info = self.env.reset(**kwargs)
            self.frame[:] = 1
            return {"image": self.frame}, info

        def step(self, action: Any) -> Any:
            self.frame[:] += 1
            return {"image": self.frame}, *self.env.step(action)[1:]

    slot = EnvSlot(Camera(gymnasium.make("InvertedPendulum-v5")), (0, TRAIN_STREAM, 0))
    slot.reset()
    for _ in range(3):
        slot.step(np.zeros(1, np.float32))
    snapshot, seen = slot.snapshot(), {"image": np.full((2, 2), 4, np.uint8)}
    assert slot.restore(snapshot, seen) and slot.exact and len(slot.actions) == 3
