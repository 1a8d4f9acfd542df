"""Evaluation: seeded episodes in environments of their own, one row each. All seeds and slots act in one call."""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import gymnasium

from o2o.closing import Closing
from o2o.data.normalizer import Normalizer
from o2o.data.rollout import rollout
from o2o.errors import ConfigError, O2OError
from o2o.train.acting import Agents, keys_of_steps, stack_of_one
from o2o.train.episode import EVAL_STREAM, FIXED_STREAM, EnvSlot, reset_seed

log = logging.getLogger("o2o")
EnvFn = Callable[[bool], gymnasium.Env]
"""Makes one environment; the argument says whether it is for evaluation."""
Row = dict[str, Any]
"""What is known of one episode: `seed` (the index of the agent, from 0) and what `EnvSlot.row` returns."""


class Evaluator:
    """Plays evaluations and keeps its environments between them; `slots` of them per seed play side by side."""

    def __init__(
        self,
        env_fn: EnvFn,
        seeds: int,
        episodes: int,
        seed: int,
        normalized: Callable[[float], float | None] | None = None,
        slots: int = 5,
        fresh_starts: bool = True,
    ) -> None:
        """Prepare for `episodes` episodes of each of `seeds` agents; environments are made at first use.

        `normalized` maps a raw return to the dataset's normalised score. `fresh_starts`: every point has reset seeds of
        its own; otherwise all have the same. Raises `ConfigError` for no episodes.
        """
        self.env_fn, self.seeds, self.episodes, self.seed, self.normalized = env_fn, seeds, episodes, seed, normalized
        self.fresh_starts = fresh_starts
        if episodes < 1:
            raise ConfigError(f"eval_episodes is {episodes}; expected at least 1")
        self.slots = min(slots, episodes)
        self.envs: list[EnvSlot] = []
        """`seeds * slots` environments, those of one seed side by side."""
        self.should_stop: Callable[[], bool] = lambda: False
        self._finished: list[tuple[Any, list[Row]]] = []

    def __call__(self, agent: Any, normalizer: Normalizer | None, point: int, deterministic: bool = True) -> list[Row]:
        """Play all episodes with the stacked `agent` `[S]` and return their rows, by seed and episode.

        Everything that agent k sees depends on `seed` + k, not on how many agents play: the seed of a reset is derived
        from (`seed` + k, episode), with `fresh_starts` from (`seed` + k, `point`, episode), the agent's random numbers
        from (`seed` + k, `point`).
        """
        rows = self._play(agent, normalizer, point, deterministic, lambda: False)
        assert rows is not None
        return rows

    def prepare(self) -> None:
        """Make the environments now, not at first use; see `_make_envs`."""
        if not self.envs:
            self._make_envs()

    def _make_envs(self) -> None:
        """Make the environments. Of hardware there is one per seed.

        If a simulator cannot give so many at once, fewer play side by side, and that is logged. Raises what the
        environment raised if there is not even one per seed.
        """
        wanted = self.seeds * self.slots
        while len(self.envs) < wanted:
            try:
                slot = self._new_slot()
            except O2OError as error:
                fewer = len(self.envs) // self.seeds
                if fewer == 0:
                    self.close()
                    raise
                self.slots = fewer
                wanted = self.seeds * self.slots
                log.warning("only %d environments can be had at once for evaluation: %s", wanted, error)
                break
            self.envs.append(slot)
            if not slot.replayable:
                wanted, self.slots = self.seeds, 1
        surplus, self.envs = self.envs[wanted:], self.envs[:wanted]
        for slot in surplus:
            slot.env.close()

    def _new_slot(self) -> EnvSlot:
        """Make one environment. It is reset once: some simulators notice only then that they are one too many."""
        slot = EnvSlot(self.env_fn(True), ())
        if slot.replayable:
            with Closing() as closing:
                closing.callback(slot.env.close)
                slot.env.reset(seed=0)
                closing.pop_all()
        return slot

    def _play(
        self, agent: Any, normalizer: Normalizer | None, point: int, deterministic: bool, stop: Callable[[], bool]
    ) -> list[Row] | None:
        """Play all episodes; return None if `stop` broke them off."""
        if not self.envs:
            self._make_envs()
        owners = [index for index in range(self.seeds) for _ in range(self.slots)]
        numbers = [iter(range(self.episodes)) for _ in range(self.seeds)]
        for slot, index in zip(self.envs, owners, strict=True):
            stream = (EVAL_STREAM, point) if self.fresh_starts else (FIXED_STREAM, 0)
            slot.seeds = (self.seed + index, *stream)
        keys = keys_of_steps([reset_seed(self.seed + index, EVAL_STREAM, point) for index in range(self.seeds)])
        policy = Agents(agent, normalizer, self.slots, keys, deterministic)
        rows: list[Row] = []
        for slot, step in rollout(policy, self.envs, [numbers[index] for index in owners], stop):
            rows.append({"seed": owners[slot], **self.envs[slot].row(step.terminated, self.normalized)})
        if len(rows) < self.seeds * self.episodes:
            return None
        return sorted(rows, key=lambda row: (row["seed"], row["episode"]))

    def until_stopped(
        self, agent: Any, normalizer: Normalizer | None, point: int, deterministic: bool = True
    ) -> list[Row] | None:
        """Play the episodes of a call. Once `should_stop` is true no further step is played, and None is returned."""
        return self._play(agent, normalizer, point, deterministic, self.should_stop)

    def ask(
        self, agent: Any, normalizer: Normalizer | None, point: int, deterministic: bool = True, about: Any = None
    ) -> None:
        """Have the episodes of a call played; `take` returns their rows together with `about`.

        Once `should_stop` is true no further step is played, and the call has no rows.
        """
        rows = self.until_stopped(agent, normalizer, point, deterministic)
        if rows is not None:
            self._finished.append((about, rows))

    def under_way(self) -> list[Any]:
        """Return the `about` of every call that is not known to be finished, in the order of the calls."""
        return []

    def take(self, wait: bool = False, leave: int = 0) -> list[tuple[Any, list[Row]]]:
        """Return (about, rows) of the finished calls in their order; `wait` for all but the last `leave` first."""
        taken, self._finished = self._finished, []
        return taken

    def close(self) -> None:
        """Close the environments, every one."""
        with ExitStack() as closing:
            for slot in self.envs:
                closing.callback(slot.env.close)
            self.envs = []


def evaluate(
    agent: Any,
    env_fn: EnvFn,
    episodes: int = 20,
    seed: int = 0,
    normalizer: Normalizer | None = None,
    deterministic: bool = True,
    normalized: Callable[[float], float | None] | None = None,
) -> list[Row]:
    """Play `episodes` episodes of one agent (not stacked) and return their rows."""
    evaluator = Evaluator(env_fn, 1, episodes, seed, normalized)
    with Closing() as closing:
        closing.callback(evaluator.close)
        return evaluator(stack_of_one(agent), normalizer, 0, deterministic)
