"""Policies in files: ONNX graphs (extra `onnx`), TorchScript modules and torch exports (extra `torch`).

A file that o2o exported (`o2o.policies.export`) has a contract beside it and acts as its agent did, with history,
chunks and random numbers.
"""

import hashlib
import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from o2o.data.datasets import Dataset
from o2o.data.rollout import Controller
from o2o.data.spaces import BASE_ACTION, STATE
from o2o.errors import ConfigError, EnvironmentMismatchError
from o2o.policies.base import Base, BasePolicy, Planner

FILES = {".onnx": "onnxruntime", ".jax": "jax", ".pt": "torch", ".pth": "torch", ".pt2": "torch"}
"""Suffix of a file -> the module that runs it."""
CONTRACT_FORMAT = 1
"""Format of a contract. It is raised when loaders of before can no longer read it."""

CONTRACT_PARTS = ("observation", "history", "action", "inputs", "noise", "memory", "base", "versions")
"""What a contract must have for its policy to act."""


def contract_of(path: Path) -> Path:
    """Return where the contract of an exported policy is."""
    return path.with_name(f"{path.name}.json")


def load_file(path: Path) -> BasePolicy:
    """Return the policy in a file; raise `ConfigError` if the file or the module that runs it is missing."""
    if not path.is_file():
        raise ConfigError(f"base {path}: there is no such file")
    _import(FILES[path.suffix], path)
    if contract_of(path).is_file():
        return ExportedPolicy.of(path)
    if path.suffix == ".jax":
        raise ConfigError(f"base {path} has no contract beside it: copy {contract_of(path).name} there, too")
    kind = OnnxPolicy if path.suffix == ".onnx" else TorchPolicy
    return kind(str(path), hashlib.sha256(path.read_bytes()).hexdigest(), path=path)


def _import(module: str, path: Path) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        extra = "onnx" if module == "onnxruntime" else "torch"
        raise ConfigError(f"base {path} needs {module}, which is not installed: pip install 'o2o[{extra}]'") from error


def onnx_session(path: Path) -> Any:
    """Return the ONNX graph in a file, ready to run. Raises `ConfigError` if it cannot be loaded."""
    runtime = _import("onnxruntime", path)
    try:
        return runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ConfigError(f"base {path} cannot be loaded: {' '.join(str(error).split())[:300]}") from error


@dataclass(frozen=True, eq=False)
class OnnxPolicy(BasePolicy):
    """An ONNX graph of one input `[1, D]`, or one per key of a dict observation; its first output is the action."""

    path: Path

    def check(self, data: Dataset) -> None:
        """Raise `EnvironmentMismatchError` unless the graph's inputs are the observations of `data`."""
        inputs = {entry.name: entry.shape for entry in onnx_session(self.path).get_inputs()}
        shape = data.observation_spec.shape
        wanted = dict(zip(inputs, [shape], strict=False)) if isinstance(shape, tuple) else shape
        if len(inputs) == 1 and len(wanted) == 1:
            wanted = dict(zip(inputs, wanted.values(), strict=True))
        same = set(inputs) == set(wanted) and all(
            len(inputs[name]) == len(entry) + 1
            and all(not isinstance(a, int) or a == b for a, b in zip(inputs[name][1:], entry, strict=True))
            for name, entry in wanted.items()
        )
        if not same:
            raise EnvironmentMismatchError(
                f"base {self.name} takes {inputs}; observations here are {data.observation_spec}, float32, as "
                f"{wanted} with a leading axis of 1"
            )

    def controller(self, data: Dataset) -> Controller:
        """Return the graph in a session of its own."""
        return OnnxController(onnx_session(self.path))


class OnnxController:
    """An ONNX graph at work; it has no memory."""

    def __init__(self, session: Any) -> None:
        """Run `session`."""
        self._session = session
        self._inputs = {entry.name: np.float64 if "double" in entry.type else None for entry in session.get_inputs()}

    def reset(self, seed: int) -> None:
        """Do nothing."""

    def interrupt(self) -> None:
        """Do nothing."""

    def act(self, observation: Any) -> Any:
        """Run the graph."""
        entries = observation if isinstance(observation, dict) else {STATE: observation}
        feed = {}
        for (name, dtype), key in zip(self._inputs.items(), self._keys(entries), strict=True):
            feed[name] = np.asarray(entries[key], dtype)[None]
        return self._session.run(None, feed)[0][0]

    def _keys(self, entries: dict[str, Any]) -> list[str]:
        return list(entries) if len(entries) == 1 else list(self._inputs)


Runner = Callable[[dict[str, np.ndarray]], Sequence[Any]]
"""Maps named inputs to outputs."""


@dataclass(frozen=True, eq=False)
class ExportedPolicy(BasePolicy):
    """A file that o2o exported, with its contract."""

    path: Path
    contract: dict[str, Any]
    inner: BasePolicy | None
    """The base policy that it corrects."""

    @classmethod
    def of(cls, path: Path) -> Self:
        """Load the contract beside `path`. Raises `ConfigError` if it cannot be read."""
        where = contract_of(path)
        try:
            text = where.read_text()
            contract = json.loads(text)
            if contract["format"] != CONTRACT_FORMAT:
                raise ConfigError(
                    f"{where} is of format {contract['format']}, this o2o reads {CONTRACT_FORMAT}: export again"
                )
            if missing := [part for part in CONTRACT_PARTS if part not in contract]:
                raise KeyError(*missing)
            inner = None if contract["base"] is None else load_file(path.with_name(contract["base"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{where} is no contract of o2o ({error!r}): export the policy again") from error
        below = inner and inner.fingerprint
        digest = hashlib.sha256(path.read_bytes() + text.encode() + repr(below).encode())
        return cls(str(path), digest.hexdigest(), path, contract, inner)

    def check(self, data: Dataset) -> None:
        """Raise `EnvironmentMismatchError` unless observations and actions of `data` are those of the contract."""
        theirs = " + ".join(f"{e['name']}[{'x'.join(map(str, e['shape']))}]" for e in self.contract["observation"])
        if theirs != str(data.observation_spec):
            raise EnvironmentMismatchError(
                f"base {self.name} was exported for observations {theirs}, here they are {data.observation_spec}; use "
                "a base of this environment (and the same achieved_goal)"
            )
        if tuple(self.contract["action"]["shape"]) != data.action_map.shape:
            raise EnvironmentMismatchError(
                f"base {self.name} was exported for actions of shape {tuple(self.contract['action']['shape'])}, here "
                f"they have {data.action_map.shape}; use a base of this environment"
            )
        if self.inner is not None:
            self.inner.check(data)

    def runner(self) -> Runner:
        """Return the program, loaded anew. Raises `ConfigError` if it cannot be loaded."""
        if self.path.suffix == ".onnx":
            session = onnx_session(self.path)
            return lambda feed: session.run(None, feed)
        try:
            call = jax.jit(jax.export.deserialize(bytearray(self.path.read_bytes())).call)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"policy {self.path} cannot be loaded by JAX {jax.__version__} (it was exported by "
                f"{self.contract['versions']['jax']}): {reason}"
            ) from error
        names = [name for part in ("inputs", "memory", "noise") for name in self.contract[part]]
        return lambda feed: jax.device_get(call(*(feed[name] for name in names)))

    def controller(self, data: Dataset) -> Controller:
        """Return the program with history, queue, memory and random numbers of its own."""
        return ExportedController(self, None if self.inner is None else Base(self.inner, data))


class ExportedController(Planner):
    """An exported policy at work in one environment."""

    def __init__(self, policy: ExportedPolicy, inner: Base | None) -> None:
        """Act with `policy` upon `inner`."""
        super().__init__(policy.contract["history"], inner)
        self._contract, self._run = policy.contract, policy.runner()
        self.reset(0)

    def reset(self, seed: int) -> None:
        """Begin an episode, with its memory as it was at first."""
        super().reset(seed)
        self._rng = np.random.default_rng(seed)
        self._memory = {
            name: np.asarray(entry["first"], entry["dtype"]) for name, entry in self._contract["memory"].items()
        }

    def act(self, observation: Any) -> np.ndarray:
        """Return the action `[*shape]` for a flat observation."""
        seen = self.joined(observation)
        entries = dict(seen) if isinstance(seen, dict) else {STATE: seen}
        if self._inner is not None:
            entries[BASE_ACTION] = self._inner.act_in_env(observation)
        return self._queue.next(lambda: self._ask(entries))

    def _ask(self, entries: dict[str, Any]) -> list[np.ndarray]:
        noise = {name: drawn(self._rng, **entry) for name, entry in self._contract["noise"].items()}
        feed = {
            name: np.asarray(entries[name], entry["dtype"])[None] for name, entry in self._contract["inputs"].items()
        }
        action, *memory = self._run({**feed, **self._memory, **noise})
        self._memory = dict(zip(self._memory, memory, strict=True))
        return list(np.reshape(action, (-1, *self._contract["action"]["shape"])))


def drawn(rng: np.random.Generator, kind: str, shape: Sequence[int]) -> np.ndarray:
    """Return random numbers of a kind that `o2o.policies.flat.Draw` names."""
    if kind == "permutation":
        return rng.permutation(shape[0]).astype(np.int32)
    return (rng.random if kind == "uniform" else rng.standard_normal)(tuple(shape), np.float32)


@dataclass(frozen=True, eq=False)
class TorchPolicy(BasePolicy):
    """A TorchScript module or a `torch.export` program (.pt2).

    It maps `[1, D]`, or a dict of such tensors, to an action `[1, *shape]`. If the module exports `reset()`, it is
    called in every episode; if it exports `interrupt()`, it is called after a step that a human took over.
    """

    path: Path

    def controller(self, data: Dataset) -> Controller:
        """Return the module, loaded anew. Raises `ConfigError` if it cannot be loaded."""
        torch = _import("torch", self.path)
        try:
            if self.path.suffix == ".pt2":
                module = torch.export.load(str(self.path)).module()
            else:
                module = torch.jit.load(str(self.path), map_location="cpu").eval()
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"base {self.path} is not of torch.jit.save or torch.export.save: {reason}") from error
        return TorchController(torch, module)


@dataclass
class TorchController:
    """A TorchScript module at work."""

    torch: Any
    module: Any

    def reset(self, seed: int) -> None:
        """Seed torch and call the module's `reset()`, if it exports one."""
        self.torch.manual_seed(seed)
        reset = getattr(self.module, "reset", None)
        if reset is not None:
            reset()

    def interrupt(self) -> None:
        """Call the module's `interrupt()`, if it exports one."""
        interrupt = getattr(self.module, "interrupt", None)
        if interrupt is not None:
            interrupt()

    def act(self, observation: Any) -> Any:
        """Run the module."""
        with self.torch.no_grad():
            tensors = jax.tree.map(lambda leaf: self.torch.as_tensor(np.asarray(leaf))[None], observation)
            answer = self.module(tensors)
        return (answer[0] if isinstance(answer, tuple) else answer)[0].numpy()
