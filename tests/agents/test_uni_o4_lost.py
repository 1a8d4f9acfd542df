"""Uni-O4's AM-Q: where roll-outs begin, which of them are lost, and what becomes of the policy."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o2o.agents import UniO4
from o2o.nn.dynamics import Dynamics
from o2o.nn.terminations import RULES
from o2o.replay.buffer import OfflineData
from tests.agents.test_uni_o4 import CONFIG, ROWS, amq, improve, make_agent, member, same


def of_rule(name: str) -> tuple[Any, OfflineData]:
    """Return an agent and data whose observations are as long as a rule wants them."""
    pad = lambda leaf: jnp.tile(leaf, 15)[:, : max(RULES[name].size, 3)]  # noqa: E731
    rows = {key: pad(leaf) if key.endswith("observations") else leaf for key, leaf in ROWS.items()}
    data = OfflineData.create({**rows, "ends": 1.0 - ROWS["masks"]}, ("ends",))
    config = replace(CONFIG, termination=name)
    return UniO4.create(jax.random.key(0), rows["observations"], rows["actions"], config), data


def stepping(name: str, following: Any) -> Any:
    """Return a `Dynamics.step` to `following(states)` in which a rule says what ended."""

    def step(self: Any, rng: Any, states: Any, actions: Any) -> Any:
        reached = following(states)
        return reached, jnp.zeros(states.shape[0]), RULES[name](reached)

    return step


@pytest.mark.parametrize("rule", ["never", "halfcheetah"])
def test_diverged_policy_reset(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy whose roll-outs diverge is put back to its reference."""
    agent, data = of_rule(rule)
    agent = agent.begin_improvement(data)
    trained, _ = improve(agent, data, 0.0)
    monkeypatch.setattr(Dynamics, "step", stepping(rule, lambda states: states * 1e9))
    judged = trained.judge(data)
    np.testing.assert_array_equal(judged.diverged, [1, 1])
    assert same(judged.policies.params, agent.reference) and same(judged.reference, agent.reference)
    assert all(not leaf.any() for leaf in jax.tree.leaves(judged.policies.opt_state))
    np.testing.assert_array_equal(judged.best, agent.best)
    _, info = improve(judged, data, 0.0)
    assert float(info["amq/diverged"]) == 2.0


@pytest.mark.parametrize(
    ("rule", "at", "number", "lost"),
    [
        ("hopper", 0, 0.6, False),
        ("hopper", 1, 0.3, False),
        ("hopper", 5, 150.0, True),
        ("walker2d", 0, 2.5, False),
        ("walker2d", 9, -100.0, True),
        ("halfcheetah", 3, np.nan, True),
        ("halfcheetah", 16, 100.0, True),
        ("pen", 26, 0.0, False),
        ("pen", 26, -np.inf, True),
    ],
)
def test_falls_and_invalid_states(
    rule: str, at: int, number: float, lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fall ends a roll-out, and what is no state loses it. Also where 100 is within the data's range."""
    agent, data = of_rule(rule)
    agent = agent.replace(dynamics=agent.dynamics.replace(std=jnp.full_like(agent.dynamics.std, 20.0)))
    standing = jnp.zeros(data.rows["observations"].shape[-1]).at[0].set(1.2)
    standing = standing.at[26].set(0.2) if rule == "pen" else standing
    assert not RULES[rule](standing) and RULES[rule](standing.at[at].set(number))
    for state, expected in ((standing, False), (standing.at[at].set(number), lost)):
        reach = lambda states, state=state: jnp.broadcast_to(state, states.shape)  # noqa: E731
        monkeypatch.setattr(Dynamics, "step", stepping(rule, reach))
        np.testing.assert_array_equal(agent.amq(agent.policies.params, data)[1], [expected] * 2)


def test_start_state_weights() -> None:
    """Start states follow the weights of the datasets.

    At horizon 1 the score is the mean Q of the second half of the rows, which has all the weight.
    """
    agent, rows = make_agent(horizon=1, judge_rows=20_000), {**ROWS, "ends": 1.0 - ROWS["masks"]}
    mixed = OfflineData.create(rows, ("ends",), ((0, 32, 0.0), (32, 32, 1.0)))
    own = member(agent.policies.params, 0)
    q = agent.critic(ROWS["observations"], agent.policy(own, ROWS["observations"]).mode()).min(axis=0)
    assert abs(float(q.mean() - q[32:].mean())) > 8 * float(q.std()) / 20_000**0.5
    score = float(amq(agent, mixed)[0][0])
    assert score == pytest.approx(float(q[32:].mean()), abs=4 * float(q.std()) / 20_000**0.5)
