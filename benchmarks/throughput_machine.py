"""What a throughput is held against: the machine's own matmul rate, a program's matmul FLOPs, the memory it took."""

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from parts import process_peak

Run = Callable[[int], object]
"""Do a thing so many times, and wait for the last."""


class Span(NamedTuple):
    """How long to measure."""

    repeats: int
    seconds: float
    """Aimed-at time of one repeat; it is longer where one call takes longer."""
    limit: float
    """No repeat is begun after so many seconds; there is one at least."""


def seconds(run: Run, count: int) -> float:
    """Return the seconds that `run(count)` takes."""
    started = time.perf_counter()
    run(count)
    return time.perf_counter() - started


def measure(run: Run, span: Span) -> list[float]:
    """Return how often per second the thing was done, for each repeat; call it once before, so that it is compiled."""
    started = time.perf_counter()
    count, elapsed = 1, seconds(run, 1)
    if elapsed < span.seconds / 4:  # one alone says little where it is short
        count = max(1, round(span.seconds / 8 / elapsed))
        elapsed = seconds(run, count)
    if elapsed > span.limit:
        return [count / elapsed]
    count, rates = max(1, round(count * span.seconds / elapsed)), []
    while len(rates) < span.repeats and (not rates or time.perf_counter() - started < span.limit):
        rates.append(count / seconds(run, count))
    return rates


def matmul_rate(size: int, span: Span) -> float:
    """Return the FLOP/s of float32 products of `size` squared matrices, each of the one before, in one program."""
    matrix = jnp.asarray(np.roll(np.eye(size, dtype=np.float32), 1, axis=0))  # any number of them stays in range

    @jax.jit
    def products(x: jax.Array, y: jax.Array, count: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, count, lambda _, x: x @ y, x)

    run = lambda count: products(matrix, matrix, jnp.asarray(count, jnp.int32)).block_until_ready()  # noqa: E731
    run(1)
    return statistics.median(measure(run, span)) * 2.0 * size**3


def matmul_flops(jaxpr: Any) -> float:
    """Return the FLOPs of a jaxpr's products and convolutions, all rounds of its scans counted, one of its whiles.

    XLA's own analysis counts one round of a scan and every elementwise operation.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, shape = equation.primitive.name, lambda i, e=equation: e.invars[i].aval.shape
        if name in ("dot_general", "conv_general_dilated"):
            numbers, out = equation.params["dimension_numbers"], math.prod(equation.outvars[0].aval.shape)
            if name == "dot_general":
                total += 2.0 * out * math.prod(shape(0)[axis] for axis in numbers[0][0])
            else:
                total += 2.0 * out * math.prod(shape(1)) / shape(1)[numbers.rhs_spec[0]]
        inner = [matmul_flops(sub) for sub in _jaxprs(equation.params)]
        if inner:
            rounds = equation.params["length"] if name == "scan" else 1
            total += max(inner) if name == "cond" else rounds * sum(inner)
    return total


def _jaxprs(params: dict[str, Any]) -> list[Any]:
    """Return the jaxprs among an equation's parameters, closed ones opened."""
    values = [v for p in params.values() for v in (p if isinstance(p, Sequence) and not isinstance(p, str) else [p])]
    opened = [getattr(value, "jaxpr", value) for value in values]
    return [value for value in opened if hasattr(value, "eqns")]


def program_flops(function: Callable[..., Any], *args: Any) -> tuple[float, float | None]:
    """Return `matmul_flops` of a function of arrays or their shapes, and XLA's own count where it has one."""
    traced = jax.jit(function).trace(*args)
    try:
        analysis: Any = traced.lower().cost_analysis()
    except (NotImplementedError, RuntimeError):  # a back end without an analysis
        analysis = None
    return matmul_flops(traced.jaxpr.jaxpr), analysis.get("flops") if isinstance(analysis, dict) else None


def forget_peak() -> None:
    """Begin the peak of this process's memory anew, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_megabytes() -> float:
    """Return the peak memory: the device's of this process, or on a CPU the process's own since `forget_peak`."""
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 1e6
    return process_peak()


def machine() -> dict[str, Any]:
    """Describe what the figures were measured on; `device` names it in one line."""
    model, info = platform.processor(), Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    back_end = jax.default_backend()
    processor = model or platform.machine()
    return {
        "device": f"{processor}, {cores} cores" if back_end == "cpu" else jax.devices()[0].device_kind,
        "platform": back_end,
        "processor": processor,
        "cores": cores,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }
