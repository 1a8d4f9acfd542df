"""How a run makes its environments, here or in another process."""

from collections.abc import Callable
from dataclasses import dataclass

import gymnasium


@dataclass(frozen=True, eq=False)
class EnvMaker:
    """Makes a run's environments. It can be pickled and holds no rows of a dataset."""

    make: Callable[..., gymnasium.Env]
    """Called with `evaluation`, with `inner` (`o2o.envs.wrap`) for training, and with what else a caller gives."""
    recorder: Callable[[gymnasium.Env], gymnasium.Env] | None = None
    """The `inner` of training environments."""
    outside: Callable[[gymnasium.Env], gymnasium.Env] | None = None
    """A wrapper around the whole environment."""

    def __call__(self, evaluation: bool, **options: object) -> gymnasium.Env:
        """Make one environment; `evaluation` says what it is for."""
        recorder = {} if self.recorder is None or evaluation else {"inner": self.recorder}
        env = self.make(evaluation=evaluation, **recorder, **options)
        return env if self.outside is None else self.outside(env)
