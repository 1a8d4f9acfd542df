"""Options for a switch that loses less: critics learn alone, are refitted to returns, the actor's rate rises."""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o2o.agents.cql import CQL, CalQL, Conservative, CQLConfig
from o2o.agents.famo2o_cql import FamO2OCQL, FamO2OCQLConfig
from o2o.agents.sac import RLPD, SAC, RLPDConfig, SACConfig
from o2o.agents.wsrl import WSRL, WSRLConfig, online_sac
from o2o.errors import ConfigError
from o2o.types import OnlineConfig
from tests.helpers.tiny import ROWS, create, largest_difference, make_batch, moved, steps, tiny, update

WIDTHS: dict[str, Any] = {"actor_hidden_dims": (16,), "critic_hidden_dims": (16,), "num_critics": 2}
THREE = OnlineConfig(initial_updates=3)


def wsrl(online: OnlineConfig = THREE, **finetune: Any) -> WSRLConfig:
    """Return a tiny WSRL over CQL with these settings of its online SAC."""
    cql = CQLConfig(**WIDTHS, conservative=Conservative(n_actions=2), max_target_actions=2)
    return WSRLConfig(
        online=online, pretrain="cql", cql=cql, finetune=online_sac(**WIDTHS, **finetune), batch_size=ROWS
    )


@jax.jit
def switch(agent: Any) -> Any:
    return agent.online()


@functools.cache
def online_agent(**finetune: Any) -> Any:
    """Return a tiny WSRL agent, pre-trained by two updates, in its online form."""
    agent = create(WSRL, wsrl(**finetune))
    for seed in range(2):
        agent, _ = update(agent, make_batch(1, seed=seed))
    return switch(agent)


@pytest.mark.parametrize("target", ["td", "mc"])
@pytest.mark.parametrize("zero_grad_steps", [False, True])
def test_critics_learn_alone(target: Any, zero_grad_steps: bool) -> None:
    """In the initial updates the critics move; actor, temperature and their Adam are bitwise what they were."""
    first = online_agent(critic_warmup=target, zero_grad_steps=zero_grad_steps)
    agent = first
    for call in range(3):
        before = agent
        agent, _ = update(agent, make_batch(1, seed=call))
        assert moved(agent.critic.params, before.critic.params)
        assert not moved((agent.actor, agent.temperature), (first.actor, first.temperature))
    assert int(agent.learner.online_steps) == 3
    after, _ = update(agent, make_batch(2, seed=9))
    assert moved(after.actor.params, agent.actor.params) and moved(after.temperature.params, agent.temperature.params)
    assert int(after.learner.online_steps) == 5


def test_after_it_all_is_usual() -> None:
    """A call after the critic-only phase is that of an agent without the option: steps are 1e-4, equal to a 1/5."""
    agent = online_agent(critic_warmup="td")
    for call in range(3):
        agent, _ = update(agent, make_batch(1, seed=call))
    plain = online_agent()
    parts = {name: getattr(agent.learner, name) for name in ("actor", "critic", "target_critic", "temperature", "rng")}
    plain = plain.replace(learner=plain.learner.replace(**parts))
    one, two = (update(each, make_batch(2, seed=4))[0] for each in (agent, plain))
    for name in parts:
        left, right = (getattr(each.learner, name) for each in (one, two))
        if name == "rng":
            left, right = jax.random.key_data(left), jax.random.key_data(right)
        assert largest_difference(left, right) < 2e-5, name  # Adam makes much of how two programs round


def test_mc_target_is_the_return() -> None:
    """With `mc` the critics' target is the Monte-Carlo return while the actor rests, and bootstrapped behind it."""
    agent, batch = online_agent(critic_warmup="mc"), make_batch(1, seed=3)
    for _ in range(3):
        agent, info = update(agent, batch)
        np.testing.assert_allclose(info["critic/target"], batch["mc_returns"].mean(), rtol=1e-5)
    _, info = update(agent, batch)
    assert abs(float(info["critic/target"] - batch["mc_returns"].mean())) > 1e-3


def test_mc_refit_removes_bias() -> None:
    """Critics that are far off come to the mean return of the rows."""
    config = tiny(
        SACConfig(critic_warmup="mc", critic_lr=1e-2, online=OnlineConfig(initial_updates=400)), num_critics=2
    )
    batch = make_batch(1)
    batch["mc_returns"] = jnp.full_like(batch["mc_returns"], 7.0)
    agent = switch(create(SAC, config))
    q = lambda agent: float(agent.q_value(batch["observations"][0], batch["actions"][0]).mean())  # noqa: E731
    assert abs(q(agent) - 7.0) > 3.0
    for _ in range(200):
        agent, _ = update(agent, batch)
    assert abs(q(agent) - 7.0) < 0.5


def test_actor_rate_rises() -> None:
    """The actor's steps grow linearly to those without the option; the moments are the same from the first on."""
    slow, plain = online_agent(actor_lr_warmup=4), online_agent()
    batch = make_batch(1, seed=5)
    one, two = (update(each, batch)[0] for each in (slow, plain))
    small, whole = (
        largest_difference(after.actor.params, before.actor.params) for after, before in ((one, slow), (two, plain))
    )
    assert small == pytest.approx(whole / 4, rel=1e-2)
    assert not moved(one.actor.opt_state[0].mu, two.actor.opt_state[0].mu)
    rates = []
    for call in range(6):
        rates.append(float(slow.learner.actor_rate))
        slow, _ = update(slow, make_batch(1, seed=call))
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_rate_waits_for_the_critics() -> None:
    """With a critic-only phase the rate begins to rise behind it."""
    agent = online_agent(critic_warmup="td", actor_lr_warmup=2)
    rates = []
    for call in range(6):
        agent, _ = update(agent, make_batch(1, seed=call))
        rates.append(float(agent.learner.actor_rate))
    assert rates == [0.0, 0.0, 0.5, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (SAC, SACConfig(critic_warmup="td", online=THREE)),
        (RLPD, RLPDConfig(critic_warmup="mc", online=THREE)),
        (CQL, CQLConfig(critic_warmup="mc", online=THREE)),
        (CalQL, CQLConfig(critic_warmup="td", online=THREE)),
        (FamO2OCQL, FamO2OCQLConfig(critic_warmup="td", online=THREE)),
    ],
)
def test_family(kind: Any, config: Any) -> None:
    """Every agent of the family rests its actor online and not in pre-training, several seeds side by side too."""
    agent = create(kind, tiny(config))
    learnt, _ = update(agent, make_batch(1))
    assert learnt.online_steps is None and steps(learnt.actor) == 1
    online = switch(learnt)
    assert online.needs.batch_keys == (("mc_returns",) if config.critic_warmup == "mc" or kind is CalQL else ())
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), online, online.replace(online_steps=jnp.asarray(3)))
    batch = make_batch(1)
    after, _ = jax.jit(jax.vmap(lambda each: each.update(batch)))(both)
    assert after.actor.opt_state[0].count.tolist() == [1, 2]
    assert after.critic.opt_state[0].count.tolist() == [2, 2]


def test_off_costs_nothing() -> None:
    """Without the options an agent has no further state, before and after the switch, and needs no more of its data."""
    agent = online_agent()
    assert agent.learner.online_steps is None and agent.needs.batch_keys == ()
    assert agent.learner.resting is None and agent.learner.actor_rate is None
    with_mc = create(WSRL, wsrl(critic_warmup="mc"))
    assert with_mc.needs.batch_keys == with_mc.config.needs.batch_keys == ("mc_returns",)
    assert switch(with_mc).needs.batch_keys == ("mc_returns",)


def test_taken_over_run_begins_anew() -> None:
    """A WSRL agent that starts from an online one has its critic-only phase before it."""
    done, _ = update(online_agent(critic_warmup="td"), make_batch(4))
    assert int(done.learner.online_steps) == 4
    taken = WSRL.from_agent(done, wsrl(critic_warmup="td"))
    assert int(switch(taken).learner.online_steps) == 0


def test_half_settings_refused() -> None:
    """A critic warm-up without updates, and online settings of the pre-trainer, are refused by name."""
    with pytest.raises(ConfigError, match=r"config.finetune.critic_warmup is 'td' and config.online.initial_updates 0"):
        wsrl(OnlineConfig(), critic_warmup="td")
    with pytest.raises(ConfigError, match=r"config.critic_warmup is 'mc' and config.online.initial_updates 0"):
        create(SAC, tiny(SACConfig(critic_warmup="mc")))
    with pytest.raises(ConfigError, match=r"WSRLConfig.cql.actor_lr_warmup is of the online phase"):
        replace(wsrl(), cql=CQLConfig(**WIDTHS, actor_lr_warmup=5))
