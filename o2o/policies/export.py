"""A policy as files that stand alone: a program (`.onnx` or `.jax`) and its contract (JSON), without o2o to run them.

The program maps the raw observation to an action in the environment's units, or to a chunk of them. Normalisation and
the range of actions are inside; history, the queue of a chunk and random numbers are outside (`examples/deploy.py`).
"""

import dataclasses
import importlib
import json
import logging
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from o2o import __version__
from o2o.data.spaces import BASE_ACTION, STATE, ActionMap
from o2o.errors import ConfigError, RunError
from o2o.files import write_atomically
from o2o.policies import flat
from o2o.policies.base import BasePolicy
from o2o.policies.exported import CONTRACT_FORMAT, ExportedPolicy, Runner, contract_of
from o2o.policies.run import RunPolicy
from o2o.rl.chunks import ActionQueue
from o2o.train.acting import act

SUFFIXES = (".onnx", ".jax")
PLATFORMS = ("cpu", "cuda")
OPSET = 20
TRIALS = 8
"""Observations at which an exported file is compared with its agent."""
TOLERANCE = 1e-3
"""Largest difference of actions, as a share of half their range, at which an exported file is accepted."""


@dataclass(frozen=True)
class Program:
    """A policy as a function of named arrays."""

    function: Callable[..., list[Any]]
    """Takes the inputs in their order; returns the action and the next memory."""
    inputs: dict[str, jax.ShapeDtypeStruct]
    outputs: tuple[str, ...]
    chunk: int
    """Actions that one call returns."""
    draws: dict[str, flat.Draw]
    memory: dict[str, np.ndarray]
    """Inputs that an episode begins with, and that the outputs of the same names replace from call to call."""
    keyed: ClosedJaxpr
    """The program of observation, memory and random key that this one was made of."""
    used: tuple[bool, ...]
    """Which of all draws the program takes."""


def to_env(action_map: ActionMap, actions: jax.Array) -> jax.Array:
    """Return environment actions `[..., *shape]` for `[..., A]` in [-1, 1], as `ActionMap.to_env` does on the host."""
    low, high = np.asarray(action_map.low, np.float32), np.asarray(action_map.high, np.float32)
    mapped = (high + low) / 2 + (high - low) / 2 * jnp.clip(actions, -1.0, 1.0)
    return jnp.clip(mapped, *action_map.float32_bounds).reshape(*actions.shape[:-1], *action_map.shape)


def from_env(action_map: ActionMap, actions: jax.Array) -> jax.Array:
    """Return `[n, A]` in [-1, 1] for environment actions `[n, *shape]`, as `ActionMap.from_env` does on the host."""
    low, high = np.asarray(action_map.low, np.float32), np.asarray(action_map.high, np.float32)
    return jnp.clip((actions.reshape(len(actions), -1) - (high + low) / 2) / ((high - low) / 2), -1.0, 1.0)


def program_of(policy: RunPolicy) -> Program:
    """Return the policy as a flat program. Raises `ConfigError`, naming the part, if it has none."""
    data, fresh = policy.data, policy.agent.initial_carry((1,))
    rows = data.arrays["observations"]
    entries = dict(rows) if isinstance(rows, dict) else {STATE: rows}
    seen = {key: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype) for key, leaf in entries.items()}
    if policy.inner is not None:
        seen[BASE_ACTION] = jax.ShapeDtypeStruct((1, *data.action_map.shape), jnp.float32)
    queued = isinstance(fresh, ActionQueue)
    leaves, form = jax.tree.flatten(None if queued else fresh)

    def whole(*inputs: Any) -> Any:
        *values, key = inputs
        observed: Any = dict(zip(seen, values, strict=False))
        if policy.inner is not None:
            observed[BASE_ACTION] = from_env(data.action_map, observed[BASE_ACTION])
        carry = fresh if queued else jax.tree.unflatten(form, values[len(seen) :])
        observed = observed if isinstance(rows, dict) else observed[STATE]
        action, carry = act(policy.agent, policy.normalizer, observed, carry, key, policy.deterministic)
        if queued:  # what a call does not play at once is the chunk's rest, of a length that is the same in every call
            return action, carry.actions, carry.left
        return action, *jax.tree.leaves(carry)

    shapes = [*seen.values(), *(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)]
    whole_program = jax.make_jaxpr(whole)(*shapes, jax.random.key(0))
    rest = _rest(whole_program, shapes) if queued else 0

    def in_units(*inputs: Any) -> Any:
        action, *others = jaxpr_as_fun(whole_program)(*inputs)
        if queued and rest:
            return (to_env(data.action_map, jnp.concatenate([action[:, None], others[0][:, :rest]], axis=1)),)
        return (to_env(data.action_map, action), *([] if queued else others))

    keyed = jax.make_jaxpr(in_units)(*shapes, jax.random.key(0))
    lined, draws = flat.flat(keyed, shapes)
    _, used = flat.live(lined.jaxpr, [0])
    carried = used[len(seen) : len(shapes)]
    wanted = [0, *range(1, 1 + len(leaves))] if any(carried) else [0]
    function, used = flat.pruned(lined, wanted)
    memory = {f"memory_{i}": np.asarray(leaf) for i, leaf in enumerate(leaves)} if any(carried) else {}
    names = [*seen, *(f"memory_{i}" for i in range(len(leaves))), *(f"noise_{i}" for i in range(len(draws)))]
    inputs = {
        n: jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for n, v in zip(names, lined.jaxpr.invars, strict=True)
    }
    kept = dict(zip(names, used, strict=True)) | dict.fromkeys(memory, True) | dict.fromkeys(seen, True)

    def complete(*values: Any) -> list[Any]:
        """Take the inputs that are kept; some of them may have no effect."""
        return function(*(value for name, value in zip(taken, values, strict=True) if name in effective))

    taken = [name for name in names if kept[name]]
    effective = {name for name, one in zip(names, used, strict=True) if one}
    found = {name: draw for name, draw in zip(names[len(shapes) :], draws, strict=True) if kept[name]}
    return Program(
        complete, {name: inputs[name] for name in taken}, ("action", *memory), 1 + rest, found, memory, keyed,
        tuple(kept[name] for name in names[len(shapes) :]),
    )  # fmt: skip


def _rest(keyed: ClosedJaxpr, shapes: list[jax.ShapeDtypeStruct]) -> int:
    """Return how many actions of a chunk are left after the first; raises `ConfigError` if that is not constant."""
    left: list[Any] = []
    key = jax.random.key(0)

    def look(*values: Any) -> Any:
        drawn = lambda draw, *_: jnp.zeros(draw.shape, draw.dtype)  # noqa: E731
        left.append(flat.inline(keyed, values, key, drawn)[2])
        return values

    jax.eval_shape(look, *shapes)
    if isinstance(left[0], Tracer):
        raise ConfigError("the policy decides itself how much of a chunk it plays, which cannot be exported")
    return int(np.asarray(left[0]).reshape(-1)[0])


def export_policy(
    policy: RunPolicy, path: Path, rate: float | None = None, about: Mapping[str, Any] | None = None
) -> Path:
    """Write the policy's program to `path` and its contract to `path` + `.json`, which is returned.

    The suffix says the kind: `.onnx` (needs the extra `onnx`), or `.jax`, an artefact of `jax.export` for CPU and CUDA.
    A base policy that is a run is written beside it, as `STEM.base` with the same suffix. `rate`: steps per second of
    the environment, None if unknown; `about` are further entries of the contract. The file is then run and compared
    with the agent. Raises `ConfigError` for another suffix, a missing module or a policy that cannot be exported,
    naming the part; `RunError` if a file cannot be written.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"policy {path} has no known suffix; use one of {', '.join(SUFFIXES)}")
    if path.suffix == ".onnx":
        for module in ("jax2onnx", "onnxruntime"):
            _import(module, path)
    try:
        program = program_of(policy)
        content = _onnx(program) if path.suffix == ".onnx" else _jax(program)
    except NotImplementedError as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"the policy of {policy.name} has no form as {path.suffix}: {reason}") from error
    contract = {**_contract(policy, program, path, rate), **(about or {})}
    _check(policy, program, path, content, contract)
    contract["base"] = _export_base(policy.inner, path, rate)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
        write_atomically(contract_of(path), json.dumps(contract, indent=2) + "\n")
    except OSError as error:
        raise RunError(f"policy {path} cannot be written: {error.strerror}") from error
    return contract_of(path)


def _import(module: str, path: Path) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"policy {path} needs {module}, which is not installed: pip install 'o2o[onnx]'") from error


def _export_base(base: BasePolicy | None, path: Path, rate: float | None) -> str | None:
    """Write the file of a base policy beside `path`; return its name, None if there is no base."""
    if base is None:
        return None
    beside = path.with_name(f"{path.stem}.base{path.suffix}")
    if isinstance(base, RunPolicy):
        export_policy(base, beside, rate)
    elif isinstance(base, ExportedPolicy) and base.path.suffix == path.suffix and base.inner is None:
        beside.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(beside, base.path.read_bytes())
        contract = {**json.loads(contract_of(base.path).read_text()), "file": beside.name}
        write_atomically(contract_of(beside), json.dumps(contract, indent=2) + "\n")
    else:
        raise ConfigError(
            f"the base policy {base.name} cannot be exported with the policy that corrects it: it is neither a run nor "
            f"a {path.suffix} file that o2o exported"
        )
    return beside.name


def _onnx(program: Program) -> bytes:
    logging.getLogger("jax2onnx").setLevel(logging.ERROR)  # it names each of its plugins that other libraries need
    from jax2onnx import to_onnx

    model: Any = to_onnx(
        lambda *inputs: tuple(program.function(*inputs)),
        [jax.ShapeDtypeStruct(entry.shape, entry.dtype) for entry in program.inputs.values()],
        model_name="o2o policy",
        opset=OPSET,
        input_names=list(program.inputs),
        output_names=[name if name == "action" else f"next_{name}" for name in program.outputs],
    )
    return model.SerializeToString()


def _jax(program: Program) -> bytes:
    function = jax.jit(lambda *inputs: tuple(program.function(*inputs)))
    return bytes(jax.export.export(function, platforms=PLATFORMS)(*program.inputs.values()).serialize())


def _contract(policy: RunPolicy, program: Program, path: Path, rate: float | None) -> dict[str, Any]:
    data, at, entries = policy.data, 0, []
    for leaf in data.observation_spec.leaves:
        width = int(np.prod(leaf.shape))
        entry = {"name": leaf.name, "path": list(leaf.path), "shape": list(leaf.shape), "unit": "the environment's"}
        if leaf.image:
            entries.append({**entry, "dtype": "uint8", "input": leaf.name})
        else:
            entries.append({**entry, "dtype": "float32", "input": STATE, "columns": [at, at + width]})
            at += width
    normalizer, inside = policy.normalizer, {"applied": "inside the program, to the input state"}
    statistics = None if normalizer is None else {"mean": normalizer.mean.tolist(), "std": normalizer.std.tolist()}
    return {
        "format": CONTRACT_FORMAT,
        "file": path.name,
        "versions": {"o2o": __version__, "jax": jax.__version__, "numpy": np.__version__},
        "dataset": data.info.name,
        "environment": data.info.env_id,
        "rate_hz": rate,
        "acts_by": "mode" if policy.deterministic else "sampling",
        "observation": entries,
        "normalizer": None if statistics is None else {**statistics, **inside},
        "history": policy.history,
        "action": {**dataclasses.asdict(data.action_map), "unit": "the environment's", "order": "as in its Box"},
        "chunk": program.chunk,
        "inputs": {
            name: {"shape": list(entry.shape), "dtype": entry.dtype.name}
            for name, entry in program.inputs.items()
            if name not in (*program.draws, *program.memory)
        },
        "noise": {name: {"kind": draw.kind, "shape": list(draw.shape)} for name, draw in program.draws.items()},
        "memory": {
            name: {"shape": list(value.shape), "dtype": value.dtype.name, "first": value.tolist()}
            for name, value in program.memory.items()
        },
    }


def _trials(policy: RunPolicy) -> list[dict[str, np.ndarray]]:
    """Return observations `[1, ...]` with their history, as the program takes them, spread like those of the data."""
    rows, rng = policy.data.arrays["observations"], np.random.default_rng(0)
    entries = dict(rows) if isinstance(rows, dict) else {STATE: rows}

    def draw(key: str, leaf: np.ndarray) -> np.ndarray:
        if leaf.dtype == np.uint8:
            return rng.integers(0, 256, (1, *leaf.shape[1:]), dtype=np.uint8)
        if key == BASE_ACTION:
            return policy.data.action_map.to_env(rng.uniform(-1, 1, (1, *leaf.shape[1:])))
        values = rng.standard_normal((1, *leaf.shape[1:]))
        if policy.normalizer is not None:
            values = np.asarray(policy.normalizer.mean) + np.asarray(policy.normalizer.std) * values
        return values.astype(np.float32)

    return [{key: draw(key, leaf) for key, leaf in entries.items()} for _ in range(TRIALS)]


def compare(policy: RunPolicy, program: Program, run: Runner) -> float:
    """Return the largest difference of the actions of agent and program, as a share of half the range of actions.

    `run` maps named inputs to outputs. Both get the same random numbers, and begin an episode at every observation.
    """
    largest, action_map = 0.0, policy.data.action_map
    half = (np.asarray(action_map.high) - np.asarray(action_map.low)).reshape(action_map.shape) / 2
    keyed = program.keyed
    act_and_draw = jax.jit(lambda *v: (jaxpr_as_fun(keyed)(*v)[0], flat.drawn_by(keyed, v[:-1], v[-1])))
    first = [jnp.asarray(leaf) for leaf in _memory(policy)]
    for number, seen in enumerate(_trials(policy)):
        key = jax.random.fold_in(jax.random.key(0), number)
        wanted, drawn = jax.device_get(act_and_draw(*seen.values(), *first, key))
        noise = [value for value, takes in zip(drawn, program.used, strict=True) if takes]
        feed = {**seen, **program.memory, **dict(zip(program.draws, noise, strict=True))}
        found = np.asarray(run(feed)[0])
        largest = max(largest, float(np.max(np.abs(found - wanted) / half)))
    return largest


def _memory(policy: RunPolicy) -> list[Any]:
    fresh = policy.agent.initial_carry((1,))
    return [] if isinstance(fresh, ActionQueue) else jax.tree.leaves(fresh)


def _check(policy: RunPolicy, program: Program, path: Path, content: bytes, contract: dict[str, Any]) -> None:
    """Raise `ConfigError` if what is to be written to `path` does not act as the agent does."""
    with tempfile.TemporaryDirectory() as folder:
        tried = Path(folder) / path.name
        tried.write_bytes(content)
        off = compare(policy, program, ExportedPolicy(str(path), None, tried, contract, None).runner())
    if not off <= TOLERANCE:
        raise ConfigError(
            f"policy {path} does not act as its agent: actions differ by {off:.2g} of half their range, where "
            f"{TOLERANCE:g} is allowed; export the other kind of file"
        )


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call."""

    p50: float
    p99: float


def latency(policy: BasePolicy, data: Any, calls: int = 200) -> Latency:
    """Return how long a policy takes for an action, measured over `calls` episodes of one step after 10 more."""
    spec, controller = data.observation_spec, policy.controller(data)
    shape, rng = spec.shape, np.random.default_rng(0)
    shapes = {STATE: shape} if isinstance(shape, tuple) else shape
    draw = {1: lambda s: rng.standard_normal(s, np.float32), 3: lambda s: rng.integers(0, 256, s, dtype=np.uint8)}
    seen = {key: draw[len(size)](size) for key, size in shapes.items()}
    taken = []
    for call in range(10 + calls):
        controller.reset(call)
        began = time.perf_counter()
        controller.act(seen if not isinstance(shape, tuple) else seen[STATE])
        taken.append(1e3 * (time.perf_counter() - began))
    return Latency(*(float(np.percentile(taken[10:], q)) for q in (50, 99)))
