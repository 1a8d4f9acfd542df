"""One simulator for training and evaluation, where no second one can run: a fixed port, a single licence."""

from typing import Any

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec

from o2o.errors import EnvironmentFaultError


class OneSimulator:
    """Makes one simulator and gives each caller a `Share` of it; it is closed when the last share is."""

    def __init__(self) -> None:
        """Begin without a simulator."""
        self._env: gym.Env | None = None
        self.shares: list[Share] = []
        """The shares that are not closed."""
        self.playing: Share | None = None
        """Whose episode it plays."""

    def __call__(self, spec: EnvSpec, **kwargs: Any) -> "Share":
        """Return one more share; the first call makes the simulator as `gymnasium.make` does."""
        if self._env is None:
            self._env = gym.make(spec, **kwargs)
        self.shares.append(share := Share(self._env, self))
        return share

    def give_back(self, share: "Share") -> None:
        """Take a share back, once."""
        if share in self.shares:
            self.shares.remove(share)
            if not self.shares and self._env is not None:
                env, self._env = self._env, None
                env.close()


class Share(gym.Wrapper):
    """A simulator that others use as well, in turns: a reset takes it over and breaks off the others' episode.

    It says of itself what hardware says (metadata `replayable` False), so evaluation and training take turns.
    """

    def __init__(self, env: gym.Env, owner: OneSimulator) -> None:
        """Share `env` with the other shares of `owner`."""
        super().__init__(env)
        self.owner = owner
        self.metadata = {**env.metadata, "replayable": False}

    @property
    def spec(self) -> EnvSpec | None:
        """The specification of the simulator; sharing changes nothing that it says."""
        return self.env.spec

    def reset(self, **kwargs: Any) -> Any:
        """Begin an episode."""
        self.owner.playing = self
        return self.env.reset(**kwargs)

    def step(self, action: Any) -> Any:
        """Play a step. Raises `EnvironmentFaultError` if another share has begun an episode since."""
        if self.owner.playing is not self:
            raise EnvironmentFaultError("the one simulator was reset by another user of it: reset it before a step")
        return self.env.step(action)

    def close(self) -> None:
        """Give the share back."""
        self.owner.give_back(self)
