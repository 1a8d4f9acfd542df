"""A run that is looked at: its agents at a checkpoint and all that acting needs, without dataset and replay."""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp

from o2o import envs
from o2o.config import RunConfig
from o2o.data.datasets import Dataset
from o2o.data.normalizer import Normalizer
from o2o.data.spaces import STATE
from o2o.errors import ConfigError, RunError
from o2o.nn.generative import Guidance
from o2o.runs.folder import DATASET, RunFolder
from o2o.runs.presets import agent_class
from o2o.train import checkpoint, programs
from o2o.train.state import Counters
from o2o.types import AgentConfig


@dataclass(frozen=True, eq=False)
class Opened:
    """The agents of a run at one of its checkpoints."""

    settings: RunConfig
    data: Dataset
    """The run's dataset, without its rows."""
    agent: Any
    """The agents of all seeds, leaves `[S, ...]`."""
    normalizer: Normalizer | None
    counters: Counters
    rate: float | None
    """Steps per second of the run's environment; None if it does not say."""

    @property
    def config(self) -> AgentConfig:
        """The agents' settings."""
        return self.settings.config

    def agent_of(self, index: int) -> Any:
        """Return the agent of one seed, without the leading seed axis."""
        return jax.tree.map(lambda leaf: leaf[index], self.agent)

    def guided(self, weight: float | None) -> Self:
        """Return the agents acting with Q's gradient of this weight (`Guidance`); None: as their settings say.

        Raises `ConfigError` for agents without `guidance`, and for a weight that does not go with their settings.
        """
        if weight is None:
            return self
        config: Any = self.agent.config
        if not isinstance(getattr(config, "guidance", None), Guidance):
            raise ConfigError(f"{self.settings.agent} has no flow that Q could guide: leave out guidance")
        config = replace(config, guidance=replace(config.guidance, weight=weight))
        return replace(self, agent=self.agent.replace(config=config))

    def normalized(self, raw_return: float) -> float | None:
        """Return the dataset's normalised score of a raw return; None without one, or in another environment."""
        if not in_own_environment(self.settings, self.data):
            return None
        score = self.data.info.normalized(raw_return, self.data.task)
        return None if score is None else float(score)


def in_own_environment(config: RunConfig, data: Dataset) -> bool:
    """Whether a run's environment is that of its dataset, so that the dataset's reference scores hold."""
    return envs.same_environment(config.env, data.info, config.environment_arguments(), config.episode_limit)


def read_dataset(path: Path) -> tuple[Dataset, float | None] | None:
    """Return a run's dataset without rows and its environment's rate; None if the run folder does not hold them."""
    try:
        values = json.loads((path / DATASET).read_text())
        return Dataset.from_json(values["dataset"], path), values["rate"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path / DATASET} cannot be read ({error!r}): restore it from a copy") from error


def load(path: Path, settings: RunConfig, data: Dataset, rate: float | None, which: str = "latest") -> Opened:
    """Load the agents of the run in folder `path` at the `latest` or `best` checkpoint, or at a step given as digits.

    Raises `ConfigError` for another word, `CheckpointError` if there is no such checkpoint.
    """
    folder = RunFolder.open(path).checkpoints
    step, state, _ = checkpoint.load_state(folder, step_of(folder, which))
    counters = Counters(**state["counters"])
    agent, normalizer = shapes_of(settings, data, counters.phase == "online")
    targets = {"agent": agent} | ({} if normalizer is None else {"normalizer": normalizer})
    arrays = checkpoint.load_arrays(folder, step, targets)
    return Opened(settings, data, arrays["agent"], arrays.get("normalizer"), counters, rate)


def shapes_of(settings: RunConfig, data: Dataset, online: bool) -> tuple[Any, Normalizer | None]:
    """Return the shapes and types of a run's agents `[S, ...]`, in their online form or before, and its normaliser."""
    example = jax.tree.map(lambda leaf: jnp.zeros((1, *leaf.shape[1:]), leaf.dtype), data.arrays)
    create = partial(programs.create_agent, agent_class=agent_class(settings.agent), config=settings.config)

    def form(key: jax.Array) -> Any:
        agent = create(key, example["observations"], example["actions"])
        return programs.to_online(agent) if online else agent

    one = jax.eval_shape(form, jax.random.key(0))
    stack = lambda leaf: jax.ShapeDtypeStruct((settings.seeds, *leaf.shape), leaf.dtype)  # noqa: E731
    if not settings.normalize:
        return jax.tree.map(stack, one), None
    seen = example["observations"]
    flat = jax.ShapeDtypeStruct((seen[STATE] if isinstance(seen, dict) else seen).shape[1:], jnp.float32)
    return jax.tree.map(stack, one), Normalizer(mean=flat, std=flat)  # pyright: ignore[reportArgumentType]


def step_of(folder: Path, which: str) -> int | None:
    """Return the step of the checkpoint `which` in a folder of checkpoints; None: the latest."""
    if which not in ("latest", "best") and not which.isdigit():
        raise ConfigError(f"no checkpoint {which!r}; give latest, best or a step such as 10000")
    return checkpoint.best_step(folder) if which == "best" else int(which) if which.isdigit() else None
