"""An environment that its package cannot make says why, whatever it raised."""

import gymnasium as gym
import pytest

from o2o import envs
from o2o.errors import ConfigError


class Bare(gym.Env):
    """Fails as gymnasium-robotics does with a MuJoCo that is too new: an assertion without a text."""

    def __init__(self) -> None:
        raise AssertionError


def test_reason_of_bare_assertion(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception without a text is named by its type."""
    monkeypatch.setitem(gym.registry, "Bare-v0", gym.envs.registration.EnvSpec("Bare-v0", Bare))
    with pytest.raises(ConfigError, match=r"Bare-v0 cannot be made \(AssertionError"):
        envs.make("Bare-v0")
