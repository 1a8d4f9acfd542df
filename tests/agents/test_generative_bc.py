"""DiffusionBC and FlowBC: chunks, their execution and what of them is learnt; runs with chunks and history."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o2o import cli
from o2o.agents import DiffusionBC, DiffusionBCConfig, FlowBC, FlowBCConfig
from o2o.config import LoopConfig
from o2o.errors import CheckpointError, ConfigError
from o2o.nn.generative import Diffusion, Flow
from o2o.report.plots import read_rows
from o2o.runs import session
from o2o.runs.folder import read_status
from o2o.types import Batch
from tests.helpers.probes import LONG
from tests.system.test_runs import StopAt, untimed

Maker = Callable[..., session.RunConfig]
SMALL: dict[str, Any] = {"network": "mlp", "actor_hidden_dims": (16, 16), "batch_size": 8}
FLOW = FlowBCConfig(model=Flow(3), horizon=4, **SMALL)
DIFFUSION = DiffusionBCConfig(model=Diffusion(3, clip="prediction"), horizon=4, **SMALL)
KEY = jax.random.key(0)


@functools.cache
def create(config: Any) -> Any:
    agent_class: Any = FlowBC if isinstance(config, FlowBCConfig) else DiffusionBC
    return jax.jit(lambda key: agent_class.create(key, jnp.zeros((1, 3)), jnp.zeros((1, 2)), config))(KEY)


def windows(rows: int = 8, width: int = 4, seed: int = 0) -> Batch:
    """Return windows `[rows, width, ...]`; that of row i is valid up to its entry i, if it is so long."""
    keys = jax.random.split(jax.random.key(seed), 2)
    valid = jnp.arange(width) <= jnp.arange(rows)[:, None]
    return {
        "observations": jax.random.normal(keys[0], (rows, width, 3)),
        "actions": jnp.tanh(jax.random.normal(keys[1], (rows, width, 2))),
        "valid": valid.astype(jnp.float32),
    }


@functools.partial(jax.jit, static_argnames="deterministic")
def act(agent: Any, observations: Any, carry: Any, rng: Any, deterministic: bool = False) -> Any:
    return agent.sample_actions(observations, carry, rng, deterministic)


@jax.jit
def loss(agent: Any, batch: Batch) -> Any:
    return agent.actor_loss(agent.actor.params, batch, KEY)[0]


@pytest.mark.parametrize("config", [FLOW, DIFFUSION], ids=["flow", "diffusion"])
def test_entries_after_end_ignored(config: Any) -> None:
    """Entries behind an episode's end do not count."""
    agent, batch = create(config), windows()
    valid = batch["valid"][..., None]
    behind = {**batch, "actions": jnp.where(valid > 0, batch["actions"], -batch["actions"])}
    assert float(loss(agent, behind)) == float(loss(agent, batch)) > 0.0
    later = {**batch, "observations": batch["observations"].at[:, 1:].set(9.0)}
    assert float(loss(agent, later)) == float(loss(agent, batch))
    for entry in range(4):
        changed = {**batch, "actions": batch["actions"].at[7, entry].multiply(-0.5)}
        assert float(loss(agent, changed)) != float(loss(agent, batch))


def test_loss_over_valid_entries() -> None:
    """The loss is the mean over valid entries, and the gap repeats the last action."""
    agent, batch = create(FLOW), windows(rows=2)
    observations, chunks, valid = agent.chunks(batch)
    np.testing.assert_array_equal(observations, batch["observations"][:, 0])
    np.testing.assert_array_equal(chunks[0].reshape(4, 2), np.tile(batch["actions"][0, 0], (4, 1)))
    np.testing.assert_array_equal(chunks[1].reshape(4, 2), batch["actions"][1, [0, 1, 1, 1]])
    np.testing.assert_array_equal(valid, [[1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]])
    errors = np.asarray(FLOW.model.loss(lambda x, t: agent.actor(observations, x, t), chunks, jax.random.split(KEY)[0]))
    assert float(loss(agent, batch)) == pytest.approx((errors[0, :2].sum() + errors[1, :4].sum()) / 6, rel=1e-5)


def test_plain_rows_without_chunks() -> None:
    """Plain rows are learnt from without chunks."""
    agent = create(dataclasses.replace(FLOW, horizon=1))
    assert agent.needs.window == 1 and agent.initial_carry((3,)) is None
    observations, chunks, valid = agent.chunks({"observations": jnp.ones((5, 3)), "actions": jnp.ones((5, 2))})
    assert observations.shape == (5, 3) and chunks.shape == (5, 2) and float(valid.min()) == 1.0


@pytest.mark.parametrize("config", [FLOW, DIFFUSION], ids=["flow", "diffusion"])
@pytest.mark.parametrize("execute", [2, 3, None])
def test_chunks_executed_in_order(config: Any, execute: int | None) -> None:
    """Chunks are executed open-loop and in order."""
    agent = create(dataclasses.replace(config, execute=execute))
    count = execute or 4
    first, second = jnp.ones((2, 3)), -jnp.ones((2, 3))
    expected = [agent.sample_chunks(first, jax.random.key(0)), agent.sample_chunks(second, jax.random.key(count))]
    carry = agent.initial_carry((2,))
    assert carry.actions.shape == (2, count, 2)
    for step in range(2 * count):
        seen = first if step % count == 0 and step < count else second
        action, carry = act(agent, seen, carry, jax.random.key(step))
        np.testing.assert_allclose(action, expected[step // count][:, step % count], atol=1e-6)


def test_single_action_without_queue() -> None:
    """One action of a longer chunk needs no queue."""
    agent = create(dataclasses.replace(FLOW, execute=1))
    assert agent.initial_carry((2,)) is None
    action, carry = act(agent, jnp.ones((2, 3)), None, KEY)
    assert carry is None
    np.testing.assert_allclose(action, agent.sample_chunks(jnp.ones((2, 3)), KEY)[:, 0], atol=1e-6)


def test_acting_uses_moving_average() -> None:
    """The acting network is the moving average."""
    agent = create(dataclasses.replace(FLOW, ema_rate=0.25))
    batch = jax.tree.map(lambda leaf: leaf[None], windows())
    updated, _ = jax.jit(lambda agent, batch: agent.update(batch))(agent, batch)
    for old, new, average in zip(
        *(jax.tree.leaves(p) for p in (agent.actor.params, updated.actor.params, updated.average)), strict=True
    ):
        np.testing.assert_allclose(average, 0.75 * old + 0.25 * new, rtol=1e-5, atol=1e-7)
    spoilt = updated.replace(actor=updated.actor.replace(params=jax.tree.map(jnp.zeros_like, updated.actor.params)))
    still = [act(each, jnp.ones((2, 3)), each.initial_carry((2,)), KEY)[0] for each in (updated, spoilt)]
    np.testing.assert_array_equal(*still)
    other = updated.replace(average=jax.tree.map(jnp.zeros_like, updated.average))
    assert np.any(act(other, jnp.ones((2, 3)), other.initial_carry((2,)), KEY)[0] != still[0])


def test_rate_decays_to_zero() -> None:
    """The learning rate decays to nothing."""
    agent = create(dataclasses.replace(FLOW, decay_steps=2))
    batch = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), windows())
    update = jax.jit(lambda agent, batch: agent.update(batch)[0])
    once = update(agent, batch)
    twice = update(once, batch)
    moved = lambda a, b: max(  # noqa: E731
        float(jnp.abs(x - y).max()) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
    )
    assert moved(once.actor.params, agent.actor.params) > 1e-4
    assert moved(twice.actor.params, once.actor.params) == 0.0


@pytest.mark.parametrize(
    "config",
    [
        FlowBCConfig(network="mlp", actor_hidden_dims=(64, 64), actor_lr=3e-3, horizon=2, decay_steps=2000),
        DiffusionBCConfig(width=32, blocks=1, actor_lr=3e-3, horizon=2, decay_steps=2000),
    ],
    ids=["flow", "diffusion"],
)
def test_two_modes_cloned(config: Any) -> None:
    """Two modes of chunks are cloned coherently, and the deterministic action takes the larger."""
    config = dataclasses.replace(config, ema_rate=0.01, batch_size=128)

    def step(agent: Any, key: jax.Array) -> tuple[Any, None]:
        sign_key, mode_key = jax.random.split(key)
        sign = jnp.sign(jax.random.uniform(sign_key, (128, 1, 1)) - 0.5)
        action = jnp.where(jax.random.uniform(mode_key, (128, 1, 1)) < 0.75, 0.7, -0.7) * sign
        batch = {
            "observations": jnp.tile(sign, (1, 2, 3)),
            "actions": jnp.tile(action, (1, 2, 2)),
            "valid": jnp.ones((128, 2)),
        }
        return agent.update(jax.tree.map(lambda leaf: leaf[None], batch))[0], None

    train = jax.jit(lambda agent, keys: jax.lax.scan(step, agent, keys)[0], compiler_options=LONG)
    agent = train(create(config), jax.random.split(KEY, 2000))
    sample = jax.jit(lambda agent, sign, deterministic: agent.sample_chunks(sign, KEY, deterministic), static_argnums=2)
    for sign in (-1.0, 1.0):
        chunks = np.asarray(sample(agent, jnp.full((2000, 3), sign), False)).reshape(2000, 4)
        same = np.all(np.sign(chunks) == np.sign(chunks[:, :1]), axis=1)
        assert same.mean() > 0.95
        assert np.mean(np.sign(chunks[:, 0]) == sign) == pytest.approx(0.75, abs=0.08)
        assert np.mean(np.abs(np.abs(chunks) - 0.7) < 0.25) > 0.9
        fixed = np.asarray(sample(agent, jnp.full((1, 3), sign), True))
        np.testing.assert_allclose(fixed, 0.7 * sign, atol=0.25)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"horizon": 0}, r"FlowBCConfig\.horizon is 0; expected at least 1"),
        ({"execute": 5}, r"FlowBCConfig\.execute is 5; expected 1 to 4, the horizon"),
        ({"execute": 0}, r"FlowBCConfig\.execute is 0"),
        ({"ema_rate": 0.0}, r"FlowBCConfig\.ema_rate is 0\.0"),
    ],
)
def test_wrong_settings_refused(changes: dict[str, Any], words: str) -> None:
    """Settings that cannot be used are refused."""
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(FLOW, **changes)


def test_paper_presets() -> None:
    """Presets have the numbers of their papers."""
    flow, diffusion = FlowBC.preset("antmaze").config, DiffusionBC.preset("kitchen").config
    assert flow.actor_hidden_dims == (512,) * 4 and flow.ema_rate == 1.0 and flow.model.steps == 10
    assert (flow.horizon, flow.weight_decay, flow.decay_steps, flow.actor_lr) == (1, 0.0, None, 3e-4)
    assert diffusion.model == Diffusion(20, "cosine", clip="prediction") and diffusion.horizon == 4
    assert diffusion.decay_steps == DiffusionBC.preset("kitchen").offline_steps


@pytest.mark.parametrize("agent", ["flow_bc", "diffusion_bc"])
def test_stopped_run_resumes_exactly(
    agent: str, tiny_run: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped run with chunks and history equals one that never stopped."""
    loop = LoopConfig(eval_every=90, eval_episodes=1, log_every=15, checkpoint_every=10_000, updates_per_dispatch=10)
    fields = [("network", "mlp"), ("horizon", 8), ("execute", 5), ("model.steps", 2)]
    run = tiny_run(agent, fields, seeds=2, history=2, offline_steps=40, online_steps=90, loop=loop)
    assert session.train(run, tmp_path / "whole")
    original, stop = session.Session._metrics, StopAt("online", 40)

    def listening(self: session.Session, row: dict[str, Any]) -> None:
        original(self, row)
        stop(row)

    monkeypatch.setattr(session.Session, "_metrics", listening)
    assert not session.train(run, tmp_path / "parts") and stop.fired
    assert read_status(tmp_path / "parts") == "stopped"
    config, trainer = session.open_run(tmp_path / "parts")
    assert trainer.counters.phase == "online" and config.history == 2
    assert trainer.replay.data.rows["observations"].shape[-1] == 2 * trainer.data.observation_spec.state_dim
    left = np.asarray(trainer.state.carry.left)
    assert left.shape == (2, 1) and left.min() > 0 and float(jnp.abs(trainer.state.carry.actions).max()) > 0
    trainer.close()
    assert session.resume(tmp_path / "parts")
    for name in ("metrics.jsonl", "episodes.jsonl"):
        whole, parts = (untimed(read_rows(tmp_path / run / name)) for run in ("whole", "parts"))
        assert parts == whole and len(whole) > 2
    states = []
    for name in ("whole", "parts"):
        _, trainer = session.open_run(tmp_path / name)
        states.append(jax.tree.leaves(trainer.save()[0]))
        trainer.close()
    for ours, theirs in zip(*states, strict=True):
        if jnp.issubdtype(ours.dtype, jax.dtypes.prng_key):
            ours, theirs = jax.random.key_data(ours), jax.random.key_data(theirs)
        np.testing.assert_array_equal(ours, theirs)


def test_cli_run_evaluated_and_played(rendering: None, embedded: str, tmp_path: Path) -> None:
    """A run of the command line is evaluated and played."""
    words = f"""train diffusion_bc --dataset {embedded} --preset small --history 3 --offline-steps 20 --online-steps 0
        --loop.eval-episodes 1 --config.horizon 4 --config.execute 2 --config.model.steps 2 --config.network mlp
        --config.actor-hidden-dims 8 8 --config.batch-size 8 --runs {tmp_path} --name run"""
    with pytest.raises(SystemExit) as ended:
        cli.main(words.split())
    assert ended.value.code == 0
    config = session.load_config(tmp_path / "run")
    assert (config.history, config.config.horizon, config.config.execute) == (3, 4, 2)
    assert config.config.model == Diffusion(2, "vp", clip="prediction")
    for deterministic in (True, False):
        rows = session.evaluate_run(tmp_path / "run", episodes=2, deterministic=deterministic)
        assert len(rows) == 2 and all(row["length"] > 1 for row in rows)
    rows = session.play_run(tmp_path / "run", tmp_path / "play.gif")
    assert rows[0]["length"] > 1 and (tmp_path / "play.gif").stat().st_size > 1000


def test_too_long_horizon_refused(tiny_run: Maker, tmp_path: Path) -> None:
    """A horizon longer than every episode is refused, and the run's name stays free."""
    run = tiny_run("flow_bc", [("horizon", 2000)])
    with pytest.raises(ConfigError, match=r"learns from 2000 steps in a row, but the longest episode of .* has \d+"):
        session.train(run, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_early_rate_end_reported(tiny_run: Maker, caplog: pytest.LogCaptureFixture) -> None:
    """A rate that ends before the run is said once."""
    for decay, said in ((10, 0), (None, 0), (6, 1)):
        fields = [*SMALL.items(), ("decay_steps", decay), ("model.steps", 2)]
        trainer = session.build(tiny_run("flow_bc", fields, offline_steps=10))
        trainer.offline(10)
        trainer.offline(10)
        messages = [record.getMessage() for record in caplog.records if record.name == "o2o"]
        caplog.clear()
        assert len(messages) == said
        assert all("falls to 0 by step 6 of 10" in message for message in messages)
        assert all("set config.decay_steps to 10 as well" in message for message in messages)
        trainer.close()


def test_too_few_rows_refused(tiny_run: Maker) -> None:
    """Fewer rows than a chunk are refused."""
    run = tiny_run("flow_bc", [("horizon", 8)])
    data = session.load_data(run)
    few = dataclasses.replace(
        data,
        arrays={key: value[:5] for key, value in data.arrays.items()},
        sources=(dataclasses.replace(data.sources[0], size=5),),
    )
    with pytest.raises(ConfigError, match="learns from 8 steps in a row, the dataset holds 5"):
        session.build(run, few)


def test_history_mismatch_refused(tiny_run: Maker, tmp_path: Path) -> None:
    """A run without history does not start one with it."""
    assert session.train(tiny_run("bc", offline_steps=20, online_steps=0), tmp_path / "bc")
    run = tiny_run("wsrl", history=2, init_from=str(tmp_path / "bc"), offline_steps=0)
    with pytest.raises(CheckpointError, match=r"has history 1, this run 2: make them equal"):
        session.build(run)
