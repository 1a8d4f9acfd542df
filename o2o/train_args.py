"""The options of `o2o train AGENT`: fields of a run, their defaults what the preset makes of the dataset and the task.

The preset depends on some of them, so they are read twice: first those that it depends on, then all.
"""

import dataclasses
import os
from pathlib import Path
from typing import Annotated, Literal

import tyro

from o2o import experiment
from o2o.errors import ConfigError
from o2o.experiment import RunConfig, TaskConfig
from o2o.usage import one_line


@dataclasses.dataclass(frozen=True)
class _Chosen:
    """What the preset depends on."""

    dataset: tuple[str, ...] = ()
    env: str | None = None
    preset: str = "paper"
    task: TaskConfig = dataclasses.field(default_factory=TaskConfig)


def parse(agent: str, args: list[str]) -> tuple[Path, RunConfig]:
    """Return the folder and the settings of a new run: those of `preset_run` with the same task, and `args` on top.

    A field of the task given as None is the preset's, as in Python. Raises `ConfigError`; `--help` exits.
    """
    helping = any(arg in ("-h", "--help") for arg in args)
    config_class = experiment.config_class(agent)
    with one_line(prog := f"o2o train {agent}"):
        chosen, _ = tyro.cli(
            _Chosen, args=[a for a in args if a not in ("-h", "--help")], prog=prog, return_unknown_args=True
        )
    if not chosen.dataset and not helping:
        raise ConfigError(
            f"o2o train {agent}: no --dataset; give a Minari id or a path (`o2o data list` shows the local ones)"
        )
    default = _default(agent, chosen)

    @dataclasses.dataclass(frozen=True)
    class TrainArgs(RunConfig):
        """Pre-train an agent on a dataset, then fine-tune it in the environment."""

        agent: Annotated[str, tyro.conf.Suppress]
        config: config_class  # pyright: ignore[reportInvalidTypeForm]
        preset: Literal["paper", "small"] = "paper"
        """Start from the paper's settings for the dataset's family of tasks, or from small ones for a laptop."""
        name: str | None = None
        """Name of the run; None for AGENT-DATASET-SEED."""
        runs: Path = Path("runs")
        """Folder that holds the runs."""

    with one_line(prog):
        parsed = tyro.cli(TrainArgs, args=args, default=TrainArgs(**vars(default)), prog=prog, console_outputs=True)
    values = {field.name: getattr(parsed, field.name) for field in dataclasses.fields(RunConfig)}
    config = RunConfig(**{**values, "task": default.task})
    slug = "+".join(Path(i).name if os.sep in i and Path(i).exists() else i.replace("/", "-") for i in config.dataset)
    return parsed.runs / (parsed.name or f"{agent}-{slug}-{config.seed}"), config


def _default(agent: str, chosen: _Chosen) -> RunConfig:
    """Return the run of the preset; without a dataset, for help alone, that of the family `other`."""
    if chosen.dataset:
        return experiment.preset_run(agent, chosen.dataset, chosen.preset, env=chosen.env, task=chosen.task)
    preset = experiment.agent_class(agent).preset("other", "small" if chosen.preset == "small" else "paper")
    return RunConfig(
        agent=agent, config=preset.config, dataset=("DATASET",), preset=chosen.preset, task=chosen.task,
        offline_steps=preset.offline_steps, online_steps=preset.online_steps,
        **getattr(experiment.agent_class(agent), "run_settings", {}),
    )  # fmt: skip
