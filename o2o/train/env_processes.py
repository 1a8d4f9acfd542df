"""Training environments in processes of their own (`LoopConfig.env_processes`).

The processes hold environments only. The training process keeps the episodes under way in them (`o2o.train.collect`),
as it does for its own environments. Resets and single steps (a resume plays episodes again) are messages. A step of all
environments goes through shared memory, with one signal each way. Of a step's `info` only `executed_action`,
`intervened`, `raw_reward` and `success` come back. The processes import JAX only if making their environments does.
"""

import math
import pickle
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from mmap import mmap
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from o2o.errors import ConfigError, EnvironmentMismatchError
from o2o.train.processes import Child, Memory, answer, end, loaded, packed

STEP = b"step"
LINE = 64
"""Bytes of a cache line; every array begins at a multiple of it."""
INSTEAD = "set loop.env_processes to 0"
Outcome = tuple[Any, float, bool, bool, dict[str, Any]]
"""What `gymnasium.Env.step` returns."""


def _leaves(observation: Any) -> list[np.ndarray]:
    """Return the arrays of an observation, dicts (by key) and tuples of them too."""
    if isinstance(observation, dict):
        return [leaf for key in sorted(observation) for leaf in _leaves(observation[key])]
    if isinstance(observation, tuple | list):
        return [leaf for entry in observation for leaf in _leaves(entry)]
    return [np.asarray(observation)]


def _rebuilt(example: Any, leaves: list[Any]) -> Any:
    """Undo `_leaves` for an observation built like `example`, taking from the front of `leaves`."""
    if isinstance(example, dict):
        return {key: _rebuilt(example[key], leaves) for key in sorted(example)}
    if isinstance(example, tuple | list):
        return type(example)([_rebuilt(entry, leaves) for entry in example])
    return leaves.pop(0)


def _told(observation: Any, reward: Any, terminated: Any, truncated: Any, info: dict[str, Any], action: Any) -> Outcome:
    """Return what comes back of a step, as plain types."""
    success = info.get("success")
    told = {
        "executed_action": np.asarray(info.get("executed_action", action), np.float32),
        "intervened": bool(info.get("intervened", False)),
        "raw_reward": float(info.get("raw_reward", reward)),
        "success": None if success is None else bool(success),
    }
    return observation, float(reward), bool(terminated), bool(truncated), told


class Layout(NamedTuple):
    """What the shared memory of one process holds."""

    envs: int
    """Environments."""
    action: tuple[int, ...]
    leaves: tuple[tuple[tuple[int, ...], str], ...]
    """Shape and type of every entry of an observation."""

    @property
    def size(self) -> int:
        """Return the number of bytes of a `Board` with this layout."""
        entries = sum(np.dtype(kind).itemsize * math.prod(shape) for shape, kind in self.leaves)
        return self.envs * (8 * 6 + 2 * 4 * math.prod(self.action) + entries) + LINE * (4 + len(self.leaves))


class Board:
    """The shared memory of one process, as arrays `[count, ...]`."""

    def __init__(self, memory: mmap, layout: Layout) -> None:
        """Place the arrays in the memory."""
        self._memory, self._at, self._count = memory, 0, layout.envs
        self.numbers = self._take((2,), "f8")
        """Reward and raw reward."""
        self.flags = self._take((4,), "i8")
        """Terminated, truncated, success (-1 if unknown), intervened."""
        self.actions, self.executed = self._take(layout.action, "f4"), self._take(layout.action, "f4")
        self.observations = [self._take(shape, kind) for shape, kind in layout.leaves]

    def _take(self, shape: tuple[int, ...], kind: str) -> np.ndarray:
        array = np.ndarray((self._count, *shape), kind, self._memory, self._at)
        self._at += -(-array.nbytes // LINE) * LINE
        return array

    def write(self, index: int, outcome: Outcome) -> None:
        """Put down the outcome of one environment's step."""
        observation, reward, terminated, truncated, info = outcome
        self.numbers[index] = reward, info["raw_reward"]
        success = info["success"]
        self.flags[index] = terminated, truncated, -1 if success is None else success, info["intervened"]
        self.executed[index] = info["executed_action"]
        found = _leaves(observation)
        for place, leaf in zip(self.observations, found, strict=True):
            if place.shape[1:] != leaf.shape or place.dtype != leaf.dtype:
                raise EnvironmentMismatchError(
                    f"an observation has an entry of shape {leaf.shape} and type {leaf.dtype}, at the reset it was "
                    f"{place.shape[1:]} and {place.dtype}; let the environment keep to one"
                )
            place[index] = leaf

    def read(self, index: int, example: Any) -> Outcome:
        """Return the outcome of one environment's step; the observation, built like `example`, is a copy."""
        reward, raw = self.numbers[index].tolist()
        terminated, truncated, success, intervened = self.flags[index].tolist()
        info = {
            "executed_action": self.executed[index].copy(),
            "intervened": bool(intervened),
            "raw_reward": raw,
            "success": None if success < 0 else bool(success),
        }
        observation = _rebuilt(example, [np.array(place[index]) for place in self.observations])
        return observation, reward, bool(terminated), bool(truncated), info


class _Bench:
    """What one process does: its environments and their board."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.envs: list[gymnasium.Env] = []
        self.board: Board | None = None

    def make(self, maker: bytes, count: int) -> list[dict[str, Any]]:
        env_fn = loaded(maker, "env_fn", INSTEAD)
        for _ in range(count):
            self.envs.append(env_fn(False))
        return [
            {
                "action_space": env.action_space,
                "observation_space": env.observation_space,
                "metadata": {"replayable": env.metadata.get("replayable", True)},
                "named": env.has_wrapper_attr("name_episode"),
            }
            for env in self.envs
        ]

    def lay_out(self, layout: Layout) -> None:
        self.board = Board(mmap(self.fd, layout.size), layout)

    def reset(self, orders: list[tuple[int, int | None, Any]]) -> list[Any]:
        observations = []
        for index, seed, name in orders:
            if name is not None:
                self.envs[index].get_wrapper_attr("name_episode")(name)
            observations.append(self.envs[index].reset(seed=seed)[0])
        return observations

    def step(self, index: int, action: np.ndarray) -> Outcome:
        return _told(*self.envs[index].step(action), action)

    def step_all(self) -> None:
        assert self.board is not None
        for index in range(len(self.envs)):
            self.board.write(index, self.step(index, self.board.actions[index].copy()))


def serve(connection: Connection, fd: int) -> None:
    """Run a process of environments: answer orders until the parent is gone."""
    bench = _Bench(fd)
    with suppress(EOFError, OSError):
        while True:
            order = connection.recv_bytes()
            if order == STEP:
                answer(connection, bench.step_all)
            else:
                name, arguments = pickle.loads(order)
                answer(connection, partial(getattr(bench, name), *arguments))
    try:
        with ExitStack() as closing:
            for env in bench.envs:
                closing.callback(env.close)
    except Exception as error:  # the parent is gone: only standard error is left
        print(f"o2o: {error}", file=sys.stderr)


class RemoteEnv(gymnasium.Env):
    """An environment in another process; `Crew` steps all environments at once."""

    def __init__(self, child: Child, index: int, action_space: Any, observation_space: Any, metadata: Any, named: bool):
        """Represent environment `index` of `child`."""
        self.child, self.index = child, index
        self.action_space, self.observation_space, self.metadata = action_space, observation_space, metadata
        self._named, self.name = named, None

    def has_wrapper_attr(self, name: str) -> bool:
        """Return whether the environment there takes names of episodes; other names: of this wrapper."""
        return self._named if name == "name_episode" else super().has_wrapper_attr(name)

    def name_episode(self, name: tuple[int, ...]) -> None:
        """Name the episode that the next reset begins."""
        self.name = name

    def order(self, seed: int | None) -> tuple[int, int | None, Any]:
        """Return the message for the next reset."""
        name, self.name = self.name, None
        return self.index, seed, name

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset the environment there."""
        self.child.ask(("reset", ([self.order(seed)],)))
        return self.child.receive()[0], {}

    def step(self, action: Any) -> Outcome:
        """Step only this environment there."""
        self.child.ask(("step", (self.index, np.asarray(action))))
        return self.child.receive()


class Crew:
    """`count` environments in `processes` processes; each process holds a range of consecutive ones."""

    def __init__(self, env_fn: Callable[[bool], gymnasium.Env], count: int, processes: int) -> None:
        """Start the processes and make the environments, in all processes at the same time.

        Raises `ConfigError` if `processes` is below 1 or `env_fn` cannot be pickled.
        """
        if processes < 1:
            raise ConfigError(f"env_processes is {processes}; expected 0 for none, or more")
        maker = packed(env_fn, "env_fn", INSTEAD)
        self.shares = [part.tolist() for part in np.array_split(np.arange(count), min(processes, count))]
        self.children: list[Child] = []
        self._memories = [Memory() for _ in self.shares]
        self._boards: list[Board] = []
        try:
            for share, memory in zip(self.shares, self._memories, strict=True):
                what = f"the process of training environments {share[0]} to {share[-1]}"
                self.children.append(Child("o2o.train.env_processes:serve", what, memory.fd))
                self.children[-1].ask(("make", (maker, len(share))))
            made = [child.receive() for child in self.children]
        except BaseException:
            self.close()
            raise
        self.envs = [
            RemoteEnv(child, i, **about)
            for child, abouts in zip(self.children, made, strict=True)
            for i, about in enumerate(abouts)
        ]
        self._examples: list[Any] = [None] * count

    def reset(self, seeds: dict[int, int]) -> dict[int, Any]:
        """Reset environments (number -> seed) in all processes at once; return number -> first observation."""
        wanted = [[n for n in share if n in seeds] for share in self.shares]
        asked = [(child, numbers) for child, numbers in zip(self.children, wanted, strict=True) if numbers]
        for child, numbers in asked:
            child.ask(("reset", ([self.envs[n].order(seeds[n]) for n in numbers],)))
        answers = self._receive([child for child, _ in asked])
        found: dict[int, Any] = {}
        for (_, numbers), observations in zip(asked, answers, strict=True):
            found |= dict(zip(numbers, observations, strict=True))
        for number, observation in found.items():
            self._examples[number] = observation
        return found

    def send(self, actions: np.ndarray) -> None:
        """Start a step of all environments with `actions` `[count, A]`."""
        if not self._boards:
            self._lay_out(actions.shape[1:])
        for child, share, board in zip(self.children, self.shares, self._boards, strict=True):
            board.actions[...] = actions[share[0] : share[-1] + 1]
            child.ask(STEP)

    def receive(self) -> list[Outcome]:
        """Wait for the step that `send` started and return one outcome per environment; raise the first failure."""
        self._receive(self.children)
        boards = zip(self.shares, self._boards, strict=True)
        return [board.read(i, self._examples[n]) for share, board in boards for i, n in enumerate(share)]

    def _receive(self, children: Sequence[Child]) -> list[Any]:
        """Wait for the answers of all and return them; raise the first failure when all have answered."""
        answers, failure = [], None
        for child in children:
            try:
                answers.append(child.receive())
            except Exception as error:
                failure = failure or error
        if failure is not None:
            raise failure
        return answers

    def _lay_out(self, action: tuple[int, ...]) -> None:
        """Divide the shared memory by the shapes of the first observations."""
        for child, share, memory in zip(self.children, self.shares, self._memories, strict=True):
            leaves = tuple((leaf.shape, leaf.dtype.str) for leaf in _leaves(self._examples[share[0]]))
            layout = Layout(len(share), action, leaves)
            self._boards.append(Board(memory.mapped(layout.size), layout))
            child.ask(("lay_out", (layout,)))
        self._receive(self.children)

    def close(self) -> None:
        """End all processes at the same time."""
        end(self.children)
        for memory in self._memories:
            memory.close()
