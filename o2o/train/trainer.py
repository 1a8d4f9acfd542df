"""Training, top to bottom: pre-training on a dataset, the switch, fine-tuning in the environments.

`Trainer` knows no agent by name. What differs between agents is read from their `needs`, `phases` and `config.online`.
Gradient steps (critic updates), environment steps and episodes are three counters. Environment steps are counted per
seed: five seeds of 1000 steps each stand at 1000.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from o2o.closing import Closing
from o2o.config import LoopConfig
from o2o.data.datasets import Dataset
from o2o.data.normalizer import Normalizer, normalized_rows
from o2o.errors import ConfigError, DivergenceError, EnvironmentFaultError
from o2o.keys import seed_keys
from o2o.nn.kernels import each_seed, seeds_in_turn
from o2o.nn.modules import where_leading
from o2o.replay.buffer import FOLLOWING, capacity_for, check_window, one_row
from o2o.replay.device import DeviceReplay, Returns
from o2o.replay.host import HostReplay
from o2o.replay.place import Place, Replay, bytes_of, row_bytes
from o2o.replay.rollout import Rollout
from o2o.replay.source import BatchSource, Sampling
from o2o.rl.chunks import outdated
from o2o.train import memory, programs
from o2o.train.collect import Fleet
from o2o.train.devices import Devices
from o2o.train.estimates import Estimator
from o2o.train.evaluation import EnvFn, Evaluator
from o2o.train.feed import Feed
from o2o.train.link import Hub
from o2o.train.remote_evaluation import evaluator_of
from o2o.train.simulated import ROOM, SIMULATED, Live, Simulated, batch_of, play_and_learn, steps_until
from o2o.train.state import Counters, Hooks, RunState, evaluation_steps
from o2o.types import Agent, AgentConfig, OnlineConfig, Phase

log = logging.getLogger("o2o")

ESTIMATES = 20
"""Estimates of a pre-training without environment, where the settings do not say how often."""


A = TypeVar("A", bound=Agent)


class Trainer(Generic[A]):
    """Pre-trains and fine-tunes `seeds` agents of one class side by side."""

    def __init__(
        self,
        agent_class: type[A],
        config: AgentConfig,
        data: Dataset,
        env_fn: EnvFn,
        *,
        seed: int = 0,
        seeds: int = 1,
        loop: LoopConfig | None = None,
        normalizer: Normalizer | None = None,
        hooks: Hooks | None = None,
        storage: Path | None = None,
        held: Dataset | None = None,
        hub: Hub | None = None,
    ) -> None:
        """Create the agents from `data`'s shapes; `env_fn(evaluation)` makes one environment.

        `data` and environments are raw: `normalizer` stands between them and the agents.
        Replay that is too large for the device is kept in the folder `storage`; None: in a temporary one.
        With `held`, episodes that are not in `data`, the agents are judged by estimates on those (`Estimator`), and
        pre-training makes no environment. With a `hub`, robots that step elsewhere send the online phase's transitions.
        Raises `ConfigError` for settings out of range and `DatasetError` if `data` lacks what the agent needs.
        """
        if seeds < 1 or seed < 0:
            raise ConfigError(f"seeds is {seeds} and seed {seed}; expected seeds >= 1 and seed >= 0")
        if config.online.replay == "rollout":
            config.online.check_rollout()
        if config.needs.priorities and (config.online.replay in ("rollout", "none") or config.online.initial_updates):
            raise ConfigError(
                f"online.replay is {config.online.replay!r} with {config.online.initial_updates} initial_updates; an "
                "agent with priorities needs 'online', 'mixed' or 'append' and no initial_updates"
            )
        self.config, self.data, self.env_fn, self.loop = config, data, env_fn, loop or LoopConfig()
        self.seed, self.seeds, self.hooks = seed, seeds, hooks or Hooks()
        rows = normalized_rows(normalizer, data.arrays)
        observations, actions = jax.tree.map(lambda leaf: np.asarray(leaf[:1]), (rows["observations"], rows["actions"]))
        create = partial(programs.create_agent, agent_class=agent_class, config=config)
        shapes = programs.create_agent.eval_shape(
            jax.random.key(seed), observations, actions, agent_class=agent_class, config=config
        )
        memory.refuse({"agents": seeds * memory.tree_bytes(shapes)}, memory.free_bytes())
        self.devices = Devices(self.loop.devices, seeds, config.batch_size)
        self.keys = self.devices.by_seed(seed_keys(seed, seeds))
        self.state = RunState(each_seed(lambda key: create(key, observations, actions), self.keys), normalizer)
        self.state.counters.episodes = [0] * seeds
        self.place = Place(self.loop.device_bytes, self.loop.replay_capacity, storage, slack=self.loop.checkpoint_every)
        sources = [(source.start, source.size, source.weight) for source in data.sources]
        self.replay: Replay | Rollout = self.place.dataset(rows, (*self.agent.needs.batch_keys, "ends"), sources, seeds)
        check_window(self.agent, self.replay.data.size, "the dataset")
        self.fleet: Fleet | Simulated | None = None
        """The training environments: stepped from here, or arrays that one program steps and learns from."""
        self._spread()
        self.feed = hub and Feed(
            hub,
            lambda: (self.agent, self.normalizer, self.counters.env_steps, self.online_config),
            lambda: self.hooks.should_stop(),
        )
        """Stands in place of environments of the run's own, where robots send transitions."""
        self._check_online()
        self._compiled = set[tuple[bool, bool]]()
        """Which online programs were called: with an update or without, with random actions or the policy's."""
        self._finished: dict[int, dict[str, Any]] = {}
        """Rows of the episodes that ended in the step under way, by index, where the agent is told of them."""
        if held is None:
            self.evaluator = evaluator_of(self.loop, env_fn, seeds, seed, self._normalized)
        else:
            self.evaluator = Estimator(held, self.agent, seeds, config.batch_size, normalizer)
            self.evaluator.phase = lambda: (
                None
                if self.counters.phase == "online"
                else phase_at(self.agent, self.counters.offline_total, self.counters.offline_steps)
            )
        self.evaluator.should_stop = lambda: self.hooks.should_stop()

    def __repr__(self) -> str:
        at = self.state.counters
        steps = f"{at.gradient_steps} updates, {at.env_steps} environment steps"
        return f"Trainer({type(self.agent).__name__}, {self.data.info.name}, seeds={self.seeds}, {at.phase}: {steps})"

    def _normalized(self, raw_return: float) -> float | None:
        score = self.data.info.normalized(raw_return, self.data.task)
        return None if score is None else float(score)

    def _spread(self) -> None:
        """Place everything that has a seed axis on the run's devices, and the rest on each of them."""
        by_seed, state = self.devices.by_seed, self.state
        state.agent, state.totals, state.carry = by_seed((state.agent, state.totals, state.carry))
        state.action, state.normalizer = by_seed(state.action), self.devices.everywhere(state.normalizer)
        self.replay.spread(self.devices.everywhere, by_seed)
        if isinstance(self.fleet, Simulated):
            self.fleet.worlds = by_seed(self.fleet.worlds)

    def forget_rows(self) -> None:
        """Let go of the dataset's rows as they were loaded: those that are learnt from are in `replay`."""
        self.data = self.data.without_rows()

    @property
    def agent(self) -> A:
        """The agents of all seeds, leaves `[S, ...]`."""
        return self.state.agent  # pyright: ignore[reportReturnType]  # the state holds any agent

    @property
    def counters(self) -> Counters:
        """Where the run stands."""
        return self.state.counters

    @property
    def normalizer(self) -> Normalizer | None:
        """What stands between raw observations and the agents."""
        return self.state.normalizer

    @property
    def online_config(self) -> OnlineConfig:
        """The schedule that the agent asks for."""
        return self.config.online

    @property
    def envs_per_seed(self) -> int:
        """Environments that are stepped together for each seed, N."""
        return self.online_config.num_envs

    def agent_of(self, index: int = 0) -> Any:
        """Return the agent of one seed, without the leading seed axis."""
        return jax.tree.map(lambda leaf: leaf[index], self.agent)

    def start_from(self, agent: Any, normalizer: Normalizer | None) -> None:
        """Take over agents `[S, ...]` that were pre-trained elsewhere, with the normaliser that they know."""
        self.state.agent, self.state.normalizer = agent, normalizer
        self._spread()

    def check_memory(self, online_steps: int) -> dict[str, int]:
        """Return the bytes that the run takes, by name; raises `ConfigError` if what is still to come cannot fit.

        `replay` is that of `online_steps`. What goes to the disk is not counted.
        """
        free, rows, online = memory.free_bytes(), self.replay.data.rows, self.online_config
        ring = 0
        if online_steps and online.replay not in ("none", "rollout") and isinstance(self.replay, DeviceReplay):
            appended = self.replay.data.size if online.replay == "append" else 0
            capacity = (capacity_for(online_steps, self.loop.replay_capacity) + appended) * self.seeds
            fits = row_bytes(rows) * capacity + bytes_of(rows) <= self.place.limit()
            ring = row_bytes(rows) * capacity if fits else 0
        one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), self.agent)
        batch = self.replay.batch_shapes(self._sampling())
        if self.counters.phase == "online" or online.replay == "rollout":
            update = 0  # of a run that goes on its replay's batches are known, and have fitted
        else:
            update = memory.update_bytes(one, batch, free or 2**62) * (1 if seeds_in_turn(self.agent) else self.seeds)
        memory.refuse({"replay": ring, f"an update with batch_size {self.config.batch_size}": update}, free)
        own = {"agents": memory.tree_bytes(self.agent), "dataset": bytes_of(rows)}
        return {**own, "replay": ring, "update": update}

    # Offline: gradient steps on the dataset, hundreds per dispatch

    def offline(self, steps: int) -> bool:
        """Pre-train until `steps` gradient steps; False if a stop was asked for before."""
        with self.devices():
            return self._offline(steps)

    def _offline(self, steps: int) -> bool:
        if not self._evaluate_again():
            return False
        counters = self.counters
        counters.offline_total = steps
        clock = Clock(counters)
        own = any((phase.update, phase.enter, phase.check) != (None,) * 3 for phase, _ in plan(self.agent, steps))
        if own and isinstance(self.replay, HostReplay):
            raise ConfigError("an agent that draws its own rows needs the dataset on the device: raise device_bytes")
        if not all(self._run_phase(phase, begin, steps, clock) for phase, begin in plan(self.agent, steps)):
            return False
        self.take_evaluations(wait=True)
        return True

    def _run_phase(self, phase: Phase, begin: int, steps: int, clock: "Clock") -> bool:
        """Run a phase of a pre-training of `steps` gradient steps, `begin` of them before it; False if stopped."""
        counters, loop, end, pace = self.counters, self.loop, begin + phase.steps, Pace()
        often = steps if isinstance(self.evaluator, Evaluator) else -(-steps // ESTIMATES)
        eval_every = loop.offline_eval_every or often
        if phase.note and counters.offline_steps < end:
            log.warning(phase.note)
        while counters.offline_steps < end:
            at = counters.offline_steps
            if at == begin:
                self._enter(phase)
            marks = [at - at % every + every for every in (eval_every, loop.log_every, loop.checkpoint_every)]
            if phase.check_every:
                marks.append(at + phase.check_every - (at - begin) % phase.check_every)
            self._offline_updates(phase, begin, min(min(end, *marks) - at, loop.updates_per_dispatch, pace.most), pace)
            at = counters.offline_steps
            if phase.check is not None and (at == end or (phase.check_every and (at - begin) % phase.check_every == 0)):
                self.state.agent = programs.check_phase(self.agent, self.replay.data, check=phase.check)
            clock.read()
            if at % loop.log_every == 0 or at == end:
                self._log()
            if at % eval_every == 0 or at == steps:
                self.evaluate(wait=False)
                clock.read()
            self.hooks.progress(phase.name, at, steps, {})
            stop = self.hooks.should_stop()
            self.take_evaluations(wait=stop or at == steps)
            if at % loop.checkpoint_every == 0 or at == steps or stop:
                self.hooks.checkpoint(self)
            if stop and (at < steps or self.broken_off()):
                return False
        return True

    def _enter(self, phase: Phase) -> None:
        """Get the agents ready for a phase, which has metrics of its own."""
        self.state.totals = {}
        if (enter := phase.enter) is not None:
            self.state.agent = each_seed(lambda agent: enter(agent, self.replay.data), self.agent)

    def _offline_updates(self, phase: Phase, begin: int, count: int, pace: "Pace") -> None:
        """Run `count` gradient steps of a phase; metrics stay on the device."""
        assert not isinstance(self.replay, Rollout)
        state, counters = self.state, self.counters
        sampling = Sampling(self.config.batch_size, window=self.agent.needs.window)
        state.totals = state.totals or self._zeros(phase)
        own = phase if phase.update is not None else None
        sources = self.replay.dataset(self.keys, counters.gradient_steps, count, sampling)
        self._updates(sources, count, pace, sampling=programs.OWN if own else sampling, phase=own, begin=begin)
        counters.offline_steps += count

    def _updates(self, sources: Iterator[tuple[BatchSource, int]], count: int, pace: "Pace", **static: Any) -> None:
        """Run `count` gradient steps on `sources`, pairs (source, steps on it)."""
        state, counters = self.state, self.counters
        for source, rest in sources:
            if rest < count:  # batches that were fetched: one in use, one in waiting, no more on the device
                jax.block_until_ready(state.totals)
            while rest:
                part = min(rest, pace.most)
                state.agent, state.totals = programs.updates(
                    state.agent, state.totals, source, self.keys, counters.gradient_steps, part, **static
                )
                counters.gradient_steps += part
                counters.unlogged_updates += part
                rest -= part
                pace.sent(part, state.totals)

    def _zeros(self, phase: Phase | None) -> Any:
        """Return zeros `[S]` for the sums of the metrics of a phase; None: of the online phase."""
        if phase is not None and phase.update is not None:
            return programs.zeros_of(
                programs.own_update, self.agent, self.replay.data, jnp.zeros(()), step=phase.update
            )
        shapes = self.replay.batch_shapes(self._sampling() if phase is None else self._sampling(utd_ratio=1))
        return programs.zeros_of(programs.update, self.agent, shapes)

    # The switch

    def begin_online(self, steps: int, kind: str | None = None, play: bool = True) -> bool:
        """Switch the agents to their online form, make room for what they will see, make and reset the environments.

        Does nothing if that was done. False if a stop was asked for while candidates were tried: nothing is changed.
        `kind`: "device", "host" or "rollout", as a checkpoint says; None: decide now, and try candidates first.
        `play` False creates no environments.
        """
        if self.counters.phase == "online":
            return True
        wanted = self.online_config
        agent = each_seed(programs.to_online, self.agent)
        keys = agent.needs.batch_keys
        assert not isinstance(self.replay, Rollout)
        appended = self.replay.data.size if wanted.replay == "append" else 0
        if wanted.replay != "rollout":
            check_window(agent, capacity_for(steps, self.loop.replay_capacity) + appended, "the replay buffer")
        if wanted.replay == "mixed":
            check_window(agent, self.replay.data.size, "the dataset")
        if kind is None and self.agent.candidates > 1:
            if not self._choose_candidates():
                return False
            agent = each_seed(programs.to_online, self.agent)
        if play and self.fleet is None:
            self._make_fleet(agent)
        if wanted.replay == "rollout":
            length = wanted.rollout_steps // wanted.num_envs
            before, self.replay = self.replay, Rollout(self.replay.data, self.seeds, length, wanted.num_envs)
            before.close()
        else:
            waits = "mc_returns" in keys
            returns = Returns(self.config.discount, self.data.task.failure_reward) if waits else None
            self.replay = self.place.online(self.replay, steps, appended, kind)
            self.replay.begin(keys, steps, wanted.replay, returns, agent.needs.priorities, self.envs_per_seed)
        self.state.agent, self.state.totals = agent, {}
        self.state.carry = jax.vmap(lambda a: a.initial_carry((self.envs_per_seed,)))(agent)
        self.counters.phase, self.counters.logged_at, self.counters.unlogged_updates = "online", 0, 0
        self._spread()
        return True

    def _choose_candidates(self) -> bool:
        """Evaluate the policies that the agent offers for the online phase; each seed's agent takes its best one.

        False, and nothing is chosen, if a stop was asked for before.
        """
        scores = np.zeros((self.agent.candidates, self.seeds))
        take = jax.jit(jax.vmap(lambda a, i: a.take_candidate(i)))
        for rank in range(self.agent.candidates):
            agent = take(self.agent, jnp.full(self.seeds, rank))  # acts by its mode, whatever deterministic_eval says
            rows = self.evaluator.until_stopped(agent, self.normalizer, self.counters.offline_steps)
            if rows is None:
                return False
            for seed in range(self.seeds):
                scores[rank, seed] = np.mean([row["score"] for row in rows if row["seed"] == seed])
        self.state.agent = take(self.agent, jnp.asarray(scores.argmax(axis=0)))
        return True

    def _check_online(self) -> None:
        """Raise `ConfigError` if the online phase cannot give what the agent needs there."""
        needs, online = jax.eval_shape(jax.vmap(programs.to_online), self.agent).needs, self.online_config
        if "mc_returns" in needs.batch_keys and online.replay == "append":
            raise ConfigError(
                "replay 'append' cannot wait for Monte-Carlo returns; use 'mixed' or 'online' with this agent"
            )
        rows_behind = needs.window > 1 or set(FOLLOWING) & set(needs.batch_keys)
        wrong = {
            "robots elsewhere send one": self.feed is not None,
            "Monte-Carlo returns need one": "mc_returns" in needs.batch_keys and online.replay != "rollout",
            "replay 'append' and windows of rows, or next actions, need one": online.replay == "append" and rows_behind,
        }
        if online.num_envs > 1 and any(wrong.values()):
            reason = next(reason for reason, holds in wrong.items() if holds)
            raise ConfigError(f"online.num_envs is {online.num_envs}, environments per seed, and {reason}: set it to 1")

    def _make_fleet(self, agent: Agent) -> Fleet | Simulated:
        """Make and reset the environments for the online form `agent`.

        Raises `EnvironmentMismatchError` if they do not fit the dataset.
        """
        fleet = self.feed or self._simulated_or_not(agent)
        self.fleet = fleet.must_fit(one_row(self.replay.data.rows), self.loop.eval_process)
        return self.fleet

    def _simulated_or_not(self, agent: Agent) -> Fleet | Simulated:
        """Return environments inside the program that learns, if they and what the agent needs allow it."""
        places = (self.seed, self.seeds, self.envs_per_seed, self.loop.env_processes)
        if self.loop.env_processes:
            return Fleet(self.env_fn, *places)
        first = self.env_fn(False)
        batch = batch_of(first)
        if batch is None or not self._fits_one_program(agent):
            return Fleet(self.env_fn, *places, first)
        first.close()
        return Simulated(batch, self.keys, self.envs_per_seed)

    def _fits_one_program(self, agent: Agent) -> bool:
        """Whether steps and updates can be one program: no host work in between, such as returns of whole episodes."""
        if self.online_config.replay == "rollout":
            return True
        waits = "mc_returns" in agent.needs.batch_keys
        return not waits and not self.loop.overlap and not isinstance(self.replay, HostReplay)

    # Online: one environment step, one update call, the next actions

    def online(self, steps: int) -> bool:
        """Warm up and fine-tune until `steps` environment steps per seed; False if a stop was asked for before.

        Called again for more steps than before, the replay grows.
        """
        with self.devices():
            return self._online(steps)

    def _online(self, steps: int) -> bool:
        if not self._evaluate_again():
            return False
        counters, loop = self.counters, self.loop
        if counters.phase == "offline" and counters.offline_steps == 0 and counters.asked_at is None:
            self.evaluate(wait=False)
        if self.broken_off() or not self.begin_online(steps):
            self.hooks.checkpoint(self)
            return False
        self.replay.grow(steps)
        self.put_back()
        clock, pace = Clock(counters), Pace()
        eval_steps = evaluation_steps(loop, self.online_config, steps)
        if self.state.action is None:
            self.choose_actions()
        at = counters.env_steps
        while at < steps:
            self._advance([*eval_steps, steps], pace)
            assert self.fleet is not None
            before, at = at, counters.env_steps
            clock.read()
            due = partial(_passed, before, at, steps)
            if due(loop.log_every):
                self._log()
            if any(before < point <= at for point in eval_steps):
                self.evaluate(wait=False)
            if due(20):
                self.hooks.progress(self.phase_name, at, steps, {})
            stop = self.hooks.should_stop()
            if stop or at >= steps:
                self.fleet.hold()
            self.take_evaluations(wait=stop or at >= steps)
            if due(loop.checkpoint_every) or stop:
                clock.read()
                self.fleet.pause()
                self.hooks.checkpoint(self)
            if stop and (at < steps or self.broken_off()):
                return False
        self.take_evaluations(wait=True)
        return True

    def _advance(self, marks: list[int], pace: "Pace") -> None:
        """Run one step or, inside a program, all up to what comes next: a log, a checkpoint or one of the `marks`."""
        self.put_back()
        if not isinstance(self.fleet, Simulated):
            self.step()
            return
        at, loop = self.counters.env_steps, self.loop
        coming = [at - at % often + often for often in (loop.log_every, loop.checkpoint_every)]
        coming += [mark for mark in marks if mark > at]
        self.simulated_steps(self.fleet, steps_until(min(coming), at, self.envs_per_seed), pace)

    def step(self) -> None:
        """Play the chosen actions, store what came of them, update if an update is due, choose the next actions."""
        assert isinstance(self.fleet, Fleet)
        state, counters, online = self.state, self.counters, self.online_config
        actions = self._finite_actions()
        rows, ended = self.fleet.step(actions.reshape(-1, actions.shape[-1]), self._episode_finished)
        over = outdated(state.carry, ended, self.fleet.intervened)
        calls = self._calls_due()
        if calls and online.initial_updates and not counters.online_updates:
            self.fleet.pause()
            self._initial_updates()
        self.replay.add(rows, self.normalizer)
        counters.env_steps += self.envs_per_seed
        state.action = None  # played; if choosing the next ones fails, a resume chooses them
        if ended.any() and self.agent.needs.episode_returns:
            self._tell_of_episodes(ended)
        for _ in range(calls - 1):
            self._learn()
            self._count_calls(1)
        self._learn_and_act(calls > 0, over)
        self._count_calls(min(calls, 1))
        self.replay.reveal(ended)

    def simulated_steps(self, fleet: Simulated, most: int, pace: "Pace") -> None:
        """Run up to `most` steps of all environments in one program, each as `step` does, and count what it did."""
        state, counters, online, per_seed = self.state, self.counters, self.online_config, self.envs_per_seed
        assert state.action is not None and not isinstance(self.replay, HostReplay)
        begin = counters.env_steps
        if online.initial_updates and not counters.online_updates:
            if self._calls_due():
                self._initial_updates()
            most = 1
        choosing = begin + per_seed  # at this environment step the first of the next actions are chosen
        random = choosing < online.random_steps
        if random:
            most = min(most, steps_until(online.random_steps, choosing, per_seed))
        count = min(most, ROOM, pace.most)
        self._finite_actions()
        live = Live(
            state.agent, state.totals or self._zeros(None), state.carry, state.action, fleet.worlds, self.replay.live()
        )
        live, told = play_and_learn(
            live, self.replay.offline, state.normalizer, self.keys, counters.gradient_steps, begin, count,
            batch=fleet.batch, online=online, sampling=self._sampling(), random=random,
        )  # fmt: skip
        state.agent, state.totals, state.carry, state.action, fleet.worlds, replay = live
        self.replay.settle(replay, count * per_seed)
        pace.sent(count, told)
        told = jax.device_get(told)
        counted = 0
        for step, seed, n in np.argwhere(told.ends.ended[:count]).tolist():  # each finds the counters of its step
            counters.env_steps = begin + step * per_seed
            self._count_calls(int(told.before[step]) - counted)
            counted = int(told.before[step])
            self._episode_finished(seed * per_seed + n, fleet.row(told.ends, (step, seed, n)))
        counters.env_steps = begin + count * per_seed
        self._count_calls(int(told.calls) - counted)
        self._finished.clear()
        if not told.finite[0]:
            raise self._bad_action()
        if not told.finite[1]:
            name = fleet.batch.task.name
            raise EnvironmentFaultError(f"environment {name} returned NaN or Inf by step {counters.env_steps}")

    def _count_calls(self, calls: int) -> None:
        """Count online update calls."""
        counters = self.counters
        counters.gradient_steps += calls * self.agent.updates_per_call
        counters.online_updates += calls
        counters.unlogged_updates += calls

    def _tell_of_episodes(self, ended: np.ndarray) -> None:
        """Let the agents hear of the episodes that `ended` `[S * N]` in the environment step under way."""
        results = np.zeros((2, len(ended)), np.float32)
        for index, row in self._finished.items():
            results[:, index] = row["return"], row["length"]
        self._finished.clear()
        returns, lengths, over = (x.reshape(self.seeds, self.envs_per_seed) for x in (*results, ended))
        self.state.agent = programs.after_episodes(self.agent, returns, lengths, over)

    def _sampling(self, utd_ratio: int | None = None) -> Sampling:
        online = self.online_config
        ratio = online.offline_ratio if online.replay == "mixed" else 0.0
        return Sampling(self.config.batch_size, utd_ratio or online.utd_ratio, ratio, self.agent.needs.window)

    def _calls_due(self) -> int:
        """Return the update calls that the environment step under way ends with."""
        online, counters = self.online_config, self.counters
        return self.replay.calls_due(counters.env_steps, online, self.agent.needs.window)

    def _initial_updates(self) -> None:
        """Run the updates that come in one go before the first online one (`OnlineConfig.initial_updates`)."""
        assert not isinstance(self.replay, Rollout)
        state, counters, count = self.state, self.counters, self.online_config.initial_updates
        sampling = self._sampling(utd_ratio=1)
        state.totals = state.totals or self._zeros(None)
        sources = self.replay.burst(self.keys, counters.gradient_steps, count, sampling)
        self._updates(sources, count, Pace(), sampling=sampling)

    def _learn_and_act(self, update: bool, over: np.ndarray) -> None:
        """Run the update call, if one is due, and choose the next actions; `over` `[S * N]` clears the carry."""
        assert self.fleet is not None
        state, counters, sampling = self.state, self.counters, self._sampling()
        places = (self.seeds, self.envs_per_seed)
        state.totals = state.totals or self._zeros(None)
        at, overlap = counters.gradient_steps, self.loop.overlap and self.online_config.replay != "rollout"
        random = counters.env_steps < self.online_config.random_steps
        if (update, random) not in self._compiled:  # which takes seconds
            self._compiled.add((update, random))
            self.fleet.pause()
        source = self.replay.source(self.keys, at, sampling) if update and not overlap else None
        state.agent, state.totals, state.carry, state.action, given = programs.learn_and_act(
            state.agent, state.totals, state.carry, source, state.normalizer, self.keys,
            at, jax.tree.map(lambda o: o.reshape(*places, *o.shape[1:]), self.fleet.observations), over.reshape(places),
            counters.env_steps, sampling=sampling, action_dim=self.replay.data.rows["actions"].shape[-1],
            random=random,
        )  # fmt: skip
        self._prioritise(given)
        if update and overlap:  # the update runs while the environments step
            self._learn()

    def _learn(self) -> None:
        """Run an update call alone."""
        state, at, sampling = self.state, self.counters.gradient_steps, self._sampling()
        source = self.replay.source(self.keys, at, sampling)
        state.totals = state.totals or self._zeros(None)
        state.agent, state.totals, given = programs.learn(
            state.agent, state.totals, source, self.keys, at, sampling=sampling
        )
        self._prioritise(given)

    def _prioritise(self, given: programs.Priorities) -> None:
        """Give the rows that an update learnt from their new priorities, if it has `given` any."""
        if given is not None:
            assert not isinstance(self.replay, Rollout)
            self.replay.prioritise(*given)

    def choose_actions(self) -> None:
        """Choose the actions for the observations at which the environments stand."""
        self._learn_and_act(False, np.zeros(self.seeds * self.envs_per_seed, bool))

    def _finite_actions(self) -> np.ndarray:
        """Return the chosen actions `[S, N, A]` on the host; raises `DivergenceError` if one is not finite."""
        actions = np.asarray(self.state.action)
        if not np.isfinite(actions).all():
            raise self._bad_action()
        return actions

    def _bad_action(self) -> DivergenceError:
        return DivergenceError(
            f"the policy's action at online step {self.counters.env_steps} is not finite: the learner diverged; "
            "lower its learning rate or look at critic/q in metrics.jsonl"
        )

    @property
    def phase_name(self) -> str:
        """`offline`, `warmup` (the first update online is still to come) or `online`."""
        if self.counters.phase == "offline":
            return "offline"
        return (
            "online" if self.counters.online_updates or self.online_config.replay in ("none", "rollout") else "warmup"
        )

    # Environments that stand elsewhere than the run

    def put_back(self) -> None:
        """Put the environments where they are to stand: those of a restored run, a robot after an evaluation.

        If one stands elsewhere, its half episode ends as by a time limit, and its policy begins afresh.
        """
        state = self.state
        if state.environments is not None:
            fleet = self.fleet or self._make_fleet(self.agent)
            assert isinstance(fleet, Fleet)
            self.fleet = None
            with Closing() as closing:
                closing.callback(fleet.close)
                same = np.asarray(fleet.restore(state.environments, state.observations))
                closing.pop_all()
            self.fleet, state.environments, state.observations = fleet, None, None
            self._begin_anew(same)
            fleet.displaced = False
        elif isinstance(self.fleet, Fleet) and self.fleet.displaced:
            self.fleet.begin_anew()
            self._begin_anew(np.zeros(len(self.fleet.slots), bool))
            self.fleet.displaced = False

    def _begin_anew(self, same: np.ndarray) -> None:
        """End the episodes of environments that are not at their old state (`same` `[S * N]`), and act anew there."""
        if same.all():
            return
        state, places = self.state, (self.seeds, self.envs_per_seed)
        self.replay.mark_ends(~same)
        self.replay.reveal(~same)
        before, action, stays = state.carry, state.action, same.reshape(places)
        kept = jax.tree.map(jnp.copy, before)  # the program that chooses takes its carry over
        self._learn_and_act(False, ~same)
        state.carry = where_leading(stays, kept, state.carry)
        if action is not None and state.action is not None:
            state.action = jnp.where(stays[..., None], action, state.action)

    # Evaluation

    def evaluate(self, wait: bool = True) -> list[dict[str, Any]]:
        """Evaluate all seeds in their own environments, report and return one row per episode.

        Without `wait`, an evaluation in another process is reported by `take_evaluations` when it is finished.
        """
        counters = self.counters
        about = {
            "point": counters.point,
            "phase": self.phase_name,
            "env_steps": counters.env_steps,
            "gradient_steps": counters.gradient_steps,
        }
        counters.asked_at = counters.point
        counters.scored_at = None if counters.scored_at == counters.point else counters.scored_at
        if self.fleet is not None:
            self.fleet.may_move()
        self.evaluator.ask(self.agent, self.normalizer, counters.point, self.loop.deterministic_eval, about)
        return self.take_evaluations(wait)

    def take_evaluations(self, wait: bool = False, leave: int = 0) -> list[dict[str, Any]]:
        """Report the evaluations that are finished, `wait` for all but the last `leave`; return the last one's rows."""
        last: list[dict[str, Any]] = []
        for about, rows in self.evaluator.take(wait, leave):
            position = {key: about[key] for key in ("phase", "env_steps", "gradient_steps")}
            last = [{**position, **row} for row in rows]
            self.counters.score = float(np.mean([row["score"] for row in last]))
            self.counters.scored_at = about["point"]
            self.hooks.episodes(last)
            self.hooks.scored(about["point"], self.counters.score)
        return last

    def take_earlier_evaluations(self) -> None:
        """Report the evaluations of earlier steps; one of this step may still be under way, or have failed."""
        here = [about for about in self.evaluator.under_way() if about and about["point"] == self.counters.point]
        self.take_evaluations(wait=True, leave=len(here))

    def broken_off(self) -> bool:
        """Whether a stop was asked for before an evaluation was played to its end."""
        return self.counters.unscored and self.hooks.should_stop()

    def _evaluate_again(self) -> bool:
        """Play the evaluation that was under way, or failed, when the state was taken; False if stopped again."""
        here = self.counters.unscored and self.counters.asked_at == self.counters.point
        if here and not self.evaluator.under_way():
            self.evaluate(wait=False)
        return not self.broken_off()

    # Metrics

    def _episode_finished(self, index: int, row: dict[str, Any]) -> None:
        counters, seed = self.counters, index // self.envs_per_seed
        counters.episodes[seed] += 1
        if self.agent.needs.episode_returns:
            self._finished[index] = row
        numbers = {key: row[key] for key in ("return", "length", "success", "intervention") if row[key] is not None}
        self.hooks.metrics(
            {
                "phase": self.phase_name,
                "env_steps": counters.env_steps + self.envs_per_seed,
                "gradient_steps": counters.gradient_steps,
                "seed": seed,
                "episodes": counters.episodes[seed],
                **{f"train/{key}": float(value) for key, value in numbers.items()},
            }
        )

    def _log(self) -> None:
        """Report the mean metrics since the last row, one row per seed; raises `DivergenceError` for one not finite."""
        counters, state = self.counters, self.state
        updates, online = counters.unlogged_updates, counters.phase == "online"
        at = counters.env_steps if online else counters.offline_steps
        if updates or online:
            host = jax.device_get(state.totals) if updates else {}
            extra = {"time/log_steps": float(at - counters.logged_at)} if online else {}
            for seed in range(self.seeds):  # all of them are written before the run ends because of one
                self.hooks.metrics(
                    {
                        "phase": self.phase_name,
                        "env_steps": counters.env_steps,
                        "gradient_steps": counters.gradient_steps,
                        "time_s": round(counters.elapsed, 3),
                        "seed": seed,
                        **{key: float(value[seed]) / updates for key, value in host.items()},
                        **extra,
                    }
                )
            self._refuse_bad(host)
        state.totals = jax.tree.map(jnp.zeros_like, state.totals)
        counters.unlogged_updates, counters.logged_at = 0, at

    def _refuse_bad(self, totals: dict[str, np.ndarray]) -> None:
        """Raise `DivergenceError` if one of the summed metrics, values `[S]`, is not finite."""
        bad = [(key, seed) for key, value in totals.items() for seed in np.flatnonzero(~np.isfinite(value)).tolist()]
        if bad:
            key, seed = bad[0]
            raise DivergenceError(self._diverged(f"{key} is not finite", seed))

    def check_finite(self) -> None:
        """Raise `DivergenceError` if the metrics since the last row, or an agent, hold what no run can go on from."""
        if self.counters.unlogged_updates:
            self._refuse_bad(jax.device_get(self.state.totals))
        if len(bad := np.flatnonzero(programs.has_nan(self.agent))):
            raise DivergenceError(self._diverged("a parameter of the agent is NaN", int(bad[0])))

    def _diverged(self, what: str, seed: int) -> str:
        counters = self.counters
        return (
            f"the learner diverged: {what} by update {counters.gradient_steps} (environment step {counters.env_steps}, "
            f"seed {self.seed + seed}); earlier checkpoints are kept; lower the learning rates, or look for the cause "
            "in metrics.jsonl"
        )

    # Checkpoints

    def save(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Report earlier evaluations, then return (arrays, values): device arrays by name, host values for JSON.

        Together they are all that a checkpoint holds. An evaluation of this very step may be under way or have failed:
        whoever goes on from here plays it again.
        """
        self.take_earlier_evaluations()
        state, counters = self.state, self.counters
        arrays: dict[str, Any] = {"agent": state.agent}
        if state.normalizer is not None:
            arrays["normalizer"] = state.normalizer
        loop: dict[str, Any] = {"keys": self.keys, "totals": state.totals if counters.unlogged_updates else {}}
        values: dict[str, Any] = {"counters": dict(vars(counters))}
        if counters.phase == "online":
            arrays |= self.replay.arrays()
            loop |= {"observations": self._observations()}
            loop |= {} if state.action is None else {"action": state.action}
            loop |= {} if state.carry is None else {"carry": state.carry}
            arrays |= {"worlds": self.fleet.worlds} if isinstance(self.fleet, Simulated) else {}
            values["replay"], values["acting"] = self.replay.state(), state.action is not None
            values["environments"] = state.environments if self.fleet is None else self.fleet.snapshot()
        return {**arrays, "loop": loop}, values

    def _observations(self) -> Any:
        """Return what the policies see next, leaves `[S * N, ...]`; zeros where no environment was made yet."""
        if self.fleet is not None:
            return self.fleet.observations
        if self.state.observations is not None:
            return self.state.observations
        row, count = one_row(self.replay.data.rows)["observations"], self.seeds * self.envs_per_seed
        return jax.tree.map(lambda leaf: np.zeros((count, *leaf.shape), leaf.dtype), row)

    def load(
        self,
        values: dict[str, Any],
        read: Callable[[dict[str, Any]], dict[str, Any]],
        online_steps: int,
        play: bool = True,
    ) -> Self:
        """Go on where `values` of `save` say; `read(targets)` returns arrays of a given structure.

        `online_steps` sizes the replay if the checkpoint does not say for how many steps it was made. `play` False: the
        run is looked at. No environment is made, and a replay on disk refuses to store anything.
        """
        saved = Counters(**values["counters"])
        if saved.phase == "online":
            replay = values["replay"]
            self.begin_online(replay.get("planned") or online_steps, replay["kind"], play=False)
        if play and saved.phase == "online" and SIMULATED in (values["environments"] or {}):
            self._make_fleet(self.agent)
        targets, _ = self.save()
        loop = targets["loop"]
        if values.get("acting"):
            shape = (self.seeds, self.envs_per_seed, *self.replay.data.rows["actions"].shape[1:])
            loop["action"] = jnp.zeros(shape)
        if saved.unlogged_updates:
            online = saved.phase == "online"
            loop["totals"] = self._zeros(
                None if online else phase_at(self.agent, saved.offline_total, saved.offline_steps)
            )
        arrays = read(targets)
        state, loop = self.state, arrays["loop"]
        state.agent, state.counters, state.totals = arrays["agent"], saved, loop["totals"]
        if saved.asked_at != saved.point:  # an earlier evaluation that failed is not played again
            saved.asked_at = saved.scored_at
        state.normalizer = arrays.get("normalizer", state.normalizer)
        if saved.phase == "online":
            self.replay.restore(arrays, values["replay"])
            state.carry, state.action = loop.get("carry"), loop.get("action")
            state.environments, state.observations = values["environments"], loop["observations"]
            if isinstance(self.fleet, Simulated):
                self.fleet.worlds = arrays["worlds"]
                state.environments, state.observations = None, None
        self._spread()
        if play:
            self.put_back()
        else:
            self.replay.look_only()
        return self

    def close(self) -> None:
        """Close all environments, and the files of a replay in host memory."""
        with ExitStack() as closing:  # each of them, whatever the others raise
            for part in (self.replay, self.fleet, self.evaluator):
                if part is not None:
                    closing.callback(part.close)


CALL_S = 1.0
"""Seconds of updates that the device is given at once. Signals are heeded only between the calls."""


class Pace:
    """Bounds the time of the calls to the device that are under way, measured on the first ones."""

    def __init__(self) -> None:
        """Start with one update, whose time is that of compilation; the next one gives the rate."""
        self.most = 1
        """Updates of the next call, at most."""
        self._queued, self._began = 0, time.perf_counter()

    def sent(self, count: int, result: Any) -> None:
        """Note a call of `count` updates; wait for its `result` if as many as fit are under way."""
        self._queued += count
        if self._queued >= self.most:
            jax.block_until_ready(result)
            now = time.perf_counter()
            self.most = max(1, int(CALL_S * self._queued / max(now - self._began, 1e-9)))
            self._queued, self._began = 0, now


class Clock:
    """Counts the seconds of training on, from those that a run has behind it."""

    def __init__(self, counters: Counters) -> None:
        """Start now."""
        self._counters, self._started = counters, time.perf_counter() - counters.elapsed

    def read(self) -> None:
        """Write the seconds so far into the counters."""
        self._counters.elapsed = time.perf_counter() - self._started


def _passed(before: int, at: int, last: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (before, at], or the `last` step is reached."""
    return at // every > before // every or at >= last


def plan(agent: Agent, steps: int) -> list[tuple[Phase, int]]:
    """Return the phases of a pre-training of `steps` gradient steps, each with the step at which it begins.

    Raises `ConfigError` if they do not add up to `steps`.
    """
    phases = [phase for phase in agent.phases(steps) if phase.steps]
    begins = [sum(phase.steps for phase in phases[:i]) for i in range(len(phases) + 1)]
    if begins[-1] != steps:
        raise ConfigError(f"the phases of this agent take {begins[-1]} gradient steps, offline_steps is {steps}")
    return [(phase, begin) for phase, (begin, _) in zip(phases, pairwise(begins), strict=True)]


def phase_at(agent: Agent, steps: int, at: int) -> Phase | None:
    """Return the phase that the last of `at` gradient steps, of `steps`, was in; None if there is none."""
    phases = [phase for phase, begin in plan(agent, steps) if begin < max(at, 1)]
    return phases[-1] if phases else None
