"""Offline-to-online reinforcement learning in JAX.

The main names are here, imported when first used: `import o2o` starts no JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from o2o import agents, envs
    from o2o.agents import AGENTS, register_agent
    from o2o.config import LoopConfig, RunConfig, TaskConfig, with_fields
    from o2o.data import datasets
    from o2o.errors import O2OError
    from o2o.report.plots import plot_runs
    from o2o.runs import session
    from o2o.runs.diagnosis import diagnose
    from o2o.runs.presets import preset_run
    from o2o.runs.session import (
        evaluate_run,
        load_config,
        load_policy,
        open_run,
        play_run,
        resume as resume_run,
        train as train_run,
    )
    from o2o.types import Agent, AgentConfig

__version__ = "0.1.0"

_PLACES = {
    "agents": "o2o.agents",
    "envs": "o2o.envs",
    "datasets": "o2o.data.datasets",
    "session": "o2o.runs.session",
    "AGENTS": "o2o.agents:AGENTS",
    "register_agent": "o2o.agents:register_agent",
    "Agent": "o2o.types:Agent",
    "AgentConfig": "o2o.types:AgentConfig",
    "LoopConfig": "o2o.config:LoopConfig",
    "RunConfig": "o2o.config:RunConfig",
    "TaskConfig": "o2o.config:TaskConfig",
    "with_fields": "o2o.config:with_fields",
    "O2OError": "o2o.errors:O2OError",
    "preset_run": "o2o.runs.presets:preset_run",
    "train_run": "o2o.runs.session:train",
    "resume_run": "o2o.runs.session:resume",
    "open_run": "o2o.runs.session:open_run",
    "evaluate_run": "o2o.runs.session:evaluate_run",
    "play_run": "o2o.runs.session:play_run",
    "diagnose": "o2o.runs.diagnosis:diagnose",
    "load_config": "o2o.runs.session:load_config",
    "load_policy": "o2o.runs.session:load_policy",
    "plot_runs": "o2o.report.plots:plot_runs",
}
"""Where each name is defined. (`o2o.train` is a package; to train is `train_run`.)"""

__all__ = [  # pyright: ignore[reportUnsupportedDunderAll]
    "AGENTS", "Agent", "AgentConfig", "LoopConfig", "O2OError", "RunConfig", "TaskConfig", "agents", "datasets",
    "diagnose", "envs", "evaluate_run", "load_config", "load_policy", "open_run", "play_run", "plot_runs", "preset_run",
    "register_agent", "resume_run", "session", "train_run", "with_fields",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'o2o' has no attribute {name!r}")
    module, _, attribute = _PLACES[name].partition(":")
    found = import_module(module)
    return getattr(found, attribute) if attribute else found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
