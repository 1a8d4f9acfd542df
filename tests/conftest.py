"""Shared fixtures: the embedded dataset, made once per worker, and settings small enough for a test."""

import ctypes.util
import dataclasses
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import pytest

if sys.platform == "linux" and not os.environ.get("DISPLAY") and ctypes.util.find_library("OSMesa"):
    os.environ.setdefault("MUJOCO_GL", "osmesa")  # read when MuJoCo is imported

# Toy programs take longer to compile than to run, in this process and in those that it starts. The second flag halves
# the time to compile; a release that does not know it would end the process. They are read when a back end starts.
if version("jaxlib").startswith("0.10."):
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

from o2o import envs
from o2o.config import LoopConfig
from o2o.data import datasets
from o2o.data.datasets import Dataset
from o2o.envs import pointmaze
from o2o.envs.pointmaze import EMBEDDED
from o2o.errors import ConfigError
from o2o.runs import session
from tests.helpers.tiny import forget_many_programs
from tests.helpers.toy_world import make_world


def pytest_configure(config: pytest.Config) -> None:
    """Share compiled programs between workers, tests and processes that they start: they are most of the time."""
    os.environ["XDG_DATA_HOME"] = os.path.join(tempfile.gettempdir(), "o2o-test-data")  # the key of `o2o.trust`
    base = os.environ.get("O2O_TEST_COMPILATION_CACHE") or os.path.join(tempfile.gettempdir(), "o2o-test-jit")
    for name, value in (("compilation_cache_dir", base), ("persistent_cache_min_compile_time_secs", 0.3)):
        jax.config.update(f"jax_{name}", value)
        os.environ[f"JAX_{name.upper()}"] = str(value)
    EMBEDDED[envs.DEMO_DATASET] = dataclasses.replace(EMBEDDED[envs.DEMO_DATASET], steps=6_000)  # in this process
    pointmaze.REFERENCE_EPISODES = 10


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Iterator[None]:
    """Drop compiled programs after a module if they are many."""
    yield
    forget_many_programs()


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """Take back what a test sets for processes to come: the command line's flags make them round otherwise."""
    before = dict(os.environ)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)


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
def dense_maze(embedded: str, tmp_path: Path) -> str:
    """Return the path of the embedded dataset as if it had been recorded in `PointMaze_UMazeDense-v3`."""
    folder = tmp_path / "dense-v0"
    shutil.copytree(datasets.default_root() / embedded, folder)
    path = folder / "data/metadata.json"
    about = json.loads(path.read_text())
    spec = json.loads(about["env_spec"])
    kwargs = {**spec["kwargs"], "reward_type": "dense"}
    about["env_spec"] = json.dumps(
        {**spec, "id": "PointMaze_UMazeDense-v3", "kwargs": kwargs, "max_episode_steps": 300}
    )
    about.pop("eval_env_spec", None)
    path.write_text(json.dumps(about))
    return str(folder)


WIDTHS = [f"{network}_hidden_dims" for network in ("actor", "critic", "value", "edit", "balance")]


def narrow(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield fields, those of nested settings too, that make every network of `config` 16 wide."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in WIDTHS:
            yield f"{prefix}{field.name}", (16, 16)
        elif dataclasses.is_dataclass(value):
            yield from narrow(value, f"{prefix}{field.name}.")


@pytest.fixture
def tiny_run(embedded: str) -> Callable[..., session.RunConfig]:
    """Return a maker of runs on the embedded dataset with tiny networks: `tiny_run(agent, fields=(...), **changes)`."""

    def make(agent: str, fields: Any = (), **changes: Any) -> session.RunConfig:
        run = session.preset_run(agent, embedded, "small")
        tiny: list[tuple[str, Any]] = [("batch_size", 16), *narrow(run.config)]
        online = [("online.warmup_steps", 20)] if agent == "wsrl" else []
        online += [("online.random_steps", 20)] if agent == "rlpd" else []
        config = session.with_fields(run.config, [*tiny, *online, ("online.min_rows", 0), *fields])
        loop = LoopConfig(
            eval_every=50, eval_episodes=1, log_every=25, checkpoint_every=10_000, updates_per_dispatch=10
        )
        defaults: dict[str, Any] = {"config": config, "loop": loop, "offline_steps": 40, "online_steps": 80}
        return dataclasses.replace(run, **{**defaults, **changes})

    return make


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Return a small dataset of a toy environment (`tests.helpers.toy_world`)."""
    return make_world(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def rendering() -> None:
    """Skip where MuJoCo cannot render."""
    try:
        env = envs.make("InvertedPendulum-v5", cameras=("free",), image_size=16)
        env.reset(seed=0)
        env.close()
    except ConfigError as error:
        pytest.skip(f"no images without OpenGL: {error}")


@pytest.fixture(scope="session")
def pixels_root(rendering: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a root of datasets that holds a small version of the embedded pixel dataset."""
    root = tmp_path_factory.mktemp("pixels")
    recipe = EMBEDDED["pointmaze-pixels"]
    EMBEDDED["pointmaze-pixels"] = dataclasses.replace(recipe, steps=400, image_size=32)
    try:
        envs.make_embedded("pointmaze-pixels", root)
    finally:
        EMBEDDED["pointmaze-pixels"] = recipe
    return root


@pytest.fixture
def pixels(pixels_root: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the pixel dataset's id, with MINARI_DATASETS_PATH set to its root."""
    monkeypatch.setitem(os.environ, "MINARI_DATASETS_PATH", str(pixels_root))
    return envs.embedded_id("pointmaze-pixels")
