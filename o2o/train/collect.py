"""From environments to transitions: the training environments, stepped side by side, and the episodes in them."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, Self

import gymnasium
import jax
import numpy as np

from o2o.closing import Closing
from o2o.envs.safety import stop_robot
from o2o.errors import ConfigError, EnvironmentMismatchError
from o2o.train.env_processes import Crew
from o2o.train.episode import TRAIN_STREAM, EnvSlot, Step
from o2o.train.evaluation import EnvFn

BESIDE = (
    "loop.eval_process plays beside training, but the environment says that it is hardware (metadata 'replayable' "
    "False); leave it out"
)


def stack(observations: Sequence[Any]) -> Any:
    """Stack observations of one structure: leaves `[n, ...]`."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *observations)


def check_fits(row: Mapping[str, Any], observations: Any, actions: Any) -> None:
    """Raise `EnvironmentMismatchError` unless an environment's shapes are those of a dataset's `row`."""
    shapes = jax.tree.map(lambda leaf: leaf.shape, row["observations"])
    if shapes != observations or row["actions"].shape != actions:
        raise EnvironmentMismatchError(
            f"the environment gives observations {observations} and takes actions {actions}, the dataset has "
            f"{shapes} and {row['actions'].shape}; use the environment that the dataset was recorded in"
        )


class Fleet:
    """The training environments of all seeds: S * N of them, seed-major (N = `per_seed`)."""

    def __init__(
        self,
        env_fn: EnvFn,
        seed: int,
        seeds: int,
        per_seed: int = 1,
        processes: int = 0,
        first: gymnasium.Env | None = None,
    ) -> None:
        """Make and reset `per_seed` environments for each seed, in `processes` processes (0: in this one).

        `first` is the first of them, if it is made already.

        Resets are seeded by (`seed` + k, stream, environment, episode), so seed k plays what a run of it alone would.
        """
        names = [(seed + k, TRAIN_STREAM, n) for k in range(seeds) for n in range(per_seed)]
        self.crew = Crew(env_fn, len(names), processes) if processes else None
        made = [] if first is None else [first]
        envs = [*made, *(env_fn(False) for _ in names[len(made) :])] if self.crew is None else self.crew.envs
        self.slots = [EnvSlot(env, name) for env, name in zip(envs, names, strict=True)]
        self.intervened = np.zeros(len(names), bool)
        """Where a human took over in the newest step, `[S * N]`."""
        self.displaced = False
        """Whether an evaluation moved what training stands on (hardware), so that its episodes must begin anew."""
        self._actions: np.ndarray | None = None
        self.fault: BaseException | None = None
        """The error of a failed reset. No step is played after it; earlier transitions are kept."""
        with Closing() as closing:
            closing.callback(self.close)
            self._reset(range(len(names)))
            closing.pop_all()
        self.observations = stack([slot.observation for slot in self.slots])
        """What the policy sees next, leaves `[S * N, ...]`."""

    def must_fit(self, row: Mapping[str, Any], shared: bool) -> Self:
        """Return itself; raises `EnvironmentMismatchError`, and is closed, if its spaces are not those of a `row`.

        `shared`: an evaluation will run beside training. Raises `ConfigError` if the environment is hardware.
        """
        with Closing() as closing:
            closing.callback(self.close)
            if shared and not self.replayable:
                raise ConfigError(BESIDE)
            found, space = jax.tree.map(np.shape, self.slots[0].observation), self.slots[0].env.action_space
            check_fits(row, found, space.shape)
            closing.pop_all()
        return self

    @property
    def replayable(self) -> bool:
        """Whether every environment can play an episode again; else it is hardware, which evaluation moves as well."""
        return all(slot.replayable for slot in self.slots)

    def may_move(self) -> None:
        """Note that an evaluation is about to move hardware; raises the fault that keeps it from being moved at all."""
        if self.replayable:
            return
        if self.fault is not None:
            raise self.fault
        self.hold()
        self.displaced = True

    def hold(self) -> None:
        """Let every robot hold still: no step comes for a while, or none any more."""
        for slot in self.slots:
            stop_robot(slot.env)

    def pause(self) -> None:
        """Prepare for something that takes longer than a step: hardware holds still, and begins its episodes anew."""
        if not self.replayable and any(slot.actions for slot in self.slots):
            self.hold()
            self.displaced = True

    def begin_anew(self) -> None:
        """Break off all episodes and begin the next ones."""
        try:
            self._reset(range(len(self.slots)))
        except BaseException as error:
            self.fault = error
            raise
        self.observations = stack([slot.observation for slot in self.slots])

    def _reset(self, indices: Sequence[int]) -> None:
        """Begin the next episode of these indices."""
        seeds = {index: self.slots[index].begin() for index in indices}
        if self.crew is None:
            for index, seed in seeds.items():
                self.slots[index].began(self.slots[index].env.reset(seed=seed)[0])
            return
        for index, observation in self.crew.reset(seeds).items():
            self.slots[index].began(observation)

    def step(
        self, actions: np.ndarray, finished: Callable[[int, dict[str, Any]], None]
    ) -> tuple[dict[str, Any], np.ndarray]:
        """Play `actions` `[S * N, A]`; return transitions, leaves `[S * N, ...]`, and which episodes ended `[S * N]`.

        Ended episodes are reported to `finished(index, row)` and reset; transitions keep the true last observation.
        If an environment fails, no slot records this step, so the run can be saved as it stood; the simulators are not
        moved back. If one fails to begin its next episode, this step is whole, and the next one raises the error.
        """
        self.send(actions)
        return self.receive(finished)

    def send(self, actions: np.ndarray) -> None:
        """Hand out `actions` `[S * N, A]`. Processes begin their step now; environments here take it in `receive`."""
        if self.fault is not None:
            raise self.fault
        self._actions = actions
        if self.crew is not None:
            self.crew.send(actions)

    def receive(self, finished: Callable[[int, dict[str, Any]], None]) -> tuple[dict[str, Any], np.ndarray]:
        """Return what became of the actions that were sent, as `step` does."""
        results = self._results()
        rows = {
            "observations": self.observations,
            "actions": np.stack([result.action for result in results]),
            "rewards": np.asarray([result.reward for result in results], np.float32),
            "masks": np.asarray([1.0 - result.terminated for result in results], np.float32),
            "next_observations": stack([result.next_observation for result in results]),
            "ends": np.asarray([result.ended for result in results], np.float32),
        }
        ended = np.asarray([result.ended for result in results])
        self.intervened = np.asarray([result.intervened for result in results])
        for index, result in enumerate(results):
            if result.ended:
                finished(index, self.slots[index].row(result.terminated))
        try:
            self._reset(np.flatnonzero(ended).tolist())
        except BaseException as error:  # the transitions that were played are not lost by it
            self.fault = error
        self.observations = stack([slot.observation for slot in self.slots])
        return rows, ended

    def _results(self) -> list[Step]:
        """Return every index's step; if one fails, all are as they were before."""
        actions, self._actions = self._actions, None
        assert actions is not None
        results: list[Step] = []
        before = [dict(vars(slot)) for slot in self.slots]
        try:
            here = (slot.env.step(action) for slot, action in zip(self.slots, actions, strict=True))
            outcomes = here if self.crew is None else self.crew.receive()
            for slot, action, outcome in zip(self.slots, actions, outcomes, strict=True):
                results.append(slot.played(action, outcome))
        except BaseException:
            for slot, old in zip(self.slots, before, strict=True):
                vars(slot).update(old)
            for slot in self.slots[: len(results)]:
                slot.actions.pop()
            self.hold()
            raise
        return results

    def snapshot(self) -> dict[str, Any]:
        """Return what `restore` needs, JSON-able."""
        return {"slots": [slot.snapshot() for slot in self.slots]}

    def restore(self, snapshot: dict[str, Any], observations: Any) -> list[bool]:
        """Put every environment back; which of them stand exactly where they stood."""

        def restore(index: int) -> bool:
            seen = jax.tree.map(lambda leaf: np.asarray(leaf[index]), observations)
            return self.slots[index].restore(snapshot["slots"][index], seen)

        if self.crew is None:
            same = [restore(index) for index in range(len(self.slots))]
        else:
            with ThreadPoolExecutor(len(self.crew.shares)) as pool:  # a thread waits for the answers of its process
                parts = pool.map(lambda share: [restore(index) for index in share], self.crew.shares)
                same = [stands for part in parts for stands in part]
        self.observations = stack([slot.observation for slot in self.slots])
        return same

    def close(self) -> None:
        """Close the environments, every one; robots hold still first."""
        self.hold()
        with ExitStack() as closing:
            for slot in self.slots:
                closing.callback(slot.env.close)
            if self.crew is not None:
                closing.callback(self.crew.close)
