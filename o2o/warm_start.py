"""What a run takes over from another that pre-trained its agents (`init_from`), and what has to fit for that."""

from typing import Any

import jax
import numpy as np

from o2o.errors import CheckpointError
from o2o.loop import Trainer
from o2o.settings import RunConfig


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


def take_over(trainer: Trainer, source: Trainer, target: Any, config: RunConfig) -> None:
    """Put the agents and the normaliser of the trainer `source` into `trainer`, as agents of the class `target`.

    Raises `CheckpointError` where rows of two normalisers would be mixed, or critics learnt other rewards.
    """
    if config.config.online.replay in ("mixed", "append") and not _alike(source.normalizer, trainer.normalizer):
        raise CheckpointError(
            f"{config.init_from} normalises observations as its own dataset is spread, and this run's dataset, which "
            "online batches come from, is spread otherwise: use that dataset, or config.online.replay online"
        )
    agent = source.agent if source.online_state is None else source.online_state.agent
    have, want = ((t.reward_scale, t.reward_bias) for t in (source.data.task, trainer.data.task))
    if hasattr(getattr(agent, "learner", agent), "critic") and have != want:
        raise CheckpointError(
            f"the critics of {config.init_from} learnt rewards of scale and bias {have}, this run has {want}: give "
            f"--task.reward-scale {have[0]:g} --task.reward-bias {have[1]:g}"
        )
    trainer.agent = jax.vmap(lambda a: target.from_agent(a, config.config))(agent)
    trainer.normalizer = source.normalizer


def _alike(one: Any, other: Any) -> bool:
    return jax.tree.all(jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), one, other))
