"""What two seeds cost on two CPU cores: as `o2o.nn.kernels` has them, batched, a run each, each on a device of its own.

    python benchmarks/seeds.py [CASE ...]

CASE: `sac-utd1`, `sac-utd20`, `iql`, `cql` (`throughput_peers.CASES`). Results go to `benchmarks/results/seeds/`; a
case that is measured anew replaces its rows. Run it alone on the machine.
"""

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from parts import measure_parts, rates_in_turns, ratio_table
from peers import serve
from throughput_peers import CASES

ROUNDS, SECONDS, SEEDS = 6, 3.0, 2
FORMS = {"as shipped": "shipped", "batched": "batched", "a run each": "alone"}
DEVICES = {"each on a host device": "devices"}
VARIANTS = {
    "sac-utd1": FORMS | DEVICES, "sac-utd20": FORMS, "iql": FORMS | DEVICES, "cql": FORMS | DEVICES,
}  # fmt: skip
DEVICE_FLAG = f"--xla_force_host_platform_device_count={SEEDS}"


def contender(form: str, case: dict[str, Any]) -> Any:
    """Return what trains in this process: online steps with several updates each, else pre-training; all seeds."""
    from peers import Contender  # noqa: PLC0415
    from throughput_adapter import Adapter  # noqa: PLC0415
    from throughput_agents import comparable  # noqa: PLC0415

    from o2o.nn import kernels as layout  # noqa: PLC0415

    if form == "batched":
        layout.BATCHED_NUMBERS = sys.maxsize
    agent, config = comparable(case)
    adapter = Adapter(agent, config, "pen", 1 if form == "alone" else SEEDS, case["rows"], case["capacity"])
    if case["utd"] > 1:
        adapter.warm()
        return Contender("", {"as run": (adapter.steps, form)}, case["utd"] * adapter.seeds)
    adapter.prepare(adapter.stages()[0])
    run = on_devices(adapter) if form == "devices" else adapter.in_dispatches
    return Contender("", {"as run": (run, form)}, adapter.seeds)


def on_devices(adapter: Any) -> Callable[[int], None]:
    """Return `adapter.in_dispatches` with every seed on a host device of its own."""
    import jax  # noqa: PLC0415
    import jax.numpy as jnp  # noqa: PLC0415
    from jax.sharding import NamedSharding, PartitionSpec  # noqa: PLC0415
    from throughput_adapter import PER_DISPATCH  # noqa: PLC0415

    from o2o.train import programs as dispatch  # noqa: PLC0415

    trainer, size = adapter.trainer, adapter.config.batch_size
    mesh = jax.make_mesh((SEEDS,), ("seed",))
    own, shared = NamedSharding(mesh, PartitionSpec("seed")), NamedSharding(mesh, PartitionSpec())

    def one_seed(agent: Any, rng: Any, data: Any, count: Any) -> Any:
        return dispatch.offline_updates(agent, rng, data, count, seeds=1, batch_size=size)

    specs = tuple(place.spec for place in (own, own, shared, shared))
    mapped = jax.shard_map(one_seed, mesh=mesh, in_specs=specs, out_specs=own.spec, check_vma=False)
    program = jax.jit(mapped, donate_argnums=(0, 1))
    state = list(jax.device_put((trainer.agent, trainer.rng), own))
    data = jax.device_put(trainer.offline_data, shared)

    def run(count: int) -> None:
        for begin in range(0, count, PER_DISPATCH):
            number = jax.device_put(jnp.asarray(min(PER_DISPATCH, count - begin), jnp.int32), shared)
            state[:] = jax.block_until_ready(program(*state, data, number))[:2]

    return run


def measured(name: str) -> dict[str, list[float]]:
    """Return the rates of every form of a case, updates of all seeds together, of rounds in which all take turns."""
    flags, script = os.environ["XLA_FLAGS"], str(Path(__file__).resolve())
    ways = {
        label: ((script, "--serve", form), f"{flags} {DEVICE_FLAG}" if form == "devices" else flags)
        for label, form in VARIANTS[name].items()
    }
    return rates_in_turns(CASES[name], ways, ROUNDS, SECONDS)


def report(rows: dict[str, Any]) -> str:
    """Return the report in Markdown."""
    lines = [
        "# Seeds", "",
        f"Made by `python benchmarks/seeds.py`; raw: `rows.json`. Training of {SEEDS} seeds, the cases of the "
        f"comparison with other libraries, critic updates of all seeds together, {ROUNDS} rounds in turns. \"A run "
        "each\" is what one seed alone makes. With several updates per step: online steps, else pre-training. "
        "Ratio: to what is shipped, the median over rounds, least and most in brackets. "
        f"Machine: {rows['machine']}.", "",
        *ratio_table("seeds", {name: CASES[name].title for name in VARIANTS}, rows), "",
    ]  # fmt: skip
    return "\n".join(lines)


def main(args: list[str]) -> int:
    """Measure the cases that are named, all where none is; or be the process of one form."""
    if args and args[0] == "--serve":
        serve(partial(contender, args[1]), json.loads(args[2]))
        return 0
    return measure_parts(args, {name: partial(measured, name) for name in VARIANTS}, report, "seeds", "cases")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
