"""Every number of every setting says what it may be."""

import dataclasses
import time
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import jax
import numpy as np
import pytest

from o2o.agents import AGENTS
from o2o.config import RunConfig, TaskConfig
from o2o.data.task import Task
from o2o.errors import ConfigError
from o2o.keys import seed_keys
from o2o.runs.recording import RecordConfig
from o2o.settings import Settings


def bare(kind: Any) -> bool:
    """Whether a type has a number without a range."""
    if get_origin(kind) is Annotated or get_origin(kind) is Literal:
        return False
    return kind in (int, float) or any(bare(part) for part in get_args(kind))


def tables(kind: Any, seen: set[type]) -> Iterator[type]:
    """Yield the dataclasses in a type, and those in their fields."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if kind not in seen:
            seen.add(kind)
            yield kind
            for part in get_type_hints(kind, include_extras=True).values():
                yield from tables(part, seen)
    else:
        for part in get_args(kind):
            yield from tables(part, seen)


def test_every_number_has_its_range() -> None:
    """No field of the settings of agents, runs, tasks and recordings is a bare int or float."""
    seen: set[type] = set()
    configs = [type(kind.preset("other", "small").config) for kind in AGENTS.values()]
    found = [table for kind in (*configs, RunConfig, Task, RecordConfig) for table in tables(kind, seen)]
    assert len(found) > 30 and all(issubclass(table, Settings) for table in found)
    without = [
        f"{table.__name__}.{field.name}"
        for table in found
        for field in dataclasses.fields(table)
        if bare(get_type_hints(table, include_extras=True)[field.name])
    ]
    assert without == []


@pytest.mark.parametrize(
    "values",
    [
        {"reward_scale": 0.0},
        {"reward_scale": float("nan")},
        {"reward_bias": float("inf")},
        {"data_share": 0.0},
        {"data_share": 1.5},
        {"success_reward": "1"},
        {"raw_failure_reward": float("nan")},
        {"metric": "points"},
        {"sparse": "no"},
    ],
)
def test_task_out_of_range(values: Any) -> None:
    """A task refuses numbers that no reward can be made with, and values of other types."""
    with pytest.raises(ConfigError, match=f"Task.{next(iter(values))} is"):
        Task("t", **values)


def test_data_share_of_run() -> None:
    """A share of more than all is refused where a run is described, too; what is right is read."""
    with pytest.raises(ConfigError, match="TaskConfig.data_share is 5; expected above 0, at most 1"):
        TaskConfig(data_share=5)
    task = Task("t", reward_scale=10, env_kwargs=[["reward_type", "dense"]])  # pyright: ignore[reportArgumentType]
    assert task.env_kwargs == (("reward_type", "dense"),) and hash(task) == hash(dataclasses.replace(task))
    assert task.rewards(np.ones(2)).tolist() == [10.0, 10.0]


@pytest.mark.parametrize(
    ("agent", "values"),
    [
        ("sac", {"policy_output_gain": -0.1}),
        ("sac", {"target_entropy": float("nan")}),
        ("expo", {"target_entropy": float("inf")}),
    ],
)
def test_agents_floats(agent: str, values: dict[str, float]) -> None:
    """The last numbers of agents without a range have one."""
    config = AGENTS[agent].preset("other", "small").config
    with pytest.raises(ConfigError, match=next(iter(values))):
        dataclasses.replace(config, **values)


@pytest.mark.parametrize("seed", [0, 7, 2**31 - 3])
def test_keys_of_seeds(seed: int) -> None:
    """The keys of many seeds are those of each alone, and are made in no time."""
    keys = seed_keys(seed, 3)
    alone = [jax.random.key_data(jax.random.key(seed + k)) for k in range(3)]
    np.testing.assert_array_equal(jax.random.key_data(keys), np.stack(alone))
    began = time.perf_counter()
    assert seed_keys(0, 100_000).shape == (100_000,)
    assert time.perf_counter() - began < 10.0
