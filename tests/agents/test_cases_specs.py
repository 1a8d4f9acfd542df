"""Numbers that the papers give and no other test names: presets by dataset, discounted chunks, encoded coefficients."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from o2o.agents import FQL, ReBRAC
from o2o.agents.balance import encode
from o2o.rl.windows import chunk_rows


@pytest.mark.parametrize(
    ("family", "dataset", "penalties"),
    [
        ("antmaze", "D4RL/antmaze/umaze-v1", (0.003, 0.002)),
        ("antmaze", "D4RL/antmaze/umaze-diverse-v1", (0.003, 0.001)),
        ("antmaze", "D4RL/antmaze/medium-play-v1", (0.001, 0.0005)),
        ("antmaze", "D4RL/antmaze/medium-diverse-v1", (0.001, 0.0)),
        ("antmaze", "D4RL/antmaze/large-play-v1", (0.002, 0.001)),
        ("antmaze", "D4RL/antmaze/large-diverse-v1", (0.002, 0.002)),
        ("locomotion", "mujoco/halfcheetah/medium-v0", (0.001, 0.01)),
        ("locomotion", "mujoco/hopper/medium-v0", (0.01, 0.01)),
        ("locomotion", "o2o/walker2d/medium-v0", (0.05, 0.1)),
        ("adroit", "D4RL/pen/cloned-v2", (0.1, 0.1)),
    ],
)
def test_rebrac_penalties(family: str, dataset: str, penalties: tuple[float, float]) -> None:
    """The paper's pair for each dataset; everything else is the family's, and the small preset has one for all."""
    preset = ReBRAC.preset(family)
    own = preset.of_task(dataset)
    assert (own.config.actor_penalty, own.config.critic_penalty) == penalties
    assert (own.reward, own.config.discount, own.offline_steps) == (preset.reward, preset.config.discount, 1_000_000)
    assert not ReBRAC.preset(family, "small").tasks


def test_fql_alpha() -> None:
    """3 on D4RL's large AntMazes, 10 on the others and on mazes that are not D4RL's."""
    preset = FQL.preset("antmaze")
    ids = ("D4RL/antmaze/large-play-v1", "D4RL/antmaze/medium-play-v1", "lab/antmaze-large-v0")
    assert [preset.of_task(dataset).config.alpha for dataset in ids] == [3.0, 10.0, 10.0]
    assert preset.of_task(ids[0]).reward == (1.0, -1.0) and preset.of_task(ids[0]).offline_steps == 1_000_000


def test_discounted_chunk() -> None:
    """Five rewards of -1 at 0.99 make -4.90099501."""
    window: dict[str, Any] = {
        "observations": jnp.zeros((1, 5, 2)),
        "actions": jnp.zeros((1, 5, 1)),
        "rewards": -jnp.ones((1, 5)),
        "masks": jnp.ones((1, 5)),
        "next_observations": jnp.zeros((1, 5, 2)),
        "valid": jnp.ones((1, 5)),
    }
    chunks = chunk_rows(window, 0.99, pad_terminal=False)
    assert float(chunks.returns[0]) == pytest.approx(-4.90099501, abs=1e-6) and float(chunks.masks[0]) == 1.0


def test_goal_within_chunk() -> None:
    """A row with mask 0 that does not end its episode (OGBench's goals) stops the bootstrap and not the rewards."""
    window: dict[str, Any] = {
        "observations": jnp.zeros((1, 3, 2)),
        "actions": jnp.zeros((1, 3, 1)),
        "rewards": jnp.asarray([[-1.0, 0.0, -1.0]]),
        "masks": jnp.asarray([[1.0, 0.0, 1.0]]),
        "next_observations": jnp.zeros((1, 3, 2)),
        "valid": jnp.ones((1, 3)),
    }
    chunks = chunk_rows(window, 0.5, pad_terminal=False)
    assert (float(chunks.returns[0]), float(chunks.masks[0]), float(chunks.valid[0])) == (-1.25, 0.0, 1.0)


def test_encoding_has_one_length() -> None:
    """Half as many as the dimension: the sum of squares of sines and cosines, for every coefficient."""
    betas = jnp.linspace(-3.0, 40.0, 50)
    np.testing.assert_allclose(jnp.sum(jnp.square(encode(betas)), axis=-1), 3.0, rtol=1e-5)
    np.testing.assert_allclose(encode(betas, dim=2)[:, 0], jnp.sin(betas), atol=1e-6)
