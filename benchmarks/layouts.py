"""What each choice of `o2o.nn.kernels` is worth on this CPU: the comparison's cases, laid out in other ways, in turns.

    python benchmarks/layouts.py [CASE ...]

CASE: `sac-utd1`, `sac-utd20`, `iql`, `cql` (`throughput_peers.CASES`), `pixels`. Results go to
`benchmarks/results/layouts/`; a case that is measured anew replaces its rows. Run it alone on the machine.
"""

import dataclasses
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from parts import measure_parts, rates_in_turns, ratio_table
from peers import CASE, Contender, serve
from throughput_peers import CASES, Case

from o2o.startup import NO_YNN

ROUNDS, SECONDS = 6, 2.0
SHIPPED, YNN = "as shipped", "XLA's YNN fusion on"
EVERY: dict[str, dict[str, Any]] = {
    SHIPPED: {},
    "sums over rows and means as XLA makes them": {"sums": True},
    "products in bfloat16": {"coarse": True},
    YNN: {},
}
WIDE: dict[str, dict[str, Any]] = {f"pieces of {size or 'all'} states": {"pieces": size} for size in (64, 128, None)}
PIXELS: dict[str, dict[str, Any]] = {SHIPPED: {}, "convolutions with XLA's own gradients": {"convolutions": True}}
EACH = {**CASES, "pixels": Case("EXPO, pre-training, one camera of 64 x 64 x 3, minibatches of 64", "expo")}
VARIANTS = {"sac-utd1": EVERY, "sac-utd20": EVERY, "iql": EVERY, "cql": {**EVERY, **WIDE}, "pixels": PIXELS}


def lay_out(sums: bool = False, coarse: bool = False, pieces: int | None = 32, convolutions: bool = False) -> None:
    """Change `o2o.nn.kernels` in this process."""
    import jax.numpy as jnp  # noqa: PLC0415

    from o2o.nn import kernels as layout  # noqa: PLC0415
    from o2o.nn import modules as networks  # noqa: PLC0415

    def product(x: Any, kernel: Any) -> Any:
        return layout.product(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)).astype(x.dtype)

    layout.PIECE_ROWS = pieces  # type: ignore[assignment]
    if sums:
        layout.sums_as_products = lambda: False
    if convolutions:
        setattr(layout, "_conv_on_cpu", layout._conv)  # noqa: B010
    if coarse:
        networks.product = product


def measured(name: str) -> dict[str, list[float]]:
    """Return the rates of every variant of a case, of rounds in which all take turns."""
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"
    flags, script = os.environ["XLA_FLAGS"], str(Path(__file__).resolve())
    ways = {
        label: ((script, "--serve", json.dumps(about)), flags.replace(NO_YNN, "") if label == YNN else flags)
        for label, about in VARIANTS[name].items()
    }
    return rates_in_turns(EACH[name], ways, ROUNDS, SECONDS)


def from_pixels() -> Contender:
    """Return what updates on images."""
    from throughput_adapter import Adapter  # noqa: PLC0415
    from throughput_agents import config_of  # noqa: PLC0415

    config = dataclasses.replace(config_of("expo", "pixels", 1, False), batch_size=64)
    adapter = Adapter("expo", config, "pixels", 1, 500)
    adapter.prepare(adapter.stages()[0])
    return Contender("o2o", {"as run": (adapter.in_dispatches, "")})


def contender(case: CASE) -> Contender:
    """Return our contender for a case, laid out as this process is."""
    from throughput_agents import ours  # noqa: PLC0415

    return from_pixels() if case["algorithm"] == "expo" else ours(case)


def report(rows: dict[str, Any]) -> str:
    """Return the report in Markdown."""
    lines = [
        "# Layouts", "",
        "Made by `python benchmarks/layouts.py`; raw: `rows.json`. What each choice of `o2o/layout.py` is worth: the "
        f"cases of the comparison with other libraries, and one from pixels, {ROUNDS} rounds in turns. Ratio: to the "
        "layout that is shipped, the median over rounds, least and most in brackets; below 1, the shipped one is "
        f"faster. Machine: {rows['machine']}.", "",
        *ratio_table("layout", {name: EACH[name].title for name in VARIANTS}, rows), "",
    ]  # fmt: skip
    return "\n".join(lines)


def main(args: list[str]) -> int:
    """Measure the cases that are named, all where none is; or be the process of one layout."""
    if args and args[0] == "--serve":
        lay_out(**json.loads(args[1]))
        serve(contender, json.loads(args[2]))
        return 0
    return measure_parts(args, {name: partial(measured, name) for name in VARIANTS}, report, "layouts", "cases")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
