"""More inputs of the kinds that people meet: each is one right line, or has the right value."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces

from o2o import trust
from o2o.agents.sac import positive, positive_model
from o2o.cli import main, parse_train
from o2o.config import LoopConfig, RunConfig, with_fields
from o2o.data import datasets
from o2o.data.datasets import Episode
from o2o.data.spaces import ObservationSpec
from o2o.data.task import Task
from o2o.envs.wrappers import FaultGuard
from o2o.errors import ConfigError, DatasetError, EnvironmentFaultError, EnvironmentMismatchError, RunError
from o2o.files import read_object, read_rows
from o2o.nn.modules import CriticEnsemble
from o2o.report.jobs import folders
from o2o.train import memory
from o2o.user_code import import_module, origin

T, NAME = 6, "lab/more-v0"


def write(root: Path, shape: tuple[int, ...], edit: Callable[[Any], None] = lambda _: None, **about: Any) -> np.ndarray:
    """Write two episodes with actions `[T, *shape]`, edit file and metadata, and return the actions `[2 * T, A]`."""
    rng, last = np.random.default_rng(0), np.arange(T) == T - 1
    episodes = [
        Episode(
            rng.normal(size=(T + 1, 3)),
            rng.uniform(-0.9, 0.9, (T, *shape)).astype(np.float32),
            np.zeros(T),
            np.zeros(T, bool),
            last,
            success=last,
        )
        for _ in range(2)
    ]
    bounds = {"observation_space": spaces.Box(-10, 10, (3,), np.float64), "action_space": spaces.Box(-1, 1, shape)}
    datasets.write(NAME, episodes, **bounds, spec=None, root=root)
    data = root / NAME / "data"
    with h5py.File(data / "main_data.hdf5", "a") as file:
        for name in list(file):
            edit(file[name])
    metadata = json.loads((data / "metadata.json").read_text())
    (data / "metadata.json").write_text(json.dumps({**metadata, **about}))
    return np.concatenate([episode.actions.reshape(T, -1) for episode in episodes])


def reshaped(*shape: int) -> Callable[[Any], None]:
    """An edit that stores the actions as `[T, *shape]`."""

    def edit(episode: Any) -> None:
        actions = episode["actions"][:]
        del episode["actions"]
        episode["actions"] = actions.reshape(T, *shape)

    return edit


@pytest.mark.parametrize(("space", "stored"), [((1,), ()), ((2,), (2, 1)), ((2, 3), (6,)), ((2, 3), (2, 3))])
def test_actions_in_other_shapes(tmp_path: Path, space: tuple[int, ...], stored: tuple[int, ...]) -> None:
    """Actions with an axis of one more or less, or flat, are those of the space, in order."""
    actions = write(tmp_path, space, reshaped(*stored))
    assert datasets.check(NAME, tmp_path) == []
    loaded = datasets.load(NAME, root=tmp_path, cache=False).arrays["actions"]
    np.testing.assert_allclose(loaded, actions, atol=1e-6)


def column(name: str, value: Any) -> Callable[[Any], None]:
    """An edit that replaces a column."""

    def edit(episode: Any) -> None:
        del episode[name]
        episode[name] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (column("actions", 3.0), r"actions have shape \(\), expected one action for each of 6 steps"),
        (column("infos/success", np.zeros((T, 0), bool)), r"infos/success has shape \(6, 0\) for 6 steps"),
        (column("terminations", np.full(T, np.nan)), r"terminations has the value nan, expected true or false"),
        (column("truncations", np.full(T, 2)), r"truncations has the value 2, expected true or false"),
    ],
)
def test_columns_named(tmp_path: Path, edit: Callable[[Any], None], message: str) -> None:
    """A column without values, or with others, is refused by name, in plain numbers."""
    write(tmp_path, (2,), edit)
    with pytest.raises(DatasetError, match=f"episode 0: {message}"):
        datasets.load(NAME, root=tmp_path, cache=False)
    assert any("episode 0" in line for line in datasets.check(NAME, tmp_path))


@pytest.mark.parametrize(
    "about",
    [
        {"total_episodes": 1.5},
        {"author": 3},
        {"dataset_id": "\ud800"},
        {"vouched": ["\ud800"]},
        {"description": "\udcff"},
    ],
)
def test_odd_metadata_one_line(tmp_path: Path, about: dict[str, Any]) -> None:
    """Odd values in the metadata are one printable line at every door."""
    write(tmp_path, (2,), **about)
    for door in (datasets.load, datasets.describe):
        with pytest.raises(DatasetError) as caught:
            door(NAME, root=tmp_path)
        assert str(caught.value).encode() and "\n" not in str(caught.value)
    assert len(datasets.check(NAME, tmp_path)) >= 1


def test_metadata_steps_beyond_memory(tmp_path: Path) -> None:
    """A number of steps that no memory holds changes no row."""
    actions = write(tmp_path, (2,), total_steps=2**62)
    np.testing.assert_allclose(datasets.load(NAME, root=tmp_path, cache=False).arrays["actions"], actions, atol=1e-6)


@pytest.mark.parametrize("weights", [[np.nan], [np.inf], [-1.0], [0.0]])
def test_weights_without_sense(tmp_path: Path, weights: list[float]) -> None:
    """Weights that are no shares are refused."""
    write(tmp_path, (2,))
    with pytest.raises(DatasetError, match="weights"):
        datasets.load([NAME], weights=weights, root=tmp_path, cache=False)


@pytest.mark.parametrize("shape", [(24, 64, 3), (16, 16, 3), (3, 20, 20), (20, 20, 1), (2, 24, 24, 3)])
def test_small_pictures_refused(shape: tuple[int, ...]) -> None:
    """Pictures of floats with an axis of colours are no hundreds of numbers, however small."""
    with pytest.raises(EnvironmentMismatchError, match=r"looks like an image, float32 of shape .*uint8"):
        ObservationSpec.from_space(spaces.Dict({"cam": spaces.Box(0, 1, shape, np.float32)}))
    grey = spaces.Box(0, 1, (16, 20), np.float32)
    assert ObservationSpec.from_space(grey).state_dim == 320


def test_half_characters_in_files(tmp_path: Path) -> None:
    """Texts that cannot be printed are one line that can; whole ones are read."""
    (path := tmp_path / "x.json").write_text('{"name": "\\ud800"}')
    with pytest.raises(RunError, match="half a character") as caught:
        read_object(path)
    assert str(caught.value).encode()
    path.write_text('{"name": "\\u00e9 \\ud83d\\ude00"}')
    assert read_object(path) == {"name": "é \N{GRINNING FACE}"}
    path.write_text('{"a": "\\ud800"}\n{"a": 1}\n')
    with pytest.raises(RunError, match=r"line 1: not JSON"):
        read_rows(path)
    assert not trust.vouched("\ud800", ["m:f"])


class Ends(gym.Env):
    """An environment whose step or reset raises what it was given."""

    observation_space = action_space = spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, error: BaseException, at: str) -> None:
        self.error, self.at = error, at

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        if self.at == "reset":
            raise self.error
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        raise self.error


class Cancelled(BaseException):
    """As of asyncio."""


@pytest.mark.parametrize("error", [SystemExit(0), SystemExit("stop"), Cancelled("gone")], ids=repr)
@pytest.mark.parametrize("at", ["reset", "step"])
def test_environment_ends_evaluation(error: BaseException, at: str) -> None:
    """What would end the process is a fault of the environment, wherever it plays; Ctrl-C stays one."""
    env = FaultGuard(Ends(error, at))
    with pytest.raises(EnvironmentFaultError, match=rf"environment Ends raised {type(error).__name__}: {error}"):
        env.reset()
        env.step(np.zeros(1))
    with pytest.raises(KeyboardInterrupt):
        FaultGuard(Ends(KeyboardInterrupt(), "step")).step(np.zeros(1))


def test_module_ends_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`sys.exit` in a module of the user's own, or in an environment's constructor, is one line."""
    (tmp_path / "leaving_module.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"'leaving_module' cannot be imported \(SystemExit: 0\)"):
        import_module("leaving_module")

    def leave(**_: Any) -> gym.Env:
        sys.exit(0)

    gym.register("Leaving-v0", leave, max_episode_steps=5)
    try:
        from o2o import envs

        with pytest.raises(ConfigError, match=r"Leaving-v0 cannot be made \(it ends the process \(SystemExit\(0"):
            envs.make("Leaving-v0")
    finally:
        del gym.registry["Leaving-v0"]


def test_package_that_looks_like_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`name.py:ID` leads to the package `name` where there is no such file: it is code like any other."""
    (tmp_path / "looks").mkdir()
    (code := tmp_path / "looks" / "__init__.py").write_text("")
    monkeypatch.chdir(tmp_path)
    assert origin("looks.py:ID") == os.path.realpath(code) == origin("looks:ID")
    (tmp_path / "file.py").write_text("")
    assert origin("file.py:act") == os.path.realpath("file.py")
    assert origin("nowhere.py:act") is None


def test_origin_follows_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module found through a link is the same code."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "linked_module.py").write_text("")
    (tmp_path / "link").symlink_to("real")
    monkeypatch.syspath_prepend(str(tmp_path / "link"))
    assert origin("linked_module:ID") == os.path.realpath(tmp_path / "real" / "linked_module.py")


def test_training_needs_an_agent(capsys: pytest.CaptureFixture[str]) -> None:
    """`o2o train` with options and without an agent has done nothing, and says so."""
    for args in (["--dataset", "x"], ["--preset", "small", "sac"]):
        with pytest.raises(SystemExit) as ended:
            main(["train", *args])
        assert ended.value.code == 2
        assert capsys.readouterr().err.startswith("o2o: error: o2o train: no agent; name one first")


def test_long_default_names_keep_the_seed(embedded: str, tmp_path: Path) -> None:
    """The default name of a run on many datasets still tells seeds apart, in bytes that a folder can have."""
    paths = [tmp_path / ("é" * 30 + str(number)) for number in range(6)]
    for path in paths:
        path.symlink_to(datasets.default_root() / embedded)
    names = set()
    for seed in ("0", "1"):
        args = ["--dataset", *map(str, paths), "--preset", "small", "--seed", seed, "--runs", str(tmp_path)]
        path, _ = parse_train("bc", args)
        assert path.name.startswith("bc-é") and path.name.endswith(f"-{seed}") and len(os.fsencode(path.name)) <= 200
        names.add(path.name)
    assert len(names) == 2


def test_texts_of_numpy() -> None:
    """Texts from NumPy (tables of a sweep) are texts."""
    run = RunConfig(agent=np.str_("bc"), config=None, dataset=("x",), action_range=np.str_("data"))  # pyright: ignore
    assert type(run.agent) is str and type(run.action_range) is str
    with pytest.raises(ConfigError, match="'Data'; expected space or data"):
        replace(run, action_range="Data")  # pyright: ignore


def test_valid_extremes() -> None:
    """What is unusual and right stays allowed."""
    run = RunConfig(agent="bc", config=None, dataset=("x",), seed=2**31 - 1, offline_steps=0, online_steps=0)
    changed = with_fields(run, {"task": {"reward_bias": -5, "reward_scale": -1}, "loop": {"eval_every": 0}})
    assert changed.task.reward_bias == -5.0 and changed.loop == LoopConfig(eval_every=0)
    assert float(Task("x", reward_scale=-1, reward_bias=-5).rewards(2.0)) == -7.0


def test_memory_of_containers(tmp_path: Path) -> None:
    """Files that the system keeps in memory can be dropped: they are free. No limit is no answer."""
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 100\ninactive_file 700\nactive_file 50\n")
    names = memory.CONTAINERS[0][1:]
    assert memory._of_container(tmp_path, *names) == 800
    (tmp_path / "memory.current").write_text("2000\n")
    assert memory._of_container(tmp_path, *names) == 0
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._of_container(tmp_path, *names) is None


def test_results_stay_where_they_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A suite's folders are absolute: an environment that changes the working folder moves nothing."""
    monkeypatch.chdir(tmp_path)
    results, runs = folders(Path("out"))
    assert (results, runs) == (tmp_path / "out", tmp_path / "out" / "runs")


def test_messages_printed_once() -> None:
    """A handler that a library gives to the root logger later (absl does) does not print o2o's messages again."""
    code = (
        "import logging; from o2o.cli import logging_to_stderr\n"
        "with logging_to_stderr():\n"
        "    logging.basicConfig()\n"
        "    logging.getLogger('o2o.x').warning('set `task.achieved_goal`')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "o2o: set --task.achieved-goal\n"


@pytest.mark.parametrize("initial", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize("param", ["exp", "softplus"])
def test_multipliers_begin_where_told(initial: float, param: Any) -> None:
    """A multiplier of any size begins at its setting."""
    free = positive_model(jax.random.key(0), initial, param, 1e-3).params["params"]["value"]
    assert float(positive(free, param)) == pytest.approx(initial, rel=1e-3)


def test_linear_critics() -> None:
    """Critics without hidden layers are linear, each its own."""
    critics = CriticEnsemble((), num=2, shared_output=True)
    params = critics.init(jax.random.key(0), jnp.zeros((1, 3)), jnp.zeros((1, 2)))
    values = critics.apply(params, jnp.eye(3), jnp.zeros((3, 2)))
    kernel, bias = params["params"]["output"]["kernel"], params["params"]["output"]["bias"]
    np.testing.assert_allclose(values, kernel[:, :3, 0] + bias, rtol=1e-6)
    assert values.shape == (2, 3) and not np.allclose(values[0], values[1])
