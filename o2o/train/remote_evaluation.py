"""Evaluation in a process of its own, on one CPU core, while training goes on (`LoopConfig.eval_process`).

The process plays the episodes that `Evaluator` would play here, with the same program. If training runs on a CPU too,
its rows are the same to the last bit. The process gets the agents' arrays when an evaluation is due. The rest of an
agent (its class, networks and settings) is sent once.
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
from o2o.train.evaluation import EnvFn, Evaluator, Row
from o2o.train.processes import Child, answer, loaded, packed

MOST_IN_FLIGHT = 2
"""One evaluation is played and one waits. Asking for a third waits for the end of the first."""
JAX_SETTINGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)
"""JAX settings that the process takes over: those that decide numbers, and where compiled programs are kept."""
INSTEAD = "set loop.eval_process to False"
GIVE_UP_S = 2.5
"""Seconds that an evaluation under way has to end when its parent is gone. It never moves a robot."""


def evaluator_of(
    loop: LoopConfig, env_fn: EnvFn, seeds: int, seed: int, normalized: Callable[[float], float | None]
) -> Evaluator:
    """Return the evaluator that a run's settings ask for."""
    kind = RemoteEvaluator if loop.eval_process else Evaluator
    return kind(env_fn, seeds, loop.eval_episodes, seed, normalized, max(loop.eval_envs, 1), loop.fresh_eval_starts)


class RemoteEvaluator(Evaluator):
    """An `Evaluator` whose episodes are played in another process, started at first use."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Prepare as an `Evaluator`; raise `ConfigError` if `env_fn` or what it refers to cannot be pickled."""
        super().__init__(*args, **kwargs)
        settings = (self.env_fn, self.seeds, self.episodes, self.seed, None, self.slots, self.fresh_starts)
        self._settings = packed(settings, "env_fn", INSTEAD)
        self._child: Child | None = None
        self._structure: Any = None
        self._asked: deque[Any] = deque()

    def prepare(self) -> None:
        """Make the environments here once, and close them: those of the process will be others."""
        trial = Evaluator(self.env_fn, self.seeds, self.episodes, self.seed, slots=self.slots)
        with Closing() as closing:
            closing.callback(trial.close)
            trial.prepare()

    def __call__(self, agent: Any, normalizer: Normalizer | None, point: int, deterministic: bool = True) -> list[Row]:
        """Play all episodes with the stacked `agent` and wait for their rows; earlier calls stay for `take`."""
        self.ask(agent, normalizer, point, deterministic)
        self._collect(0)
        return self._finished.pop()[1]

    def until_stopped(
        self, agent: Any, normalizer: Normalizer | None, point: int, deterministic: bool = True
    ) -> list[Row] | None:
        """Play the episodes of a call. Return None if `should_stop` is true before; a later stop waits for the rows."""
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
        """Return the `about` of every call that is not known to be finished, in the order of the calls."""
        return list(self._asked)

    def take(self, wait: bool = False, leave: int = 0) -> list[tuple[Any, list[Row]]]:
        """Return (about, rows) of the finished calls in their order; `wait` for all but the last `leave` first.

        Raises what the environment or the agent raised in the process, and `EnvironmentFaultError` if it died.
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
        """Wait until only `leave` evaluations are under way. If one fails, wait for all and raise the first failure."""
        failure: Exception | None = None
        while len(self._asked) > (leave if failure is None else 0):
            try:
                self._finished.append(self._next())
            except Exception as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def _next(self) -> tuple[Any, list[Row]]:
        """Wait for the rows of the oldest evaluation."""
        assert self._child is not None
        about = self._asked[0]
        self._child.ready(None)  # an interruption here changes nothing
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
        except BaseException:  # an answer was read only in part
            self.close()
            raise
        self._asked.popleft()
        for row in rows:
            row["normalized"] = self.normalized(row["return"]) if self.normalized else None
        return about, rows

    def close(self) -> None:
        """End the process, and with it an evaluation under way."""
        if self._child is not None:
            self._child.close()
        self._child = None
        self._asked.clear()


def _on_host(leaf: Any) -> Any:
    """Return an array in host memory; random keys are sent as they are."""
    return leaf if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key) else np.asarray(leaf)


class _Player:
    """The evaluator in the process, and the structure of the agents that it plays."""

    def __init__(self, settings: bytes) -> None:
        self._settings = settings
        self.evaluator: Evaluator | None = None
        self._structure: Any = None

    def play(self, request: bytes) -> list[Row]:
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
    """Run the evaluation process: play one evaluation after the other until the parent is gone."""
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
    """Receive requests while an evaluation is played; end the process when the parent is gone."""
    with suppress(EOFError, OSError):
        while True:
            inbox.put(connection.recv_bytes())
    inbox.put(None)
    inbox.put(None)
    time.sleep(GIVE_UP_S)
    os._exit(1)
