"""The two training loops, offline and online, for every agent and any number of seeds side by side.

`Trainer` holds the state of a run (agents, replay, environments, counters) and knows no agent by name: what differs is
read from `agent.config.online` and `agent.needs`. Gradient steps (critic updates), environment steps (per seed) and
episodes are three counters; environment steps are counted per seed (five seeds of 1000 steps each stand at 1000).
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from o2o.data.datasets import Dataset
from o2o.data.normalizer import Normalizer, normalized_rows
from o2o.errors import ConfigError, DivergenceError
from o2o.replay import host as host_replay
from o2o.replay.buffer import OfflineData, capacity_for, check_window
from o2o.replay.host import HostData, HostReplay
from o2o.train import pretraining, resume
from o2o.train import programs as dispatch
from o2o.train.evaluation import EnvFn, Evaluator
from o2o.train.fleet import Fleet
from o2o.train.programs import OnlineMode, OnlineState
from o2o.train.remote_evaluation import evaluator_of
from o2o.train.schedule import Counters, Hooks, LoopConfig, evaluation_steps
from o2o.types import OnlineConfig


class Trainer:
    """Pre-trains and fine-tunes `seeds` agents of one class side by side."""

    def __init__(
        self,
        agent_class: Any,
        config: Any,
        data: Dataset,
        env_fn: EnvFn,
        *,
        seed: int = 0,
        seeds: int = 1,
        loop: LoopConfig | None = None,
        normalizer: Normalizer | None = None,
        hooks: Hooks | None = None,
        storage: Path | None = None,
    ) -> None:
        """Create the agents from `data`'s shapes; `env_fn(evaluation)` makes one environment.

        `data` and environments are raw: `normalizer` stands between them and the agents.
        Replay that is too large for the device is kept in the folder `storage`; None: in a temporary one.
        Raises `ConfigError` for settings out of range and `DatasetError` if `data` lacks what the agent needs.
        """
        if seeds < 1 or seed < 0:
            raise ConfigError(f"seeds is {seeds} and seed {seed}; expected seeds >= 1 and seed >= 0")
        self.config, self.data, self.env_fn, self.loop = config, data, env_fn, loop or LoopConfig()
        self.seed, self.seeds, self.hooks = seed, seeds, hooks or Hooks()
        self.normalizer, rows = normalizer, normalized_rows(normalizer, data.arrays)
        example = jax.tree.map(lambda leaf: np.asarray(leaf[:1]), {k: rows[k] for k in ("observations", "actions")})
        keys = jax.random.split(jax.random.key(seed), seeds + 1)
        make = partial(dispatch.create_agent, agent_class=agent_class, config=config)
        self.agent = dispatch.each_seed(
            lambda key: make(key, example["observations"], example["actions"]), keys[:seeds]
        )
        sources = [(source.start, source.size, source.weight) for source in data.sources]
        self.programs: Any = dispatch
        self.storage = storage
        self._place(host_replay.place(rows, (*self.agent.needs.keys, "ends"), sources, self.loop.device_bytes))
        check_window(self.agent, self.offline_data.size, "the dataset")
        self.rng = jax.random.split(keys[seeds], seeds)
        self.counters = Counters(episodes=[0] * seeds)
        self.online_state: OnlineState | None = None
        self.fleet: Fleet | None = None
        self.action: jax.Array | None = None
        self.visible = [0] * seeds
        self.planned = 0  # environment steps that the replay buffer was allocated for
        self.exact_resume = True
        self.stood: tuple[dict[str, Any], Any] | None = None  # where the environments are to be put back
        self.moved = False  # by an evaluation that had the robot
        self.offline_totals: dict[str, Any] = {}
        self.updates_since_log = 0
        self.unscored: int | None = None  # where the last evaluation was asked for, until its rows are there
        self.evaluator = evaluator_of(self.loop, env_fn, seeds, seed, self._normalized)
        self.evaluator.should_stop = lambda: self.hooks.should_stop()

    def _normalized(self, raw_return: float) -> float | None:
        score = self.data.info.normalized(raw_return, self.data.task)
        return None if score is None else float(score)

    @property
    def online_config(self) -> OnlineConfig:
        """The schedule that the agent asks for."""
        return self.config.online

    def agent_of(self, member: int = 0) -> Any:
        """Return one seed's agent without the leading seed axis."""
        agent = self.agent if self.online_state is None else self.online_state.agent
        return jax.tree.map(lambda leaf: leaf[member], agent)

    def offline(self, steps: int) -> bool:
        """Pre-train until `steps` gradient steps in all; False if a stop was asked for before."""
        return self._evaluate_again() and pretraining.pretrain(self, steps)

    def _place(self, data: OfflineData | HostData) -> None:
        """Take the dataset as it is placed, and the programs that go with it."""
        self.offline_data = data
        if isinstance(data, HostData) and not isinstance(self.programs, HostReplay):
            self.programs = HostReplay(self.storage, self.loop.checkpoint_every)

    def begin_online(self, steps: int, host: bool | None = None, play: bool = True) -> None:
        """Switch the agents to their online form, allocate the replay buffer, reset the environments.

        `host`: whether observations stay in host memory; None: if the device is too small. Not to `play`: none is made.
        """
        if self.online_state is not None:
            return
        wanted = self.online_config
        agent = dispatch.each_seed(dispatch.to_online, self.agent)
        if "mc_returns" in agent.needs.keys and wanted.replay == "append":
            raise ConfigError(
                "replay 'append' cannot wait for Monte-Carlo returns; use 'mixed' or 'online' with this agent"
            )
        rows = self.offline_data.size if wanted.replay == "append" else 0
        capacity = capacity_for(steps, self.loop.replay_capacity) + rows
        check_window(agent, capacity, "the replay buffer")
        if wanted.replay == "mixed":
            check_window(agent, self.offline_data.size, "the dataset")
        if play:
            self.make_fleet("mc_returns" in agent.needs.keys)
        self._place(host_replay.make_room(self.offline_data, capacity * self.seeds, self.loop.device_bytes, host))
        self.online_state = self.programs.fresh_online_state(agent, self.rng, self.offline_data, capacity, rows > 0)
        self.visible, self.planned = [rows] * self.seeds, steps
        self.counters.phase, self.counters.logged_at = "online", 0

    def make_fleet(self, waits: bool = False, per_seed: int = 1) -> None:
        """Make and reset the environments; raises `EnvironmentMismatchError` if they do not fit the dataset."""
        fleet = Fleet(self.env_fn, self.seed, self.seeds, waits, per_seed, self.loop.env_processes)
        self.fleet = fleet.must_fit(self.offline_data.rows, self.loop.eval_process)

    def online(self, steps: int) -> bool:
        """Warm up and fine-tune until `steps` environment steps per seed; False if a stop was asked for before.

        Called again for more steps than before, the replay buffer grows.
        """
        if not self._evaluate_again():
            return False
        unknown = self.unscored is None and self.counters.scored_at is None
        if self.online_state is None and self.counters.offline_steps == 0 and unknown:
            self.evaluate(wait=False)
        if not self.broken_off():
            self.begin_online(steps)
        if self.online_state is None:  # stopped before the switch
            self.hooks.checkpoint(self)
            return False
        host_replay.extend_room(self, steps)
        resume.put_back(self)
        counters, loop = self.counters, self.loop
        started = time.perf_counter() - counters.elapsed
        eval_steps = evaluation_steps(loop, self.online_config, steps)
        if self.action is None:
            self.first_actions()
        at = counters.env_steps
        while at < steps:
            resume.put_back(self)
            self._online_step()
            before, at, counters.elapsed = at, counters.env_steps, time.perf_counter() - started
            due = lambda every, since=before, now=at: now // every > since // every or now >= steps  # noqa: E731
            if due(loop.log_every):
                self._log_online()
            if any(before < point <= at for point in eval_steps):
                self.evaluate(wait=False)
            if due(20):
                self.hooks.progress(self.phase_name, at, steps, {})
            stop = self.hooks.should_stop()
            self.take_evaluations(wait=stop or at >= steps)
            if due(loop.checkpoint_every) or stop:
                counters.elapsed = time.perf_counter() - started
                self.hooks.checkpoint(self)
            if stop and (at < steps or self.broken_off()):
                return False
        self.take_evaluations(wait=True)
        return True

    def broken_off(self) -> bool:
        """Whether a stop was asked for before an evaluation was played to its end."""
        return self.unscored is not None and self.hooks.should_stop()

    def first_actions(self) -> None:
        """Choose the actions for the observations at which the environments stand."""
        assert self.online_state is not None and self.fleet is not None
        self.online_state, self.action = self.programs.first_actions(
            self.online_state,
            self.normalizer,
            self.fleet.observations,
            seeds=self.seeds,
            random=self.counters.env_steps < self.online_config.random_steps,
        )

    @property
    def phase_name(self) -> str:
        """`offline`, `warmup` (the first update online is still to come) or `online`."""
        if self.counters.phase == "offline":
            return "offline"
        return "online" if self.counters.online_updates or self.online_config.replay == "none" else "warmup"

    def _may_update(self, window: int) -> bool:
        """Whether this step ends with an update: its time has come, and enough rows are stored to cut a window."""
        assert self.fleet is not None
        online, counters = self.online_config, self.counters
        if online.replay == "none" or counters.env_steps < online.first_update():
            return False
        appended = self.offline_data.size if online.replay == "append" else 0
        stored = self.visible if self.fleet.waits else [appended + counters.env_steps]
        return min(stored) >= window

    def finite_actions(self) -> np.ndarray:
        """Return the chosen actions on the host; raises `DivergenceError` if one is not finite."""
        actions = np.asarray(self.action)
        if not np.isfinite(actions).all():
            raise DivergenceError(
                f"the policy's action at online step {self.counters.env_steps} is not finite: the learner diverged; "
                "lower its learning rate or look at critic/q in metrics.jsonl"
            )
        return actions

    def _online_step(self) -> None:
        assert self.online_state is not None and self.fleet is not None
        counters, online = self.counters, self.online_config
        rows, ended = self.fleet.step(self.finite_actions(), self._episode_finished)
        waits, window = self.fleet.waits, self.online_state.agent.needs.window
        update = self._may_update(window)
        mode = OnlineMode(
            seeds=self.seeds,
            update=update,
            random=counters.env_steps + 1 < online.random_steps,
            pending=waits,
            utd_ratio=online.utd_ratio,
            batch_size=self.config.batch_size,
            offline_ratio=online.offline_ratio if online.replay == "mixed" else 0.0,
            window=window,
            overlap=self.loop.overlap,
        )
        offline = self.offline_data if online.replay == "mixed" else None
        over = self.fleet.outdated(self.online_state.carry, ended)
        if update and online.initial_updates and not counters.online_updates:
            self._initial_updates(offline, mode)
        self.online_state, self.action = self.programs.online_step(
            self.online_state, offline, self.normalizer, rows, self.fleet.observations, over, mode=mode
        )
        if waits:
            self.commit(np.flatnonzero(ended))
        else:
            self.fleet.forget(np.flatnonzero(ended))
        counters.env_steps += 1
        counters.gradient_steps += online.utd_ratio if update else 0
        counters.online_updates += int(update)
        self.updates_since_log += int(update)

    def _initial_updates(self, offline: OfflineData | HostData | None, mode: OnlineMode) -> None:
        """Run the updates that come in one go before the first online one (`OnlineConfig.initial_updates`)."""
        assert self.online_state is not None
        count = self.online_config.initial_updates
        self.online_state = self.programs.initial_updates(
            self.online_state, offline, jnp.asarray(count, jnp.int32), mode=mode
        )
        self.counters.gradient_steps += count
        self.updates_since_log += count

    def commit(self, members: np.ndarray) -> None:
        """Fill in the returns-to-go of these members' waiting rows and let them be sampled."""
        assert self.online_state is not None and self.fleet is not None
        failure = self.data.task.failure_reward
        returns, counts = self.fleet.take_returns(members, self.config.discount, failure)
        if not counts.any():
            return
        if counts.max() > self.online_state.buffer.capacity:
            raise ConfigError(
                f"an episode of {counts.max()} steps does not fit the replay buffer; raise replay_capacity"
            )
        self.visible = [seen + int(count) for seen, count in zip(self.visible, counts, strict=True)]
        buffer = self.programs.commit_episodes(self.online_state.buffer, returns, counts, seeds=self.seeds)
        self.online_state = self.online_state._replace(buffer=buffer)

    def _episode_finished(self, member: int, row: dict[str, Any]) -> None:
        counters, keys = self.counters, ("return", "length", "success", "intervention")
        counters.episodes[member] += 1
        metrics = {f"train/{key}": float(row[key]) for key in keys if row[key] is not None}
        position = {"env_steps": counters.env_steps + 1, "gradient_steps": counters.gradient_steps}
        numbers = {"seed": member, "episodes": counters.episodes[member], **metrics}
        self.hooks.metrics({"phase": self.phase_name, **position, **numbers})

    def _log_online(self) -> None:
        assert self.online_state is not None
        updates, counters = self.updates_since_log, self.counters
        metrics = {key: value / updates for key, value in self.online_state.totals.items()} if updates else {}
        zeros = jax.tree.map(jnp.zeros_like, self.online_state.totals)
        self.online_state = self.online_state._replace(totals=zeros)
        self.write_metrics(metrics, {"time/log_steps": float(counters.env_steps - counters.logged_at)})
        self.updates_since_log, counters.logged_at = 0, counters.env_steps

    def evaluate(self, wait: bool = True) -> list[dict[str, Any]]:
        """Evaluate all seeds in their own environments, report and return one row per episode.

        Without `wait`, an evaluation in another process is reported by `take_evaluations` when it is finished.
        """
        counters = self.counters
        agent = self.agent if self.online_state is None else self.online_state.agent
        about = {
            "point": counters.point,
            "phase": self.phase_name,
            "env_steps": counters.env_steps,
            "gradient_steps": counters.gradient_steps,
        }
        self.unscored = counters.point
        self.moved = resume.may_move(self)
        self.evaluator.ask(agent, self.normalizer, counters.point, self.loop.deterministic_eval, about)
        return self.take_evaluations(wait)

    def take_evaluations(self, wait: bool = False, leave: int = 0) -> list[dict[str, Any]]:
        """Report the evaluations that are finished, `wait` for all but the last `leave`; return the last one's rows."""
        last: list[dict[str, Any]] = []
        for about, rows in self.evaluator.take(wait, leave):
            position = {key: about[key] for key in ("phase", "env_steps", "gradient_steps")}
            last = [{**position, **row} for row in rows]
            self.counters.score = float(np.mean([row["score"] for row in last]))
            self.counters.scored_at = about["point"]
            self.unscored = None if about["point"] == self.unscored else self.unscored
            self.hooks.episodes(last)
            self.hooks.scored(about["point"], self.counters.score)
        return last

    def take_earlier_evaluations(self) -> bool:
        """Report the evaluations of earlier steps; return whether this step's is under way, or has failed."""
        point = self.counters.point
        here = [about for about in self.evaluator.under_way() if about and about["point"] == point]
        self.take_evaluations(wait=True, leave=len(here))
        return self.unscored == point

    def _evaluate_again(self) -> bool:
        """Play the evaluation that was under way, or failed, when the state was taken; False if stopped again."""
        if self.unscored == self.counters.point and not self.evaluator.under_way():
            self.evaluate(wait=False)
        return not self.broken_off()

    def write_metrics(self, metrics: dict[str, Any], extra: dict[str, float]) -> None:
        """Report one row per seed: metrics `[S]` each, and what all seeds share."""
        counters = self.counters
        host = jax.device_get(metrics)
        for member in range(self.seeds):
            values = {key: float(value[member]) for key, value in host.items()}
            position = {"env_steps": counters.env_steps, "gradient_steps": counters.gradient_steps}
            row = {"phase": self.phase_name, **position, "time_s": round(counters.elapsed, 3), "seed": member}
            self.hooks.metrics({**row, **values, **extra})

    @property
    def slots_shape(self) -> tuple[int, ...]:
        """The axes of the training environments: `[S]`."""
        return (self.seeds,)

    def mark_ends(self, where: np.ndarray) -> None:
        """Make the newest row the last of its episode where `where` `[S]` is true."""
        assert self.online_state is not None
        self.online_state = self.online_state._replace(buffer=self.online_state.buffer.mark_ends(where))

    def placed(self, buffer: Any) -> Any:
        """Return a loaded replay buffer as the programs want it."""
        if isinstance(self.programs, HostReplay):
            self.programs.stand_at(buffer)
        return buffer

    def close(self) -> None:
        """Close all environments, and the files of a replay in host memory."""
        with ExitStack() as closing:  # each of them, whatever the others raise
            for part in (self.programs, self.fleet, self.evaluator):
                if isinstance(part, HostReplay | Fleet | Evaluator):
                    closing.callback(part.close)

    def arrays(self) -> dict[str, Any]:
        """Return every device array of the run, by name (o2o.train.checkpoint)."""
        return resume.arrays(self)

    def state(self) -> dict[str, Any]:
        """Return every host value of the run, JSON-able; reports the evaluations of earlier steps, waiting for them."""
        return resume.state(self)

    def restore(
        self,
        state: dict[str, Any],
        load: Callable[[dict[str, Any]], dict[str, Any]],
        online_steps: int,
        play: bool = True,
    ) -> Self:
        """Put the run where `state` says (`resume.restore`); not to `play`: environments only when `online` goes on."""
        resume.restore(self, state, load, online_steps)
        if play:
            resume.put_back(self)
        return self
