"""Settings from names: the run that an agent's preset, or a cell of a benchmark, makes of a dataset."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from o2o import envs
from o2o.agents import AGENTS
from o2o.config import LoopConfig, RunConfig, TaskConfig, with_fields
from o2o.data import datasets
from o2o.errors import ConfigError, suggest
from o2o.nn.terminations import termination_of
from o2o.report.suite import Cell
from o2o.types import Agent, AgentConfig, Needs
from o2o.user_code import import_module

OWN_REWARDS = ("kitchen", "locomotion")
"""Families whose presets are for the environment's own rewards. Those of the others are for sparse rewards only."""


PUBLISHED_LOOP = {
    "ogbench": LoopConfig(eval_every=50_000, offline_eval_every=50_000, eval_episodes=50, deterministic_eval=False)
}
"""How often, and how, policies are judged in the papers on a family of tasks: the loop of the preset `paper`."""


def agent_class(name: str) -> type[Agent]:
    """Return the agent class of a name of `AGENTS`, or of `module:Class`, which imports the module.

    Raises `ConfigError` with a suggestion for an unknown name.
    """
    module, colon, path = name.partition(":")
    if not colon:
        if name not in AGENTS:
            raise ConfigError(f"no agent {name!r}; {suggest(name, AGENTS)}; or give your own as module:Class")
        return AGENTS[name]
    kind: Any = import_module(module)
    for part in path.split("."):
        kind = getattr(kind, part, None)
    if not (isinstance(kind, type) and issubclass(kind, Agent)):
        raise ConfigError(f"{name!r} is no agent: expected a class derived from o2o.types.Agent in module {module}")
    return kind


def agent_name(name: str) -> str:
    """Return the name by which any process finds the agent: `module:Class` for one that is not the toolkit's own."""
    kind = agent_class(name)
    own = kind.__module__.partition(".")[0] in ("o2o", "__main__")
    return name if own else f"{kind.__module__}:{kind.__qualname__}"


def config_class(name: str) -> type[AgentConfig]:
    """Return the class of an agent's config."""
    return type(agent_class(name).preset("other", "small").config)


def config_needs(name: str) -> Needs:
    """Return what an agent with default settings needs."""
    return agent_class(name).preset("other", "small").config.needs


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The settings of a new run that its preset depends on."""

    dataset: tuple[str, ...] = ()
    env: str | None = None
    preset: str = "paper"
    task: TaskConfig = dataclasses.field(default_factory=TaskConfig)

    def run(self, agent: str) -> RunConfig:
        """Return the run of the preset; without a dataset (for help texts), of the preset for the family `other`."""
        if self.dataset:
            return preset_run(agent, self.dataset, self.preset, env=self.env, task=self.task)
        kind = agent_class(agent)
        preset = kind.preset("other", "small" if self.preset == "small" else "paper")
        return RunConfig(
            agent=agent_name(agent),
            config=preset.config,
            dataset=("DATASET",),
            preset=self.preset,
            task=self.task,
            offline_steps=preset.offline_steps,
            online_steps=preset.online_steps,
            **preset.run,
        )


def preset_run(
    agent: str,
    dataset: str | Path | Sequence[str | Path],
    size: str = "paper",
    env: str | None = None,
    **changes: Any,
) -> RunConfig:
    """Return the run that an agent's preset makes of a dataset, with the fields of `RunConfig` in `changes` replaced.

    `size` is `paper` or `small`. The presets of mazes and Adroit scale only sparse rewards, and the settings of `task`
    win over those of the preset; dicts in `config`, `task` and `loop` change single fields. Raises `ConfigError` for an
    unknown agent, size or field, `DatasetError` for the dataset.
    """
    ids = tuple(os.fspath(entry) for entry in ([dataset] if isinstance(dataset, str | Path) else dataset))
    known = [field.name for field in dataclasses.fields(RunConfig) if field.name not in ("agent", "dataset", "preset")]
    if unknown := sorted(changes.keys() - known):
        hint = suggest(unknown[0], [*known, "size"])
        raise ConfigError(f"preset_run has no argument {unknown[0]!r}; {hint}")
    if size not in ("paper", "small"):
        raise ConfigError(f"no preset {size!r}; there are paper, small")
    agent = agent_name(agent)
    if not ids:
        raise ConfigError("dataset is empty; expected one or more Minari ids or paths")
    task_config = changes.pop("task", TaskConfig())
    if isinstance(task_config, Mapping):
        task_config = with_fields(TaskConfig(), task_config)
    about = datasets.named_first([datasets.info(name) for name in ids])
    family = envs.task_for(env or about).family
    preset = agent_class(agent).preset(family, size).of_task(about.name)
    if family == "adroit" and task_config.binary is None:
        task_config = dataclasses.replace(task_config, binary=True)
    suits = envs.run_task(about, env, task_config.binary).sparse or family in OWN_REWARDS
    rewards = (task_config.reward_scale, task_config.reward_bias, task_config.normalize_returns)
    untouched = all(value is None for value in rewards)
    if preset.reward is not None and suits and untouched:
        task_config = dataclasses.replace(task_config, reward_scale=preset.reward[0], reward_bias=preset.reward[1])
    if untouched:
        task_config = dataclasses.replace(task_config, normalize_returns=preset.normalize_returns)
    if task_config.binary:
        paper = {"only_successes": preset.only_successes or None}
        paper |= {name: getattr(preset, name) for name in ("terminate_on_success", "data_share")}
        asked = {name: getattr(task_config, name) for name in paper}
        task_config = dataclasses.replace(
            task_config, **{name: paper[name] if value is None else value for name, value in asked.items()}
        )
    if getattr(preset.config, "termination", None) == "auto":
        rule = termination_of(env or about.env_id)
        preset = dataclasses.replace(preset, config=dataclasses.replace(preset.config, termination=rule))
    paper_loop = PUBLISHED_LOOP.get(family, LoopConfig())
    loop = paper_loop if size == "paper" else LoopConfig(eval_every=2_500, log_every=500, checkpoint_every=5_000)
    defaults: dict[str, Any] = {
        "config": preset.config,
        "offline_steps": preset.offline_steps,
        "online_steps": preset.online_steps,
        "loop": loop,
        **preset.run,
    }
    run = RunConfig(agent=agent, dataset=ids, env=env, task=task_config, preset=size, **defaults)
    return with_fields(run, changes)


def cell_run(cell: Cell, path: Path) -> RunConfig:
    """Return the settings of the run in folder `path` for a cell of a benchmark."""
    task = with_fields(TaskConfig(), cell.options)
    run = preset_run(cell.agent, cell.dataset, cell.preset, task=task, seed=cell.seed, seeds=cell.seeds)
    loop = dataclasses.replace(
        run.loop,
        eval_every=cell.eval_every,
        offline_eval_every=cell.offline_eval_every,
        eval_episodes=cell.eval_episodes,
        checkpoint_every=20_000,
    )
    source, (base, seed_index) = cell.source(path), cell.base_of(path) or (None, 0)
    run = dataclasses.replace(
        run,
        config=with_fields(run.config, cell.overrides),
        loop=loop,
        offline_steps=cell.offline_steps,
        online_steps=cell.online_steps,
        init_from=source and str(source),
        base=base,
        base_seed_index=seed_index,
    )
    return with_fields(run, cell.fields or ())
