"""Numbers of the specifications that no other test names: starts, presets of mazes, limits of DSRL, QAM and ReBRAC."""

from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o2o.agents import (
    AGENTS,
    DSRL,
    FQL,
    QAM,
    TD3BC,
    DSRLConfig,
    QAMConfig,
    ReBRAC,
    ReBRACConfig,
    TD3BCConfig,
    TD7Config,
)
from o2o.agents.dsrl import SteeredBase
from o2o.agents.qam import OGBENCH_FORMS
from o2o.nn.generative import Flow
from o2o.rl import losses
from o2o.rl.windows import chunk_rows, chunk_transitions
from tests.agents.test_cases_td7 import constant, made
from tests.helpers.contract import QUICK
from tests.helpers.tiny import constant_critic, create, make_batch, set_config, tiny
from tests.helpers.toy_qc import windows

KEY = jax.random.key(3)


# ---------------------------------------------------------------- presets

MAZES = {
    "cube quadruple": "ogbench/cube-quadruple-play-singletask-task1-v0",
    "antmaze large": "ogbench/antmaze-large-navigate-singletask-task1-v0",
    "antmaze giant": "ogbench/antmaze-giant-navigate-singletask-task1-v0",
    "humanoidmaze medium": "ogbench/humanoidmaze-medium-navigate-singletask-task2-v0",
    "humanoidmaze large": "ogbench/humanoidmaze-large-navigate-singletask-task2-v0",
}
PUBLISHED: dict[str, tuple[str, tuple[float, ...]]] = {
    "fql": ("alpha", (100, 3, 3, 30, 30)),
    "ifql": ("expectile", (0.95, 0.9, 0.8, 0.7, 0.8)),
    "rebrac": ("exploration_noise", (0.2, 0, 0, 0, 0.1)),
    "expo": ("edit_scale", (0.4, 0.2, 0.3, 0.5, 0.1)),
    "qam": ("inverse_temperature", (1, 10, 3, 3, 3)),
    "dsrl": ("noise_scale", (1.4, 0.8, 1.2, 0.6, 0.8)),
    "rlpd": ("target_entropy", (0.5,) * 5),
}


@pytest.mark.parametrize("agent", PUBLISHED)
def test_quadruple_and_mazes(agent: str) -> None:
    """Single actions on mazes, discount 0.995 on far ones, rho 0 for the humanoid; each its published value."""
    name, values = PUBLISHED[agent]
    for (domain, dataset), value in zip(MAZES.items(), values, strict=True):
        config = AGENTS[agent].preset("other", "paper").of_task(dataset).config
        maze, far = domain != "cube quadruple", domain.startswith(("antmaze giant", "humanoid"))
        rho = config.rho if hasattr(config, "rho") else config.pessimism
        assert (config.chunk, config.discount) == (1 if maze else 5, 0.995 if far else 0.99), domain
        assert rho == (0.0 if domain.startswith("humanoid") else 0.5) and getattr(config, name) == value, domain
    assert {domain for form in OGBENCH_FORMS.values() for domain in form} > set(MAZES)


def test_fql_goes_online_after_a_million() -> None:
    """The published fine-tuning runs pre-train for 1M updates everywhere; relocate has its own alpha."""
    adroit = FQL.preset("adroit")
    assert [adroit.of_task(f"D4RL/{task}/cloned-v2").config.alpha for task in ("pen", "relocate")] == [1e3, 1e4]
    for agent in ("fql", "ifql"):
        assert {AGENTS[agent].preset(family).offline_steps for family in ("adroit", "antmaze")} == {1_000_000}


# ---------------------------------------------------------------- ReBRAC


def test_rebrac_starts() -> None:
    """Hidden biases 0.1, outputs within 1e-3 and 3e-3, LayerNorm untouched; FQL's actor ends a tenth as large."""
    config = tiny(ReBRACConfig())
    plain, own, fql = (create(ReBRAC, replace(config, start=start)) for start in ("plain", "rebrac", "fql"))
    actor, critic = own.actor.params["params"], own.critic.params["params"]
    for layer in (*actor["MLP_0"].values(), critic["dense_0"], critic["dense_1"]):
        np.testing.assert_allclose(layer["bias"], 0.1)
    for name, leaf in critic["norm_0"].items():
        np.testing.assert_array_equal(leaf, 1.0 if name == "scale" else 0.0)
    for layer, bound in ((actor["Dense_0"], 1e-3), (critic["output"], 3e-3)):
        assert 0.5 * bound < float(jnp.abs(layer["kernel"]).max()) <= bound and 0 < jnp.abs(layer["bias"]).max() < bound
    ends = [each.actor.params["params"]["Dense_0"]["kernel"] for each in (plain, fql)]
    np.testing.assert_allclose(0.1 * ends[0], ends[1], rtol=1e-6)
    for agent in (own, fql):
        for net, target in ((agent.actor.params, agent.target_actor), (agent.critic.params, agent.target_critic)):
            jax.tree.map(np.testing.assert_array_equal, net, target)
    assert ReBRAC.preset("antmaze").of_task("D4RL/antmaze/umaze-v1").config.start == "rebrac"
    assert ReBRAC.preset("other").of_task("ogbench/scene-play-v0").config.start == "fql"


def test_rebrac_noise_is_clipped() -> None:
    """Noise of sigma 5 moves an action by 0.5 at most, and by that for nearly all; sigma 0 by nothing."""
    agent = set_config(create(ReBRAC, tiny(ReBRACConfig())), exploration_noise=5.0)
    moves = np.abs(np.asarray(agent.explore(jnp.zeros((500, 2)), KEY)))
    assert moves.max() == 0.5 and np.mean(moves == 0.5) > 0.9
    np.testing.assert_array_equal(set_config(agent, exploration_noise=0.0).explore(jnp.full((3, 2), 0.5), KEY), 0.5)


def test_rebrac_is_td3bc() -> None:
    """With one critic and beta_1 = 1 / (2.5 A) the actor's loss is TD3+BC's divided by 2.5."""
    plain, rows = create(TD3BC, tiny(TD3BCConfig(), num_critics=1)), make_batch()
    config = tiny(ReBRACConfig(), num_critics=1, critic_layer_norm=False, actor_penalty=1 / (2.5 * 2))
    agent = create(ReBRAC, config)
    agent = agent.replace(
        actor=agent.actor.replace(params=plain.actor.params), critic=agent.critic.replace(params=plain.critic.params)
    )
    one, other = (float(each.actor_loss(each.actor.params, rows, KEY)[0]) for each in (agent, plain))
    assert one == pytest.approx(other / 2.5, rel=1e-5) and abs(other) > 0.1


# ---------------------------------------------------------------- DSRL


class Still(nn.Module):
    """A velocity `gain` x: with one step the base is clip((1 + gain) z)."""

    gain: float

    @nn.compact
    def __call__(self, observations: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
        """Return `[..., n]`."""
        return self.gain * x


def steered(gain: float) -> Any:
    """Return DSRL of single actions on a base without parameters."""
    sizes: dict[str, Any] = {"actor_hidden_dims": (16,), "critic_hidden_dims": (16,), "num_critics": 2}
    agent = create(DSRL, DSRLConfig(base=SteeredBase(flow=Flow(1)), base_update="none", batch_size=8, **sizes))
    return agent.replace(base=agent.base.replace(module=Still(gain), params={}), average={})


def test_dsrl_identity_base_is_sac() -> None:
    """With Base(s, z) = z and Qz = Q the noise critics' loss is 0, and targets and actor's loss are SAC's."""
    agent, rows = steered(0.0), make_batch()
    agent = agent.replace(noise_critic=agent.noise_critic.replace(params=agent.critic.params))
    chunks = chunk_rows({**jax.tree.map(lambda x: x[:, None], rows), "valid": jnp.ones((8, 1))}, 0.99, True)
    inside = jnp.tanh(jax.random.normal(KEY, (8, 2)))
    assert float(agent.noise_critic_loss(agent.noise_critic.params, chunks, inside)[0]) == pytest.approx(0.0, abs=1e-10)
    u = agent.policy(rows["next_observations"]).sample(KEY)
    q = agent.critic(rows["next_observations"], u, params=agent.target_critic)
    y = rows["rewards"] + 0.99 * rows["masks"] * losses.lower_bound(q, 0.5)
    np.testing.assert_allclose(agent.targets(chunks, KEY), y, rtol=1e-5)
    actions, log_prob = agent.policy(rows["observations"]).sample_and_log_prob(KEY)
    climbed = agent.critic(rows["observations"], actions).mean(axis=0)
    loss, _ = agent.actor_loss(agent.actor.params, chunks, KEY)
    assert float(loss) == pytest.approx(float(losses.sac_actor_loss(log_prob, climbed, agent.alpha())), rel=1e-5)


def test_dsrl_deaf_base() -> None:
    """A base that ignores its noise gives the noise critics one goal for all z: flat critics have no loss."""
    agent, rows = steered(-1.0), make_batch()
    agent = agent.replace(critic=agent.critic.replace(params=constant_critic(agent.critic.params, 2.0)))
    chunks = chunk_rows({**jax.tree.map(lambda x: x[:, None], rows), "valid": jnp.ones((8, 1))}, 0.99, True)
    noise = 3.0 * jax.random.normal(KEY, (8, 2))
    np.testing.assert_array_equal(agent.base_chunks(rows["observations"], noise), 0.0)
    flat = constant_critic(agent.noise_critic.params, 1.5)
    assert float(agent.noise_critic_loss(flat, chunks, noise)[0]) == pytest.approx(0.25, rel=1e-5)


# ---------------------------------------------------------------- QAM


def chunked(form: Any) -> Any:
    """Return QAM of chunks of two, lambda 0."""
    return create(QAM, tiny(QAMConfig(), chunk=2, num_critics=2, flow_steps=3, form=form, inverse_temperature=0.0))


def test_qam_without_lambda_is_fedit() -> None:
    """With lambda 0 and edits what acts is clip(Flow(v_b) + beta e), whatever the fast field is."""
    agent, seen = set_config(chunked("edit"), edit_scale=0.3), make_batch()["observations"]
    noise_rng, edit_rng = jax.random.split(KEY)
    base = Flow(3).sample(
        lambda x, t: agent.behaviour(seen, x, t), jax.random.normal(noise_rng, (1, *seen.shape[:1], 4)), KEY
    )[0]
    edits = agent.edit_policy(seen, base[None]).sample(edit_rng)[0]
    other = agent.replace(actor=agent.actor.replace(params=jax.tree.map(lambda x: 3.0 * x, agent.actor.params)))
    for each in (agent, other):
        np.testing.assert_allclose(each.propose(seen, KEY), jnp.clip(base + 0.3 * edits, -1.0, 1.0), atol=1e-5)


@pytest.mark.parametrize(("form", "moving"), [("edit", "edit"), ("one_step", "one_step")])
def test_qam_forms_leave_fields(form: str, moving: str) -> None:
    """Edit and one-step policy move by their own losses, which move nothing else: fields and critics step as QAM's."""
    rows = windows(np.random.default_rng(0).normal(size=(8, 2)), np.zeros((8, 2)), np.ones((8, 2)))
    step = jax.jit(lambda agent: agent.gradients(chunk_transitions(rows, agent.config), KEY)[0], compiler_options=QUICK)
    plain, own = step(chunked("flow")), step(chunked(form))
    assert own.keys() - plain.keys() == {moving, "temperature"} - ({"temperature"} if form == "one_step" else set())
    assert any(np.any(leaf) for leaf in jax.tree.leaves(own[moving]))
    for name in ("behaviour", "actor"):
        for one, other in zip(jax.tree.leaves(plain[name]), jax.tree.leaves(own[name]), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)


# ---------------------------------------------------------------- TD7


def test_td7_clones_online() -> None:
    """After the switch `online_cloning` is the weight: Q of 4, weight 0.25 and squared distance d make -4 + d."""
    batch, agent = make_batch(), set_config(made(online=True), online_cloning=0.25)
    agent = agent.replace(critic=agent.critic.replace(params=constant(agent.critic.params, (4.0, 4.0))))
    loss, info = agent.actor_loss(agent.actor.params, batch, KEY)
    assert float(info["actor/distance"]) > 0.1
    assert float(loss) == pytest.approx(-4.0 + float(info["actor/distance"]), rel=1e-5)
    small = AGENTS["td7"].preset("locomotion", "small")
    assert (small.run, small.config.cloning, small.config.online_cloning) == ({"normalize": True}, 0.4, 0.1)
    assert (AGENTS["td7"].preset("locomotion").config.online_cloning, TD7Config().cloning) == (0.0, 0.1)
