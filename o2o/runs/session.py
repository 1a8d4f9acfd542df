"""From settings to a finished run: the one place that joins data, tasks, environments, agents, loops and run folders.

The command line, the benchmarks and notebooks all come through here.
"""

import dataclasses
import logging
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from o2o import envs
from o2o.agents import AGENTS
from o2o.closing import Closing
from o2o.config import RunConfig, TaskConfig, from_dict, to_dict, with_fields
from o2o.data import datasets
from o2o.data.checks import check_data, returns_scale, summary
from o2o.data.history import check_length, with_history
from o2o.data.holdout import split
from o2o.data.normalizer import Normalizer
from o2o.data.recorder import EPISODES, Recorder, export, forget, next_number
from o2o.data.task import Task
from o2o.envs.maker import EnvMaker
from o2o.errors import ConfigError
from o2o.policies.base import Base, BasePolicy, base_labels, with_base_labels
from o2o.policies.exported import FILES, load_file
from o2o.policies.python import python_policy
from o2o.policies.run import RunPolicy, TrainedPolicy
from o2o.runs import init_from as warm_start
from o2o.runs.folder import REPLAY, RunFolder, StopFlag, guarded, read_config
from o2o.runs.loggers import Logger, Screen, evaluation_rows, make_loggers
from o2o.runs.presets import agent_class, cell_run, config_class, config_needs, preset_run
from o2o.train.collect import BESIDE
from o2o.train.episode import EVAL_STREAM, EnvSlot
from o2o.train.evaluation import Evaluator
from o2o.train.state import Hooks
from o2o.train.trainer import Trainer

log = logging.getLogger("o2o")

__all__ = ["RunConfig", "Session", "TaskConfig", "agent_class", "build", "cell_run", "config_class", "preset_run"]
__all__ += ["evaluate_run", "load_base", "load_config", "load_data", "load_policy", "open_run", "play_run", "resume"]
__all__ += ["train", "with_fields"]


def task_of(config: RunConfig) -> Task:
    """Return the task with the run's changes applied."""
    about = datasets.info(config.dataset[0])
    own = ("achieved_goal", "binary", "normalize_returns")
    changes = {k: v for k, v in vars(config.task).items() if v is not None and k not in own}
    binary = {} if config.task.binary is None else {"binary": config.task.binary}
    task = dataclasses.replace(envs.task_for(config.env or about, **binary), **changes)
    if config.task.normalize_returns is None or config.task.reward_scale is not None:
        return task
    scale = returns_scale(config.dataset, task, config.task.normalize_returns)
    return dataclasses.replace(task, reward_scale=scale)


def _check_scale(config: RunConfig) -> None:
    """Raise `ConfigError` if the reward scale was given too and is not what normalised returns ask for."""
    given, span = config.task.reward_scale, config.task.normalize_returns
    if given is None or span is None:
        return
    wanted = task_of(with_fields(config, [("task.reward_scale", None)])).reward_scale
    if given != wanted:
        raise ConfigError(
            f"task.reward_scale is {given:g}, but task.normalize_returns {span:g} asks for {wanted:g}: give one of them"
        )


def base_of(config: RunConfig) -> BasePolicy | None:
    """Return the base policy of a run, None if it has none.

    Raises `ConfigError` if its agent needs a base and there is none, or takes none and there is one.
    """
    takers = [name for name in AGENTS if config_needs(name).base_policy]
    agent_class(config.agent)
    if config.base is None and config.agent in takers:
        raise ConfigError(
            f"agent {config.agent} corrects a base policy, and there is none: give --base with a run folder, a .onnx "
            "or .pt file, or module:function"
        )
    if config.base is None:
        return None
    if config.agent not in takers:
        raise ConfigError(f"agent {config.agent} takes no base policy (base={config.base}); those that do: {takers}")
    return load_base(config.base, config.base_seed_index, config.base_sample)


def load_base(spec: Any, seed_index: int = 0, sample: bool = False) -> BasePolicy:
    """Return the base policy of a run folder, a `.onnx` or TorchScript `.pt` file, `module:name`, or a Python object.

    `seed_index`: which seed of a run, from 0. `sample`: draw from a run's policy in place of its mode. See
    `o2o.policies.python.python_policy` for what a Python object must do. Raises `ConfigError`, `RunError` or
    `CheckpointError`.
    """
    if callable(spec) or hasattr(spec, "act"):
        return python_policy(spec)
    path, text = Path(str(spec)), str(spec)
    if path.suffix in FILES and ":" not in text:
        return load_file(path)
    if path.is_dir():
        return run_policy(path, seed_index, sample)
    if ":" in text:
        return python_policy(text)
    raise ConfigError(
        f"base {spec!r} is none that o2o knows: give a run folder, a .onnx or .pt file, or module:function"
    )


def run_policy(path: Path, seed_index: int, sample: bool = False, which: str = "latest") -> RunPolicy:
    """Return the agent of one seed of a run at checkpoint `which` (`open_run`) as a base policy."""
    config, trainer = open_run(path, which)
    trainer.close()
    if not 0 <= seed_index < trainer.seeds:
        raise ConfigError(f"base_seed_index is {seed_index}; run {path} has {trainer.seeds} seed(s), numbered from 0")
    return RunPolicy.of(
        str(path),
        trainer.agent_of(seed_index),
        trainer.normalizer,
        trainer.data,
        history=config.history,
        deterministic=not sample,
        inner=base_of(config),
    )


def load_data(config: RunConfig, base: BasePolicy | None = None) -> datasets.Dataset:
    """Load the run's dataset with its task's rewards; observations get their history and the base's actions.

    `base`: the run's base policy, if it is loaded already.
    """
    check_length(config.history)
    if not 0.0 <= config.config.discount <= 1.0:
        raise ConfigError(f"config.discount is {config.config.discount}; expected 0 to 1, such as 0.99")
    if config.config.batch_size < 1:
        raise ConfigError(f"config.batch_size is {config.config.batch_size}; expected at least 1")
    base, needs = base or base_of(config), config.config.needs
    data = datasets.load(
        config.dataset,
        task=task_of(config),
        weights=config.weights or None,
        discount=config.config.discount if "mc_returns" in needs.batch_keys else None,
        achieved_goal=config.task.achieved_goal,
        clip_actions=config.clip_actions,
        action_range=config.action_range,
        action_margin=needs.action_margin,
    )
    if base is None:
        return with_history(data, config.history)
    labels = base_labels(base, data, config.base_labels, config.base_timeout_s)
    return with_base_labels(with_history(data, config.history), *labels)


def make_env(
    config: RunConfig, data: datasets.Dataset, base: BasePolicy | None = None, evaluation: bool = False, **options: Any
) -> Any:
    """Make one environment of a run; `options` go to `o2o.envs.make`. With a base, observations hold its action."""
    return env_maker(config, data, base)(evaluation, **options)


def env_maker(
    config: RunConfig, data: datasets.Dataset, base: BasePolicy | None = None, recorder: Any = None
) -> EnvMaker:
    """Return the maker of a run's environments; `recorder` goes around the training ones (`o2o.envs.wrap`, `inner`)."""
    make = partial(
        envs.make, config.env or data.info, data.task, achieved_goal=config.task.achieved_goal, dataset=data.info,
        history=config.history, action_map=data.action_map, cameras=config.cameras, image_size=config.image_size,
    )  # fmt: skip
    if base is None:
        return EnvMaker(make, recorder)
    return EnvMaker(
        make, recorder, partial(_with_base, policy=base, data=data.without_rows(), timeout_s=config.base_timeout_s)
    )


def _with_base(env: Any, policy: BasePolicy, data: datasets.Dataset, timeout_s: float | None) -> Any:
    return envs.BaseAction(env, Base(policy, data, timeout_s))


def without_environment(config: RunConfig, about: datasets.DatasetInfo) -> bool:
    """Whether a run makes no environment and is judged by offline estimates.

    Raises `ConfigError` if that is asked for together with an online phase.
    """
    if config.online_steps:
        if config.offline_estimate:
            raise ConfigError("offline_estimate is for runs without an online phase: set --online-steps 0 too")
        return False
    return config.offline_estimate or (config.env or about.eval_env_spec or about.env_spec) is None


def build(
    config: RunConfig,
    data: datasets.Dataset | None = None,
    hooks: Hooks | None = None,
    folder: Path | None = None,
    base: BasePolicy | None = None,
    begins: bool = True,
) -> Trainer:
    """Return the trainer of a run, nothing done yet; `folder` is for what it records and for replay on disk.

    `data` and `base` spare loading what the settings name once more. Only where the run `begins`, and does not go on
    from a checkpoint of its online phase, are agents taken from its `init_from`.
    """
    base = base or base_of(config)
    found = data or load_data(config, base)
    comparable = config.env is None or envs.same_environment(config.env, found.info)
    scores = {key: found.info.metadata.get(key) if comparable else None for key in ("ref_min_score", "ref_max_score")}
    about = {"algorithm_name": config.agent, **{key: score for key, score in scores.items() if score is not None}}
    recorder = None
    if config.record and folder is not None:
        recorder = partial(Recorder, folder=folder / EPISODES, task=found.task, metadata=about)
    env_fn = env_maker(config, found, base, recorder)
    held = None
    if without_environment(config, found.info):
        found, held = split(found, config.holdout)
    normalizer = Normalizer.fit(found.arrays["observations"], floor=config.std_floor) if config.normalize else None
    trainer = Trainer(
        agent_class(config.agent), config.config, found, env_fn, seed=config.seed, seeds=config.seeds, loop=config.loop,
        normalizer=normalizer, hooks=hooks, storage=None if folder is None else folder / REPLAY, held=held,
    )  # fmt: skip
    check_data(trainer.agent, found, config.normalize)
    if not comparable:
        trainer.evaluator.normalized = None
    if config.init_from is not None and begins:
        _start_from(trainer, config)
    return trainer


def _start_from(trainer: Trainer, config: RunConfig) -> None:
    """Put the pre-trained agents of another run into the trainer, in place of its own pre-training."""
    target = agent_class(config.agent)
    source_config = load_config(Path(str(config.init_from)))
    warm_start.check_settings(source_config, config)
    source = build(_to_look_at(source_config), folder=Path(str(config.init_from)), begins=False)
    folder = RunFolder(Path(str(config.init_from)))
    folder.load(source, source_config.online_steps, go_on=False)
    folder.close()
    warm_start.check_trained(source, source_config, str(config.init_from))
    warm_start.check_values(source, trainer, str(config.init_from))
    warm_start.take_over(trainer, source, target, config)
    source.close()


def _to_look_at(config: RunConfig) -> RunConfig:
    """Return the settings of a run for who will not train it: no records, no processes."""
    loop = dataclasses.replace(config.loop, eval_process=False, env_processes=0)
    return dataclasses.replace(config, record=False, loop=loop)


def load_config(path: Path) -> RunConfig:
    """Return the settings of a run folder."""
    values = read_config(path)
    for name in ("format", "versions", "fingerprint", "dataset_summary", "base_fingerprint"):
        values.pop(name, None)
    agent_config = values.pop("config", {})
    config = from_dict(config_class(values["agent"]), agent_config, f"{path}/config.json config")
    return dataclasses.replace(from_dict(RunConfig, {**values, "config": None}, f"{path}/config.json"), config=config)


class Session:
    """A run being trained: its folder, screen, loggers and trainer."""

    def __init__(
        self,
        config: RunConfig,
        run: RunFolder,
        data: datasets.Dataset,
        screen: Screen | None = None,
        base: BasePolicy | None = None,
    ) -> None:
        """Build the trainer and connect it to the run folder."""
        self.config, self.run, self.screen = config, run, screen
        self.loggers: list[Logger] = []
        self.stop = StopFlag()
        saving = {"checkpoint": run.save, "scored": run.scored}
        hooks = Hooks(metrics=self._metrics, episodes=self._episodes, should_stop=self.stop, **saving)
        if screen is not None:
            hooks.progress = screen.progress
        begins = not run.online  # reads the latest checkpoint
        self.trainer = build(config, data, hooks, run.path, base, begins)
        if config.init_from is not None and begins:  # its networks are those of the agents that it starts from
            self.config = dataclasses.replace(config, config=self.trainer.agent.config)
            run.change(config=to_dict(self.config.config))
        try:
            self.loggers += make_loggers(config.loggers, run.path, to_dict(self.config))
        except BaseException:
            self.trainer.close()
            raise

    def _metrics(self, row: dict[str, Any]) -> None:
        self.run.metrics.write(row)
        for logger in self.loggers:
            logger.metrics(row)

    def _episodes(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            self.run.episodes.write(row)
        for row in evaluation_rows(rows):
            for logger in self.loggers:
                logger.metrics(row)
        if self.screen is not None:
            self.screen.episodes(rows)

    def work(self) -> bool:
        """Train to the end; False if a signal stopped it (the state is saved)."""

        def phases() -> bool:
            if self.config.init_from is None and not self.trainer.offline(self.config.offline_steps):
                return False
            return self.config.online_steps == 0 or self.trainer.online(self.config.online_steps)

        with Closing() as closing:
            closing.callback(self.run.close)
            for logger in self.loggers:
                closing.callback(logger.close)
            closing.callback(self.trainer.close)
            with self.stop:
                finished = guarded(self.run, self.trainer, phases)
        if finished and self.config.record and any((self.run.path / EPISODES).glob("*.npz")):
            export(self.run.path)
        return finished


def train(config: RunConfig, path: Path, screen: Screen | None = None) -> bool:
    """Train a new run in folder `path`; False if a signal stopped it. Raises `RunError` if the folder exists."""
    base = base_of(config)
    data = load_data(config, base)
    if config.task.normalize_returns is not None:  # said in config.json, so that a resume has the very same
        _check_scale(config)
        config = with_fields(config, [("task.reward_scale", data.task.reward_scale)])
    if without_environment(config, data.info):
        log.info("no environment: the run is judged by the error of its actions on held-out episodes (--holdout)")
    else:
        env = make_env(config, data, base)
        env.close()
        if config.loop.eval_process and not env.metadata.get("replayable", True):
            raise ConfigError(BESIDE)
    if config.init_from is not None:
        load_config(Path(config.init_from))
    about = {"fingerprint": data.fingerprint, "dataset_summary": summary(data)}
    about |= {} if base is None else {"base_fingerprint": base.fingerprint}
    run = RunFolder.create(path, {**to_dict(config), **about}, config.keep_checkpoints).lock()
    try:
        session = Session(config, run, data, screen, base)
    except BaseException:
        run.close()
        shutil.rmtree(path)  # nothing has been done: the corrected command may have the name
        raise
    return session.work()


def resume(path: Path, screen: Screen | None = None, online_steps: int | None = None) -> bool:
    """Continue a run from its last checkpoint, as if it had never stopped; True at once if it had finished.

    Without any checkpoint it begins again. `online_steps`: until so many environment steps instead of those in its
    config.json, which is changed. Raises `ConfigError` if the run has made more of them, or has its replay on disk,
    which cannot grow: nothing has been moved or written then.
    """
    config = load_config(path)
    base, begun = base_of(config), read_config(path)
    if base is not None and base.fingerprint != begun.get("base_fingerprint"):
        raise ConfigError(
            f"base {config.base} changed since run {path} began; restore it as it was, or start a new run"
        )
    data = load_data(config, base)
    if online_steps and without_environment(config, data.info):
        raise ConfigError(
            f"run {path} was trained without an environment; to fine-tune, begin another run with its data and --env"
        )
    wanted = begun.get("fingerprint")
    if wanted != data.fingerprint:
        raise ConfigError(
            f"dataset {data.info.name} changed since run {path} began: fingerprint {data.fingerprint}, was {wanted}; "
            "restore the dataset or start a new run"
        )
    run = RunFolder.open(path, config.keep_checkpoints).lock()
    with Closing() as closing:
        closing.callback(run.close)
        if online_steps is not None:
            run.check_steps(online_steps, config.loop.replay_capacity)
        session = Session(config, run, data, screen, base)
        closing.callback(session.trainer.close)
        run.load(session.trainer, config.online_steps)
        if online_steps is not None:
            session.config = dataclasses.replace(config, online_steps=online_steps)
            run.change(online_steps=online_steps)
        slots = [] if session.trainer.fleet is None else session.trainer.fleet.slots
        for slot in slots:
            if not slot.exact:  # what comes is not what was there: it is counted behind that
                slot.episode = max(slot.episode, next_number(path / EPISODES, slot.seeds))
        forget(path, {slot.seeds: slot.episode for slot in slots})
        closing.pop_all()
    return session.work()


def open_run(path: Path, which: str = "latest") -> tuple[RunConfig, Trainer]:
    """Return a run's settings and its trainer at the `latest` or `best` checkpoint, or at a step given as digits."""
    from o2o.train import checkpoint

    if which not in ("latest", "best") and not which.isdigit():
        raise ConfigError(f"no checkpoint {which!r}; give latest, best or a step such as 10000")
    config = load_config(path)
    trainer = build(_to_look_at(config), folder=path, begins=False)
    run = RunFolder.open(path)
    step = checkpoint.best_step(run.checkpoints) if which == "best" else int(which) if which.isdigit() else None
    run.load(trainer, config.online_steps, step, go_on=False)
    run.close()
    return config, trainer


def load_policy(path: Path, which: str = "latest", seed_index: int = 0) -> TrainedPolicy:
    """Return the policy of one seed of a run at a checkpoint, for any loop: `reset`, `act`, `interrupt`.

    It acts by its mode. The run's dataset, and its base policy if it has one, must be where they were. Raises
    `ConfigError` if the run has no such seed, `CheckpointError` if it has no such checkpoint.
    """
    check_seed_index(path, seed_index)
    return TrainedPolicy(run_policy(path, seed_index, which=which))


def check_seed_index(path: Path, seed_index: int) -> None:
    """Raise `ConfigError` unless a run has a seed of this index."""
    if not 0 <= seed_index < (seeds := load_config(path).seeds):
        raise ConfigError(f"no seed of index {seed_index}: {path} trained {seeds} seed(s), counted from 0")


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise ConfigError(f"seed is {seed}; expected at least 0")


def evaluate_run(
    path: Path, episodes: int = 50, which: str = "latest", seed: int = 1, deterministic: bool = True
) -> list[dict[str, Any]]:
    """Play `episodes` new episodes with every seed of a run and return one row per episode.

    `seed` is that of the resets. Raises `ConfigError` if it is negative.
    """
    _check_seed(seed)
    _, trainer = open_run(path, which)
    evaluator = Evaluator(trainer.env_fn, trainer.seeds, episodes, seed, trainer.evaluator.normalized)
    with Closing() as closing:
        closing.callback(trainer.close)
        closing.callback(evaluator.close)
        return evaluator(trainer.agent, trainer.normalizer, 0, deterministic)


def play_run(
    path: Path, out: Path | None, episodes: int = 1, which: str = "latest", seed_index: int = 0, seed: int = 1
) -> list[dict[str, Any]]:
    """Play episodes with one seed of a run and return their rows.

    `out`: a video file; None: a window on the screen. Raises `ConfigError` for settings out of range, an unknown kind
    of video file or a missing display.
    """
    from o2o.policies.video import check_out, check_window, record

    check_out(out) if out is not None else check_window()
    if episodes < 1:
        raise ConfigError(f"episodes is {episodes}; expected at least 1")
    _check_seed(seed)
    check_seed_index(path, seed_index)
    config, trainer = open_run(path, which)
    mode = "human" if out is None else "rgb_array"
    env = make_env(config, trainer.data, base_of(config), True, render_mode=mode)
    slot = EnvSlot(env, (seed + seed_index, EVAL_STREAM, 0))
    with Closing() as closing:
        closing.callback(trainer.close)
        closing.callback(env.close)
        return record(slot, trainer.agent_of(seed_index), trainer.normalizer, episodes, out)
