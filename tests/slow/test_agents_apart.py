"""Every agent with a replay learns from a robot elsewhere; the others are refused in one line."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from o2o.agents import AGENTS
from o2o.data.normalizer import normalize
from o2o.errors import ConfigError
from o2o.runs import session
from o2o.runs.session import RunConfig
from o2o.train.link import Hub, Row, shared_key
from tests.system.test_cases_apart import LOOP, noted as noted, playing, stored

Maker = Callable[..., RunConfig]
APART = [
    name
    for name, kind in AGENTS.items()
    for config in [kind.preset("other", "small").config]
    if config.online.replay not in ("rollout", "none") and not config.needs.episode_returns
]


def config_of(agent: str, tiny_run: Maker, base: Path) -> RunConfig:
    """Return a short run of an agent, with at least one update online; a base is trained for one that corrects it."""
    online = tiny_run(agent).config.online
    waits: list[tuple[str, Any]] = [
        (f"online.{name}", 20) for name in ("warmup_steps", "random_steps") if getattr(online, name)
    ]
    initial = [("online.initial_updates", 5)] if online.initial_updates else []
    changes: dict[str, Any] = {"offline_steps": 10, "online_steps": 60, "loop": LOOP, "offline_estimate": True}
    changes |= {"episode_limit": 20}  # Monte-Carlo returns wait for the end of an episode
    if agent == "sac":  # XLA without optimisation (conftest.py) makes NaN of its gradient for 16 rows
        waits.append(("batch_size", 32))
    if agent == "residual":
        assert session.train(tiny_run("bc", offline_steps=10, online_steps=0, loop=LOOP), base, quiet=True)
        changes |= {"base": str(base), "offline_steps": 0, "base_timeout_s": None}
    return tiny_run(agent, [*waits, *initial], **changes)


@pytest.mark.parametrize("agent", APART)
def test_agent_learns_apart(agent: str, tiny_run: Maker, noted: list[Row], tmp_path: Path) -> None:
    """What the robot played is what the learner has stored and learnt from, whichever agent acts."""
    hub, path = Hub(("127.0.0.1", 0), shared_key("127.0.0.1"), silent_s=2.0), tmp_path / "run"
    config = config_of(agent, tiny_run, tmp_path / "base")
    robot, done = playing(noted, hub.address[1], tmp_path / "spool", base=config.base)
    assert session.train(config, path, quiet=True, hub=hub)
    robot.join(30)
    rows, counters, normalizer = stored(path)
    assert counters.env_steps == 60 and counters.online_updates > 0 and done[0].transitions == len(noted) >= 60
    for key in ("observations", "actions", "next_observations"):
        sent = jax.tree.map(lambda *leaves: np.concatenate(leaves), *(row.values[key] for row in noted[:60]))
        sent = normalize(normalizer, sent) if key.endswith("observations") else sent
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), rows[key], sent)


@pytest.mark.parametrize("agent", sorted(set(AGENTS) - set(APART)))
def test_agent_refused(agent: str, tiny_run: Maker) -> None:
    """The line says what the agent is, and what is expected."""
    with pytest.raises(ConfigError, match=r"is .*, and the run is a learner's; expected "):
        session.check_learner(tiny_run(agent))
