"""The machine of a robot: it acts, keeps it safe and records, while a learner elsewhere trains the policy.

`o2o learner` trains a run as `o2o train` does, but for the environment: its transitions come from here. The loop here
never waits for the learner. A thread sends what was recorded and brings the newest parameters (`o2o.train.link`).
"""

import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from o2o import envs
from o2o.closing import Closing
from o2o.config import RunConfig
from o2o.data.datasets import Dataset
from o2o.errors import ConfigError, DivergenceError, RunError, TrustError
from o2o.keys import seed_keys
from o2o.policies.base import BasePolicy
from o2o.replay.source import Sampling
from o2o.rl.chunks import outdated
from o2o.runs import opened
from o2o.runs.folder import StopFlag
from o2o.runs.session import base_of, env_maker, settings_of
from o2o.settings import Count, checked
from o2o.train import programs
from o2o.train.collect import Fleet
from o2o.train.feed import unpacked_agents
from o2o.train.link import Link, Row, address_of, shared_key
from o2o.train.spool import Spool
from o2o.train.state import RunState

_log = logging.getLogger(__name__)

SWITCH_S = 0.0005
"""Seconds for which the thread of the link may keep Python from the control loop: ten times less than Python's own."""
FLUSH_S = 10.0
"""Seconds at the end in which the rest is sent."""
Lost = Literal["finish", "stop", "go-on"]


@dataclass(frozen=True)
class Acted:
    """What an actor has done."""

    episodes: int
    """Episodes that ended."""
    transitions: int
    waiting: int
    """Transitions that the learner has not received; they lie in the spool folder."""


class Acting:
    """The newest agent that was sent, in one environment, as in training."""

    def __init__(self, settings: RunConfig, data: Dataset, seed: int, begun: int) -> None:
        """Draw from `seed`; `begun` actions were drawn from it before."""
        self._shapes = opened.shapes_of(settings, data, online=True)
        self._keys, self._chosen = seed_keys(seed, 1), begun
        self._sampling, self._width = Sampling(settings.config.batch_size), data.arrays["actions"].shape[-1]
        self._state: RunState | None = None
        self._random = False

    def unpack(self, message: bytes) -> tuple[RunState, bool]:
        """Return an agent that was sent, and whether random actions are asked for instead of its own."""
        agents, normalizer, about = unpacked_agents(message, self._shapes)
        return jax.block_until_ready(RunState(agents, normalizer)), about["random"] > 0

    def take(self, unpacked: tuple[RunState, bool]) -> None:
        """Act with this agent from now on; what is remembered of the episode stays."""
        state, self._random = unpacked
        if self._state is None:
            state.carry = jax.vmap(lambda agent: agent.initial_carry((1,)))(state.agent)
        else:
            state.carry = self._state.carry
        self._state = state

    def warm_up(self, observations: Any) -> None:
        """Compile what acts, before a robot waits for it; `observations` `[1, ...]` may be any."""
        for random in {self._random, False}:
            self._act(observations, np.ones(1, bool), random)

    def __call__(self, observations: Any, ended: np.ndarray, intervened: np.ndarray) -> np.ndarray:
        """Return the actions `[1, A]` for `observations` `[1, ...]`; the two `[1]` are those of the step before.

        Raises `DivergenceError` if an action is not finite.
        """
        assert self._state is not None
        actions = self._act(observations, outdated(self._state.carry, ended, intervened), self._random)
        if not np.isfinite(actions).all():
            raise DivergenceError("the action of the learner's policy is not finite: the learner diverged")
        return actions

    def _act(self, observations: Any, over: np.ndarray, random: bool) -> np.ndarray:
        state = self._state
        assert state is not None
        seen = jax.tree.map(lambda leaf: leaf[None], observations)
        state.agent, _, state.carry, actions, _ = programs.learn_and_act(
            state.agent, {}, state.carry, None, state.normalizer, self._keys, 0, seen, over[None], self._chosen,
            sampling=self._sampling, action_dim=self._width, random=random,
        )  # fmt: skip
        self._chosen += 1
        return np.asarray(actions)[0]


@checked
def act(
    env: str,
    learner: str,
    spool: Path = Path("spool"),
    lost: Lost = "finish",
    episodes: Count | None = None,
    env_kwargs: tuple[str, ...] = (),
    episode_limit: Count | None = None,
    base: str | None = None,
    progress: Callable[[int, dict[str, Any]], None] = lambda episode, row: None,
) -> Acted:
    """Act in an environment for the learner at HOST:PORT until it has finished, or for so many `episodes`.

    Every transition is in the folder `spool` before the next action, and stays until the learner has saved it; a later
    call with the same folder sends the rest. `lost`: what to do while no learner answers. `base`: where the learner's
    base policy lies on this machine. `progress(episode, row)` is called at the end of each episode.

    Raises `RunError` if nobody answers at first, if the learner has another version of o2o or trains another run,
    `ConfigError` for another base than the learner's, `EnvironmentMismatchError` for other spaces, and what the
    environment raises.
    """
    address = address_of(learner)
    with Closing() as closing, StopFlag() as stop:
        closing.callback(partial(sys.setswitchinterval, sys.getswitchinterval()))
        sys.setswitchinterval(SWITCH_S)
        kept = Spool(spool)
        closing.callback(kept.close)
        link = Link(address, shared_key(address[0]), kept)
        closing.callback(link.close)
        welcome = link.connect()
        if ":" in str(agent := welcome["settings"].get("agent")):  # before it is imported
            raise TrustError(f"the learner's agent is code ({agent}), which an actor does not run")
        settings = settings_of(welcome["settings"], f"the learner at {learner}")
        data = Dataset.from_json(welcome["dataset"]["dataset"], spool)
        here = replace(settings, env=env, env_kwargs=env_kwargs, episode_limit=episode_limit or settings.episode_limit)
        _ = envs.specification(env)  # which imports the module that registers it
        task = envs.run_task(data.info, env, settings.task.binary, here.environment_arguments())
        data = replace(data, task=replace(data.task, env_kwargs=task.env_kwargs))
        robot = env_maker(here, data, _base(settings, base, welcome.get("base")))(False)
        closing.callback(robot.close)
        newest = Row.unpacked("", kept.last, kept.read(kept.last - 1, 1)[0]) if kept.last else None
        begin = 0 if newest is None else newest.episode + 1
        seed = int(kept.about["actor"][:7], 16) + begin
        acting = Acting(here, data, seed, kept.last)
        link.read = acting.unpack
        link.start()
        if not _wait(lambda: link.parameters is not None, link, stop):
            return Acted(0, 0, kept.last - link.received)
        acting.take(link.taken())
        acting.warm_up(
            jax.tree.map(lambda leaf: np.zeros((1, *leaf.shape[1:]), leaf.dtype), data.arrays["observations"])
        )
        return _play(lambda _: robot, seed, begin, acting, link, stop, lost, episodes, progress)


def _base(settings: RunConfig, here: str | None, fingerprint: str | None) -> BasePolicy | None:
    """Return the base policy that lies `here`, which must be the learner's; None if the agent takes none."""
    theirs = settings.base
    if theirs is not None and here is None:
        raise ConfigError(f"the learner's agent corrects a base policy ({theirs}): give a copy of it with `base`")
    found = base_of(replace(settings, base=here))
    if found is not None and found.fingerprint != fingerprint:
        raise ConfigError(f"base {here} is another policy than the learner's ({theirs}): copy that to this machine")
    return found


def _wait(ready: Callable[[], bool], link: Link, stop: Callable[[], bool]) -> bool:
    """Wait until `ready`; False if there is nothing to wait for any more. Raises `RunError` if the actor is refused."""
    while not ready():
        if link.refused is not None:
            raise RunError(link.refused)
        if stop() or link.finished:
            return False
        time.sleep(0.02)
    return True


def _play(
    env_fn: Callable[[bool], Any],
    seed: int,
    begin: int,
    acting: Acting,
    link: Link,
    stop: Callable[[], bool],
    lost: Lost,
    episodes: int | None,
    progress: Callable[[int, dict[str, Any]], None],
) -> Acted:
    """Play from episode `begin` on."""
    fleet, step, done, before = Fleet(env_fn, seed, 1), 0, 0, link.spool.last
    slot, results = fleet.slots[0], list[dict[str, Any]]()
    ended, intervened = np.ones(1, bool), np.zeros(1, bool)
    try:
        while (episodes is None or done < episodes) and not (stop() or link.finished):
            if link.refused is not None:
                raise RunError(link.refused)
            if not link.connected and (lost == "stop" or (lost == "finish" and step == 0)):
                _log.info("the robot waits for the learner")
                fleet.hold()
                if not _wait(lambda: link.connected, link, stop):
                    break
                fleet.begin_anew()
                ended, step = np.ones(1, bool), 0
            if link.parameters is not None:
                acting.take(link.taken())
            actions, episode = acting(fleet.observations, ended, intervened), begin + slot.episode
            rows, ended = fleet.step(actions, lambda _, row: results.append(row))
            intervened = fleet.intervened
            result = results.pop() if results else None
            link.spool.append(Row("", 0, episode, step, rows, result, bool(intervened[0])).packed())
            step += 1
            if result is not None:
                done, step = done + 1, 0
                progress(episode, result)
    finally:  # whatever ends it; sending the rest takes a while
        fleet.hold()
    link.close(FLUSH_S)
    return Acted(done, link.spool.last - before, max(link.spool.last - link.received, 0))
