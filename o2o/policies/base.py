"""Base policies for agents that correct one: a run, a Python controller, an exported file.

They act on the host, in the environment's own units, and are never trained here. `o2o.policies.source` calls them.
"""

import copy
import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from o2o.data.datasets import Dataset
from o2o.data.history import History, join, past
from o2o.data.normalizer import Normalizer, normalize
from o2o.data.spaces import ActionMap, ObservationSpec, with_base_action
from o2o.errors import BaseFaultError, ConfigError, DivergenceError, EnvironmentMismatchError
from o2o.policies.exported import FILES, load_file
from o2o.policies.source import Base, Policy, Source, base_labels, episode_actions, first_bad, with_base_labels
from o2o.rl.chunks import ActionQueue
from o2o.types import Array, Carry
from o2o.user_code import import_module, run_file

__all__ = ["Base", "BaseFaultError", "Policy", "Source", "base_labels", "load_base", "with_base_labels"]

EPISODES_AT_ONCE = 64
"""Dataset episodes that a run of ours labels side by side."""


def load_base(spec: Any, member: int = 0, sample: bool = False) -> Source:
    """Return the base policy of a run folder, a `.onnx` or TorchScript `.pt` file, `module:name`, or a callable.

    A callable maps the environment's own observation (float32; entries that o2o leaves out are not there) to its own
    action `[*shape]`, or to a chunk `[H, *shape]`. A class, or a function that needs no argument, makes such a
    controller, or an object with `act`; its `reset(seed)` or `reset()`, if any, is called in every episode, and its
    `interrupt()`, if any, after a step that a human took over. `member`
    is the seed of a run to take; `sample` draws from its policy instead of taking the mode. Raises `ConfigError`,
    `RunError` or `CheckpointError`.
    """
    if callable(spec) or hasattr(spec, "act"):
        return FunctionSource(getattr(spec, "__name__", type(spec).__name__), None, target=spec)
    path, text = Path(str(spec)), str(spec)
    if path.suffix in FILES and ":" not in text:
        return load_file(path)
    if path.is_dir():
        return run_source(path, member, sample)
    if ":" in text:
        return FunctionSource(text, None, target=_named(text))
    raise ConfigError(
        f"base {spec!r} is none that o2o knows: give a run folder, a .onnx or .pt file, or module:function"
    )


def _named(text: str) -> Any:
    """Return the object of `module:name` or `path/file.py:name`; modules of the working folder are found too."""
    where, _, name = text.rpartition(":")
    try:
        module = run_file(Path(where)) if where.endswith(".py") else import_module(where)
    except ConfigError as error:
        raise ConfigError(f"base {text!r}: {error}") from error
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found) and not hasattr(found, "act"):
        raise ConfigError(f"base {text!r}: {where} has no callable {name!r}")
    return found


@dataclass(frozen=True, eq=False)
class FunctionSource(Source):
    """A Python controller."""

    target: Any

    def policy(self, data: Dataset) -> Policy:
        """Return the function itself, or a controller of its own; raises `ConfigError` if there is none to be had."""
        controller = self.target
        if inspect.isclass(controller) or (not hasattr(controller, "reset") and _needs_nothing(controller)):
            controller = controller()
        elif hasattr(controller, "reset"):
            try:
                controller = copy.deepcopy(controller)
            except Exception as error:
                raise ConfigError(
                    f"base {self.name} cannot be copied ({type(error).__name__}: {error}), and each environment needs "
                    "one of its own: give a class, or a function that makes it"
                ) from error
        act = getattr(controller, "act", controller)
        if not callable(act):
            raise ConfigError(f"base {self.name} made {controller!r}, which can neither be called nor has `act`")
        begin, interrupt = (getattr(controller, name, None) for name in ("reset", "interrupt"))
        return FunctionPolicy(act, begin, interrupt, data.observation_spec)


def _needs_nothing(function: Any) -> bool:
    """Whether a callable can be called without an argument only: it makes the controller."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return not any(p.kind in (*positional, inspect.Parameter.VAR_POSITIONAL) for p in parameters)


@dataclass
class FunctionPolicy:
    """A Python controller at work."""

    function: Callable[[Any], Any]
    on_reset: Callable[..., Any] | None
    on_interrupt: Callable[[], Any] | None
    spec: ObservationSpec

    def reset(self, seed: int) -> None:
        """Call the controller's `reset(seed)`, or its `reset()` if it takes no argument."""
        if self.on_reset is not None:
            self.on_reset(*(() if _needs_nothing(self.on_reset) else (seed,)))

    def interrupt(self) -> None:
        """Call the controller's `interrupt()`."""
        if self.on_interrupt is not None:
            self.on_interrupt()

    def act(self, observation: Any) -> Any:
        """Ask the controller."""
        return self.function(self.spec.unflatten(observation))


@partial(jax.jit, static_argnames="deterministic")
def _act(
    agent: Any, normalizer: Normalizer | None, observations: Any, carry: Carry, rng: Array, deterministic: bool
) -> tuple[Array, Carry]:
    """Return actions `[n, A]` and carries of one agent for observations `[n, D]`."""
    return agent.sample_actions(normalize(normalizer, observations), carry, rng, deterministic)


@dataclass(frozen=True, eq=False)
class RunSource(Source):
    """A run of ours: one of its agents, which acts as it does in its own run."""

    agent: Any
    normalizer: Normalizer | None
    data: Dataset = field(repr=False)
    """The world it was trained in, without its rows."""
    history: int
    deterministic: bool
    inner: Source | None
    """The base that it corrects itself."""

    def check(self, data: Dataset) -> None:
        """Compare observations and action space with those it was trained on."""
        if self.data.observation_spec != data.observation_spec:
            raise EnvironmentMismatchError(
                f"base {self.name} was trained on observations {self.data.observation_spec}, here they are "
                f"{data.observation_spec}; use a base of this environment (and the same achieved_goal)"
            )
        theirs, ours = (ActionMap.from_space(d.info.action_space) for d in (self.data, data))
        if theirs != ours:
            raise EnvironmentMismatchError(
                f"base {self.name} was trained with the action space {self.data.info.action_space}, this environment "
                f"has {data.info.action_space}; use a base of this environment"
            )

    def policy(self, data: Dataset) -> Policy:
        """Return a copy with a queue of its own; the parameters are shared."""
        return RunPolicy(self)

    def see(self, observation: Any, base_action: Any) -> Any:
        """Return what the agent takes: observations `[..., D]` with their history, and its base's action."""
        return observation if self.inner is None else with_base_action(observation, base_action)

    def actions(self, data: Dataset, episodes: list[Any]) -> list[np.ndarray]:
        """Return its actions in whole episodes, many side by side in one call per step."""
        below: list[Any] = [None] * len(episodes)
        if self.inner is not None:
            raw = episode_actions(self.inner, self.data, episodes)
            below = [self.data.action_map.from_env(actions) for actions in raw]
        seen = [self.see(joined(e, self.history), b) for e, b in zip(episodes, below, strict=True)]
        lengths = [len(jax.tree.leaves(episode)[0]) for episode in seen]
        found: list[Any] = [None] * len(seen)
        order = sorted(range(len(seen)), key=lambda number: lengths[number])
        for first in range(0, len(order), EPISODES_AT_ONCE):
            block = order[first : first + EPISODES_AT_ONCE]
            for number, actions in zip(block, self._side_by_side([seen[n] for n in block]), strict=True):
                found[number] = self.data.action_map.to_env(actions[: lengths[number]])
        return found

    def _side_by_side(self, episodes: list[Any]) -> np.ndarray:
        """Return actions `[n, T, A]` for n episodes; the shorter ones go on at their last observation."""
        longest = max(len(jax.tree.leaves(episode)[0]) for episode in episodes)
        carry, key, actions = self.agent.initial_carry((len(episodes),)), jax.random.key(0), []
        for t in range(longest):
            now = [jax.tree.map(lambda leaf, t=t: leaf[min(t, len(leaf) - 1)], episode) for episode in episodes]
            rows = jax.tree.map(lambda *leaves: np.stack(leaves), *now)
            step, carry = _act(self.agent, self.normalizer, rows, carry, jax.random.fold_in(key, t), self.deterministic)
            actions.append(np.asarray(step))
        return np.stack(actions, axis=1)


def joined(episode: Any, history: int) -> Any:
    """Return an episode `[T, ...]` with every observation joined to those before it, as `History` does."""
    return join(past(episode, np.arange(len(jax.tree.leaves(episode)[0])), 0, history))


class RunPolicy:
    """An agent of ours at work: one call to the device per action, or per chunk where it plays chunks."""

    def __init__(self, source: RunSource) -> None:
        """Act with the agent of `source`."""
        self._source, self._agent = source, source.agent
        self._inner = None if source.inner is None else Base(source.inner, source.data)
        self.reset(0)

    def reset(self, seed: int) -> None:
        """Begin an episode with empty queues."""
        self._key, self._calls, self._rest = jax.random.key(seed), 0, []
        self._carry, self._history = self._agent.initial_carry((1,)), None
        if self._inner is not None:
            self._inner.reset(seed)

    def interrupt(self) -> None:
        """Empty the queues, its base's too."""
        self._rest = []
        if self._inner is not None:
            self._inner.interrupt()

    def act(self, observation: Any) -> np.ndarray:
        """Return the action `[*shape]` for an observation `[D]`; raises `DivergenceError` if it is not finite."""
        source = self._source
        if self._history is None:
            self._history = History(source.history)
            seen = self._history.reset(observation)
        else:
            seen = self._history.push(observation)
        seen = source.see(seen, None if self._inner is None else self._inner.act(observation))
        if not self._rest:
            self._ask(seen)
        return source.data.action_map.to_env(self._rest.pop(0))

    def _ask(self, seen: Any) -> None:
        """Fill `_rest` with the next action and, of a queue, all that stand behind it.

        Raises `DivergenceError` if one is not finite.
        """
        rows = jax.tree.map(lambda leaf: np.asarray(leaf)[None], seen)
        rng = jax.random.fold_in(self._key, self._calls)
        source = self._source
        action, carry = _act(self._agent, source.normalizer, rows, self._carry, rng, source.deterministic)
        self._calls += 1
        actions = np.asarray(action)
        if isinstance(carry, ActionQueue):
            queue, left = jax.device_get(carry)
            actions = np.concatenate([actions, queue[0, : int(left[0])]])
            carry = self._agent.initial_carry((1,))
        if (bad := first_bad(actions)) is not None:
            raise DivergenceError(
                f"the policy of {source.name} has {bad} in its action: its learner diverged; take an earlier "
                "checkpoint, or train again with a lower learning rate"
            )
        self._carry, self._rest = carry, list(actions)


def run_source(path: Path, member: int, sample: bool = False, which: str = "latest") -> RunSource:
    """Return one of a run's agents, at checkpoint `which` (`o2o.runs.session.open_run`), as a policy."""
    from o2o.runs import session

    config, trainer = session.open_run(path, which)
    trainer.close()
    if not 0 <= member < trainer.seeds:
        raise ConfigError(f"base_member is {member}; run {path} has {trainer.seeds} seed(s), numbered from 0")
    agent = trainer.agent_of(member)
    inner = session.base_of(config)
    parts = [agent.config, sample, config.history, trainer.data.action_map, inner and inner.fingerprint]
    digest = hashlib.sha256(repr(parts).encode())
    for leaf in jax.tree.leaves((agent, trainer.normalizer)):
        raw = jax.random.key_data(leaf) if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        digest.update(np.ascontiguousarray(raw).tobytes())
    known = inner is None or inner.fingerprint is not None
    return RunSource(
        name=str(path), fingerprint=digest.hexdigest() if known else None, agent=agent, normalizer=trainer.normalizer,
        data=trainer.data.without_rows(), history=config.history, deterministic=not sample, inner=inner,
    )  # fmt: skip
