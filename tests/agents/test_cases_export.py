"""Exported policies: every agent's file acts as the agent does, and what does not fit is refused in one line."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces

from o2o.agents import AGENTS
from o2o.data.datasets import Dataset, DatasetInfo
from o2o.data.normalizer import Normalizer
from o2o.data.spaces import ActionMap, ObservationSpec, with_base_action
from o2o.data.task import Task
from o2o.errors import ConfigError, EnvironmentMismatchError
from o2o.nn.encoders import EncoderConfig
from o2o.policies.base import BasePolicy
from o2o.policies.export import compare, export_policy, program_of
from o2o.policies.exported import ExportedPolicy, contract_of, load_file
from o2o.policies.python import python_policy
from o2o.policies.run import RunPolicy, TrainedPolicy
from tests.helpers.contract import ACTION_DIM, CONFIGS, OBSERVATION_DIM, QUICK

DEPLOY = Path(__file__).parents[2] / "examples" / "deploy.py"
BOX = spaces.Box(-10.0, 10.0, (OBSERVATION_DIM,), np.float32)
ACTIONS = spaces.Box(np.array([-2.0, -1.0], np.float32), np.array([2.0, 3.0], np.float32))
SAMPLING = ("bc", "jsrl", "pex", "residual")
"""Agents whose samples are compared, too: of a distribution, with a memory, from a pair, upon a base."""


def toy_data(space: gym.Space = BOX, history: int = 1, base: bool = False) -> Dataset:
    """Return a dataset without rows."""
    spec = ObservationSpec.from_space(space)
    info = DatasetInfo(("toy-v0",), None, None, None, space, ACTIONS, None, None, 0, 0, {"dataset_id": "toy-v0"})
    one = spec.flatten(space.sample())
    rows = jax.tree.map(lambda leaf: np.zeros((0, *leaf.shape[:-1], leaf.shape[-1] * history), leaf.dtype), one)
    arrays = {"observations": rows, "actions": np.zeros((0, ACTION_DIM), np.float32)}
    if base:
        arrays["observations"] = with_base_action(rows, arrays["actions"])
    return Dataset(arrays, info, "none", (), spec, ActionMap.from_space(ACTIONS), Task("toy"))


def toy_policy(
    name: str,
    deterministic: bool = True,
    history: int = 1,
    inner: BasePolicy | None = None,
    space: gym.Space = BOX,
    **settings: Any,
) -> RunPolicy:
    """Return a policy of an agent in its online form, with random networks."""
    data, config = toy_data(space, history, inner is not None), dataclasses.replace(CONFIGS[name], **settings)
    shapes = jax.tree.map(lambda leaf: jnp.zeros((1, *leaf.shape[1:]), leaf.dtype), data.arrays)

    def make(key: jax.Array) -> Any:
        return AGENTS[name].create(key, shapes["observations"], shapes["actions"], config).online()

    size = data.observation_spec.state_dim * history
    normalizer = Normalizer(mean=jnp.arange(size) * 0.5, std=jnp.full(size, 2.0))
    agent = jax.jit(make, compiler_options=QUICK)(jax.random.key(0))
    return RunPolicy.of(name, agent, normalizer, data, history=history, deterministic=deterministic, inner=inner)


def deployed(path: Path) -> Any:
    """Return the policy of `examples/deploy.py`."""
    spec = importlib.util.spec_from_file_location("deploy", DEPLOY)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Policy(path)


def observations(count: int, size: int = OBSERVATION_DIM) -> np.ndarray:
    """Return random observations `[count, size]`."""
    return np.random.default_rng(1).normal(0.0, 2.0, (count, size)).astype(np.float32)


def base_for(name: str) -> BasePolicy | None:
    """Return a base policy for an agent that needs one."""
    return toy_policy("qc") if CONFIGS[name].needs.base_policy else None


@pytest.mark.parametrize(
    ("name", "deterministic"), [*((name, True) for name in AGENTS), *((name, False) for name in SAMPLING)]
)
def test_agent_as_onnx(name: str, deterministic: bool, tmp_path: Path) -> None:
    """An agent's ONNX file acts as the agent does with the same random numbers, to 1e-5 of half the action range."""
    policy = toy_policy(name, deterministic, inner=base_for(name))
    program = program_of(policy)
    export_policy(policy, tmp_path / "policy.onnx")
    written = load_file(tmp_path / "policy.onnx")
    assert isinstance(written, ExportedPolicy)
    assert compare(policy, program, written.runner()) <= 1e-5


@pytest.mark.parametrize("suffix", [".onnx", ".jax"])
def test_episode_as_deployed(suffix: str, tmp_path: Path) -> None:
    """With history, chunks and a base, whole episodes are the agent's, also by the loader that knows no o2o."""
    policy = toy_policy("residual", inner=toy_policy("diffusion_bc", history=2))
    path = tmp_path / f"policy{suffix}"
    export_policy(policy, path)
    own = TrainedPolicy(policy)
    others = [load_file(path).controller(policy.data), *([deployed(path)] if suffix == ".onnx" else [])]
    for seed in range(2):
        own.reset(seed)
        for other in others:
            other.reset(seed)
        for step, observation in enumerate(observations(7)):
            if step == 4:
                for each in (own, *others):
                    each.interrupt()
            wanted = own.act(observation)
            assert ACTIONS.contains(wanted)
            for other in others:
                np.testing.assert_allclose(other.act(observation), wanted, atol=1e-5)


def test_images_as_deployed(tmp_path: Path) -> None:
    """A policy that sees a camera and a nested state acts from its file as it does itself."""
    camera = spaces.Box(0, 255, (32, 32, 3), np.uint8)
    space = spaces.Dict(
        {"arm": spaces.Dict({"q": spaces.Box(-1, 1, (2,)), "v": spaces.Box(-1, 1, (1,))}), "eye": camera}
    )
    encoder = EncoderConfig(kind="conv", conv_features=(4, 4), conv_strides=(4, 2), latent_dim=4)
    policy = toy_policy("expo", history=2, space=space, encoder=encoder)
    contract = json.loads(export_policy(policy, tmp_path / "policy.onnx").read_text())
    assert [entry["path"] for entry in contract["observation"]] == [["arm", "q"], ["arm", "v"], ["eye"]]
    assert contract["inputs"]["eye"] == {"shape": [1, 32, 32, 6], "dtype": "uint8"}
    written = load_file(tmp_path / "policy.onnx")
    assert isinstance(written, ExportedPolicy)
    assert compare(policy, program_of(policy), written.runner()) <= 1e-5
    file, controller = deployed(tmp_path / "policy.onnx"), written.controller(policy.data)
    for seed in range(3):
        space.seed(seed)
        observation = space.sample()
        action = file.act(observation)
        np.testing.assert_allclose(action, controller.act(policy.data.observation_spec.flatten(observation)), atol=1e-6)
    with pytest.raises(ValueError, match=r"entry 'eye' is float64 of shape \[32, 32, 3\], the policy needs uint8"):
        file.act({**observation, "eye": observation["eye"] / 255.0})


def test_samples_by_seed(tmp_path: Path) -> None:
    """A sampling policy's file draws from its seed: the same again, another for another, spread as the agent's."""
    policy = toy_policy("bc", deterministic=False)
    export_policy(policy, tmp_path / "policy.onnx")
    file, seen = deployed(tmp_path / "policy.onnx"), np.zeros(OBSERVATION_DIM, np.float32)

    def draws(actor: Any, seed: int, count: int) -> np.ndarray:
        actor.reset(seed)
        return np.stack([actor.act(seen) for _ in range(count)])

    np.testing.assert_array_equal(draws(file, 3, 4), draws(file, 3, 4))
    assert np.any(draws(file, 3, 4) != draws(file, 4, 4))
    own, theirs = draws(TrainedPolicy(policy), 0, 400), draws(file, 0, 400)
    np.testing.assert_allclose(theirs.mean(axis=0), own.mean(axis=0), atol=0.25)
    np.testing.assert_allclose(theirs.std(axis=0), own.std(axis=0), rtol=0.25)


def test_contract_says_all(tmp_path: Path) -> None:
    """The contract names entries, shapes, range, history, chunk, normaliser, rate and versions."""
    policy = toy_policy("diffusion_bc", history=2)
    contract = json.loads(export_policy(policy, tmp_path / "policy.onnx", rate=20.0).read_text())
    assert contract["observation"] == [
        {"name": "observation", "path": [], "shape": [3], "unit": "the environment's", "dtype": "float32",
         "input": "state", "columns": [0, 3]}
    ]  # fmt: skip
    assert contract["action"]["low"] == [-2.0, -1.0] and contract["action"]["high"] == [2.0, 3.0]
    assert (contract["history"], contract["chunk"], contract["rate_hz"], contract["format"]) == (2, 2, 20.0, 1)
    assert contract["normalizer"]["std"] == [2.0] * 6 and contract["inputs"]["state"]["shape"] == [1, 6]
    assert set(contract["versions"]) == {"o2o", "jax", "numpy"}


def test_loader_alone(tmp_path: Path) -> None:
    """The loader's page runs as a script where neither o2o nor JAX can be imported."""
    export_policy(toy_policy("bc"), tmp_path / "policy.onnx")
    hide = "import runpy, sys; sys.modules |= dict.fromkeys(('o2o', 'jax', 'gymnasium')); sys.argv = sys.argv[1:]"
    command = [sys.executable, "-c", f"{hide}; runpy.run_path(sys.argv[0], run_name='__main__')", str(DEPLOY)]
    done = subprocess.run([*command, str(tmp_path / "policy.onnx")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    wanted = TrainedPolicy(toy_policy("bc")).act(np.zeros(OBSERVATION_DIM, np.float32))
    printed = done.stdout.partition("[")[2].partition("]")[0]
    np.testing.assert_allclose([float(word) for word in printed.split()], wanted, atol=1e-5)
    assert "p99" in done.stdout


def test_wrong_arrays_refused(tmp_path: Path) -> None:
    """The loader says in one line which array does not fit the contract; a file as base says which environment."""
    export_policy(toy_policy("bc"), tmp_path / "policy.onnx")
    file = deployed(tmp_path / "policy.onnx")
    with pytest.raises(ValueError, match=r"entry 'observation' is float64 of shape \[4\], the policy needs .* \[3\]$"):
        file.act(np.zeros(4))
    with pytest.raises(ValueError, match="entry 'observation' has a number that is not finite"):
        file.act(np.array([0.0, np.nan, 0.0]))
    other = toy_data(spaces.Box(-1.0, 1.0, (5,), np.float32))
    with pytest.raises(EnvironmentMismatchError, match=r"exported for observations observation\[3\], here they are"):
        load_file(tmp_path / "policy.onnx").check(other)
    for wrong in (np.array([None] * 3), np.array(["a"] * 3), np.zeros(3, complex)):
        with pytest.raises(ValueError, match="entry 'observation' is .*, the policy needs float32"):
            file.act(wrong)
    with pytest.raises(ValueError, match="a number that is not finite"):
        file.act(np.full(3, 1e300))
    contract = contract_of(tmp_path / "policy.onnx")
    sound = json.loads(contract.read_text())
    for text in ("", "{}", "[]", json.dumps({k: v for k, v in sound.items() if k != "observation"})):
        contract.write_text(text)
        with pytest.raises(ValueError, match="policy.onnx.json is no contract of o2o .*: copy it again"):
            deployed(tmp_path / "policy.onnx")
        with pytest.raises(ConfigError, match="is no contract of o2o"):
            load_file(tmp_path / "policy.onnx")
    contract.write_text(json.dumps(sound | {"inputs": {"state": {"shape": [1, 4], "dtype": "float32"}}}))
    with pytest.raises(ValueError, match=r"takes {'state': \[1, 3\]}, and its contract says {'state': \[1, 4\]}"):
        deployed(tmp_path / "policy.onnx")
    (tmp_path / "policy.onnx").write_bytes((tmp_path / "policy.onnx").read_bytes()[:200])
    with pytest.raises(ValueError, match="policy.onnx cannot be loaded"):
        deployed(tmp_path / "policy.onnx")


def test_unexportable_part_named(tmp_path: Path) -> None:
    """A policy that cannot be exported is refused with its part; nothing is written."""
    upon_code = toy_policy("residual", inner=python_policy(lambda observation: np.zeros(2)))
    with pytest.raises(ConfigError, match="the base policy <lambda> cannot be exported .* neither a run nor a .onnx"):
        export_policy(upon_code, tmp_path / "policy.onnx")
    with pytest.raises(ConfigError, match=r"policy.txt has no known suffix; use one of .onnx, .jax"):
        export_policy(toy_policy("bc"), tmp_path / "policy.txt")

    class Bits(AGENTS["bc"]):  # pyright: ignore[reportGeneralTypeIssues]
        def sample_actions(self, observations: Any, carry: Any, rng: Any, deterministic: bool = False) -> Any:
            action, carry = super().sample_actions(observations, carry, rng, True)
            return action + jax.random.bits(rng, action.shape).astype(jnp.float32), carry

    policy = toy_policy("bc")
    agent = Bits(**{f.name: getattr(policy.agent, f.name) for f in dataclasses.fields(policy.agent)})
    with pytest.raises(ConfigError, match="draws random numbers by random_bits"):
        export_policy(dataclasses.replace(policy, agent=agent), tmp_path / "policy.onnx")
    assert not list(tmp_path.iterdir())


def test_loaded_policy_is_compiled() -> None:
    """The first action of a policy compiles nothing."""
    policy = TrainedPolicy(toy_policy("iql"))
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "compile" in name else None
    )
    policy.reset(1)
    policy.act(observations(1)[0])
    assert compiled == []
