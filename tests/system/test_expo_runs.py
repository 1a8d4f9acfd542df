"""EXPO on images, in runs that are stopped and resumed, and on a bandit."""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o2o.agents.expo import EXPO
from o2o.config import LoopConfig
from o2o.errors import ConfigError
from o2o.nn.encoders import EncoderConfig
from o2o.nn.generative import Diffusion, Flow
from o2o.report.plots import read_rows
from o2o.runs import session
from tests.helpers.probes import LONG
from tests.helpers.tiny import ACTION_DIM, ROWS, make_batch, moved, steps
from tests.helpers.toy_expo import KEY, TINY, N, act, base_step, changed, critic_step, edit_step, fresh, quick, update
from tests.system.test_runs import StopAt, assert_same_runs, train_interrupted

# Images ------------------------------------------------------------------------------------------------------------

PIXELS = replace(TINY, encoder=EncoderConfig("conv", conv_features=(4, 4), conv_strides=(2, 2), latent_dim=6))


def pixel_batch(*shape: int) -> Any:
    """Return a batch whose observations are a state and an image of 12x12 pixels, leaves `[*shape, ...]`."""
    batch = make_batch(*shape)
    draw = np.random.default_rng(1).integers
    for name in ("observations", "next_observations"):
        pixels = jnp.asarray(draw(0, 256, (*shape, 12, 12, 3)), jnp.uint8)
        batch[name] = {"state": batch[name], "front": pixels}
    return batch


@functools.cache
def pixel_agent() -> Any:
    example = jax.tree.map(lambda leaf: leaf[0, :1], pixel_batch(1, ROWS))
    make = quick(lambda key: EXPO.create(key, example["observations"], example["actions"], PIXELS))
    return make(jax.random.key(0))


def test_encoder_learning() -> None:
    """The encoder learns from imitation first, and online from the critics alone."""
    agent, batch = pixel_agent(), pixel_batch(2, ROWS)
    rows = jax.tree.map(lambda leaf: leaf[0], batch)
    pretrained, _ = update(agent, batch)
    assert changed(agent, pretrained) == {"base", "target_base"}
    assert moved(agent.encoder.params, pretrained.encoder.params)
    online = pretrained.online()
    for step, learns in ((critic_step, True), (base_step, False), (edit_step, False)):
        assert moved(online.encoder.params, step(online, rows, KEY)[0].encoder.params) == learns
    after, info = update(online, batch)
    assert steps(after.encoder) == 1 + 2 and all(np.isfinite(value) for value in info.values())


def test_actions_use_image_and_state() -> None:
    """Actions depend on the image and the state."""
    agent, observations = pixel_agent(), pixel_batch(2, ROWS)["observations"]
    before = act(agent, observations, KEY)
    assert before.shape == (2, ROWS, ACTION_DIM)
    assert moved(act(agent, {**observations, "front": 255 - observations["front"]}, KEY), before)
    assert moved(act(agent, {**observations, "state": observations["state"] + 1.0}, KEY), before)


def test_flat_observations_required() -> None:
    """Observations without images must be flat."""
    with pytest.raises(ConfigError, match="EXPO needs flat float32 observations"):
        EXPO.create(KEY, {"state": jnp.zeros((1, 3))}, jnp.zeros((1, 2)), TINY)


# Runs ---------------------------------------------------------------------------------------------------------------

SMALLER = [
    ("online.utd_ratio", 2),
    ("base_width", 16),
    ("base_blocks", 1),
    ("diffusion", Diffusion(2)),
    ("n_edits", 2),
    ("n_samples", 2),
]


def test_stop_and_resume(tiny_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run stopped and resumed equals one never stopped: imitation alone, random steps, then everything learns."""
    offline_steps, random_steps = 30, 15
    loop = LoopConfig(eval_every=1000, eval_episodes=1, log_every=10, checkpoint_every=10_000, updates_per_dispatch=10)
    fields = [*SMALLER, ("online.random_steps", random_steps)]
    run = tiny_run("expo", fields, offline_steps=offline_steps, online_steps=60, loop=loop)
    assert session.train(run, tmp_path / "whole")
    train_interrupted(run, tmp_path / "parts", monkeypatch, [StopAt("offline", 10), StopAt("online", 40)])
    assert_same_runs(tmp_path / "whole", tmp_path / "parts", more_than=1)
    rows = read_rows(tmp_path / "whole" / "metrics.jsonl")
    counts = [row["gradient_steps"] for row in rows if row["phase"] == "offline"]
    assert max(counts) == offline_steps
    assert all("critic/loss" not in row for row in rows if row["phase"] == "offline")
    learnt = [row for row in rows if "critic/loss" in row]
    assert all(0.0 <= row["edit/win_share"] <= 1.0 and 0.0 < row["edit/size"] < 1.0 for row in learnt)
    assert min(row["env_steps"] for row in learnt) >= random_steps


# A bandit -----------------------------------------------------------------------------------------------------------


@pytest.mark.learning
@pytest.mark.parametrize("base", ["diffusion", "flow"])
def test_bandit_mode_choice(base: Any) -> None:
    """On a bandit the rewarded one of two modes is chosen.

    Data at -0.6 and 0.6 alike, reward for the positive ones: the base has both modes, the OTF policy one.
    """
    config = replace(
        TINY, base=base, base_width=32, base_lr=3e-3, base_ema=0.02, critic_lr=3e-3, tau=0.05, edit_scale=0.1,
        diffusion=Diffusion(steps=10), flow=Flow(steps=10), n_edits=N, batch_size=64,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    actions = np.where(rng.random((512, 1)) < 0.5, -0.6, 0.6) + 0.05 * rng.normal(size=(512, 1))
    table: Any = {
        "observations": np.zeros((512, 1)),
        "actions": actions,
        "rewards": (actions[:, 0] > 0).astype(float),
        "masks": np.zeros(512),
        "next_observations": np.zeros((512, 1)),
    }
    table = {name: jnp.asarray(column, jnp.float32) for name, column in table.items()}

    def train(agent: Any, count: int) -> Any:
        def step(agent: Any, key: Any) -> tuple[Any, Any]:
            rows = jax.random.randint(key, (1, 64), 0, 512)
            return agent.update({name: column[rows] for name, column in table.items()})

        return jax.lax.scan(step, agent, jax.random.split(KEY, count))[0]

    run: Callable[..., Any] = jax.jit(train, static_argnums=1, compiler_options=LONG)
    agent = run(run(fresh(config, 1, 1), 500).online(), 200)
    observations = jnp.zeros((512, 1))
    samples = np.asarray(agent.base_samples(agent.target_base, observations, 1, KEY)[0])
    assert np.abs(samples).max() <= 1.0
    assert 0.3 < np.mean(samples > 0) < 0.7 and np.mean(np.abs(np.abs(samples) - 0.6) < 0.25) > 0.8
    chosen = np.asarray(act(agent, observations, KEY))
    assert np.mean(chosen > 0.3) > 0.9, f"base {np.mean(samples > 0):.2f}, chosen {np.mean(chosen > 0):.2f}"
