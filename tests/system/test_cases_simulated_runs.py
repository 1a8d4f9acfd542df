"""Runs whose environments are inside the program that learns: the same loop, exact counts, exact resume."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from o2o.config import LoopConfig, RunConfig
from o2o.errors import ConfigError
from o2o.report.plots import read_rows
from o2o.runs import session
from o2o.train.collect import Fleet
from o2o.train.simulated import Simulated
from o2o.train.trainer import Pace, Trainer
from tests.system.test_runs import StopAt, assert_same_runs, train_interrupted

ENV = "jax/PointMaze_UMaze-v0"
PPO = (("online.num_envs", 2), ("online.rollout_steps", 24), ("epochs", 2))
Maker = Callable[..., RunConfig]


class Outside(Fleet):
    """The same worlds, stepped from outside of the program, transition by transition."""

    def __init__(self, inside: Simulated) -> None:
        self.inside, self.slots, self.crew, self.fault, self.displaced = inside, [], None, None, False
        self.intervened = inside.intervened
        self._step = jax.jit(jax.vmap(inside.batch.step))

    @property
    def observations(self) -> Any:
        return np.asarray(self.inside.observations)

    def step(self, actions: np.ndarray, finished: Any) -> Any:
        places = self.inside.worlds.length.shape
        worlds, rows, ends = self._step(self.inside.worlds, actions.reshape(*places, -1))
        self.inside.worlds = worlds
        for where in np.argwhere(np.asarray(ends.ended)):
            finished(int(np.ravel_multi_index(where, places)), self.inside.row(jax.device_get(ends), tuple(where)))
        flat = jax.tree.map(lambda leaf: np.asarray(leaf).reshape(-1, *leaf.shape[2:]), rows)
        return flat, np.asarray(ends.ended).reshape(-1)


def begun(run: RunConfig) -> tuple[Trainer, list[dict[str, Any]]]:
    trainer = session.build(run)
    heard: list[dict[str, Any]] = []
    trainer.hooks.metrics = heard.append
    trainer.begin_online(run.online_steps)
    trainer.choose_actions()
    assert isinstance(trainer.fleet, Simulated)
    return trainer, heard


def assert_same(left: Any, right: Any) -> None:
    for one, two in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        if jax.dtypes.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, two = jax.random.key_data(one), jax.random.key_data(two)
        np.testing.assert_allclose(np.asarray(one), np.asarray(two), atol=2e-3)


AT_ONCE = (("online.random_steps", 0), ("online.warmup_steps", 0))
CASES = [
    ("sac", (*AT_ONCE, ("online.num_envs", 2), ("online.update_every", 3)), 2),
    ("rlpd", (("online.utd_ratio", 2), ("online.num_envs", 2), ("online.random_steps", 7)), 2),
    ("wsrl", (("online.utd_ratio", 2), ("online.warmup_steps", 6)), 1),
    ("ppo", PPO, 2),
    ("uni_o4", PPO, 1),
]


@pytest.mark.parametrize(("agent", "fields", "seeds"), CASES, ids=[case[0] for case in CASES])
def test_one_program_is_the_loop(agent: str, fields: Any, seeds: int, tiny_run: Maker) -> None:
    """Steps in one program leave what the loop's own steps leave: agents, rows, next actions, counters, episodes."""
    run = tiny_run(agent, fields, env=ENV, seeds=seeds, offline_steps=0, episode_limit=9, online_steps=40)
    inside, told = begun(run)
    outside, heard = begun(run)
    outside.fleet = Outside(outside.fleet)
    for _ in range(40 // outside.envs_per_seed):
        outside.step()
    pace = Pace()
    while inside.counters.env_steps < 40:
        pace.most = 7
        inside.simulated_steps(inside.fleet, (40 - inside.counters.env_steps) // inside.envs_per_seed, pace)
    counters = [vars(trainer.counters) for trainer in (inside, outside)]
    assert counters[0] == counters[1] and counters[0]["env_steps"] == 40
    assert inside.replay.state() == outside.replay.state()
    assert_same(inside.replay.arrays(), outside.replay.arrays())
    assert_same(inside.state.action, outside.state.action)
    assert_same(inside.fleet.worlds, outside.fleet.inside.worlds)
    assert_same(inside.agent, outside.agent)
    assert sum(counters[0]["episodes"]) == seeds * inside.envs_per_seed * (40 // inside.envs_per_seed // 9)
    assert told == heard
    calls = {"sac": 40 // 3, "rlpd": 33, "wsrl": 33, "ppo": 1, "uni_o4": 1}[agent]
    assert counters[0]["online_updates"] == calls
    assert counters[0]["gradient_steps"] == calls * inside.agent.updates_per_call


def test_lanes_do_not_mix(tiny_run: Maker) -> None:
    """Rows of several environments take turns in the ring; windows and next actions follow one of them."""
    fields = (("online.num_envs", 3), ("chunk", 2), ("online.replay", "online"))
    trainer, _ = begun(tiny_run("qc", fields, env=ENV, offline_steps=0, episode_limit=7, online_steps=30))
    for _ in range(10):
        trainer.simulated_steps(trainer.fleet, 1, Pace())
    buffer = jax.tree.map(lambda leaf: leaf[0], trainer.replay.buffer)
    assert (buffer.lanes, int(buffer.size), buffer.capacity % 3) == (3, 30, 0)
    batch = buffer.sample_sequences(jax.random.key(0), (200,), 2)
    valid = np.asarray(batch["valid"][:, 1], bool)
    assert 0 < valid.sum() < 200
    seen = np.asarray(batch["observations"])
    np.testing.assert_array_equal(seen[valid, 1], np.asarray(batch["next_observations"])[valid, 0])
    following = buffer.replace(following=("next_actions", "next_valid"))
    row = following._take(np.arange(30))
    has = np.asarray(row["next_valid"], bool)
    assert not has[27:].any() and not has[18:21].any() and has.sum() == 24
    actions = np.asarray(row["actions"])
    np.testing.assert_array_equal(np.asarray(row["next_actions"])[has], actions[np.flatnonzero(has) + 3])
    trainer.close()


@pytest.mark.parametrize(
    ("agent", "fields", "stops"),
    [
        ("rlpd", (("online.num_envs", 2), ("online.random_steps", 10)), [StopAt("online", 30)]),
        ("ppo", PPO, [StopAt("online", 30)]),
    ],
    ids=["rlpd", "ppo"],
)
def test_resume_is_exact(
    agent: str, fields: Any, stops: list[StopAt], tiny_run: Maker, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is stopped and resumed is, bit for bit, the run that never stopped; `eval` plays its policy."""
    loop = LoopConfig(eval_every=40, eval_episodes=1, log_every=6, checkpoint_every=10_000)
    run = tiny_run(agent, fields, env=ENV, offline_steps=10, online_steps=80, loop=loop)
    assert session.train(run, tmp_path / "whole")
    train_interrupted(run, tmp_path / "parts", monkeypatch, stops)
    assert_same_runs(tmp_path / "whole", tmp_path / "parts", more_than=2)
    points = {row["env_steps"] for row in read_rows(tmp_path / "whole" / "episodes.jsonl")}
    assert {0, 40, 80} <= points
    assert session.evaluate_run(tmp_path / "parts", episodes=1)[0]["length"] > 0


def test_several_environments_refused(tiny_run: Maker) -> None:
    """What cannot be done with several environments per seed is said before anything is trained."""
    append = (("online.replay", "append"),)
    cases = [("calql", (), "Monte-Carlo returns need one"), ("qc", append, "'append' and windows")]
    for agent, fields, said in cases:
        run = tiny_run(agent, (("online.num_envs", 2), *fields), env=ENV, offline_steps=0)
        with pytest.raises(ConfigError, match=said):
            session.build(run)


def test_gymnasium_environments_per_seed(tiny_run: Maker) -> None:
    """Off-policy agents step several Gymnasium environments per seed: rows in turn, updates per row, one counter."""
    run = tiny_run("rlpd", (("online.num_envs", 2), ("online.utd_ratio", 2), ("online.random_steps", 0)), seeds=2)
    trainer = session.build(run)
    assert trainer.online(20)
    counters = trainer.counters
    assert (counters.env_steps, counters.online_updates, counters.gradient_steps) == (20, 18, 36)
    rows = {key: np.asarray(leaf)[:, :20] for key, leaf in trainer.replay.buffer.rows.items()}
    np.testing.assert_array_equal(rows["next_observations"][:, :18], rows["observations"][:, 2:20])
    assert len(trainer.fleet.slots) == 4 and np.unique(rows["observations"][:, :2].reshape(4, -1), axis=0).shape[0] == 4
    trainer.close()
