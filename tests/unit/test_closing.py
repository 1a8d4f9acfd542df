"""What is closed: all of it, whatever one of the environments raises there, and a fault stays the one reported."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import jax.numpy as jnp
import numpy as np
import pytest

from o2o import envs
from o2o.closing import Closing
from o2o.data import datasets
from o2o.data.recorder import EPISODES, RECORDED
from o2o.errors import DivergenceError, EnvironmentFaultError, EnvironmentMismatchError, RunError
from o2o.runs import session
from o2o.runs.session import RunConfig
from o2o.train.collect import Fleet
from o2o.train.evaluation import EnvFn, evaluate
from tests.system.test_evaluate import Pendulum
from tests.system.test_takeovers import TASK, Arm

Maker = Callable[..., RunConfig]


def stuck(folder: Path, bad: int) -> EnvFn:
    """Return a maker of arms that note in `folder` when they are closed; that of number `bad` raises then."""
    made = list[gym.Env]()

    class Stuck(gym.Wrapper):
        def close(self) -> None:
            number = made.index(self)
            (folder / str(number)).touch()
            if number == bad:
                raise RuntimeError("brake stuck")

    def make(evaluation: bool) -> gym.Env:
        made.append(Stuck(Arm()))
        return envs.wrap(made[-1], TASK, evaluation=evaluation)

    return make


def closed(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("fault", [False, True])
def test_failing_close_during_training(
    fault: bool,
    embedded: str,
    tiny_run: Maker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A failing close leaves no robot open and no half episode unwritten.

    Two environments are made to see that there can be two. The third is the evaluation's, the fourth the training's,
    which fails in a step or not.
    """
    env = envs.make(datasets.info(embedded))
    kind, made, done, steps = type(env.unwrapped), list[Any](), list[int](), list[int]()
    env.close()
    init, step, close = kind.__init__, kind.step, kind.close

    def making(self: Any, *args: Any, **kwargs: Any) -> None:
        made.append(self)
        init(self, *args, **kwargs)

    def stepping(self: Any, action: Any) -> Any:
        steps.append(made.index(self))
        if fault and steps.count(3) == 12:
            raise OSError("gripper lost contact")
        return step(self, action)

    def closing(self: Any) -> None:
        done.append(made.index(self))
        close(self)
        if made.index(self) == 2:
            raise RuntimeError("brake stuck")

    for name, changed in (("__init__", making), ("step", stepping), ("close", closing)):
        monkeypatch.setattr(kind, name, changed)
    monkeypatch.setitem(kind.metadata, "replayable", False)
    run, words = tiny_run("bc", offline_steps=10, online_steps=30, record=True), "RuntimeError: brake stuck as it was c"
    if fault:
        with pytest.raises(EnvironmentFaultError, match="OSError: gripper lost contact at step"):
            session.train(run, tmp_path / "run")
    else:
        assert session.train(run, tmp_path / "run")
    assert sorted(done) == [0, 1, 2, 3]
    assert (tmp_path / "run" / RECORDED).exists() == (not fault)
    (episode,) = (tmp_path / "run" / EPISODES).glob("*.npz")
    assert np.load(episode)["rewards"].size == (11 if fault else 30)
    assert any(told.startswith("besides, while closing: " if fault else "while closing: ") for told in caplog.messages)
    assert words in caplog.text


def test_evaluation_closes_all_envs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An evaluation closes all its environments, also where one cannot be closed."""
    for name in ("whole", "diverged"):
        (tmp_path / name).mkdir()
    rows = evaluate(Pendulum(gains=jnp.zeros(2)), stuck(tmp_path / "whole", 2), episodes=4)
    assert len(rows) == 4 and closed(tmp_path / "whole") == {"0", "1", "2", "3"}
    assert "RuntimeError: brake stuck as it was closed" in caplog.text
    caplog.clear()
    with pytest.raises(DivergenceError, match="action has nan in entry 0"):
        evaluate(Pendulum(gains=jnp.full(2, jnp.nan)), stuck(tmp_path / "diverged", 0), episodes=2)
    assert closed(tmp_path / "diverged") == {"0", "1"}
    assert caplog.messages[0].startswith("besides, while closing: environment Arm raised")


def test_mismatch_reported_despite_close(tmp_path: Path) -> None:
    """What does not fit is said, though it cannot be closed."""
    fleet = Fleet(stuck(tmp_path, 1), 0, 3)
    row = {"observations": np.zeros(7), "actions": np.zeros(1)}
    with pytest.raises(EnvironmentMismatchError, match=r"gives observations \(2,\)"):
        fleet.must_fit(row, False)
    assert closed(tmp_path) == {"0", "1", "2"}


def test_process_closes_all_envs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A process closes all its environments."""
    fleet = Fleet(stuck(tmp_path, 1), 0, 3, processes=1)
    fleet.close()
    assert closed(tmp_path) == {"0", "1", "2"}
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "brake stuck as it was closed" in error


def test_interruption_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    """An interruption stays one where closing fails as well."""

    def failing() -> None:
        raise OSError("disk gone")

    with pytest.raises(KeyboardInterrupt), Closing() as closing:
        closing.callback(failing)
        raise KeyboardInterrupt
    assert caplog.messages == ["besides, while closing: disk gone"]
    caplog.clear()
    with Closing() as closing:
        closing.callback(failing)
    assert caplog.messages == ["while closing: disk gone"]
    caplog.clear()

    def unkept() -> None:
        raise RunError("cannot record")

    with pytest.raises(RunError, match="cannot record"), Closing() as closing:
        closing.callback(unkept)
    with pytest.raises(KeyboardInterrupt), Closing() as closing:
        closing.callback(unkept)
        raise KeyboardInterrupt
    assert caplog.messages == ["besides, while closing: cannot record"]
