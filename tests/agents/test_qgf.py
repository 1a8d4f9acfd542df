"""Guidance (QGF): what Q's gradient does to a flow's samples, worked by hand, and that it changes acting alone."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o2o.agents import BC, IFQL, QC, BCConfig, IFQLConfig
from o2o.errors import ConfigError
from o2o.nn.generative import Apply, Flow, Guidance
from o2o.runs import session
from tests.helpers.tiny import OBSERVATION_DIM, constant_critic, create, moved, set_config
from tests.helpers.toy_qc import BASE, DISTILLED, KEY, H, quick, random_windows, update

TINY = IFQLConfig(
    chunk=H,
    num_samples=1,
    flow_steps=3,
    batch_size=8,
    actor_hidden_dims=(16, 16),
    critic_hidden_dims=(16, 16),
    value_hidden_dims=(16, 16),
)
OBSERVATIONS = jax.random.normal(KEY, (6, OBSERVATION_DIM))
play = quick(lambda agent: agent.play(OBSERVATIONS, jax.random.key(5), False))


def sampled(apply: Apply, guidance: Guidance, value: Any, noise: Any = 0.0, steps: int = 10, **how: Any) -> np.ndarray:
    """Return the guided samples of a flow from noise of one number a row."""
    start = jnp.atleast_1d(jnp.asarray(noise, jnp.float32))[:, None]
    return np.asarray(Flow(steps).sample(guidance.guided(apply, value, **how), start, KEY))[:, 0]


def linear(slope: float) -> Any:
    return lambda x: slope * x[..., 0]


def gaussian(variance: float) -> Apply:
    """Return the exact velocity of a flow to N(0, variance)."""
    return lambda x, t: (t * variance - (1 - t)) / ((1 - t) ** 2 + t**2 * variance) * x


@pytest.mark.parametrize(("variance", "share"), [(1.0, 1.1741), (0.25, 0.8112), (0.04, 0.4471)])
def test_shift_of_gaussian(variance: float, share: float) -> None:
    """With a linear Q the mean moves by a known share of w q. The exponential tilt would give the variance."""
    moved_to = sampled(gaussian(variance), Guidance(weight=0.5), linear(0.2))
    np.testing.assert_allclose(moved_to, share * 0.5 * 0.2, rtol=1e-4)


def test_still_flow() -> None:
    """A flow that stands still moves by w times the gradient."""
    still = lambda x, t: jnp.zeros_like(x)  # noqa: E731
    for at in ("clean", "noisy"):
        found = sampled(still, Guidance(weight=0.5, at=at), linear(0.2), [-0.3, 0.1])
        np.testing.assert_allclose(found, [-0.2, 0.2], rtol=1e-5)


def test_point_mass() -> None:
    """On a point mass only the last step's push is left: a = mu + w 2 (a* - mu) / T."""
    point = lambda x, t: (0.2 - x) / (1.0 - t)  # noqa: E731
    found = sampled(point, Guidance(weight=0.5), lambda x: -jnp.square(x[..., 0] - 0.6), [-1.0, 0.5])
    np.testing.assert_allclose(found, 0.2 + 0.5 * 2 * (0.6 - 0.2) / 10, rtol=1e-4)


def test_gradient_outside_box() -> None:
    """The clip is not in the gradient: outside the box the push is the one at its edge."""
    still = lambda x, t: jnp.zeros_like(x)  # noqa: E731
    quadratic = lambda x: -jnp.square(x[..., 0])  # noqa: E731
    step = Guidance(weight=0.1).guided(still, quadratic)(jnp.asarray([[5.0]]), jnp.asarray(0.0))
    np.testing.assert_allclose(step, [[-0.2]], rtol=1e-6)
    clipped = Guidance(weight=0.1, jacobian=True).guided(still, quadratic)(jnp.asarray([[5.0]]), jnp.asarray(0.0))
    np.testing.assert_array_equal(clipped, [[0.0]])


@pytest.mark.parametrize("slope", [0.0, -0.5])
def test_jacobian(slope: float) -> None:
    """With v = c x + d the Jacobian scales the gradient by 1 + (1 - t) c; with c = 0 both are the same."""
    drift = lambda x, t: slope * x + 0.1  # noqa: E731
    for t in (0.0, 0.5):
        pushes = [
            Guidance(weight=0.5, jacobian=jacobian).guided(drift, linear(0.2))(jnp.asarray([[0.1]]), jnp.asarray(t))
            for jacobian in (False, True)
        ]
        plain = drift(jnp.asarray([[0.1]]), t)
        np.testing.assert_allclose(pushes[0] - plain, 0.1, rtol=1e-5)
        np.testing.assert_allclose(pushes[1] - plain, 0.1 * (1 + (1 - t) * slope), rtol=1e-5)


def test_weights_side_by_side() -> None:
    """A list of weights in one call does what separate calls do; 0 does nothing."""
    flow, q = gaussian(0.25), lambda x: -jnp.square(x[..., 0] - 0.5)
    together = sampled(flow, Guidance(), q, [0.3, 0.3, 0.3], weight=jnp.asarray([0.0, 0.5, 2.0]))
    alone = [sampled(flow, Guidance(weight=w), q, [0.3])[0] for w in (0.0, 0.5, 2.0)]
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    assert len(set(together)) == 3


def test_weight_zero_costs_nothing() -> None:
    """With weight 0 the velocity is the flow's own function."""
    flow = gaussian(1.0)
    assert Guidance().guided(flow, linear(1.0)) is flow
    with pytest.raises(ConfigError, match="jacobian"):
        Guidance(jacobian=True, at="noisy")


@pytest.mark.parametrize(("kind", "config"), [(QC, replace(BASE, num_samples=1)), (IFQL, TINY)], ids=["qc", "ifql"])
def test_guided_agents(kind: Any, config: Any) -> None:
    """Guided chunks have a higher Q' and stay in the box; the target critics guide, and no others."""
    agent = create(kind, config)
    guided = set_config(agent, guidance=Guidance(weight=3.0))
    values = [
        float(agent.critic(OBSERVATIONS, play(each), params=agent.target_critic).min(axis=0).mean())
        for each in (agent, guided)
    ]
    assert values[1] > values[0] + 0.05 and float(jnp.abs(play(guided)).max()) <= 1.0
    other = guided.replace(critic=guided.critic.replace(params=constant_critic(agent.critic.params, 0.0)))
    np.testing.assert_array_equal(play(other), play(guided))
    flat = guided.replace(target_critic=constant_critic(agent.target_critic, 0.0))
    np.testing.assert_allclose(play(flat), play(agent), atol=1e-6)
    online = set_config(agent, guidance=Guidance(weight=3.0, critics="online", aggregate="mean"))
    same = online.replace(target_critic=constant_critic(agent.target_critic, 0.0))
    np.testing.assert_array_equal(play(same), play(online))


@pytest.mark.parametrize(("kind", "config"), [(QC, BASE), (IFQL, TINY)], ids=["qc", "ifql"])
def test_training_without_guidance(kind: Any, config: Any) -> None:
    """Learning does not know of guidance: networks and metrics are the same bit for bit."""
    agent = create(kind, config)
    guided = set_config(agent, guidance=Guidance(weight=3.0))
    (one, infos), (two, others) = (update(each, random_windows()) for each in (agent, guided))
    assert {name: float(value) for name, value in infos.items()} == {k: float(v) for k, v in others.items()}
    assert not moved(one.critic.params, two.critic.params) and not moved(one.actor.params, two.actor.params)


def test_guided_one_step_policy_refused() -> None:
    """The one-step policy has no steps to guide."""
    with pytest.raises(ConfigError, match="guidance .*distilled"):
        replace(DISTILLED, guidance=Guidance(weight=1.0))


def test_weight_of_a_trained_run(tiny_run: Callable[..., session.RunConfig], tmp_path: Path) -> None:
    """A trained run acts and is exported with another weight; agents without a flow refuse it."""
    path = tmp_path / "ifql"
    assert session.train(tiny_run("ifql", [("num_samples", 1)], offline_steps=10, online_steps=0), path)
    opened = session.open_agents(path)
    seen = opened.data.info.observation_space.sample()
    actions = [session.load_policy(path, guidance=weight).act(seen) for weight in (None, 0.0, 5.0)]
    np.testing.assert_array_equal(actions[0], actions[1])
    assert np.abs(actions[0] - actions[2]).max() > 1e-4
    session.export_run(path, tmp_path / "guided.jax", guidance=5.0)  # which compares file and agent
    with pytest.raises(ConfigError, match="no flow that Q could guide"):
        replace(opened, agent=create(BC, BCConfig(actor_hidden_dims=(8,)))).guided(1.0)
    with pytest.raises(ConfigError, match="guidance"):
        session.evaluate_run(path, 1, guidance=-1.0)
