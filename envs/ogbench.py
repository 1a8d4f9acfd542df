"""OGBench's manipulation (arXiv 2410.20092): its play data, made with the oracles of its wheel, and the tasks in it.

The settings are those of `data_gen_scripts` of seohongpark/ogbench 1.2.1. The loop over the oracles is ours: every
episode has random numbers of its own, so that any number of processes makes the same set. One set is stored for each
scene; `o2o.data.views` reads it as any of the scene's tasks.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
from filelock import FileLock, Timeout
from gymnasium.envs.registration import EnvSpec

from o2o.data import files, views
from o2o.data.datasets import tell_versions
from o2o.data.files import Episode
from o2o.data.recorder import read_episode, write_episode
from o2o.data.task import Part, judge
from o2o.errors import ConfigError, DatasetError, suggest
from o2o.files import write_atomically

EPISODE_STEPS = 1000
"""Transitions of an episode; its last observation is the 1001st row of the authors' files."""
WITHIN = 0.04
"""Metres from its goal within which a cube, the drawer or the window counts as there."""
ARM = 14
"""Entries of `qpos` before those of the objects: arm and gripper."""
CUBE = 7
STATES = ("qpos", "qvel", "button_states")
HEADER, LOCK = "make.json", "lock"
POLL_S = 0.2
SLACK = 4_000_000
"""Bytes beyond the numbers of a set that HDF5 may take, and some for others who write to the disk."""
EXTRA = "pip install 'o2o[ogbench]'"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Play:
    """How the play data of a scene are made."""

    env: str
    """The scene: its environment is `<env>-v0`, its tasks are `<env>-singletask-task1-v0` and so on."""
    episodes: int = 1000
    """Episodes for training; a tenth as many more are for validation."""
    p_stack: tuple[float, float] = (0.5, 0.5)
    """Range from which an episode draws its probability of stacking a cube on another."""
    noise: float = 0.1
    noise_smoothing: float = 0.5


PLAYS = {
    "cube-single-play": Play("cube-single", p_stack=(0.0, 0.0)),
    "cube-double-play": Play("cube-double", p_stack=(0.0, 0.25)),
    "cube-triple-play": Play("cube-triple", episodes=3000, p_stack=(0.05, 0.35)),
    "scene-play": Play("scene"),
    "puzzle-3x3-play": Play("puzzle-3x3"),
    "puzzle-4x4-play": Play("puzzle-4x4"),
}
"""Name (of `o2o data make ogbench/NAME`) and settings; the stored set is `ogbench/NAME-v0`."""


def wheel() -> ModuleType:
    """Return the package ogbench, which registers its environments. Raises `ConfigError` if it is not installed."""
    try:
        import ogbench
    except ImportError as error:
        raise ConfigError(f"OGBench's environments need the package ogbench ({error}): {EXTRA}") from error
    return ogbench


def versions() -> dict[str, str]:
    """Return the versions of what the data depend on."""
    found = {}
    for name in ("ogbench", "mujoco"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def play_id(name: str) -> tuple[str, str]:
    """Return the ids of a scene's sets, for training and for validation; raises `DatasetError` for an unknown scene."""
    scene = name.removeprefix(files.OGBENCH_PREFIX).removesuffix("-v0")
    if (whole := views.set_of(scene)) != scene and whole in PLAYS:
        raise DatasetError(
            f"{scene!r} is read from the set of its scene, which all its tasks share: `o2o data make ogbench/{whole}`"
        )
    if scene not in PLAYS:
        hint = suggest(scene, PLAYS)
        raise DatasetError(f"no play data of OGBench for {scene!r}; {hint} (`o2o data make ogbench/scene-play`)")
    return f"{files.OGBENCH_PREFIX}{scene}-v0", f"{files.OGBENCH_PREFIX}{scene}-val-v0"


def _env(play: Play) -> gym.Env:
    wheel()
    settings: dict[str, Any] = {"mode": "data_collection", "terminate_at_goal": False}
    return gym.make(f"{play.env}-v0", max_episode_steps=EPISODE_STEPS + 1, disable_env_checker=True, **settings)


class Player:
    """A scene and its oracles, which act in it episode by episode."""

    def __init__(self, play: Play) -> None:
        """Make the environment and the oracles. Raises `ConfigError` if ogbench is not installed."""
        self.env = _env(play)
        self._play = play
        from ogbench.manipspace.oracles.plan.button_plan import ButtonPlanOracle
        from ogbench.manipspace.oracles.plan.cube_plan import CubePlanOracle
        from ogbench.manipspace.oracles.plan.drawer_plan import DrawerPlanOracle
        from ogbench.manipspace.oracles.plan.window_plan import WindowPlanOracle

        settings: dict[str, Any] = {"noise": play.noise, "noise_smoothing": play.noise_smoothing}
        closed = play.env.startswith("puzzle")
        self._oracles: dict[str, Any] = {
            "cube": CubePlanOracle(env=self.env, **settings),
            "button": ButtonPlanOracle(env=self.env, gripper_always_closed=closed, **settings),
            "drawer": DrawerPlanOracle(env=self.env, **settings),
            "window": WindowPlanOracle(env=self.env, **settings),
        }

    def episode(self, seed: int, part: int, index: int, steps: int = EPISODE_STEPS) -> Episode:
        """Return episode `index` of a part (0 training, 1 validation), the same whoever makes it, and when.

        The oracles draw from NumPy's global generator, whose state is put back.
        """
        before = np.random.get_state()
        try:
            for attempt in count():
                numbers = np.random.SeedSequence([seed, part, index, attempt]).generate_state(2)
                found = self._play_once(int(numbers[0]), int(numbers[1]), steps)
                if self._play.env != "scene" or _in_reach(found):
                    return found
            raise AssertionError
        finally:
            np.random.set_state(before)

    def _play_once(self, seed: int, env_seed: int, steps: int) -> Episode:
        np.random.seed(seed)
        observation, info = self.env.reset(seed=env_seed)
        p_stack = np.random.uniform(*self._play.p_stack)
        oracle = self._oracles[info["privileged/target_task"]]
        oracle.reset(observation, info)
        observations, actions, states = [observation], [], []
        for _ in range(steps):
            action = np.clip(oracle.select_action(observation, info), -1.0, 1.0)
            observation, _, _, _, info = self.env.step(action)
            if oracle.done:
                target = self.env.unwrapped.set_new_target(p_stack=p_stack)  # pyright: ignore[reportAttributeAccessIssue]
                oracle = self._oracles[target[1]["privileged/target_task"]]
                oracle.reset(*target)
            states.append([info.get(f"prev_{key}") for key in STATES])
            actions.append(action)
            observations.append(observation)
        columns = zip(*states, [info.get(key) for key in STATES], strict=True)
        found = {key: np.asarray(column) for key, column in zip(STATES, columns, strict=True) if column[0] is not None}
        return Episode(
            observations=np.asarray(observations, np.float32),
            actions=np.asarray(actions, np.float32),
            rewards=np.zeros(steps, np.float32),
            terminations=np.zeros(steps, bool),
            truncations=np.arange(steps) == steps - 1,
            states={key: _small(column) for key, column in found.items()},
            seed=env_seed,
        )


def _small(column: np.ndarray) -> np.ndarray:
    return column.astype(np.float32 if column.dtype.kind == "f" else np.int8)


def _in_reach(episode: Episode) -> bool:
    """Whether the scene's cube never left the table for where no oracle reaches it (numerical instability)."""
    assert episode.states is not None
    _, y, z = episode.states["qpos"][:, ARM : ARM + 3].T
    return not np.any((y >= 0.29) | ((y <= -0.3) & ((z < 0.06) | (z > 0.08))))


def goals(play: Play) -> dict[str, tuple[EnvSpec, tuple[Part, ...]]]:
    """Return environment and goal of every task of a scene, by what follows the set's name: `singletask-task1`.

    `singletask` is the scene's default task.
    """
    wheel()
    default = f"{play.env}-singletask"
    env = gym.make(f"{default}-v0", disable_env_checker=True)
    inner: Any = env.unwrapped
    parts, chosen = [_parts(about) for about in inner.task_infos], inner._reward_task_id
    env.close()
    found = {"singletask": (gym.spec(f"{default}-v0"), parts[chosen - 1])}
    for number, goal in enumerate(parts, start=1):
        found[f"singletask-task{number}"] = gym.spec(f"{default}-task{number}-v0"), goal
    return found


def _parts(about: dict[str, Any]) -> tuple[Part, ...]:
    """Return the conditions of a task in terms of the simulator's state; `about` is its entry of `task_infos`."""
    goal = about.get("goal", about)
    cubes = goal.get("block_xyzs", goal.get("goal_xyzs", ()))
    buttons = goal.get("button_states", goal.get("goal_button_states", ()))
    parts = []
    for i, place in enumerate(cubes):
        at = ARM + CUBE * i
        parts.append(Part("qpos", (at, at + 1, at + 2), tuple(map(float, place)), WITHIN))
    parts += [Part("button_states", (i,), (float(state),)) for i, state in enumerate(buttons)]
    at = ARM + CUBE * len(cubes) + len(buttons)
    for name in ("drawer_pos", "window_pos"):
        if name in goal:
            parts.append(Part("qpos", (at,), (float(goal[name]),), WITHIN))
            at += 1
    return tuple(parts)


def make_play(
    name: str,
    root: str | Path | None = None,
    progress: Progress | None = None,
    steps: int | None = None,
    seed: int = 0,
    processes: int | None = None,
) -> tuple[str, str]:
    """Make the sets of a scene under a root, those that are not there yet, and return their ids.

    An interrupted call goes on with the next missing episode. `steps`: transitions for training, in whole episodes of
    1000 (fewer than 1000: one shorter episode); default: the authors' number. `processes`: default one for each core.
    `progress(done, total)` is called with counts of steps. Raises `DatasetError` if an id holds something else, there
    is no room, or it cannot be written; `ConfigError` if ogbench is not installed.
    """
    ids, play = play_id(name), PLAYS[name.removeprefix(files.OGBENCH_PREFIX).removesuffix("-v0")]
    length = EPISODE_STEPS if steps is None else min(steps, EPISODE_STEPS)
    train = play.episodes if steps is None else -(-steps // EPISODE_STEPS)
    counts = train, max(train // 10, 1)
    wheel()
    recipe = {**asdict(play), "p_stack": list(play.p_stack), "seed": seed, "episode_steps": length, **versions()}
    missing = [part for part in (0, 1) if not _is_there(ids[part], {**recipe, "episodes": counts[part]}, root)]
    if not missing:
        return ids
    work = files.work_folder(files.check_new(ids[missing[-1]], root).with_name(f"{play.env}-play-v0"), "making")
    job = _Job(play, seed, length, [(part, i) for part in missing for i in range(counts[part])], work)
    try:
        work.mkdir(parents=True, exist_ok=True)
        with FileLock(work / LOCK).acquire(timeout=0):
            _begin(work, recipe, ids[0])
            player = Player(play)
            _check_room(job, player)
            job.run(processes or os.cpu_count() or 1, player, progress or (lambda done, total: None))
            tasks = goals(play)
            for part in missing:
                _write(ids[part], job, part, {**recipe, "episodes": counts[part]}, player.env, tasks, root)
        shutil.rmtree(work, ignore_errors=True)
    except Timeout as error:
        raise DatasetError(f"{ids[0]} is being made by another process; wait for it") from error
    except OSError as error:
        raise DatasetError(
            f"{work}: {error.strerror or error}; free some space, or give another --root, and give the command again"
        ) from error
    return ids


def _is_there(dataset_id: str, recipe: dict[str, Any], root: str | Path | None) -> bool:
    """Whether a set is there; raises `DatasetError` if it was made otherwise. Other versions are no other recipe."""
    if dataset_id not in files.local_ids(root):
        return False
    about = files.info(dataset_id, root)
    made = about.metadata.get("recipe")
    made = made if isinstance(made, dict) else {}
    changed = [key for key in recipe if key not in versions() and made.get(key) != recipe[key]]
    if changed:
        told = ", ".join(f"{key} {made.get(key)}, not {recipe[key]}" for key in changed)
        raise DatasetError(
            f"dataset {dataset_id} exists but was made otherwise ({told}): delete its folder to make it anew, or give "
            "another --root"
        )
    tell_versions(about)
    return True


def _begin(work: Path, recipe: dict[str, Any], dataset_id: str) -> None:
    """Write what is being made, or raise `DatasetError` if what was begun here is something else."""
    path, header = work / HEADER, {key: value for key, value in recipe.items() if key != "episodes"}
    before = json.loads(path.read_text()) if path.exists() and any(work.glob("*.npz")) else header
    if changed := [
        f"{key} {before.get(key)}, not {value}" for key, value in header.items() if before.get(key) != value
    ]:
        raise DatasetError(
            f"{dataset_id} was begun with other settings ({', '.join(changed)}): give the command that began it, or "
            f"delete {work}"
        )
    write_atomically(path, json.dumps(header, indent=2))


def _check_room(job: "_Job", player: Player) -> None:
    """Raise `DatasetError` if the disk has no room: each episode lies there twice until the sets are whole."""
    model: Any = player.env.unwrapped
    model.reset()
    numbers = sum(np.prod(space.shape or ()) for space in (player.env.observation_space, player.env.action_space))
    row = 4 * (numbers + model.model.nq + model.model.nv + 8)
    done = len(job.done())
    _check_free(job.work.parent, int(row * job.steps * (2 * len(job.wanted) - done)))


def _check_free(folder: Path, needed: int) -> None:
    """Raise `DatasetError` unless a folder's disk takes so many bytes and `SLACK` more.

    A disk that is full when HDF5 closes its file ends the process, so this is looked at before each set is written.
    """
    free = shutil.disk_usage(folder).free
    if free < needed + SLACK:
        raise DatasetError(
            f"{folder} has {free / 1e6:.0f} MB free, and making the sets takes about {(needed + SLACK) / 1e6:.0f} MB: "
            "free some space and give the command again, or give another --root"
        )


@dataclass(frozen=True)
class _Job:
    """The episodes to make, each a file of its own in a hidden folder beside the set."""

    play: Play
    seed: int
    steps: int
    wanted: list[tuple[int, int]]
    """Part and index of each."""
    work: Path

    def file(self, part: int, index: int) -> Path:
        return self.work / f"{part}-{index:06d}.npz"

    def done(self) -> list[tuple[int, int]]:
        there = {path.name for path in self.work.glob("*.npz")}
        return [key for key in self.wanted if self.file(*key).name in there]

    def missing(self) -> list[tuple[int, int]]:
        done = set(self.done())
        return [key for key in self.wanted if key not in done]

    def play_missing(self, player: Player, keys: Sequence[tuple[int, int]]) -> Iterator[None]:
        """Make episodes and yield after each."""
        for part, index in keys:
            episode = player.episode(self.seed, part, index, self.steps)
            write_episode(self.file(part, index), player.env.observation_space, episode)
            yield

    def run(self, processes: int, player: Player, progress: Progress) -> None:
        """Make what is missing, in this process or in several others. Raises `DatasetError` if one of them fails."""
        tell = lambda: progress(len(self.done()) * self.steps, len(self.wanted) * self.steps)  # noqa: E731
        missing = self.missing()
        tell()
        processes = min(processes, len(missing))
        if processes <= 1:
            for _ in self.play_missing(player, missing):
                tell()
            return
        with _workers(self, [missing[i::processes] for i in range(processes)]) as workers:
            while any(worker.poll() is None for worker, _ in workers):
                time.sleep(POLL_S)
                tell()
                for worker, errors in workers:
                    if worker.poll():
                        errors.seek(0)
                        last = errors.read().decode(errors="replace").strip().splitlines()[-1:]
                        raise DatasetError(
                            f"a process that made episodes in {self.work} ended ({''.join(last) or worker.poll()}); "
                            "the same command goes on from there"
                        )


@contextlib.contextmanager
def _workers(job: _Job, shares: Sequence[Sequence[tuple[int, int]]]) -> Iterator[list[tuple[Any, Any]]]:
    """Start a process for each share of the episodes; those that still work at the end are ended."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from o2o.envs.ogbench import work; work()"]
    with contextlib.ExitStack() as stack:
        workers = []
        for share in shares:
            told = json.dumps({**asdict(job), "work": str(job.work), "wanted": share, "parent": os.getpid()}).encode()
            errors = stack.enter_context(tempfile.TemporaryFile())
            orders = stack.enter_context(tempfile.TemporaryFile())
            orders.write(told)
            orders.seek(0)
            worker = subprocess.Popen(command, stdin=orders, stdout=errors, stderr=errors, env=environment)
            stack.callback(worker.wait)
            stack.callback(worker.terminate)
            workers.append((worker, errors))
        yield workers


def work() -> None:
    """Make the episodes that standard input asks for: what one of the processes of `make_play` does."""
    told = json.load(sys.stdin)
    if os.getppid() != told["parent"]:
        return
    play = Play(**{**told["play"], "p_stack": tuple(told["play"]["p_stack"])})
    job = _Job(play, told["seed"], told["steps"], [(part, i) for part, i in told["wanted"]], Path(told["work"]))
    for _ in job.play_missing(Player(play), job.missing()):
        if os.getppid() != told["parent"]:  # it was killed
            return


def _write(
    dataset_id: str,
    job: _Job,
    part: int,
    recipe: dict[str, Any],
    env: gym.Env,
    tasks: dict[str, tuple[EnvSpec, tuple[Part, ...]]],
    root: str | Path | None,
) -> None:
    """Write the set of one part from the files of its episodes; it appears whole or not at all."""
    keys = [key for key in job.wanted if key[0] == part]
    _check_free(job.work.parent, sum(job.file(*key).stat().st_size for key in keys))

    def episodes() -> Iterator[Episode]:
        for key in keys:
            yield read_episode(job.file(*key), env.observation_space, env.action_space)

    reached = dict.fromkeys(tasks, 0)
    for episode in episodes():
        states = {name: column[:-1] for name, column in (episode.states or {}).items()}
        for task, (_, parts) in tasks.items():
            reached[task] += int(judge(parts, states)[1].sum())
    files.write_dataset(
        dataset_id,
        episodes(),
        observation_space=env.observation_space,
        action_space=env.action_space,
        spec=env.spec,
        root=root,
        metadata={
            "recipe": recipe,
            "made_with": versions(),
            "tasks": {
                task: {
                    "env_spec": spec.to_json(),
                    "goal": [asdict(part) for part in parts],
                    "goal_rows": reached[task],
                }
                for task, (spec, parts) in tasks.items()
            },
            "algorithm_name": "OGBench's plan oracles",
            "author": {"o2o"},
            "description": f"Play data of OGBench's {job.play.env}, made anew with the authors' settings (arXiv "
            "2410.20092): another draw, not their files.",
            "requirements": [f"{package}=={number}" for package, number in versions().items()],
        },
    )
