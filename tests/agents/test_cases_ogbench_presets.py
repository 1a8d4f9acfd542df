"""The `paper` presets of OGBench's tasks: the published settings, chosen by the dataset's id."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces

from o2o.agents import AGENTS
from o2o.agents.qam import OGBENCH_FORMS
from o2o.config import with_fields
from o2o.data import datasets
from o2o.data.files import Episode
from o2o.runs import session

AGENTS_OF_THE_TABLE = ("fql", "rebrac", "rlpd", "expo", "qam")
IDS = {
    "cube single": "ogbench/cube-single-play-singletask-task2",
    "cube double": "ogbench/cube-double-play-singletask-task1-v0",
    "cube triple": "ogbench/cube-triple-play-singletask-task5",
    "scene": "ogbench/scene-play-singletask-task1-sparse",
    "puzzle 3x3": "ogbench/puzzle-3x3-play-singletask-task4-sparse",
    "puzzle 4x4": "ogbench/puzzle-4x4-play-singletask-task4-sparse",
}
TABLE: dict[str, tuple[str, tuple[float, ...]]] = {
    "fql": ("alpha", (300, 300, 30, 300, 300, 1)),
    "rebrac": ("actor_penalty", (0.01, 0.01, 0.01, 0.03, 0.1, 0.01)),
    "expo": ("edit_scale", (0.2, 0.2, 0.3, 0.2, 0.2, 0.8)),
    "qam": ("inverse_temperature", (1, 1, 3, 1, 3, 30)),
    "qc": ("alpha", (100,) * 6),
    "rlpd": ("target_entropy", (0.5,) * 6),
}
"""The setting that each domain has of its own, in the order of `IDS`."""


def preset(agent: str, domain: str) -> Any:
    """Return the preset of an agent for a domain's dataset."""
    return AGENTS[agent].preset("other", "paper").of_task(IDS[domain])


@pytest.mark.parametrize("agent", TABLE)
def test_published_settings(agent: str) -> None:
    """Each domain has its published value; one more word in an id, or another version, changes nothing."""
    name, values = TABLE[agent]
    for domain, value in zip(IDS, values, strict=True):
        found = preset(agent, domain)
        assert getattr(found.config, name) == value, domain
        assert AGENTS[agent].preset("other").of_task(f"{IDS[domain]}-v0") == found
        assert found.config.chunk == 5 and found.config.batch_size == 256 and found.config.discount == 0.99


@pytest.mark.parametrize("agent", AGENTS_OF_THE_TABLE)
def test_protocol_of_the_table(agent: str) -> None:
    """Ten critics, mean - 0.5 std, cut windows dropped; 1M updates (RLPD none), 500k steps, updates from step 5000."""
    found = preset(agent, "scene")
    config = found.config
    assert (config.num_critics, config.pessimism, config.pad_terminal) == (10, 0.5, False)
    assert config.critic_hidden_dims == (512,) * 4 and config.online.utd_ratio == 1
    assert (found.offline_steps, found.online_steps) == (0 if agent == "rlpd" else 1_000_000, 500_000)
    assert max(config.online.warmup_steps, config.online.random_steps) == 5000
    assert config.online.replay == ("mixed" if agent == "rlpd" else "append")


@pytest.mark.parametrize("agent", TABLE)
def test_general_preset_elsewhere(agent: str) -> None:
    """Other datasets, and families, have the general preset."""
    for family in ("other", "antmaze"):
        general = AGENTS[agent].preset(family, "paper")
        for name in ("lab/arm-v0", "robot/scene-v0", "puzzle/box-v3"):
            assert general.of_task(name) is general


@pytest.mark.parametrize("agent", TABLE)
def test_published_networks(agent: str) -> None:
    """The networks can be made: critics of 4x512, whole chunks of 25 numbers in."""
    config = preset(agent, "scene").config
    make = lambda key: AGENTS[agent].create(key, jnp.zeros((1, 40)), jnp.zeros((1, 5)), config)  # noqa: E731
    made = jax.eval_shape(make, jax.random.key(0))
    kernel = made.critic.params["params"]["dense_0"]["kernel"]
    assert kernel.shape == (config.num_critics, 40 + 25, 512)
    assert made.critic.module.activation == "gelu" and made.critic.module.norm_last


def test_qam_forms() -> None:
    """QAM-E and QAM-F have their own settings for each published domain; they fit the agent."""
    for form, domains in OGBENCH_FORMS.items():
        assert set(domains) >= set(IDS) - {"cube single"}
        for domain, own in domains.items():
            if domain not in IDS:
                continue
            config = with_fields(preset("qam", domain).config, {"form": form, **own})
            assert config.form == form and config.inverse_temperature == own["inverse_temperature"]


def test_runs_take_the_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`preset_run` chooses by the dataset's id, with the published times of evaluation; `small` has its own."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    episode = Episode(
        observations=np.zeros((6, 3)),
        actions=np.zeros((5, 2), np.float32),
        rewards=np.zeros(5),
        terminations=np.zeros(5, bool),
        truncations=np.arange(5) == 4,
    )
    name, state = "ogbench/puzzle-3x3-play-singletask-task4-v0", spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action = spaces.Box(-1.0, 1.0, (2,), np.float32)
    datasets.write(name, [episode], observation_space=state, action_space=action, spec=None)
    env = "puzzle-3x3-play-singletask-task4-v0"
    run = session.preset_run("qam", name, env=env)
    assert (run.config.inverse_temperature, run.config.chunk, run.online_steps) == (3.0, 5, 500_000)
    assert (run.loop.eval_every, run.loop.offline_eval_every) == (50_000, 50_000)
    changed = session.preset_run("qam", name, env=env, loop={"eval_episodes": 7})
    assert (changed.loop.eval_episodes, changed.loop.eval_every) == (7, 50_000)
    small = session.preset_run("qam", name, "small")
    assert small.config.num_critics == 2 and small.loop.eval_every == 2_500
