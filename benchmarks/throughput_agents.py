"""Our side of the throughput benchmark, in a process of its own: every form of one agent, shape and number of seeds.

`python throughput_agents.py cell JSON` prints one JSON row per form as soon as it is measured; `... serve JSON` is our
contender in the comparison with other libraries (`peers.serve`).
"""

import dataclasses
import gc
import json
import os
import statistics
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

from peers import CASE, Contender, repeat, serve
from throughput_adapter import PER_DISPATCH, SHAPES, Adapter
from throughput_machine import (
    Run,
    Span,
    alone,
    forget_peak,
    kinds_of,
    machine,
    matmul_rate,
    measure,
    peak_megabytes,
    seconds,
    squares,
)
from throughput_report import AS_RUN, PRODUCTS, SQUARES, Row, today

from o2o import __version__
from o2o.agents import AGENTS, CQLConfig, IQLConfig, RLPDConfig, SACConfig
from o2o.agents.cql import Conservative
from o2o.nn.encoders import EncoderConfig
from o2o.types import OnlineConfig

BATCH_SIZE = 256
ROWS = {"pen": 20_000, "cheetah": 20_000, "pixels": 2_000}
"""Rows of the dataset, and of the replay buffer."""
FULL, SHORT = Span(repeats=5, seconds=1.0, limit=15.0), Span(repeats=5, seconds=0.4, limit=10.0)
"""For rates, and for what they are held against."""
LONG = 2.0
"""Seconds of an online step whose program is not measured a second time without its environment."""
TINY = EncoderConfig(kind="conv", conv_features=(4, 4), conv_strides=(4, 2), latent_dim=4)
QUICK = Span(repeats=2, seconds=0.05, limit=1.0)


def plain(online: OnlineConfig, **changes: Any) -> OnlineConfig:
    """Return a schedule whose updates begin with the first step: what comes before is no measure of what follows."""
    return dataclasses.replace(online, warmup_steps=0, random_steps=0, min_rows=0, initial_updates=0, **changes)


def config_of(agent: str, shape: str, utd: int, quick: bool) -> Any:
    """Return an agent's config at paper size, or for a quick look at laptop size and with minibatches of 16."""
    kind: Any = AGENTS[agent]
    config = kind.preset(SHAPES[shape][0], "small" if quick else "paper").config
    short = {"num_envs": 2, "rollout_steps": 32} if quick else {}
    if quick and hasattr(config, "encoder"):
        config = dataclasses.replace(config, encoder=TINY)
    online = plain(config.online, **({"utd_ratio": utd} if utd else {}), **short)
    return dataclasses.replace(config, batch_size=16 if quick else BATCH_SIZE, online=online)


class Cell:
    """The forms of one agent, shape and number of seeds."""

    def __init__(self, agent: str, shape: str, seeds: int, quick: bool) -> None:
        """Measure the machine's matmul rates."""
        self.agent, self.shape, self.seeds, self.quick = agent, shape, seeds, quick
        self.span, self.short = (QUICK, QUICK) if quick else (FULL, SHORT)
        small, large = (64, 128) if quick else (256, 2048)
        rates = {"small": matmul_rate(small, self.short), "large": matmul_rate(large, self.short)}
        self.shared: dict[str, Any] = {
            "device": machine()["device"], "agent": agent, "shape": shape, "seeds": seeds, "matmul": rates,
            "when": today(),
        }  # fmt: skip

    def adapter(self, utd: int) -> Adapter:
        """Make the agent with a number of updates per environment step, 0 for its own."""
        gc.collect()
        forget_peak()
        rows = 1_000 if self.quick else ROWS[self.shape]
        return Adapter(self.agent, config_of(self.agent, self.shape, utd, self.quick), self.shape, self.seeds, rows)

    def offline(self) -> Iterator[Row]:
        """Measure offline updates, every stage of an agent that has several."""
        adapter = self.adapter(0)
        for stage in adapter.stages():
            forget_peak()
            adapter.prepare(stage)
            first, second = seconds(adapter.updates, 1), seconds(adapter.updates, 1)
            updates = measure(adapter.in_dispatches, self.span, second)
            single = measure(repeat(lambda: adapter.updates(1)), self.span)
            yield self.row(
                adapter, f"offline:{stage}" if stage else "offline", 0, updates=self.of_all(updates),
                single=self.of_all(single), compile_seconds=first - second,
            )  # fmt: skip
        adapter.trainer.close()

    def online(self, form: str, utd: int) -> Row:
        """Measure the whole online loop, and the parts of its step one by one."""
        adapter = self.adapter(utd)
        first, second = adapter.warm()
        found: dict[str, Any] = {"compile_seconds": first - second}
        rollout = adapter.online.replay == "rollout"
        together = adapter.online.rollout_steps // adapter.online.num_envs if rollout else 1
        steps = measure(lambda count: adapter.loop(count * together), self.span, None if rollout else second)
        side_by_side = adapter.online.num_envs if rollout else 1
        per_step = side_by_side * together
        found["steps"] = self.of_all([rate * per_step for rate in steps])
        if rollout:
            agent: Any = adapter.trainer.agent_of(0)
            found["updates"] = self.of_all([rate * agent.rollout_updates for rate in steps])
        parts = {"environment": [rate * side_by_side for rate in measure(adapter.environments(), self.short)]}
        if adapter.recorder.last is not None:
            parts["transfer"] = measure(adapter.transfers, self.short)
            if second < LONG:
                parts["update"] = measure(adapter.steps, self.span)
            if adapter.learning():
                found["updates"] = self.of_all([rate * utd for rate in parts.get("update", steps)])
        found["parts"] = {name: 1000.0 / statistics.median(rates) for name, rates in parts.items()}
        row = self.row(adapter, form, utd, **found)
        adapter.trainer.close()
        return row

    def of_all(self, rates: list[float]) -> list[float]:
        """Return what one seed's rates, all seeds going together, amount to."""
        return [rate * self.seeds for rate in rates]

    def row(self, adapter: Adapter, form: str, utd: int, **found: Any) -> Row:
        """Return the row of a form, with the memory that it took and the FLOPs of its update."""
        peak = peak_megabytes()
        counted = adapter.flops(utd) if found.get("updates") else (None, None)
        return Row(
            **self.shared, form=form, utd=utd, peak_megabytes=peak, flops=counted[0], flops_xla=counted[1],
            note=adapter.note, **found,
        )  # fmt: skip

    def measured(self, forms: list[str]) -> Iterator[Row]:
        """Measure the forms asked for: `offline`, `utdN`, and `online` for agents without a ratio of their own."""
        for form in forms:
            if form == "offline":
                yield from self.offline()
            else:
                yield self.online(form, int(form.removeprefix("utd")) if form.startswith("utd") else 0)


def comparable(case: CASE) -> tuple[str, Any]:
    """Return our agent and its config for a case of the comparison, the mathematics those of the case."""
    hidden, batch = tuple(case["hidden"]), case["batch"]
    shared: dict[str, Any] = {
        "batch_size": batch, "actor_hidden_dims": hidden, "critic_hidden_dims": hidden, "num_critics": case["critics"],
    }  # fmt: skip
    normed = {"critic_layer_norm": case["layer_norm"]}
    if case["algorithm"] == "iql":
        return "iql", IQLConfig(**shared, value_hidden_dims=hidden)
    if case["algorithm"] == "cql":
        term = Conservative(subset=None)
        single = {"shared_output": False, "target_subset": None, "max_target_actions": None}
        return "cql", CQLConfig(**shared, **normed, **single, actor_layer_norm=False, conservative=term)
    if case["critics"] == 2:
        return "sac", SACConfig(**shared, **normed, online=plain(SACConfig().online, utd_ratio=case["utd"]))
    return "rlpd", RLPDConfig(**shared, **normed, online=plain(RLPDConfig().online, utd_ratio=case["utd"]))


def bounds(adapter: Adapter, utd: int, large: int) -> tuple[dict[str, tuple[Run, str]], float]:
    """Return forms that make an update's products and nothing else, and as many FLOPs in products of `large` squared.

    The first counts for as many updates as the program of the case's form does; a run of the second, one product, for
    that many times the number returned.
    """
    kinds = kinds_of(adapter.traced(utd)[0])
    each = [(alone(*kind), times) for kind, (times, _) in kinds.items()]

    def run(count: int) -> None:
        for product, times in each:
            product(count * times)

    forms = {
        PRODUCTS: (run, "every matrix product of the update in its very shape, one after the other, and nothing else"),
        SQUARES: (squares(large), f"as many FLOPs in products of {large} x {large}, and nothing else"),
    }
    return forms, 2.0 * large**3 / sum(times * flops for times, flops in kinds.values())


def prepared(case: CASE) -> tuple[Adapter, dict[str, tuple[Run, str]]]:
    """Return our agent of a case of the comparison, ready to go, and its forms."""
    agent, config = comparable(case)
    adapter = Adapter(agent, config, "cheetah" if case["env"] else "pen", 1, case["rows"], case["capacity"])
    if case["env"]:
        adapter.warm()
        return adapter, {AS_RUN: (adapter.loop, "the online loop: environment, replay, update, metrics")}
    if case["utd"] > 1:
        adapter.warm()
        return adapter, {AS_RUN: (adapter.steps, "one online step: store a row, draw, update, choose the next action")}
    adapter.prepare(adapter.stages()[0])
    return adapter, {
        AS_RUN: (adapter.in_dispatches, f"the offline loop's call: {PER_DISPATCH} times drawing and updating"),
        "one per call": (repeat(lambda: adapter.updates(1)), "drawing and updating, waited for each time"),
    }


def ours(case: CASE, bounded: bool = False) -> Contender:
    """Return our contender for a case of the comparison, with what bounds it if asked."""
    adapter, forms = prepared(case)
    contender = Contender(f"o2o {__version__}", forms, case["utd"])
    if bounded:
        extra, contender.worth[SQUARES] = bounds(adapter, case["utd"], case["square"])
        contender.forms |= extra
    return contender


def main() -> None:
    """Do what the first argument says with the second."""
    task, about = sys.argv[1], json.loads(sys.argv[2])
    if task == "serve":
        serve(partial(ours, bounded=True), about)
        return
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    answers.write(json.dumps({"machine": machine()}) + "\n")
    forms = about.pop("forms")
    for row in Cell(**about).measured(forms):
        answers.write(json.dumps(dataclasses.asdict(row)) + "\n")


if __name__ == "__main__":
    main()
