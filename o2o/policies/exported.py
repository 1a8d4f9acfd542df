"""Base policies in files: ONNX graphs (extra `onnx`), TorchScript modules and torch exports (extra `torch`)."""

import hashlib
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from o2o.data.datasets import Dataset
from o2o.data.rollout import Controller
from o2o.data.spaces import STATE
from o2o.errors import ConfigError, EnvironmentMismatchError
from o2o.policies.base import BasePolicy

FILES = {".onnx": "onnxruntime", ".pt": "torch", ".pth": "torch", ".pt2": "torch"}
"""Suffix of a file -> the module that runs it."""


def load_file(path: Path) -> BasePolicy:
    """Return the policy in a file; raise `ConfigError` if the file or the module that runs it is missing."""
    if not path.is_file():
        raise ConfigError(f"base {path}: there is no such file")
    _import(FILES[path.suffix], path)
    kind = OnnxPolicy if path.suffix == ".onnx" else TorchPolicy
    return kind(str(path), hashlib.sha256(path.read_bytes()).hexdigest(), path=path)


def _import(module: str, path: Path) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        extra = "onnx" if module == "onnxruntime" else "torch"
        raise ConfigError(f"base {path} needs {module}, which is not installed: pip install 'o2o[{extra}]'") from error


@dataclass(frozen=True, eq=False)
class OnnxPolicy(BasePolicy):
    """An ONNX graph of one input `[1, D]`, or one per key of a dict observation; its first output is the action."""

    path: Path

    def check(self, data: Dataset) -> None:
        """Raise `EnvironmentMismatchError` unless the graph's inputs are the observations of `data`."""
        inputs = {entry.name: entry.shape for entry in self._session().get_inputs()}
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

    def _session(self) -> Any:
        runtime = _import("onnxruntime", self.path)
        try:
            return runtime.InferenceSession(str(self.path), providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ConfigError(f"base {self.path} cannot be loaded: {' '.join(str(error).split())[:300]}") from error

    def controller(self, data: Dataset) -> Controller:
        """Return the graph in a session of its own."""
        return OnnxController(self._session())


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
