"""A seed is a seed: member k of `--seed s --seeds n` is the run of `--seed s+k`, to float tolerance."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from o2o.config import RunConfig
from o2o.runs import session
from o2o.train.trainer import Trainer

PPO = [
    ("online.num_envs", 2),
    ("online.rollout_steps", 24),
    ("epochs", 2),
    ("batch_size", 12),
    ("actor_hidden_dims", (8,)),
    ("value_hidden_dims", (8,)),
]


def trained(run: RunConfig, heard: list[dict[str, Any]]) -> Trainer:
    trainer = session.build(run)
    trainer.hooks.episodes = heard.extend
    trainer.offline(run.offline_steps)
    trainer.online(run.online_steps)
    return trainer


@pytest.mark.parametrize(("agent", "fields"), [("wsrl", ()), ("iql", ()), ("ppo", PPO)], ids=["wsrl", "iql", "ppo"])
def test_seed_independent_of_others(agent: str, fields: Any, tiny_run: Callable[..., RunConfig]) -> None:
    """A seed beside another is the run of that seed alone.

    Networks, stored transitions and evaluation episodes agree; the first seed's differ from them.
    """
    steps = {"offline_steps": 10, "online_steps": 48}
    beside, alone = [], []
    pair = trained(tiny_run(agent, fields, seed=3, seeds=2, **steps), beside)
    single = trained(tiny_run(agent, fields, seed=4, seeds=1, **steps), alone)
    of_both = lambda index: jax.tree.leaves((pair.agent_of(index).actor.params, pair.state.action[index]))  # noqa: E731
    own = jax.tree.leaves((single.agent_of(0).actor.params, single.state.action[0]))
    for one, two in zip(of_both(1), own, strict=True):
        np.testing.assert_allclose(one, two, atol=2e-4)
    assert any(np.abs(np.asarray(one) - two).max() > 1e-2 for one, two in zip(of_both(0), own, strict=True))
    rows = lambda trainer: trainer.replay.buffer.rows if agent != "ppo" else trainer.replay.rows  # noqa: E731
    for key, leaf in rows(single).items():
        np.testing.assert_allclose(rows(pair)[key][1], leaf[0], atol=2e-3, err_msg=key)
    second = [row for row in beside if row["seed"] == 1]
    assert len(second) == len(alone) > 0
    for one, two in zip(second, alone, strict=True):
        assert (one["episode"], one["length"], one["success"]) == (two["episode"], two["length"], two["success"])
    pair.close()
    single.close()
