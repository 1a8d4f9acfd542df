"""From settings to a finished run: the one place that joins data, tasks, environments, agents, loops and run folders.

The command line, the benchmarks and notebooks all come through here.
"""

import dataclasses
import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from o2o import datasets, envs
from o2o.agents import AGENTS
from o2o.bench import Cell
from o2o.episode import EnvSlot
from o2o.errors import CheckpointError, ConfigError
from o2o.evaluate import Evaluator
from o2o.log import Logger, Screen, make_loggers
from o2o.loop import Trainer
from o2o.runs import RunFolder, StopFlag, from_dict, guarded, read_config, to_dict
from o2o.schedule import Hooks, LoopConfig
from o2o.tasks import Task


@dataclass(frozen=True)
class TaskConfig:
    """Changes to the task's own conventions; what is None stays as the task table has it."""

    binary: bool | None = None
    """Adroit: replace the dense reward by the sparse -1/0 success reward of the papers."""
    reward_scale: float | None = None
    """Multiplies every raw reward, in the dataset and in the environment."""
    reward_bias: float | None = None
    """Added to every scaled reward."""
    terminate_on_success: bool | None = None
    """End a training episode at its first success."""
    achieved_goal: bool = False
    """Keep `achieved_goal` of Dict observations."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that defines a run; saved as config.json."""

    agent: str
    """Name in o2o.agents.AGENTS."""
    config: Any
    """The agent's config."""
    dataset: tuple[str, ...]
    """Minari ids or paths, mixed by `weights`."""
    weights: tuple[float, ...] = ()
    """Share of each dataset in a batch; empty for the share of its rows."""
    env: str | None = None
    """Gymnasium id of the environment; None for the dataset's own."""
    task: TaskConfig = field(default_factory=TaskConfig)
    """Changes to the task's conventions."""
    normalize: bool = False
    """Normalise observations with the dataset's statistics, stored with the agent."""
    seed: int = 0
    """Every random draw of the run comes from it."""
    seeds: int = 1
    """Agents trained side by side in one program."""
    offline_steps: int = 10_000
    """Gradient steps of pre-training."""
    online_steps: int = 10_000
    """Environment steps of the online phase per seed, warm-up included."""
    init_from: str | None = None
    """WSRL only: a finished run of BC, IQL, CQL or Cal-QL to start from instead of pre-training."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """How often to log, evaluate and checkpoint."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept; the best is kept besides."""
    loggers: tuple[str, ...] = ()
    """`tensorboard`, `wandb`: besides metrics.jsonl."""
    preset: str = "paper"
    """Which preset the agent's config started from (for the record)."""


def agent_class(name: str) -> Any:
    """Return the agent class; raises `ConfigError` suggesting a near name."""
    if name not in AGENTS:
        near = difflib.get_close_matches(name, AGENTS, n=1)
        raise ConfigError(
            f"no agent {name!r}; " + (f"did you mean {near[0]!r}?" if near else f"there are {', '.join(AGENTS)}")
        )
    return AGENTS[name]


def config_class(name: str) -> Any:
    """Return the config dataclass of an agent."""
    return type(agent_class(name).preset("other", "small").config)


def preset_run(
    agent: str, dataset: str | tuple[str, ...], size: str = "paper", env: str | None = None, **changes: Any
) -> RunConfig:
    """Return the run that the agent's preset makes of a dataset; `changes` are fields of `RunConfig`."""
    ids = (dataset,) if isinstance(dataset, str) else tuple(dataset)
    if size not in ("paper", "small"):
        raise ConfigError(f"no preset {size!r}; there are paper, small")
    task_config = changes.pop("task", TaskConfig())
    about = datasets.info(ids[0])
    family = envs.task_for(env or about).family
    preset = agent_class(agent).preset(family, size)
    if family == "adroit" and task_config.binary is None:
        task_config = dataclasses.replace(task_config, binary=True)
    binary = {} if task_config.binary is None else {"binary": task_config.binary}
    suits = envs.task_for(env or about, **binary).sparse or family == "kitchen"  # the papers shift sparse rewards only
    untouched = task_config.reward_scale is None and task_config.reward_bias is None
    if preset.reward is not None and suits and untouched:
        task_config = dataclasses.replace(task_config, reward_scale=preset.reward[0], reward_bias=preset.reward[1])
    loop = LoopConfig() if size == "paper" else LoopConfig(eval_every=2_500, log_every=500, checkpoint_every=5_000)
    defaults: dict[str, Any] = {
        "config": preset.config,
        "offline_steps": preset.offline_steps,
        "online_steps": preset.online_steps,
        "loop": loop,
    }
    return RunConfig(agent=agent, dataset=ids, env=env, task=task_config, preset=size, **{**defaults, **changes})


def with_fields(config: Any, changes: Iterable[tuple[str, Any]]) -> Any:
    """Return a dataclass with fields replaced by dotted name (`online.utd_ratio`); unknown ones raise `ConfigError`."""
    for name, value in changes:
        head, _, rest = name.partition(".")
        known = [f.name for f in dataclasses.fields(config)]
        if head not in known:
            near = difflib.get_close_matches(head, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(known)}"
            raise ConfigError(f"{type(config).__name__} has no field {head!r}{hint}")
        config = dataclasses.replace(
            config, **{head: with_fields(getattr(config, head), [(rest, value)]) if rest else value}
        )
    return config


def cell_run(cell: Cell, path: Path) -> RunConfig:
    """Return the run of a benchmark cell that will live in folder `path`."""
    task = with_fields(TaskConfig(), cell.options)
    run = preset_run(cell.agent, cell.dataset, cell.preset, task=task, seed=cell.seed, seeds=cell.seeds)
    loop = dataclasses.replace(
        run.loop,
        eval_every=cell.eval_every,
        offline_eval_every=cell.offline_eval_every,
        eval_episodes=cell.eval_episodes,
        checkpoint_every=20_000,
    )
    source = cell.source(path)
    return dataclasses.replace(
        run, config=with_fields(run.config, cell.overrides), loop=loop, offline_steps=cell.offline_steps,
        online_steps=cell.online_steps, init_from=None if source is None else str(source),
    )  # fmt: skip


def task_of(config: RunConfig) -> Task:
    """Return the task with the run's changes applied."""
    about = datasets.info(config.dataset[0])
    changes = {k: v for k, v in vars(config.task).items() if v is not None and k not in ("achieved_goal", "binary")}
    binary = {} if config.task.binary is None else {"binary": config.task.binary}
    return dataclasses.replace(envs.task_for(config.env or about, **binary), **changes)


def load_data(config: RunConfig) -> datasets.Dataset:
    """Load the run's dataset under its task's conventions."""
    return datasets.load(
        config.dataset,
        task=task_of(config),
        weights=config.weights or None,
        discount=config.config.discount,
        achieved_goal=config.task.achieved_goal,
    )


def summary(data: datasets.Dataset) -> dict[str, float | None]:
    """Return the dataset's own mean success rate, raw return and normalised score per episode."""
    returns, solved = data.info.episode_returns, data.info.episode_success
    scores = None if returns is None else data.info.normalized(returns, data.task)
    mean = lambda values: None if values is None else float(np.mean(values))  # noqa: E731
    return {"success": mean(solved), "return": mean(returns), "normalized": mean(scores)}


def build(config: RunConfig, data: datasets.Dataset | None = None, hooks: Hooks | None = None) -> Trainer:
    """Return the trainer of a run, nothing done yet."""
    data = data or load_data(config)
    where = config.env or data.info

    def env_fn(evaluation: bool) -> Any:
        return envs.make(
            where, data.task, evaluation=evaluation, achieved_goal=config.task.achieved_goal, dataset=data.info
        )

    trainer = Trainer(
        agent_class(config.agent), config.config, data, env_fn, seed=config.seed, seeds=config.seeds, loop=config.loop,
        normalize=config.normalize, hooks=hooks,
    )  # fmt: skip
    if config.init_from is not None:
        _start_from(trainer, config)
    return trainer


def _start_from(trainer: Trainer, config: RunConfig) -> None:
    """Put the pre-trained agents of another run into the trainer, in place of its own pre-training."""
    target = agent_class(config.agent)
    if not hasattr(target, "from_agent"):
        raise ConfigError(f"agent {config.agent} cannot start from another run; `init_from` is for wsrl")
    source_config = load_config(Path(str(config.init_from)))
    if source_config.seeds != config.seeds:
        raise CheckpointError(
            f"{config.init_from} trained {source_config.seeds} seeds, this run has {config.seeds}: make them equal"
        )
    source = build(source_config)
    folder = RunFolder(Path(str(config.init_from)))
    folder.load(source, source_config.online_steps, cut_rows=False)
    folder.close()
    agent = source.agent if source.online_state is None else source.online_state.agent
    trainer.agent, trainer.normalizer = (
        jax.vmap(lambda a: target.from_agent(a, config.config))(agent),
        source.normalizer,
    )
    source.close()


def load_config(path: Path) -> RunConfig:
    """Return the settings of a run folder."""
    values = read_config(path)
    values.pop("versions", None)
    values.pop("fingerprint", None)
    values.pop("dataset_summary", None)
    agent_config = values.pop("config", {})
    config = from_dict(config_class(values["agent"]), agent_config, f"{path}/config.json config")
    return dataclasses.replace(from_dict(RunConfig, {**values, "config": None}, f"{path}/config.json"), config=config)


class Session:
    """A run being trained: its folder, screen, loggers and trainer."""

    def __init__(self, config: RunConfig, run: RunFolder, data: datasets.Dataset, screen: Screen | None = None) -> None:
        """Build the trainer and connect it to the run folder."""
        self.config, self.run, self.screen = config, run, screen
        self.loggers: list[Logger] = make_loggers(config.loggers, run.path, to_dict(config))
        self.stop = StopFlag()
        hooks = Hooks(metrics=self._metrics, episodes=self._episodes, checkpoint=run.save, should_stop=self.stop)
        if screen is not None:
            hooks.progress = screen.progress
        self.trainer = build(config, data, hooks)

    def _metrics(self, row: dict[str, Any]) -> None:
        self.run.metrics.write(row)
        for logger in self.loggers:
            logger.metrics(row)

    def _episodes(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            self.run.episodes.write(row)
        if self.screen is not None:
            self.screen.episodes(rows)

    def work(self) -> bool:
        """Train to the end; False if a signal stopped it (the state is saved)."""

        def phases() -> bool:
            if self.config.init_from is None and not self.trainer.offline(self.config.offline_steps):
                return False
            return self.config.online_steps == 0 or self.trainer.online(self.config.online_steps)

        try:
            with self.stop:
                return guarded(self.run, self.trainer, phases)
        finally:
            self.trainer.close()
            for logger in self.loggers:
                logger.close()
            self.run.close()


def train(config: RunConfig, path: Path, screen: Screen | None = None) -> bool:
    """Train a new run in folder `path`; False if a signal stopped it. Raises `RunError` if the folder exists."""
    data = load_data(config)
    probe = envs.make(config.env or data.info, data.task, achieved_goal=config.task.achieved_goal)
    probe.close()
    if config.init_from is not None:
        load_config(Path(config.init_from))
    about = {"fingerprint": data.fingerprint, "dataset_summary": summary(data)}
    run = RunFolder.create(path, {**to_dict(config), **about}, config.keep_checkpoints)
    return Session(config, run, data, screen).work()


def resume(path: Path, screen: Screen | None = None) -> bool:
    """Continue a run from its last checkpoint, as if it had never stopped; True at once if it had finished."""
    config = load_config(path)
    data = load_data(config)
    wanted = read_config(path).get("fingerprint")
    if wanted != data.fingerprint:
        raise ConfigError(
            f"dataset {data.info.name} changed since run {path} began: fingerprint {data.fingerprint}, was {wanted}; "
            "restore the dataset or start a new run"
        )
    run = RunFolder.open(path, config.keep_checkpoints)
    session = Session(config, run, data, screen)
    run.load(session.trainer, config.online_steps)
    return session.work()


def open_run(path: Path, which: str = "latest") -> tuple[RunConfig, Trainer]:
    """Return a run's settings and its trainer at the `latest` or `best` checkpoint, or at a step given as digits."""
    from o2o import checkpoint

    config = load_config(path)
    trainer = build(dataclasses.replace(config, init_from=None))
    run = RunFolder.open(path)
    step = checkpoint.best_step(run.checkpoints) if which == "best" else int(which) if which.isdigit() else None
    run.load(trainer, config.online_steps, step, cut_rows=False)
    run.close()
    return config, trainer


def evaluate_run(
    path: Path, episodes: int = 50, which: str = "latest", seed: int = 1, deterministic: bool = True
) -> list[dict[str, Any]]:
    """Evaluate every seed of a run anew; one row per episode."""
    _, trainer = open_run(path, which)
    agent = trainer.agent if trainer.online_state is None else trainer.online_state.agent
    evaluator = Evaluator(trainer.env_fn, trainer.seeds, episodes, seed, trainer.evaluator.normalized)
    try:
        return evaluator(agent, trainer.normalizer, 0, deterministic)
    finally:
        evaluator.close()
        trainer.close()


def play_run(
    path: Path, out: Path | None, episodes: int = 1, which: str = "latest", member: int = 0, seed: int = 1
) -> list[dict[str, Any]]:
    """Play a run's policy on the screen (`out` None) or into a video file; returns the episodes' rows."""
    from o2o.video import record

    config, trainer = open_run(path, which)
    where = config.env or trainer.data.info
    mode = "human" if out is None else "rgb_array"
    env = envs.make(
        where, trainer.data.task, evaluation=True, render_mode=mode, achieved_goal=config.task.achieved_goal
    )
    slot = EnvSlot(env, (seed, 1, member, 0))
    try:
        return record(slot, trainer.agent_of(member), trainer.normalizer, episodes, out)
    finally:
        env.close()
        trainer.close()
