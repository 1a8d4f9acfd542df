"""Updates per second of every agent at the papers' network sizes; run it alone on the machine.

`python benchmarks/throughput.py` writes `benchmarks/results/throughput/`. Transitions are synthetic and resident on the
device; no environment is stepped. Every row is the median of a few repeats, compilation excluded.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

# OpenBLAS's threads spin in the initialisers' QR while another process holds a core: minutes instead of seconds.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np

from o2o.agents import AGENTS
from o2o.buffer import OfflineData
from o2o.dispatch import (
    OnlineMode,
    create_agent,
    each_seed,
    fresh_online_state,
    offline_updates,
    online_step,
    to_online,
)
from o2o.types import window_of

RESULTS = Path(__file__).parent / "results" / "throughput"
REPEATS = 3
SECONDS = 2.0
"""Aimed-at time of one repeat; it is longer where one call takes longer."""
BATCH_SIZE = 256
DATASET_ROWS = 20_000
FAMILIES = {"adroit": (45, 24), "locomotion": (17, 6)}
"""Family of the preset to (observation, action) dimensions: those of Adroit's pen and of HalfCheetah."""
ONLINE = ("sac", "rlpd", "wsrl")


@dataclass(frozen=True)
class Row:
    """One measurement."""

    family: str
    agent: str
    form: str
    """`offline`: many updates in one call; `single`: one update in each; `online`: `utd_ratio` with one step's work."""
    utd_ratio: int
    updates_per_second: float
    """Critic updates (BC: actor updates) on minibatches of `BATCH_SIZE`; median over the repeats."""
    steps_per_second: float | None
    """Online: environment steps, with a simulator that takes no time."""
    repeats: list[float]
    """Updates per second of each repeat."""
    ratio: float = 1.0
    """Updates per second over those of the family's `sac` with one update in each call."""


def observed(kind: Any, states: Any, action_dim: int) -> Any:
    """Return the observations that an agent of this class takes, of states `[N, D]`."""
    if not getattr(kind, "needs_base", False):
        return states
    return {"state": states, "base_action": np.tanh(states[:, :action_dim])}


def synthetic(observation_dim: int, action_dim: int, needs: tuple[str, ...], kind: Any) -> OfflineData:
    """Return random transitions with every key that an agent of this class may need."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal((DATASET_ROWS, *shape)).astype(np.float32)  # noqa: E731
    rows = {
        "observations": observed(kind, normal(observation_dim), action_dim),
        "actions": np.tanh(normal(action_dim)),
        "rewards": normal(),
        "masks": np.ones(DATASET_ROWS, np.float32),
        "next_observations": observed(kind, normal(observation_dim), action_dim),
        "ends": np.zeros(DATASET_ROWS, np.float32),
        "mc_returns": normal(),
    }
    return OfflineData.create(rows, (*needs, "ends"))


def measure(run: Callable[[int], None]) -> list[float]:
    """Time `run(n)`, which does a thing `n` times and waits; return how often per second, for each repeat."""
    run(1)
    count, elapsed = 1, _seconds(run, 1)
    if elapsed < SECONDS / 4:  # one alone says little where it is short
        count = max(1, round(SECONDS / 8 / elapsed))
        elapsed = _seconds(run, count)
    count = max(1, round(count * SECONDS / elapsed))
    return [count / _seconds(run, count) for _ in range(REPEATS)]


def _seconds(run: Callable[[int], None], count: int) -> float:
    started = time.perf_counter()
    run(count)
    return time.perf_counter() - started


class Bench:
    """One agent of one family at paper size, one seed."""

    def __init__(self, name: str, family: str) -> None:
        """Create the agent and its data."""
        observation_dim, action_dim = FAMILIES[family]
        kind: Any = AGENTS[name]
        self.name, self.family = name, family
        preset = kind.preset(family, "paper").config
        steady = replace(preset.online, initial_updates=0)  # a critic's warm-up is no measure of what follows
        self.config = replace(preset, batch_size=BATCH_SIZE, online=steady)
        states = np.zeros((1, observation_dim), np.float32)
        example = (observed(kind, states, action_dim), jnp.zeros((1, action_dim)))
        keys = jax.random.split(jax.random.key(0), 1)
        self.agent = each_seed(lambda key: create_agent(key, *example, agent_class=kind, config=self.config), keys)
        self.data = synthetic(observation_dim, action_dim, self.agent.needs, kind)
        self.rng = jax.random.split(jax.random.key(1), 1)

    def offline(self, single: bool = False) -> Row:
        """Measure the offline phase; with `single`, one update in each call."""

        def update(count: int) -> None:
            number = jnp.asarray(count, jnp.int32)
            self.agent, self.rng, _ = offline_updates(
                self.agent, self.rng, self.data, number, seeds=1, batch_size=BATCH_SIZE
            )

        def run(count: int) -> None:
            if single:
                for _ in range(count):
                    update(1)
            else:
                update(count)
            jax.block_until_ready(self.agent)

        repeats = measure(run)
        form = "single" if single else "offline"
        return Row(self.family, self.name, form, 1, statistics.median(repeats), None, repeats)

    def online(self) -> Row:
        """Measure the online phase: insert a row, `utd_ratio` updates, the next action, which the caller waits for."""
        wanted = self.config.online
        agent = each_seed(to_online, self.agent)
        state = fresh_online_state(agent, self.rng, self.data, DATASET_ROWS, append=True)
        mixed = wanted.replay == "mixed"
        mode = OnlineMode(
            seeds=1,
            update=True,
            random=False,
            pending=False,
            utd_ratio=wanted.utd_ratio,
            batch_size=BATCH_SIZE,
            offline_ratio=wanted.offline_ratio if mixed else 0.0,
            window=window_of(agent),
        )
        kept = {key: value for key, value in self.data.rows.items() if key in state.buffer.rows}
        row = jax.tree.map(lambda value: np.asarray(value[:1]), kept)
        ended = np.zeros(1, bool)

        def run(count: int) -> None:
            nonlocal state
            for _ in range(count):
                state, action = online_step(
                    state, self.data if mixed else None, None, row, row["next_observations"], ended, mode=mode
                )
                np.asarray(action)
            jax.block_until_ready(state.agent)

        steps = measure(run)
        repeats = [rate * wanted.utd_ratio for rate in steps]
        median = statistics.median(repeats)
        return Row(self.family, self.name, "online", wanted.utd_ratio, median, statistics.median(steps), repeats)


def family_rows(family: str) -> list[Row]:
    """Measure a family: first the yardstick, then every agent."""
    yardstick = Bench("sac", family).offline(single=True)
    rows = [yardstick]
    report(yardstick)
    for name in AGENTS:
        bench = Bench(name, family)
        for form in (bench.offline, bench.online) if name in ONLINE else (bench.offline,):
            row = form()
            rows.append(replace(row, ratio=row.updates_per_second / yardstick.updates_per_second))
            report(rows[-1])
    return rows


def report(row: Row) -> None:
    """Print one line."""
    print(
        f"{row.family:<11} {row.agent:<6} {row.form:<8} utd {row.utd_ratio:<3} {row.updates_per_second:9.1f} updates/s "
        f"ratio {row.ratio:.3f}",
        flush=True,
    )


def machine() -> dict[str, Any]:
    """Describe what the figures were measured on."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": model or platform.machine(),
        "cores": cores,
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def markdown(rows: list[Row], about: dict[str, Any]) -> str:
    """Return the README of the results."""
    lines = [
        "# Throughput",
        "",
        f"Updates per second with the networks of each agent's `paper` preset, minibatches of {BATCH_SIZE}, one seed, "
        f"synthetic transitions: median of {REPEATS} repeats of about {SECONDS:g} s, compilation excluded. An update "
        "is one step of the critics (BC: of the actor) on one minibatch.",
        "",
        f"Machine: {about['processor']}, {about['cores']} cores; jax {about['jax']} on {about['platform']} "
        f"({about['device']}); Python {about['python']}.",
        "",
        "`offline` runs many updates in one call to the device, as pre-training does. `online` is the agent after the "
        "switch: each call inserts a transition, runs `utd` updates and chooses the next action, for which the loop "
        "waits; steps/s is what a simulator that takes no time would see. Ratio: updates/s over those of `sac` with "
        "one update in each call, measured in the same run (`single`).",
    ]
    for family, (observation_dim, action_dim) in FAMILIES.items():
        lines += [
            "",
            f"## {family} ({observation_dim} observations, {action_dim} actions)",
            "",
            "| agent | form | utd | updates/s | min - max | ms/update | steps/s | ratio |",
            "|---|---|--:|--:|--:|--:|--:|--:|",
        ]
        for row in rows:
            if row.family != family:
                continue
            rate, steps = row.updates_per_second, "" if row.steps_per_second is None else f"{row.steps_per_second:.1f}"
            spread = f"{min(row.repeats):.1f} - {max(row.repeats):.1f}"
            lines.append(
                f"| {row.agent} | {row.form} | {row.utd_ratio} | {rate:.1f} | {spread} | {1000 / rate:.2f} | {steps} | "
                f"{row.ratio:.2f} |"
            )
    return "\n".join([*lines, "", "Made by `python benchmarks/throughput.py`; every repeat is in `rows.json`.", ""])


def main() -> None:
    """Measure everything and write the results."""
    rows = [row for family in FAMILIES for row in family_rows(family)]
    about = machine()
    RESULTS.mkdir(parents=True, exist_ok=True)
    content = {"machine": about, "batch_size": BATCH_SIZE, "rows": [asdict(row) for row in rows]}
    (RESULTS / "rows.json").write_text(json.dumps(content, indent=1) + "\n")
    (RESULTS / "README.md").write_text(markdown(rows, about))
    print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
