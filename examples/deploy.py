"""Act with a policy that `o2o export` wrote. Needs NumPy and onnxruntime alone: neither o2o nor JAX.

    o2o export runs/demo policy.onnx
    python deploy.py policy.onnx

Copy this file, `policy.onnx` and `policy.onnx.json` (for a residual policy also `policy.base.onnx` and its contract) to
the robot's computer. In your loop: `policy.reset(seed)` at the start of every episode, `policy.act(observation)` in
every step, `policy.interrupt()` after a human has taken over. Observations and actions are in the environment's units.
"""

import json
import sys
import time
from collections import deque
from pathlib import Path

import numpy as np
import onnxruntime

PARTS = ("format", "observation", "history", "action", "inputs", "noise", "memory", "base")


class Policy:
    """The policy in an ONNX file, by the contract beside it: history, chunks, random numbers and base policy."""

    def __init__(self, path):
        """Load `path`, and `path` + `.json`."""
        try:
            self.contract = json.loads(Path(f"{path}.json").read_text())
            missing = [part for part in PARTS if part not in self.contract]
        except (ValueError, TypeError) as error:
            missing = [error]
        if missing:
            raise ValueError(f"{path}.json is no contract of o2o ({missing[0]}): copy it again")
        if self.contract["format"] != 1:
            raise ValueError(f"{path}.json is of format {self.contract['format']}; this loader reads 1")
        try:
            self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ValueError(f"{path} cannot be loaded: {' '.join(str(error).split())[:200]}") from None
        wanted = {k: v["shape"] for part in ("inputs", "memory", "noise") for k, v in self.contract[part].items()}
        if (takes := {entry.name: entry.shape for entry in self.session.get_inputs()}) != wanted:
            raise ValueError(f"{path} takes {takes}, and its contract says {wanted}: copy both files again")
        base = self.contract["base"]
        self.base = Policy(Path(path).with_name(base)) if base else None
        self.reset()

    def reset(self, seed=0):
        """Begin an episode; whatever the policy draws in it comes from `seed`."""
        self.rng, self.past, self.queue = np.random.default_rng(seed), deque(maxlen=self.contract["history"]), []
        self.memory = {k: np.array(v["first"], v["dtype"]) for k, v in self.contract["memory"].items()}
        if self.base:
            self.base.reset(seed)

    def interrupt(self):
        """Drop the rest of a chunk: a human has taken over since it was planned."""
        self.queue = []
        if self.base:
            self.base.interrupt()

    def act(self, observation):
        """Return the action `[*shape]` for one observation as the environment gives it (a dict for a Dict)."""
        now = self.read(observation)
        self.past.extend([now] * (1 if self.past else self.past.maxlen))
        inputs = {key: np.concatenate([seen[key] for seen in self.past], axis=-1)[None] for key in now}
        if self.base:
            inputs["base_action"] = self.base.act(observation)[None]
        if not self.queue:
            noise = {name: self.draw(**entry) for name, entry in self.contract["noise"].items()}
            action, *memory = self.session.run(None, {**inputs, **self.memory, **noise})
            self.memory = dict(zip(self.memory, memory, strict=True))
            self.queue = list(action.reshape(-1, *self.contract["action"]["shape"]))
        return self.queue.pop(0)

    def read(self, observation):
        """Return the program's inputs for one observation: numbers in one row, images as they are."""
        rows, images = [], {}
        for entry in self.contract["observation"]:
            value = observation
            for key in entry["path"]:
                try:
                    value = value[key]
                except (KeyError, IndexError, TypeError):
                    raise ValueError(
                        f"the observation has no entry {entry['name']!r}, which the policy needs"
                    ) from None
            value = np.asarray(value)
            kind = value.dtype == np.uint8 if entry["dtype"] == "uint8" else value.dtype.kind in "biuf"
            if list(value.shape) != entry["shape"] or not kind:
                raise ValueError(
                    f"observation entry {entry['name']!r} is {value.dtype} of shape {list(value.shape)}, the policy "
                    f"needs {entry['dtype']} of shape {entry['shape']}"
                )
            if entry["dtype"] == "uint8":
                images[entry["input"]] = value.copy()
                continue
            with np.errstate(over="ignore"):
                rows.append(value.astype(np.float32).reshape(-1))
            if not np.isfinite(rows[-1]).all():
                raise ValueError(f"observation entry {entry['name']!r} has a number that is not finite")
        return {**({"state": np.concatenate(rows)} if rows else {}), **images}

    def draw(self, kind, shape):
        """Return the random numbers of one input."""
        if kind == "permutation":
            return self.rng.permutation(shape[0]).astype(np.int32)
        return (self.rng.random if kind == "uniform" else self.rng.standard_normal)(tuple(shape), np.float32)


def example(contract):
    """Return an observation of zeros that fits a contract."""
    tree = {}
    for entry in contract["observation"]:
        value = np.zeros(entry["shape"], entry["dtype"])
        if not entry["path"]:
            return value
        node = tree
        for key in entry["path"][:-1]:
            node = node.setdefault(key, {})
        node[entry["path"][-1]] = value
    return tree


def main(path):
    """Act 1000 times on zeros and print how long it took. Put your robot's observations in their place."""
    policy = Policy(path)
    observation, taken = example(policy.contract), []
    for _ in range(1000):
        began = time.perf_counter()
        action = policy.act(observation)
        taken.append(1e3 * (time.perf_counter() - began))
    print(f"action {action}, p50 {np.percentile(taken, 50):.3f} ms, p99 {np.percentile(taken, 99):.3f} ms")


if __name__ == "__main__":
    main(sys.argv[1])
