"""A trained policy outside of o2o's loops: the environment's own observations in, its own actions out."""

from typing import Any

import numpy as np

from o2o.data.spaces import STATE
from o2o.errors import EnvironmentFaultError
from o2o.policies.base import RunSource
from o2o.policies.source import first_bad


class TrainedPolicy:
    """One agent of a run (`o2o.runs.session.load_policy`) that acts as in o2o's evaluations, for any loop or robot.

    It does by itself what o2o's environments do around an agent: observations flattened, normalised and joined to
    their history, the base asked, chunks played to their end, actions in the environment's units and within its bounds.
    Where an evaluation plays several episodes side by side, the last bits of its actions may be others.
    """

    def __init__(self, source: RunSource) -> None:
        """Act with the agent of `source`, an episode having begun."""
        self._policy, self._spec = source.policy(source.data), source.data.observation_spec
        self.reset()

    def reset(self, seed: int = 0) -> None:
        """Begin an episode: history, chunk and base anew; to be called after every reset of the environment.

        `seed` of that reset; it matters only to what draws in spite of acting by its mode (EXPO, PEX, a sampling base).
        """
        self._policy.reset(int(np.random.default_rng(seed).integers(2**31)))  # as `o2o.envs.BaseAction` does

    def interrupt(self) -> None:
        """Drop what is left of a chunk, the base's too: a human has taken over since it was planned."""
        self._policy.interrupt()

    def act(self, observation: Any) -> np.ndarray:
        """Return the action `[*shape]`, float32, for one observation as the environment gives it, of a Dict the dict.

        Raises `EnvironmentMismatchError` unless it has the entries and shapes of the run's dataset, images uint8;
        `EnvironmentFaultError` if a number of it is not finite, of which nothing is remembered; `DivergenceError` if
        the action is not.
        """
        seen = self._spec.flatten(observation)
        state = seen.get(STATE) if isinstance(seen, dict) else seen
        if state is not None and (bad := first_bad(state)) is not None:
            raise EnvironmentFaultError(
                f"the observation has {bad}, for which there is no action: look at the sensors, and act again when all "
                "of them have readings"
            )
        return np.asarray(self._policy.act(seen))
