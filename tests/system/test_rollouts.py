"""On-policy runs and staged pre-training: what a rollout holds, counters, stages, exact resume, compile counts."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from o2o.config import LoopConfig
from o2o.errors import ConfigError, DatasetError
from o2o.report.plots import read_rows
from o2o.runs import session
from o2o.runs.session import RunConfig
from o2o.train.programs import learn_and_act
from o2o.train.state import evaluation_steps
from o2o.train.trainer import Trainer, phase_at, plan
from o2o.types import Agent, OnlineConfig, Phase
from tests.system.test_runs import StopAt, assert_same_runs, train_interrupted

Maker = Callable[..., RunConfig]
SMALL = (("online.num_envs", 2), ("online.rollout_steps", 24), ("epochs", 2))
STAGED = (
    *SMALL, ("dynamics_hidden_dims", (16,)), ("dynamics_elites", 2), ("dynamics_members", 2), ("candidates", 2),
    ("num_policies", 2), ("offline_batch_size", 16), ("judge_rows", 16), ("horizon", 4), ("judge_every", 5),
    ("validate_every", 5), ("critic_steps", 10), ("dynamics_steps", 10), ("clone_steps", 10), ("improve_steps", 15),
)  # fmt: skip


@pytest.fixture
def ppo(tiny_run: Maker) -> Trainer:
    """Return a trainer of two PPO seeds, two environments each, with rollouts of 24 steps."""
    trainer = session.build(tiny_run("ppo", SMALL, seeds=2, offline_steps=0))
    assert isinstance(trainer, Trainer)
    return trainer


def test_rollout_time_order(ppo: Trainer) -> None:
    """A rollout is in order of time and joins no episodes.

    11 vector steps of an unfinished rollout: each next observation is the next row's, but at an episode's end.
    """
    ppo.loop = replace(ppo.loop, eval_every=1_000)
    ppo.begin_online(22)
    ppo.choose_actions()
    for _ in range(11):
        ppo.step()
    assert ppo.counters.phase == "online"
    rows = {key: np.asarray(leaf) for key, leaf in ppo.replay.rows.items()}
    assert rows["observations"].shape[:3] == (2, 12, 2) and rows["rewards"].shape == (2, 12, 2)
    joined = np.all(rows["next_observations"][:, :10] == rows["observations"][:, 1:11], axis=-1)
    np.testing.assert_array_equal(joined, rows["ends"][:, :10] == 0)
    flat = rows["observations"][:, 0].reshape(4, -1)
    assert len({tuple(row) for row in flat.tolist()}) == 4, "every environment has a start of its own"
    assert not rows["observations"][:, 11].any() and ppo.replay.at == 11
    assert ppo.phase_name == "online", "there is no warm-up"
    ppo.close()


def test_counters_updates_and_compilations(ppo: Trainer, tiny_run: Maker) -> None:
    """60 steps are two rollouts of 24 and a rest; each is worth 2 epochs of 2 minibatches; two programs in all."""
    learn_and_act.clear_cache()
    first = jax.tree.leaves(ppo.agent.actor.params)[0].copy()
    assert ppo.online(60)
    counters = ppo.counters
    assert (counters.env_steps, counters.online_updates, counters.gradient_steps) == (60, 2, 8)
    assert ppo.phase_name == "online" and ppo.replay.at == 6
    assert np.all(np.asarray(ppo.agent.seen) == 48)
    assert np.any(np.asarray(jax.tree.leaves(ppo.agent.actor.params)[0]) != np.asarray(first))
    assert learn_and_act._cache_size() == 2
    ppo.close()


def test_evaluation_steps(tiny_run: Maker, tmp_path: Path) -> None:
    """Evaluations are where they were asked for.

    With 4 environments, steps come in fours: 50 is evaluated at 52, the end at 80.
    """
    points = evaluation_steps(LoopConfig(eval_every=50), OnlineConfig(replay="rollout"), 80)
    assert points == {50, 80}
    run = tiny_run("ppo", (("online.num_envs", 4), ("online.rollout_steps", 24)), offline_steps=0)
    assert session.train(run, tmp_path / "run")
    rows = read_rows(tmp_path / "run" / "episodes.jsonl")
    assert sorted({row["env_steps"] for row in rows}) == [0, 52, 80]


@pytest.mark.parametrize(
    ("agent", "fields", "steps", "stops"),
    [("ppo", SMALL, 20, [StopAt("online", 50)]), ("uni_o4", STAGED, 45, [StopAt("offline", 34), StopAt("online", 30)])],
)
def test_stop_and_resume(
    agent: str, fields: Any, steps: int, stops: list[StopAt], tiny_run: Maker, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A run stopped and resumed equals one never stopped.

    Also in the middle of a rollout, and of a stage (gradient step 34 of 45 lies in the improvement).
    """
    loop = LoopConfig(eval_every=40, eval_episodes=1, log_every=6, checkpoint_every=10_000, updates_per_dispatch=4)
    run = tiny_run(agent, fields, seeds=2, offline_steps=steps, online_steps=80, loop=loop)
    assert session.train(run, tmp_path / "whole")
    train_interrupted(run, tmp_path / "parts", monkeypatch, stops)
    assert_same_runs(tmp_path / "whole", tmp_path / "parts", more_than=3)
    rows = [row for row in read_rows(tmp_path / "whole" / "metrics.jsonl") if row["phase"] == "offline"]
    if agent == "uni_o4":
        kinds = [
            next(iter(sorted(set(row) & {"critic/loss", "dynamics/loss", "clone/loss", "improve/loss"})))
            for row in rows
        ]
        assert list(dict.fromkeys(kinds)) == ["critic/loss", "dynamics/loss", "clone/loss", "improve/loss"]
    assert session.evaluate_run(tmp_path / "parts", episodes=1)[0]["length"] > 0


def test_unreplayable_run_cuts_episode(ppo: Trainer) -> None:
    """A run that cannot be replayed cuts the episode in the rollout."""
    ppo.begin_online(40)
    ppo.choose_actions()
    for _ in range(3):
        ppo.step()
    assert ppo.counters.phase == "online"
    ends = ppo.replay.rows["ends"]
    assert not ends.any()
    ppo.replay.mark_ends(np.asarray([False, True, False, False]))
    np.testing.assert_array_equal(ends[:, 2], [[0.0, 1.0], [0.0, 0.0]])
    assert ends.sum() == 1.0
    ppo.close()


class Staged(Agent):
    """Three phases, one of them empty."""

    def phases(self, steps: int) -> tuple[Phase, ...]:
        return FIRST, Phase("none", 0), LAST


FIRST, LAST = Phase("first", 4), Phase("last", 6, check_every=2)


def test_stage_of_step() -> None:
    """Each step has its stage, and more steps than the stages have are refused."""
    assert plan(Staged(), 10) == [(FIRST, 0), (LAST, 4)]
    assert [phase_at(Staged(), 10, at) for at in (0, 1, 4, 5, 10)] == [FIRST, FIRST, FIRST, LAST, LAST]
    assert plan(Agent(), 7) == [(Phase("offline", 7), 0)] and phase_at(Agent(), 7, 3) == Phase("offline", 7)
    with pytest.raises(ConfigError, match="take 10 gradient steps, offline_steps is 11"):
        plan(Staged(), 11)


def test_best_candidate_goes_online(tiny_run: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The candidate that is best in the environment goes online."""
    trainer = session.build(tiny_run("uni_o4", STAGED, seeds=2, offline_steps=45))
    played: list[Any] = []

    def play(agent: Any, *_: Any) -> list[dict[str, Any]]:
        """Seed 0's second candidate is the better one, seed 1's first."""
        played.append(np.asarray(agent.chosen))
        good = {0: 1, 1: 0}
        number = len(played) - 1
        return [{"seed": s, "score": float(number == good[s])} for s in (0, 1)]

    monkeypatch.setattr(trainer.evaluator, "until_stopped", play)
    ranks = np.asarray([[0.0, 1.0], [0.0, 1.0]], np.float32)
    trainer.start_from(trainer.agent.replace(scores=jax.numpy.asarray(ranks)), None)
    gone: list[np.ndarray] = []
    monkeypatch.setattr("o2o.train.programs.to_online", lambda agent: gone.append(np.asarray(agent.chosen)) or agent)
    assert trainer.begin_online(40)
    np.testing.assert_array_equal(np.stack(played), [[1, 1], [0, 0]])
    np.testing.assert_array_equal(np.stack(gone[-2:]), [0, 1])


def test_bad_settings_refused(tiny_run: Maker, tmp_path: Path) -> None:
    """What cannot work is refused before a step."""
    uneven = r"rollout_steps is 24 with num_envs 5; expected a multiple"
    for agent in ("ppo", "uni_o4"):
        with pytest.raises(ConfigError, match=uneven):
            tiny_run(agent, (("online.num_envs", 5), ("online.rollout_steps", 24)))
    with pytest.raises(ConfigError, match="wants them raw: leave out `normalize`"):
        session.train(tiny_run("uni_o4", STAGED, offline_steps=45, normalize=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    host = tiny_run("uni_o4", STAGED, offline_steps=45, loop=LoopConfig(device_bytes=0))
    with pytest.raises(ConfigError, match="needs the dataset on the device: raise device_bytes"):
        session.build(host).offline(45)
    short = session.load_data(tiny_run("ppo", SMALL))
    few = replace(short, arrays={key: jax.tree.map(lambda leaf: leaf[:40], v) for key, v in short.arrays.items()})
    with pytest.raises(DatasetError, match="has 40 transitions"):
        session.build(tiny_run("uni_o4", STAGED), few).offline(45)


def test_ppo_from_host_memory(tiny_run: Maker) -> None:
    """PPO learns the same from a dataset in host memory."""
    agents = []
    for device_bytes in (None, 0):
        loop = LoopConfig(eval_every=0, eval_episodes=1, updates_per_dispatch=10, device_bytes=device_bytes)
        trainer = session.build(tiny_run("ppo", SMALL, loop=loop))
        trainer.offline(20)
        trainer.online(48)
        assert (type(trainer.replay.data).__name__ == "HostData") == (device_bytes == 0)
        agents.append(jax.tree.leaves(trainer.agent_of(0).actor.params))
        trainer.close()
    for device, host in zip(*agents, strict=True):
        np.testing.assert_allclose(host, device, atol=1e-6)
