"""What a run takes over from another that pre-trained its agents (`init_from`), and what has to fit for that."""

import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np

from o2o.config import RunConfig
from o2o.errors import CheckpointError
from o2o.runs.folder import read_status
from o2o.runs.opened import Opened
from o2o.train.trainer import Trainer

_log = logging.getLogger(__name__)


def check_settings(source: RunConfig, config: RunConfig) -> None:
    """Raise `CheckpointError` where what the policy sees and does means something else in the two runs."""
    if source.seeds != config.seeds:
        raise CheckpointError(
            f"{config.init_from} trained {source.seeds} seeds, this run has {config.seeds}: make them equal"
        )
    for name in ("history", "normalize", "action_range"):
        have, want = getattr(source, name), getattr(config, name)
        if have != want:
            raise CheckpointError(f"{config.init_from} has {name} {have}, this run {want}: make them equal")


def check_trained(source: Opened, settings: RunConfig, path: str) -> None:
    """Raise `CheckpointError` if the run in folder `path`, opened as `source`, has not ended its pre-training.

    Where it has but is not finished, one line on standard error says which step is taken.
    """
    steps, counters = settings.offline_steps if settings.init_from is None else 0, source.counters
    if counters.phase == "offline" and counters.offline_steps < steps:
        raise CheckpointError(
            f"{path} has made {counters.offline_steps} of its {steps} gradient steps of pre-training: finish it first, "
            f"`o2o resume {path}`"
        )
    if (status := read_status(Path(path))) != "finished":
        _log.warning("%s is %s, not finished; taken as it is at step %d", path, status, counters.point)


def take_over(trainer: Trainer, source: Opened, target: Any, config: RunConfig) -> None:
    """Put the agents and the normaliser of the run `source` into `trainer`, as agents of the class `target`.

    Raises `CheckpointError` where observations or actions have other sizes, or rows of two normalisers would be mixed;
    `ConfigError` for agents that `target` cannot start from.
    """
    have, want = (
        jax.tree.map(lambda leaf: leaf.shape[1:], [t.data.arrays[key] for key in ("observations", "actions")])
        for t in (source, trainer)
    )
    if have != want:
        raise CheckpointError(
            f"{config.init_from} saw observations {have[0]} and took actions {have[1]}, this run's dataset has "
            f"{want[0]} and {want[1]}: start from a run on such data"
        )
    taken = jax.vmap(lambda a: target.from_agent(a, config.config))(source.agent)
    if config.config.online.replay in ("mixed", "append") and not _alike(source.normalizer, trainer.normalizer):
        raise CheckpointError(
            f"{config.init_from} normalises observations as its own dataset is spread, and this run's dataset, which "
            "online batches come from, is spread otherwise: use that dataset, or config.online.replay online"
        )
    trainer.start_from(taken, source.normalizer)


def check_values(source: Opened, trainer: Trainer, path: str) -> None:
    """Raise `CheckpointError`, with the flags that mend it, where values learnt by `source` mean other rewards here."""
    if not hasattr(getattr(source.agent, "learner", source.agent), "critic"):
        return
    theirs, ours = source.data.task, trainer.data.task
    names = ("reward_scale", "reward_bias", "binary", "terminate_on_success")
    have, want = ({f"task.{name}": getattr(task, name) for name in names} for task in (theirs, ours))
    if theirs.sparse and ours.sparse and not (theirs.binary or ours.binary):  # the same rewards of other raw ones
        have["task.reward_bias"] += theirs.reward_scale * (theirs.raw_failure_reward - ours.raw_failure_reward)
    have["config.discount"], want["config.discount"] = source.config.discount, trainer.config.discount
    other = [name for name in have if have[name] != want[name]]
    if not other:
        return
    rewards = ("task.reward_scale", "task.reward_bias")  # without one of them the other is no more the preset's
    given = [*rewards, "task.binary"] if {*rewards, "task.binary"} & {*other} else []
    flags = " ".join(f"--{name.replace('_', '-')} {have[name]}" for name in dict.fromkeys([*given, *other]))
    described = ", ".join(f"{name} {have[name]} (this run: {want[name]})" for name in other)
    raise CheckpointError(f"the critics of {path} learnt with {described}: give {flags}")


def _alike(one: Any, other: Any) -> bool:
    return jax.tree.all(jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), one, other))
