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


def measure(run: Run, span: Span, known: float | None = None) -> list[float]:
    """Return how often per second the thing was done, for each repeat; call it once before, so that it is compiled.

    `known` are the seconds that it took once, where that was measured already.
    """
    started = time.perf_counter()
    count, elapsed = 1, seconds(run, 1) if known is None else known
    if elapsed < span.seconds / 4:  # one alone says little where it is short
        count = max(1, round(span.seconds / 8 / elapsed))
        elapsed = seconds(run, count)
    if elapsed > span.limit:
        return [count / elapsed]
    count, rates = max(1, round(count * span.seconds / elapsed)), []
    while len(rates) < span.repeats and (not rates or time.perf_counter() - started < span.limit):
        rates.append(count / seconds(run, count))
    return rates


def squares(size: int) -> Run:
    """Return what makes float32 products of `size` squared matrices, each of the one before, in one program."""
    matrix = jnp.asarray(np.roll(np.eye(size, dtype=np.float32), 1, axis=0))  # any number of them stays in range

    @jax.jit
    def products(x: jax.Array, y: jax.Array, count: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, count, lambda _, x: x @ y, x)

    return lambda count: products(matrix, matrix, jnp.asarray(count, jnp.int32)).block_until_ready()


def matmul_rate(size: int, span: Span) -> float:
    """Return the FLOP/s of the products of `squares`."""
    run = squares(size)
    run(1)
    return statistics.median(measure(run, span)) * 2.0 * size**3


def alone(shapes: Any, numbers: Any) -> Run:
    """Return what makes a product of two arrays of these shapes, each about like the one before, in one program."""
    first, second = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))

    @jax.jit
    def run(first: jax.Array, second: jax.Array, count: jax.Array) -> jax.Array:
        def again(_: Any, carry: Any) -> Any:
            changed, total = carry
            out = jax.lax.dot_general(changed, second, numbers)
            corner = (0,) * changed.ndim  # changed a little: else the product could be made once for all rounds
            return changed.at[corner].add(1e-6 * out[(0,) * out.ndim]), total + out[(-1,) * out.ndim]

        return jax.lax.fori_loop(0, count, again, (first, jnp.zeros(())))[1]

    return lambda count: run(first, second, jnp.asarray(count, jnp.int32)).block_until_ready()


def products(jaxpr: Any, rounds: int = 1, cheapest: bool = False) -> list[tuple[Any, int]]:
    """Return a jaxpr's products and convolutions, its equations, each with how often it runs.

    All rounds of scans are counted, one of whiles; of branches the one with the most FLOPs, or the `cheapest`.
    """
    of_branches = min if cheapest else max
    found: list[tuple[Any, int]] = []
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in ("dot_general", "conv_general_dilated"):
            found.append((equation, rounds))
        times = rounds * equation.params["length"] if name == "scan" else rounds
        inner = [products(sub, times, cheapest) for sub in _jaxprs(equation.params)]
        found += of_branches(inner, key=flops_of) if inner and name == "cond" else sum(inner, [])
    return found


def flops_of(found: Sequence[tuple[Any, int]]) -> float:
    """Return the FLOPs of `products`."""
    total = 0.0
    for equation, rounds in found:
        first, second = (entry.aval.shape for entry in equation.invars[:2])
        numbers, out = equation.params["dimension_numbers"], math.prod(equation.outvars[0].aval.shape)
        if equation.primitive.name == "dot_general":
            total += 2.0 * rounds * out * math.prod(first[axis] for axis in numbers[0][0])
        else:
            total += 2.0 * rounds * out * math.prod(second) / second[numbers.rhs_spec[0]]
    return total


def kinds_of(traced: Any) -> dict[Any, tuple[int, float]]:
    """Return every kind of product in a traced function, what `alone` takes: how often it is made, and its FLOPs.

    JAX's gradient of a product by its weights is a product whose result is transposed; XLA makes it with its operands
    exchanged instead, which for thin ones is faster, and so it is named here.
    """
    kinds: dict[Any, tuple[int, float]] = {}
    exchanged = _transposed_results(traced.jaxpr.jaxpr)
    for equation, rounds in products(traced.jaxpr.jaxpr):
        kind = (tuple(v.aval.shape for v in equation.invars), equation.params["dimension_numbers"])
        if equation.outvars[0] in exchanged:
            shapes, (contracted, batch) = kind
            kind = (shapes[::-1], (contracted[::-1], batch[::-1]))
        kinds[kind] = (kinds.get(kind, (0, 0.0))[0] + rounds, flops_of([(equation, 1)]))
    return kinds


def _transposed_results(jaxpr: Any) -> set[Any]:
    """Return the variables, of a jaxpr and those within, that nothing reads but an exchange of their last two axes."""
    readers: dict[Any, int] = {}
    exchanged = []
    for equation in jaxpr.eqns:
        for variable in equation.invars:
            if not hasattr(variable, "val"):  # no literal
                readers[variable] = readers.get(variable, 0) + 1
        if equation.primitive.name == "transpose":
            order = tuple(range(len(equation.params["permutation"])))
            if equation.params["permutation"] == (*order[:-2], *order[:-3:-1]):
                exchanged.append(equation.invars[0])
    found = {v for v in exchanged if readers[v] == 1 and v not in jaxpr.outvars}
    return found.union(*(_transposed_results(sub) for e in jaxpr.eqns for sub in _jaxprs(e.params)))


def _jaxprs(params: dict[str, Any]) -> list[Any]:
    """Return the jaxprs among an equation's parameters, closed ones opened."""
    values = [v for p in params.values() for v in (p if isinstance(p, Sequence) and not isinstance(p, str) else [p])]
    opened = [getattr(value, "jaxpr", value) for value in values]
    return [value for value in opened if hasattr(value, "eqns")]


def program_flops(traced: Any, period: int = 1) -> tuple[float, float | None]:
    """Return the FLOPs of the `products` of a traced function, and XLA's own count where it has one.

    Of branches the dearest is taken once every `period` times, else the cheapest. XLA's analysis counts one round of a
    scan and every elementwise operation.
    """
    try:
        analysis: Any = traced.lower().cost_analysis()
    except (NotImplementedError, RuntimeError):  # a back end without an analysis
        analysis = None
    dearest, cheapest = (flops_of(products(traced.jaxpr.jaxpr, cheapest=least)) for least in (False, True))
    ours = (dearest + (period - 1) * cheapest) / period
    return ours, analysis.get("flops") if isinstance(analysis, dict) else None


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
