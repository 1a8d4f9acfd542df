"""Shared fixtures: the embedded dataset, made once per worker, and settings small enough for a test."""

import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from o2o import envs, experiment
from o2o.schedule import LoopConfig


def pytest_configure(config: pytest.Config) -> None:
    """Share compiled programs between workers and tests: most of the suite's time is compilation."""
    base = os.environ.get("O2O_TEST_COMPILATION_CACHE") or os.path.join(tempfile.gettempdir(), "o2o-test-jit")
    jax.config.update("jax_compilation_cache_dir", base)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.fixture(scope="session")
def embedded_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a root of datasets that holds the embedded PointMaze dataset."""
    root = tmp_path_factory.mktemp("minari")
    envs.make_embedded(envs.DEMO_DATASET, root)
    return root


@pytest.fixture
def embedded(embedded_root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Return the embedded dataset's id, with MINARI_DATASETS_PATH set to its root."""
    monkeypatch.setitem(os.environ, "MINARI_DATASETS_PATH", str(embedded_root))
    yield envs.embedded_id(envs.DEMO_DATASET)


@pytest.fixture
def tiny_run(embedded: str) -> Callable[..., experiment.RunConfig]:
    """Return a maker of runs on the embedded dataset with tiny networks: `tiny_run(agent, fields=(...), **changes)`."""

    def make(agent: str, fields: Any = (), **changes: Any) -> experiment.RunConfig:
        run = experiment.preset_run(agent, embedded, "small")
        tiny: list[tuple[str, Any]] = [("actor_hidden_dims", (16, 16)), ("batch_size", 16)]
        names = {field.name for field in dataclasses.fields(run.config)}
        tiny += [(name, (16, 16)) for name in ("critic_hidden_dims", "value_hidden_dims") if name in names]
        online = [("online.warmup_steps", 20)] if agent == "wsrl" else []
        online += [("online.random_steps", 20)] if agent == "rlpd" else []
        config = experiment.with_fields(run.config, [*tiny, *online, ("online.min_rows", 0), *fields])
        loop = LoopConfig(
            eval_every=50, eval_episodes=1, log_every=25, checkpoint_every=10_000, updates_per_dispatch=10
        )
        defaults: dict[str, Any] = {"config": config, "loop": loop, "offline_steps": 40, "online_steps": 80}
        return dataclasses.replace(run, **{**defaults, **changes})

    return make
