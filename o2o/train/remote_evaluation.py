"""Evaluation in a process of its own, on one core and the CPU, while training goes on (`LoopConfig.eval_process`).

The process plays what `Evaluator` would play here, the same program on the same numbers, so its rows are the same to
the last bit wherever training, too, runs on a CPU. It gets the agents' arrays at the moment an evaluation is due; what
else an agent is made of (its class, networks, settings) goes there once.
"""

import os
import pickle
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Thread
from typing import Any

import jax
import numpy as np

from o2o.closing import Closing
from o2o.config import LoopConfig
from o2o.data.normalizer import Normalizer
from o2o.errors import O2OError
from o2o.train.evaluation import EnvFn, Evaluator
from o2o.train.processes import Child, answer, loaded, packed

MOST_IN_FLIGHT = 2
"""One evaluation is played, one waits; who asks for a third waits for the first."""
JAX_SETTINGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)
"""What decides the numbers, and where compiled programs are kept."""
INSTEAD = "set loop.eval_process to False"
GIVE_UP_S = 2.5
"""An evaluation under way has so long to end when nobody waits for it any more; no robot is in it."""


def evaluator_of(
    loop: LoopConfig, env_fn: EnvFn, seeds: int, seed: int, normalized: Callable[[float], float | None]
) -> Evaluator:
    """Return the evaluator that a run's settings ask for."""
    kind = RemoteEvaluator if loop.eval_process else Evaluator
    return kind(env_fn, seeds, loop.eval_episodes, seed, normalized)


class RemoteEvaluator(Evaluator):
    """An `Evaluator` whose episodes are played in another process, started at first use."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Prepare as an `Evaluator`; raises `ConfigError` if `env_fn` cannot be pickled, closures included."""
        super().__init__(*args, **kwargs)
        settings = (self.env_fn, self.seeds, self.episodes, self.seed, None, self.slots)
        self._settings = packed(settings, "env_fn", INSTEAD)
        self._child: Child | None = None
        self._structure: Any = None
        self._asked: deque[Any] = deque()

    def __call__(
        self, agent: Any, normalizer: Normalizer | None, point: int, deterministic: bool = True
    ) -> list[dict[str, Any]]:
        """Play all episodes with the stacked `agent`, wait for their rows; what was asked before stays for `take`."""
        self.ask(agent, normalizer, point, deterministic)
        self._collect(0)
        return self._finished.pop()[1]

    def until_stopped(
        self, agent: Any, normalizer: Normalizer | None, point: int, deterministic: bool = True
    ) -> list[dict[str, Any]] | None:
        """Play the episodes of a call; None if `should_stop` says so before, a later stop waits for their rows."""
        return None if self.should_stop() else self(agent, normalizer, point, deterministic)

    def ask(
        self, agent: Any, normalizer: Normalizer | None, point: int, deterministic: bool = True, about: Any = None
    ) -> None:
        """Send the agents' arrays; returns at once unless `MOST_IN_FLIGHT` evaluations are under way."""
        self._collect(MOST_IN_FLIGHT - 1)
        leaves, structure = jax.tree.flatten((agent, normalizer))
        skeleton = None
        if self._child is None:
            self._start()
        kind = (hash(structure), structure)  # structures of two classes may be equal, where the fields are
        if kind != self._structure:
            skeleton = packed(jax.tree.unflatten(structure, range(len(leaves))), "the agent", INSTEAD)
        self._send((skeleton, [_on_host(leaf) for leaf in leaves], point, deterministic))
        self._structure = kind
        self._asked.append(about)

    def under_way(self) -> list[Any]:
        """Return the `about` of what was asked for and is not known to have been played, in that order."""
        return list(self._asked)

    def take(self, wait: bool = False, leave: int = 0) -> list[tuple[Any, list[dict[str, Any]]]]:
        """Return (about, rows) of what has been played, in the order asked; `wait` for all but the last `leave`.

        Raises what the environment or the agent raised there, and `EnvironmentFaultError` if the process died.
        """
        if wait:
            self._collect(leave)
        while self._asked and self._child is not None and self._child.ready():
            self._collect(len(self._asked) - 1)
        return [(about, rows) for about, rows in super().take() if about is not None]

    def _start(self) -> None:
        self._child = Child("o2o.train.remote_evaluation:serve", "the evaluation process")
        self._structure = None
        self._send({name: getattr(jax.config, name) for name in JAX_SETTINGS})
        self._send(self._settings)

    def _send(self, message: Any) -> None:
        assert self._child is not None
        try:
            self._child.send(message)
        except BaseException:
            self.close()
            raise

    def _collect(self, leave: int) -> None:
        """Wait until only `leave` evaluations are under way; if one fails, for all, and raise the first failure."""
        failure: Exception | None = None
        while len(self._asked) > (leave if failure is None else 0):
            try:
                self._finished.append(self._next())
            except Exception as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def _next(self) -> tuple[Any, list[dict[str, Any]]]:
        """Wait for the rows of the oldest evaluation."""
        assert self._child is not None
        about = self._asked[0]
        self._child.ready(None)  # an interruption here leaves all as it is
        try:
            rows = self._child.receive()
        except Exception as error:
            self._asked.popleft()
            self._structure = None
            if not self._child.close.alive:
                self.close()
            if isinstance(error, O2OError) and isinstance(about, dict):
                where = f"{about['env_steps']} environment steps and {about['gradient_steps']} updates"
                error.args = (f"{error} (in the evaluation after {where}, whose rows are missing)",)
            raise
        except BaseException:  # an answer read by half
            self.close()
            raise
        self._asked.popleft()
        for row in rows:
            row["normalized"] = self.normalized(row["return"]) if self.normalized else None
        return about, rows

    def close(self) -> None:
        """End the process; an evaluation under way is given up."""
        if self._child is not None:
            self._child.close()
        self._child = None
        self._asked.clear()


def _on_host(leaf: Any) -> Any:
    """Return an array in host memory; keys of a random stream travel as they are."""
    return leaf if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key) else np.asarray(leaf)


class _Player:
    """The evaluator in the process, and what the agents there are made of."""

    def __init__(self, settings: bytes) -> None:
        self._settings = settings
        self.evaluator: Evaluator | None = None
        self._structure: Any = None

    def play(self, request: bytes) -> list[dict[str, Any]]:
        """Play one evaluation."""
        if self.evaluator is None:
            self.evaluator = Evaluator(*loaded(self._settings, "env_fn", INSTEAD))
        skeleton, leaves, point, deterministic = pickle.loads(request)
        if skeleton is not None:
            self._structure = jax.tree.structure(loaded(skeleton, "the agent", INSTEAD))
        agent, normalizer = jax.tree.unflatten(self._structure, jax.device_put(leaves))
        return self.evaluator(agent, normalizer, point, deterministic)

    def close(self) -> None:
        """Close the environments."""
        if self.evaluator is not None:
            self.evaluator.close()


def serve(connection: Connection) -> None:
    """Be the evaluation process: play what is asked for, one after the other, until the parent is gone."""
    inbox: SimpleQueue[bytes | None] = SimpleQueue()
    Thread(target=_listen, args=(connection, inbox), daemon=True).start()
    settings, world = inbox.get(), inbox.get()
    if settings is None or world is None:
        return
    for name, value in pickle.loads(settings).items():
        jax.config.update(name, value)
    player = _Player(world)
    with Closing() as closing:
        closing.callback(player.close)
        while (request := inbox.get()) is not None:
            answer(connection, partial(player.play, request))


def _listen(connection: Connection, inbox: SimpleQueue[bytes | None]) -> None:
    """Take requests while an evaluation is played; when the parent is gone, end the process, idle or not."""
    with suppress(EOFError, OSError):
        while True:
            inbox.put(connection.recv_bytes())
    inbox.put(None)
    inbox.put(None)
    time.sleep(GIVE_UP_S)
    os._exit(1)
