"""Every learner on probe environments with known values; an untrained or a broken learner fails each threshold."""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o2o.agents import (
    AGENTS,
    AWACConfig,
    BCConfig,
    CalQLConfig,
    Conservative,
    CQLConfig,
    DSRLConfig,
    EXPOConfig,
    FQLConfig,
    IFQLConfig,
    IQLConfig,
    PEXConfig,
    QAMConfig,
    QCConfig,
    ReBRACConfig,
    RLPDConfig,
    SACConfig,
    TD3BCConfig,
    WSRLConfig,
)
from o2o.agents.dsrl import SteeredBase
from o2o.agents.wsrl import online_sac
from o2o.nn.generative import Diffusion
from tests.helpers.probes import (
    BATCH,
    BEST_ACTION,
    DISCOUNT,
    Probe,
    best_action,
    endless,
    mode,
    noisy_expert,
    one_step,
    q_values,
    two_steps,
)

pytestmark = pytest.mark.learning

ACTOR: dict[str, Any] = {"actor_hidden_dims": (32, 32), "batch_size": BATCH, "discount": DISCOUNT, "actor_lr": 3e-3}
CRITIC: dict[str, Any] = {**ACTOR, "critic_hidden_dims": (32, 32), "critic_lr": 3e-3, "tau": 0.05, "num_critics": 2}
SOFT: dict[str, Any] = {**CRITIC, "temperature_lr": 3e-3, "backup_entropy": False}
PLAIN = Conservative(weight=0.0, n_actions=1)
"""Without its penalty, whose pessimism moves the values, CQL is SAC."""
CONFIGS: dict[str, Any] = {
    "iql": replace(IQLConfig(), **CRITIC, value_hidden_dims=(32, 32), value_lr=3e-3, beta=10.0),
    "cql": replace(CQLConfig(), **SOFT, conservative=PLAIN, max_target_actions=3),
    "calql": replace(CalQLConfig(), **SOFT, conservative=PLAIN, max_target_actions=3),
    "sac": replace(SACConfig(), **SOFT),
    "rlpd": replace(RLPDConfig(), **SOFT),
    "wsrl": WSRLConfig(cql=CQLConfig(**SOFT), finetune=online_sac(**SOFT), batch_size=BATCH, discount=DISCOUNT),
    "qc": replace(QCConfig(), **CRITIC, chunk=1, num_samples=32, flow_steps=3),
    "qam": replace(QAMConfig(), **CRITIC, chunk=1, pessimism=0.0, inverse_temperature=10.0),
    "awac": replace(AWACConfig(), **CRITIC, temperature=0.1),
    "td3bc": replace(TD3BCConfig(), **CRITIC, alpha=100.0, target_noise=0.0),
    "rebrac": replace(ReBRACConfig(), **CRITIC, target_noise=0.0),
    "fql": replace(FQLConfig(), **CRITIC, alpha=0.1),
    "ifql": replace(IFQLConfig(), **CRITIC, value_hidden_dims=(32, 32), value_lr=3e-3, expectile=0.5, num_samples=64),
    "dsrl": replace(
        DSRLConfig(),
        **CRITIC,
        base=SteeredBase(actor_hidden_dims=(32, 32)),
        base_lr=3e-3,
        temperature_lr=3e-3,
        noise_scale=2.0,
    ),
    "pex": replace(PEXConfig(), **CRITIC, value_hidden_dims=(32, 32), value_lr=3e-3, evaluation_randomness=0.0),
    "expo": replace(
        EXPOConfig(),
        batch_size=BATCH,
        discount=DISCOUNT,
        critic_hidden_dims=(32, 32),
        critic_lr=3e-3,
        tau=0.05,
        num_critics=2,
        base_width=32,
        base_blocks=1,
        base_lr=3e-3,
        base_ema=0.05,
        diffusion=Diffusion(3),
        n_samples=8,
        n_edits=8,
        edit_scale=0.3,
        edit_hidden_dims=(32, 32),
        edit_lr=3e-3,
        decay_steps=None,
    ),
}
LEARNERS = tuple(CONFIGS)
ACTIONS = np.linspace(-0.9, 0.9, 7)


@functools.lru_cache
def make_probe(name: str) -> Probe:
    """Return the learner's probe, made once so that its training is compiled once; online learners are probed."""
    agent = AGENTS[name].create(jax.random.key(0), jnp.zeros((1, 1)), jnp.zeros((1, 1)), CONFIGS[name])
    return Probe(agent.online() if name in ("wsrl", "expo", "pex") else agent)


def test_learners_with_critic_probed() -> None:
    """Every learner with a critic is probed."""
    imitators = {"bc", "diffusion_bc", "flow_bc"}
    windows_and_bases = {"residual", "ibrl"}  # their targets and their climb are in their own tests
    same_losses = {
        "jsrl",
        "famo2o",
        "famo2o_cql",
    }  # the critics are IQL's and CQL's, in a test of their own bit for bit
    no_q_online = {"ppo", "uni_o4"}  # test_ppo and test_uni_o4 have their values by hand
    embeddings = {"td7"}  # its critics need them, in test_cases_td7
    assert set(LEARNERS) == set(AGENTS) - imitators - windows_and_bases - same_losses - no_q_online - embeddings


@pytest.mark.parametrize("name", LEARNERS)
def test_terminal_reward(name: str) -> None:
    agent = make_probe(name).train(one_step())
    for state in (-1.0, 1.0):
        np.testing.assert_allclose(q_values(agent, state, ACTIONS), 0.7, atol=0.07)


@pytest.mark.parametrize("name", LEARNERS)
def test_value_discounted_per_step(name: str) -> None:
    """The value is discounted once per step."""
    agent = make_probe(name).train(two_steps())
    np.testing.assert_allclose(q_values(agent, 1.0, ACTIONS), 1.0, atol=0.1)
    np.testing.assert_allclose(q_values(agent, -1.0, ACTIONS), DISCOUNT, atol=0.1)


@pytest.mark.parametrize("name", LEARNERS)
def test_time_limit_bootstraps(name: str) -> None:
    """A time limit bootstraps."""
    agent = make_probe(name).train(endless())
    np.testing.assert_allclose(q_values(agent, 1.0, ACTIONS), 1.0 / (1.0 - DISCOUNT), atol=0.2)


@pytest.mark.parametrize("name", LEARNERS)
def test_policy_finds_best_action(name: str) -> None:
    """The policy finds the best action."""
    agent = make_probe(name).train(best_action())
    for state in (-1.0, 1.0):
        expected = -4.0 * (ACTIONS - BEST_ACTION * state) ** 2
        assert np.abs(q_values(agent, state, ACTIONS) - expected).mean() < 0.3
        assert mode(agent, state) == pytest.approx(BEST_ACTION * state, abs=0.12)


@pytest.mark.parametrize("name", LEARNERS)
def test_untrained_learner_fails(name: str) -> None:
    """An untrained learner passes no probe."""
    agent = make_probe(name).agent
    values = q_values(agent, 1.0, ACTIONS)
    for target in (0.7, 1.0, 1.0 / (1.0 - DISCOUNT)):
        assert np.abs(values - target).max() > 0.2
    assert max(abs(mode(agent, state) - BEST_ACTION * state) for state in (-1.0, 1.0)) > 0.12


@pytest.mark.parametrize("loss", ["nll", "mse"])
def test_bc_finds_mean_action(loss: Any) -> None:
    """BC finds the mean action."""
    config = replace(BCConfig(), **ACTOR, loss=loss)
    agent = AGENTS["bc"].create(jax.random.key(0), jnp.zeros((1, 1)), jnp.zeros((1, 1)), config)
    trained = Probe(agent).train(noisy_expert())
    errors = [[abs(mode(a, state) - BEST_ACTION * state) for state in (-1.0, 1.0)] for a in (agent, trained)]
    assert max(errors[0]) > 0.1 and max(errors[1]) < 0.05
    if loss == "nll":
        actions, _ = trained.sample_actions(jnp.ones((2000, 1)), None, jax.random.key(1))
        assert float(actions.std()) == pytest.approx(0.1, abs=0.03)
