"""Texts of settings, agents and runs: a line that says what is not as usual."""

import dataclasses

from o2o.agents import AGENTS
from o2o.config import LoopConfig, RunConfig, TaskConfig
from o2o.settings import short
from tests.helpers.tiny import create


def test_short_texts() -> None:
    """Runs and agents show what differs from the defaults of their settings, within settings too, and nothing else."""
    config = dataclasses.replace(AGENTS["td3bc"].preset("other", "small").config, batch_size=8)
    online = dataclasses.replace(config.online, utd_ratio=3)
    run = RunConfig(agent="td3bc", config=dataclasses.replace(config, online=online), dataset=("a/b-v0",), seeds=2)
    text = repr(run)
    assert text.startswith("RunConfig(agent='td3bc', config=TD3BCConfig(") and "dataset=('a/b-v0',), seeds=2" in text
    assert "batch_size=8" in text and "utd_ratio=3" in text and "discount" not in text and "loop" not in text
    shown = repr(dataclasses.replace(run, loop=LoopConfig(eval_every=7), task=TaskConfig(binary=True)))
    assert "loop=LoopConfig(eval_every=7)" in shown and "task=TaskConfig(binary=True)" in shown
    assert short(3.0) == "3.0" and short(LoopConfig()) == "LoopConfig()"
    small = dataclasses.replace(AGENTS["bc"].preset("other", "small").config, batch_size=8, actor_hidden_dims=(16, 16))
    agent = create(AGENTS["bc"], small)
    assert repr(agent).startswith("BC(") and "batch_size=8" in repr(agent) and "discount" not in repr(agent)
