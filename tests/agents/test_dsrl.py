"""DSRL: losses by hand, its limits (no noise, other bases), what moves what, bases of runs, what is learnt."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o2o.agents import BC, DSRL, FQL, QC, BCConfig, DiffusionBC, DiffusionBCConfig, DSRLConfig, FlowBC, FlowBCConfig
from o2o.agents.dsrl import SteeredBase
from o2o.agents.fql import FQLConfig
from o2o.config import LoopConfig
from o2o.errors import ConfigError
from o2o.nn.generative import Diffusion, Flow
from o2o.rl.windows import Chunks, chunk_rows
from o2o.runs import session
from tests.helpers.tiny import (
    ACTION_DIM,
    OBSERVATION_DIM,
    constant_critic,
    create,
    largest_difference,
    moved,
    set_config,
    steps,
)
from tests.helpers.toy_qc import BASE as QC_TINY, DISCOUNT, KEY, H, act, four_windows, quick, random_windows, update

TINY = DSRLConfig(
    chunk=H,
    num_critics=3,
    batch_size=8,
    base=SteeredBase(flow=Flow(3), actor_hidden_dims=(16, 16)),
    actor_hidden_dims=(16, 16),
    critic_hidden_dims=(16, 16),
)
OBSERVATIONS = jax.random.normal(KEY, (6, OBSERVATION_DIM))
FLOW = FlowBCConfig(horizon=H, network="mlp", actor_hidden_dims=(16, 16), model=Flow(3), ema_rate=0.5, batch_size=8)
DIFFUSION = DiffusionBCConfig(
    horizon=4, execute=2, width=16, blocks=1, model=Diffusion(3, clip="prediction"), batch_size=8
)
base_chunks = quick(lambda agent, obs, noise: agent.base_chunks(obs, noise))
play = quick(lambda agent, rng, det: agent.play(OBSERVATIONS, rng, det), static_argnums=2)
targets = quick(lambda agent, chunks, rng: agent.targets(chunks, rng))
noise_loss = quick(lambda agent, chunks, noise: agent.noise_critic_loss(agent.noise_critic.params, chunks, noise)[0])


def chunks_of(batch: Any) -> Chunks:
    return chunk_rows(batch, DISCOUNT, True)


# ---------------------------------------------------------------- losses


def test_critic_by_hand() -> None:
    """y has the base's action of the policy's noise, mean - rho std of the old critics, and no entropy."""
    agent = set_config(create(DSRL, TINY), noise_scale=0.7, rho=0.4)
    chunks, key = chunks_of(four_windows()), jax.random.key(5)
    u = agent.policy(chunks.next_observations).sample(key)
    assert u.shape == (4, H * ACTION_DIM)
    after = base_chunks(agent, chunks.next_observations, 0.7 * u)
    q = np.asarray(agent.critic(chunks.next_observations, after, params=agent.target_critic))
    y = np.asarray(chunks.returns) + 0.99**3 * np.asarray([1, 1, 0, 0]) * (q.mean(axis=0) - 0.4 * q.std(axis=0))
    np.testing.assert_allclose(targets(agent, chunks, key), y, rtol=1e-4)
    hot = agent.replace(temperature=agent.temperature.replace(params={"params": {"value": jnp.asarray(5.0)}}))
    np.testing.assert_array_equal(targets(hot, chunks, key), targets(agent, chunks, key))
    now = np.asarray(agent.critic(chunks.observations, chunks.actions))
    loss, _ = agent.critic_loss(agent.critic.params, chunks, jnp.asarray(y))
    np.testing.assert_allclose(loss, np.mean(np.asarray([1, 0, 1, 1]) * (now - y) ** 2), rtol=1e-4)


def test_noise_critic_by_hand() -> None:
    """Qz is regressed head by head on the critics, not their targets, at the base's action; b has no part in it."""
    agent = create(DSRL, TINY)
    chunks, noise = chunks_of(four_windows()), 2.0 * jax.random.normal(KEY, (4, H * ACTION_DIM))
    goal = np.asarray(agent.critic(chunks.observations, base_chunks(agent, chunks.observations, noise)))
    judged = np.asarray(agent.noise_critic(chunks.observations, noise))
    assert judged.shape == (3, 4)
    wanted = np.mean((judged - goal) ** 2)
    for other in (agent, agent.replace(target_critic=constant_critic(agent.target_critic, 9.0))):
        np.testing.assert_allclose(noise_loss(other, chunks, noise), wanted, rtol=1e-4)
    np.testing.assert_allclose(noise_loss(set_config(agent, noise_scale=0.1), chunks, noise), wanted, rtol=1e-4)


def test_actor_and_temperature_by_hand() -> None:
    """L_pi = mean(alpha l - mean Qz(s, b u)) with the density of u; alpha steps on alpha (H + d / 2)."""
    agent = set_config(create(DSRL, replace(TINY, temperature_init=0.3)), noise_scale=0.7)
    chunks, key = chunks_of(four_windows()), jax.random.key(5)
    u, log_prob = agent.policy(chunks.observations).sample_and_log_prob(key)
    qz = np.asarray(agent.noise_critic(chunks.observations, 0.7 * u)).mean(axis=0)
    loss, info = agent.actor_loss(agent.actor.params, chunks, key)
    np.testing.assert_allclose(loss, np.mean(0.3 * np.asarray(log_prob) - qz), rtol=1e-4)
    stepped, _ = quick(lambda agent: agent.update_policy(chunks, key))(agent)
    slope = 0.3 * (float(info["actor/entropy"]) + H * ACTION_DIM / 2)  # d alpha / d ln alpha = alpha
    np.testing.assert_allclose(stepped.temperature.opt_state[0].mu["params"]["value"], 0.1 * slope, rtol=1e-4)


def test_what_moves_what() -> None:
    """Each network steps on its own loss alone, and averages take the parameters of before the step."""
    agent, batch = create(DSRL, TINY), random_windows()
    one, _ = update(agent, batch)
    for name in ("actor", "critic", "noise_critic", "base", "temperature"):
        assert steps(getattr(one, name)) == 1, name
    assert largest_difference(one.target_critic, agent.target_critic) < 1e-7
    assert largest_difference(one.average, agent.average) < 1e-7
    two, _ = update(one, random_windows(1))
    for new, old, after in (
        (one.critic.params, one.target_critic, two.target_critic),
        (one.base.params, one.average, two.average),
    ):
        assert largest_difference(after, jax.tree.map(lambda a, b: 0.005 * a + 0.995 * b, new, old)) < 1e-7
    rng, target_rng, *_ = jax.random.split(agent.rng, 5)
    assert jnp.array_equal(jax.random.key_data(one.rng), jax.random.key_data(rng))
    chunks = chunks_of(jax.tree.map(lambda leaf: leaf[0], batch))
    y = targets(agent, chunks, target_rng)
    alone = quick(jax.grad(lambda params: agent.critic_loss(params, chunks, y)[0]))(agent.critic.params)
    first = jax.tree.map(lambda moment: moment / 0.1, one.critic.opt_state[0].mu)
    assert largest_difference(first, alone) < 1e-5, "no gradient of L_z or L_pi reaches Q"


# ---------------------------------------------------------------- limits


def test_no_noise() -> None:
    """With b = 0 it plays Base(s, 0), and the actor's gradient is that of the entropy alone."""
    agent = set_config(create(DSRL, TINY), noise_scale=0.0)
    still = base_chunks(agent, OBSERVATIONS, jnp.zeros((6, H * ACTION_DIM)))
    for key, deterministic in ((1, False), (2, False), (1, True)):
        np.testing.assert_allclose(play(agent, jax.random.key(key), deterministic), still, atol=1e-6)
    flat = agent.replace(
        noise_critic=agent.noise_critic.replace(params=constant_critic(agent.noise_critic.params, 1.0))
    )
    chunks = chunks_of(four_windows())
    grads = [
        quick(jax.grad(lambda params, each=each: each.actor_loss(params, chunks, KEY)[0]))(agent.actor.params)
        for each in (agent, flat)
    ]
    assert largest_difference(*grads) < 1e-7


def test_noise_of_long_chunks() -> None:
    """Five actions of five numbers have 25 noise numbers, or 5 that are repeated."""
    long = replace(TINY, chunk=5)
    for noise, size in (("per_step", 25), ("shared", 5)):
        config = replace(long, noise=noise)
        agent = quick(lambda key, c=config: DSRL.create(key, jnp.zeros((1, 3)), jnp.zeros((1, 5)), c))(KEY)
        assert agent.noise_dim == size
        z = jax.random.normal(KEY, (4, size))
        seen = jax.random.normal(KEY, (4, 3))
        assert base_chunks(agent, seen, z).shape == (4, 25) and agent.noise_critic(seen, z).shape == (3, 4)
        assert agent.policy(seen).mean.shape == (4, size)
        if noise == "shared":
            whole = set_config(agent, noise="per_step")
            np.testing.assert_allclose(base_chunks(whole, seen, jnp.tile(z, 5)), base_chunks(agent, seen, z), atol=1e-6)


class Signs(nn.Module):
    """A velocity whose flow of one step ends at -0.5 or 0.5, the noise's sign; it has no gradient at all."""

    @nn.compact
    def __call__(self, observations: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
        self.param("inputs", nn.initializers.zeros, ())
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)

        def jump(x: Any) -> np.ndarray:
            return np.where(np.asarray(x) > 0, 0.5, -0.5).astype(np.float32) - np.asarray(x)

        return jax.pure_callback(jump, shape, x, vmap_method="expand_dims")


def test_black_box_with_two_modes() -> None:
    """A base without gradient: the mode of higher Q is found, and all its noise has one value.

    Rewards are known for actions at 0.5 and -0.5, without noise, as in demonstrations.
    """
    config = replace(
        TINY,
        chunk=1,
        base=SteeredBase(flow=Flow(1)),
        base_update="none",
        num_critics=2,
        actor_lr=1e-2,
        critic_lr=1e-2,
        temperature_lr=1e-2,
        temperature_init=0.1,
    )
    agent = quick(lambda key: DSRL.create(key, jnp.zeros((1, 1)), jnp.zeros((1, 1)), config))(KEY)
    signs = Signs()
    params = signs.init(KEY, jnp.zeros((1, 1)), jnp.zeros((1, 1)), jnp.zeros(()))
    agent = agent.replace(base=agent.base.replace(module=signs, params=params), average=params)
    actions = jnp.asarray([[-0.5], [0.5]] * 4)
    rows = {
        "observations": jnp.zeros((8, 1)),
        "next_observations": jnp.zeros((8, 1)),
        "actions": actions,
        "rewards": actions[:, 0],
        "masks": jnp.zeros(8),
    }
    batch = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (300, *leaf.shape)), rows)
    trained, _ = update(agent, batch)
    assert not moved(trained.average, params) and steps(trained.actor) == 300
    noise = jnp.asarray([[-1.5], [-0.3], [0.3], [1.5]])
    values = np.asarray(trained.noise_critic(jnp.zeros((4, 1)), noise)).mean(axis=0)
    np.testing.assert_allclose(values, [-0.5, -0.5, 0.5, 0.5], atol=0.15)
    played = trained.policy(jnp.zeros((1000, 1))).sample(KEY)
    assert float(jnp.mean(played > 0)) > 0.95
    np.testing.assert_array_equal(base_chunks(trained, jnp.zeros((1, 1)), played[:1]), [[0.5]])


# ---------------------------------------------------------------- bases of runs


def trained_base(kind: Any, config: Any) -> Any:
    """Return an agent whose moving average, where it has one, is not its network."""
    agent = create(kind, config)
    if not hasattr(agent, "average"):
        return agent
    return agent.replace(average=jax.tree.map(lambda leaf: 1.1 * leaf, agent.average))


@pytest.mark.parametrize(
    ("kind", "config", "chunk"),
    [(FlowBC, FLOW, H), (DiffusionBC, DIFFUSION, 2), (QC, QC_TINY, H), (FQL, FQLConfig(actor_hidden_dims=(16,)), 1)],
    ids=["flow_bc", "diffusion_bc", "qc", "fql"],
)
def test_base_of_agent(kind: Any, config: Any, chunk: int) -> None:
    """The base of another agent makes the same actions of the same noise, and stays as it is."""
    source = trained_base(kind, replace(config, critic_hidden_dims=(16,)) if kind is FQL else config)
    agent = quick(lambda source: DSRL.from_agent(source, replace(TINY, chunk=chunk)))(source)
    assert agent.config.base_update == "none" and agent.needs.window == chunk
    again = jax.eval_shape(
        lambda: DSRL.create(KEY, jnp.zeros((1, OBSERVATION_DIM)), jnp.zeros((1, ACTION_DIM)), agent.config)
    )
    assert jax.tree.structure(again) == jax.tree.structure(agent), "a run is opened by its settings alone"
    zero = jnp.zeros((6, agent.noise_dim))
    if kind is QC:
        wanted = source.flow_chunks(OBSERVATIONS, zero)
    elif kind is FQL:
        wanted = source.flow_actions(OBSERVATIONS, zero)
    else:
        wanted = source.sample_chunks(OBSERVATIONS, KEY, True).reshape(6, -1)[:, : chunk * ACTION_DIM]
    np.testing.assert_allclose(base_chunks(agent, OBSERVATIONS, zero), wanted, atol=1e-5)


def test_frozen_base() -> None:
    """With b = 0 another agent's base plays its own mode, and updates leave it as it is; told to clone, it learns."""
    source = trained_base(FlowBC, FLOW)
    take = quick(DSRL.from_agent, static_argnums=1)
    agent = take(source, replace(TINY, noise_scale=0.0))
    wanted = source.sample_chunks(OBSERVATIONS, KEY, True).reshape(6, -1)
    np.testing.assert_allclose(play(agent, KEY, False), wanted, atol=1e-5)
    after, info = update(agent, random_windows())
    assert not moved(after.base.params, agent.base.params) and not moved(after.average, agent.average)
    assert moved(after.actor.params, agent.actor.params) and "base/loss" not in info
    assert take(source, replace(TINY, base_update="clone")).config.clones


def test_actions_before_updates() -> None:
    """Random actions are the base's own first ones, of noise from N(0, I)."""
    agent = create(DSRL, TINY)
    noise = jax.random.normal(KEY, (6, H * ACTION_DIM))
    wanted = base_chunks(agent, OBSERVATIONS, noise)[:, :ACTION_DIM]
    np.testing.assert_allclose(agent.random_actions(OBSERVATIONS, KEY, ACTION_DIM), wanted, atol=1e-6)


def test_queue() -> None:
    """A chunk is played in order; a sample and the mode differ."""
    agent = create(DSRL, TINY)
    chunk = np.asarray(play(agent, KEY, True)).reshape(6, H, ACTION_DIM)
    carry, played = agent.initial_carry((6,)), []
    for _ in range(H):
        action, carry = act(agent, OBSERVATIONS, carry, KEY, True)
        played.append(action)
    np.testing.assert_allclose(np.stack(played, axis=1), chunk, atol=1e-6)
    assert float(np.abs(play(agent, KEY, False) - play(agent, KEY, True)).max()) > 1e-3


def test_refusals() -> None:
    """What cannot be steered, too long chunks, and training on no base are refused by name."""
    with pytest.raises(ConfigError, match="cannot steer BC.*flow_bc"):
        DSRL.from_agent(create(BC, BCConfig(actor_hidden_dims=(8,))), TINY)
    with pytest.raises(ConfigError, match="chunk is 5, but the base makes 3"):
        DSRL.from_agent(create(FlowBC, FLOW), replace(TINY, chunk=5))
    with pytest.raises(ConfigError, match="chunk is 4; expected 1 to 3, the horizon"):
        replace(TINY, chunk=4, base=replace(TINY.base, horizon=3))
    with pytest.raises(ConfigError, match="chunk is 3; expected 4, the horizon of the base, where the base is cloned"):
        replace(TINY, base=replace(TINY.base, horizon=4))
    with pytest.raises(ConfigError, match="no base yet: give `init_from`"):
        create(DSRL, replace(TINY, base_update="none")).phases(10)


def test_run_on_a_run(tiny_run: Callable[..., session.RunConfig], tmp_path: Path) -> None:
    """A run steers the flow of another run, can be opened again, and has its base as it was."""
    loop = LoopConfig(eval_every=20, eval_episodes=1, log_every=10, checkpoint_every=100, updates_per_dispatch=5)
    flow = tiny_run("flow_bc", [("horizon", 2)], offline_steps=20, online_steps=0, loop=loop)
    assert session.train(flow, tmp_path / "flow")
    run = tiny_run(
        "dsrl", [("chunk", 2), ("online.warmup_steps", 5)], online_steps=20, loop=loop,
        init_from=str(tmp_path / "flow"),
    )  # fmt: skip
    assert session.train(run, tmp_path / "steered")
    source, steered = (session.open_agents(str(tmp_path / name)) for name in ("flow", "steered"))
    assert steered.settings.config.base_update == "none" and steered.settings.config.base.horizon == 2
    assert not moved(source.agent.average, steered.agent.average)
    assert steered.counters.env_steps == 20
    rows = session.evaluate_run(tmp_path / "steered", 1)
    assert len(rows) == 1 and np.isfinite(rows[0]["return"])


def test_published_settings() -> None:
    """OGBench's tasks have the settings of QAM's table by the dataset's name."""
    preset = DSRL.preset("other")
    scene = preset.of_task("ogbench/scene-play-singletask-task1-v0").config
    assert (scene.noise_scale, scene.chunk, scene.num_critics, scene.rho) == (0.4, 5, 10, 0.5)
    humanoid = preset.of_task("ogbench/humanoidmaze-medium-navigate-v0").config
    assert (humanoid.noise_scale, humanoid.chunk, humanoid.rho, humanoid.discount) == (0.6, 1, 0.0, 0.995)
    assert preset.of_task("lab/pick-v0").config == DSRLConfig()
