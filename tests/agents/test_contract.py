"""The agents' contract, run on every entry of `AGENTS`; presets and refusals that all agents share."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

from o2o.agents import AGENTS
from o2o.errors import ConfigError, DatasetError, O2OError
from o2o.types import OnlineConfig, Preset
from tests.helpers.contract import ACTION_DIM, CHECKS, CONFIGS, OBSERVATION_DIM, ONLINE_CASES, Case, observed
from tests.helpers.tiny import forget_many_programs

CASES = [(name, "offline") for name in AGENTS] + [(name, "online") for name in ONLINE_CASES]
WINDOWED = ("diffusion_bc", "residual", "qc", "ibrl", "qam")
FAMILIES = ("antmaze", "pointmaze", "adroit", "kitchen", "locomotion", "other")


@functools.lru_cache
def make_case(name: str, phase: str) -> Case:
    """Return the case, made once per session so that its compiled methods are shared."""
    forget_many_programs()  # this module alone compiles more than a process may keep
    return Case(name, phase)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize(("name", "phase"), CASES, ids=["-".join(case) for case in CASES])
def test_contract(name: str, phase: str, check: Callable[[Case], None]) -> None:
    check(make_case(name, phase))


def test_toy_config_per_agent() -> None:
    """Every agent has a toy config."""
    assert set(CONFIGS) == set(AGENTS)


def test_config_class_per_agent() -> None:
    """Every agent has a config class of its own.

    Jaxlib takes two pytree classes with equal fields for one, so a program of one might run for the other.
    """
    assert len({type(config) for config in CONFIGS.values()}) == len(AGENTS)


@pytest.mark.parametrize("name", [name for name in AGENTS if not hasattr(CONFIGS[name], "encoder")])
def test_image_observations_refused(name: str) -> None:
    """Image observations are refused by agents without an encoder."""
    images = {"state": jnp.zeros((1, 3)), "image": jnp.zeros((1, 8, 8, 3), jnp.uint8)}
    with pytest.raises(ConfigError, match="needs flat float32 observations"):
        AGENTS[name].create(jax.random.key(0), images, jnp.zeros((1, ACTION_DIM)), CONFIGS[name])


@pytest.mark.parametrize("name", AGENTS)
def test_missing_key_named(name: str) -> None:
    """A missing needed key is named."""
    case = make_case(name, "offline")
    agent = case.agent
    for key in agent.needs.batch_keys:
        batch = case.batch(1)
        del batch[key]
        with pytest.raises(O2OError, match=key):
            agent.update(batch)
    extra = set(case.batch(1)) - {"observations", "actions", "rewards", "masks", "next_observations"}
    assert set(agent.needs.batch_keys) <= extra


@pytest.mark.parametrize("name", [name for name in AGENTS if name not in WINDOWED])
def test_missing_leading_axis_refused(name: str) -> None:
    """A minibatch without its leading axis is refused."""
    case = make_case(name, "offline")
    assert case.agent.needs.window == 1  # in windows, their axis would stand where the rows' does
    rows = jax.tree.map(lambda leaf: leaf[0], case.batch(1))
    with pytest.raises(DatasetError, match=r"\[utd, B, A\]: give one minibatch as leaf\[None\]"):
        case.agent.update(rows)


@pytest.mark.parametrize("size", ["paper", "small"])
@pytest.mark.parametrize("name", AGENTS)
def test_presets_complete(name: str, size: str) -> None:
    """Presets are complete and fit their agent."""
    observations, actions = observed(name, jnp.zeros((1, OBSERVATION_DIM))), jnp.zeros((1, ACTION_DIM))
    for family in FAMILIES:
        preset = AGENTS[name].preset(family, size)
        assert isinstance(preset, Preset) and type(preset.config) is type(CONFIGS[name])
        assert isinstance(preset.config.online, OnlineConfig) and hash(preset.config) == hash(preset.config)
        assert preset.offline_steps + preset.online_steps > 0
        if size == "small":
            longest = 30_000 if preset.config.online.replay == "rollout" else 10_000  # not an update for every step
            assert preset.offline_steps <= 10_000 and preset.online_steps <= longest and preset.config.batch_size <= 256
    config = AGENTS[name].preset(FAMILIES[0], size).config
    agent = jax.eval_shape(lambda key: AGENTS[name].create(key, observations, actions, config), jax.random.key(0))
    assert agent.config == config
