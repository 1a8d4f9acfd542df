"""The offline loop: gradient steps on the dataset, hundreds per dispatch, in one stage or in several."""

import sys
import time
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from o2o.errors import ConfigError
from o2o.replay.host import HostData
from o2o.train import programs as dispatch
from o2o.types import Agent, Phase

if TYPE_CHECKING:
    from o2o.train.trainer import Trainer


def plan(agent: Agent, steps: int) -> list[tuple[Phase, int]]:
    """Return the phases of a pre-training of `steps` gradient steps, each with the step at which it begins."""
    stages = [phase for phase in agent.phases(steps) if phase.steps]
    begins = [sum(stage.steps for stage in stages[:i]) for i in range(len(stages) + 1)]
    if begins[-1] != steps:
        raise ConfigError(f"the phases of this agent take {begins[-1]} gradient steps, offline_steps is {steps}")
    return [(stage, begin) for stage, (begin, _) in zip(stages, pairwise(begins), strict=True)]


def phase_at(agent: Agent, steps: int, at: int) -> Phase | None:
    """Return the phase that the last of `at` gradient steps, of `steps` in all, was in; None if there is none."""
    phases = [phase for phase, begin in plan(agent, steps) if begin < max(at, 1)]
    return phases[-1] if phases else None


def pretrain(trainer: "Trainer", steps: int) -> bool:
    """Pre-train until `steps` gradient steps in all; False if a stop was asked for before."""
    counters, loop = trainer.counters, trainer.loop
    counters.offline_total = steps
    started = time.perf_counter() - counters.elapsed
    eval_every = loop.offline_eval_every or steps
    for stage, begin in plan(trainer.agent, steps):
        end = begin + stage.steps
        if stage.note and counters.offline_steps < end:
            print(f"o2o: {stage.note}", file=sys.stderr)
        if stage.update is not None and isinstance(trainer.offline_data, HostData):
            raise ConfigError("an agent that draws its own rows needs the dataset on the device: raise device_bytes")
        while counters.offline_steps < end:
            at = counters.offline_steps
            if stage.enter is not None and at == begin:
                enter = partial(_enter, phase=stage, data=trainer.offline_data)
                trainer.agent = dispatch.each_seed(enter, trainer.agent)
            marks = [at - at % every + every for every in (eval_every, loop.log_every, loop.checkpoint_every)]
            if stage.check_every:
                marks.append(at + stage.check_every - (at - begin) % stage.check_every)
            _updates(trainer, stage, begin, min(min(end, *marks) - at, loop.updates_per_dispatch))
            at = counters.offline_steps
            if stage.check_every and ((at - begin) % stage.check_every == 0 or at == end):
                trainer.agent = dispatch.check_phase(
                    trainer.agent, trainer.offline_data, seeds=trainer.seeds, check=stage.check
                )
            if at % loop.log_every == 0 or at == end:
                counters.elapsed = time.perf_counter() - started
                _log(trainer)
            if at % eval_every == 0 or at == steps:
                trainer.evaluate(wait=False)
            counters.elapsed = time.perf_counter() - started
            trainer.hooks.progress(stage.name, at, steps, {})
            stop = trainer.hooks.should_stop()
            trainer.take_evaluations(wait=stop or at == steps)
            if at % loop.checkpoint_every == 0 or at == steps or stop:
                trainer.hooks.checkpoint(trainer)
            if stop and (at < steps or trainer.broken_off()):
                return False
    trainer.take_evaluations(wait=True)
    return True


def _enter(agent: Any, phase: Phase, data: Any) -> Any:
    return agent if phase.enter is None else phase.enter(agent, data)


def _updates(trainer: "Trainer", stage: Phase, begin: int, count: int) -> None:
    """Run `count` gradient steps of a stage in one dispatch and add their metrics up; all stays on the device."""
    counters, about = trainer.counters, {}
    if stage.update is not None:
        done = jnp.asarray(counters.offline_steps - begin, jnp.float32)
        about = {"phase": stage, "begin": done, "length": jnp.asarray(stage.steps, jnp.float32)}
    trainer.agent, trainer.rng, info = trainer.programs.offline_updates(
        trainer.agent, trainer.rng, trainer.offline_data, jnp.asarray(count, jnp.int32), seeds=trainer.seeds,
        batch_size=trainer.config.batch_size, **about,
    )  # fmt: skip
    totals = trainer.offline_totals  # the dispatch's mean metrics are weighted by its updates
    trainer.offline_totals = {k: value * count + totals[k] if totals else value * count for k, value in info.items()}
    counters.offline_steps += count
    counters.gradient_steps += count


def _log(trainer: "Trainer") -> None:
    counters = trainer.counters
    updates = counters.offline_steps - counters.logged_at
    if updates:
        trainer.write_metrics({key: value / updates for key, value in trainer.offline_totals.items()}, {})
    trainer.offline_totals, counters.logged_at = {}, counters.offline_steps
