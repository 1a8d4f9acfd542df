"""A policy as one straight line of primitive operations, which other runtimes understand.

Calls are inlined, loops unrolled, and everything that depends on constants alone is computed. What the policy draws
from its random key becomes an input: whoever runs the program draws it, from the distributions that `Draw` names.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal as Constant
from jax.typing import ArrayLike

from o2o.errors import ConfigError

Kind = Literal["normal", "uniform", "permutation"]
CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr", "call")
"""Parameters under which operations that only call something keep it."""
MOST_TURNS = 10_000
"""Turns of a `while` loop after which it counts as endless."""


@dataclass(frozen=True)
class Draw:
    """Random numbers that one call of a policy takes.

    `normal`: standard normal, float32 `[*shape]`; `uniform`: in [0, 1), float32 `[*shape]`; `permutation`: of the
    numbers below n, int32 `[n]`.
    """

    kind: Kind
    shape: tuple[int, ...]

    @property
    def dtype(self) -> Any:
        """The type of the numbers."""
        return jnp.int32 if self.kind == "permutation" else jnp.float32


@dataclass(frozen=True)
class _Key:
    """A value that follows from the policy's random key alone."""

    value: Any


Drawer = Callable[[Draw, JaxprEqn, list[Any]], Any]
"""Gives the random numbers of a `Draw`, which an operation makes from its inputs (keys as they are)."""


def inline(closed: ClosedJaxpr, inputs: Sequence[Any], key: Any, draw: Drawer) -> list[Any]:
    """Compute a program of `inputs` and, as its last input, a random key; `draw` gives what it draws from the key."""
    return _run(closed.jaxpr, closed.consts, [*inputs, _Key(key)], draw)


def _run(jaxpr: Jaxpr, consts: Sequence[Any], inputs: Sequence[Any], draw: Drawer) -> list[Any]:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))
    read = lambda atom: atom.val if isinstance(atom, Constant) else values[atom]  # noqa: E731
    for equation in jaxpr.eqns:
        results = _step(equation, [read(atom) for atom in equation.invars], draw)
        values.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _step(equation: JaxprEqn, inputs: list[Any], draw: Drawer) -> list[Any]:
    """Compute one operation."""
    name, params = equation.primitive.name, equation.params
    if any(isinstance(value, _Key) for value in inputs):
        drawn = _draw(equation, inputs, draw)
        if drawn is not None:
            return [drawn]
    if name == "scan":
        return _scan(params, inputs, draw)
    if name == "while":
        return _while(params, inputs, draw)
    if name == "cond":
        return _cond(params["branches"], inputs, draw)
    called = next((params[word] for word in CALLS if word in params), None)
    if called is not None:
        consts, inner = (called.consts, called.jaxpr) if isinstance(called, ClosedJaxpr) else ((), called)
        return _run(inner, consts, inputs, draw)
    if any(isinstance(value, _Key) for value in inputs):
        return _follow(equation, inputs)
    if name == "select_n" and len(inputs) == 3 and _aval(equation.outvars[0]).dtype == jnp.bool_:  # not in onnxruntime
        which, one, other = inputs
        return [jnp.logical_or(jnp.logical_and(which, other), jnp.logical_and(jnp.logical_not(which), one))]
    if name == "stack":  # new in JAX, and unknown to others
        axis = params["axis"]
        return [jnp.concatenate([jnp.expand_dims(value, axis) for value in inputs], axis)]
    return _compute(equation, inputs)


def _compute(equation: JaxprEqn, inputs: list[Any]) -> list[Any]:
    """Compute an operation: at once, if all inputs are known."""
    if any(isinstance(value, Tracer) for value in inputs):
        return _bind(equation, inputs)
    with jax.ensure_compile_time_eval():
        return _bind(equation, inputs)


def _aval(var: Any) -> Any:
    """Return the shape and type of a variable."""
    return var.aval


def _bind(equation: JaxprEqn, inputs: list[Any]) -> list[Any]:
    found = equation.primitive.bind(*inputs, **equation.params)
    return list(found) if equation.primitive.multiple_results else [found]


def _follow(equation: JaxprEqn, inputs: list[Any]) -> list[Any]:
    """Split, fold or take keys."""
    values = [value.value if isinstance(value, _Key) else value for value in inputs]
    raw = [var for var in equation.outvars if not jnp.issubdtype(_aval(var).dtype, jax.dtypes.prng_key)]
    if raw or any(isinstance(value, Tracer) for value in inputs):
        raise ConfigError(
            f"the policy draws random numbers by {equation.primitive.name}, which has no place in an exported file: "
            "export its mode, or draw by jax.random.normal, uniform, randint, categorical or choice"
        )
    return [_Key(value) for value in _compute(equation, values)]


def _draw(equation: JaxprEqn, inputs: list[Any], draw: Drawer) -> Any:
    """Return what an operation of `jax.random` returns, made of numbers that `draw` gives; None for any other."""
    name, (out, *_) = equation.params.get("name"), equation.outvars
    shape = tuple(_aval(out).shape)
    if name == "_normal_real":
        return draw(Draw("normal", shape), equation, inputs)
    if name == "_uniform":
        low, high = _bounds(inputs)
        return jnp.maximum(low, draw(Draw("uniform", shape), equation, inputs) * (high - low) + low)
    if name == "_randint":
        low, high = _bounds(inputs)
        share = draw(Draw("uniform", shape), equation, inputs)
        below = jnp.floor(share * (high - low).astype(jnp.float32)).astype(_aval(out).dtype)
        return jnp.minimum(low + below, high - 1)
    if name == "_shuffle" and len(shape) == 1:
        (column,) = (value for value in inputs if not isinstance(value, _Key))
        return jnp.take(jnp.asarray(column), draw(Draw("permutation", shape), equation, inputs), axis=0)
    return None


def _bounds(inputs: Sequence[Any]) -> tuple[Any, Any]:
    """Return the lower and the upper bound among the inputs of a draw; JAX gives them in either order."""
    one, other = (value for value in inputs if not isinstance(value, _Key))
    if isinstance(one, Tracer) or isinstance(other, Tracer):
        return jnp.minimum(one, other), jnp.maximum(one, other)
    with jax.ensure_compile_time_eval():
        return jnp.minimum(one, other), jnp.maximum(one, other)


def _scan(params: dict[str, Any], inputs: list[Any], draw: Drawer) -> list[Any]:
    consts, carries = params["num_consts"], params["num_carry"]
    fixed, carry, rows = inputs[:consts], inputs[consts : consts + carries], inputs[consts + carries :]
    found: list[Any] = [None] * params["length"]
    turns = range(params["length"])
    for turn in reversed(turns) if params["reverse"] else turns:
        now = [_Key(row.value[turn]) if isinstance(row, _Key) else _row(row, turn) for row in rows]
        results = _run(params["jaxpr"].jaxpr, params["jaxpr"].consts, [*fixed, *carry, *now], draw)
        carry, found[turn] = results[:carries], results[carries:]
    return [*carry, *(_joined(column) for column in zip(*found, strict=True))]


def _joined(rows: Sequence[Any]) -> Any:
    return jnp.concatenate([jnp.expand_dims(row, 0) for row in rows])


def _row(rows: Any, turn: int) -> Any:
    if isinstance(rows, Tracer):
        return rows[turn]
    with jax.ensure_compile_time_eval():
        return jnp.asarray(rows)[turn]


def _while(params: dict[str, Any], inputs: list[Any], draw: Drawer) -> list[Any]:
    tests, fixed = params["cond_nconsts"], params["body_nconsts"]
    asked, known, carry = inputs[:tests], inputs[tests : tests + fixed], inputs[tests + fixed :]
    for _ in range(MOST_TURNS):
        (more,) = _run(params["cond_jaxpr"].jaxpr, params["cond_jaxpr"].consts, [*asked, *carry], draw)
        if isinstance(more, Tracer):
            raise ConfigError("the policy repeats a step until its result is good enough, which cannot be exported")
        if not more:
            return carry
        carry = _run(params["body_jaxpr"].jaxpr, params["body_jaxpr"].consts, [*known, *carry], draw)
    raise ConfigError(f"a loop of the policy takes more than {MOST_TURNS} turns, which cannot be exported")


def _cond(branches: Sequence[ClosedJaxpr], inputs: list[Any], draw: Drawer) -> list[Any]:
    index, *operands = inputs
    run = lambda branch: _run(branch.jaxpr, branch.consts, operands, draw)  # noqa: E731
    if not isinstance(index, Tracer):
        return run(branches[int(np.clip(int(index), 0, len(branches) - 1))])
    results = [run(branch) for branch in branches]
    chosen = results[-1]
    for number in reversed(range(len(branches) - 1)):
        here = index == number if index.dtype != jnp.bool_ else jnp.logical_not(index)
        chosen = [jnp.where(here, one, other) for one, other in zip(results[number], chosen, strict=True)]
    return chosen


def numbers_of(draw: Draw, equation: JaxprEqn, inputs: list[Any]) -> ArrayLike:
    """Return the numbers that `equation` itself would have drawn from its key: those that give the same result."""
    name = equation.params["name"]
    values = [value.value if isinstance(value, _Key) else jnp.asarray(value) for value in inputs]
    if name == "_shuffle":
        in_order = jnp.arange(*draw.shape, dtype=_aval(equation.outvars[0]).dtype)
        shuffled = [value if isinstance(i, _Key) else in_order for value, i in zip(values, inputs, strict=True)]
        return _bind(equation, shuffled)[0]
    if name == "_normal_real":
        return _bind(equation, values)[0]
    low, high = _bounds(inputs)
    if name == "_randint":
        return (_bind(equation, values)[0] - low + 0.5) / (high - low)
    between = [v if isinstance(i, _Key) else jnp.asarray(v > low, v.dtype) for v, i in zip(values, inputs, strict=True)]
    return _bind(equation, between)[0]


def live(jaxpr: Jaxpr, wanted: Sequence[int]) -> tuple[list[JaxprEqn], list[bool]]:
    """Return the equations of a program that its outputs number `wanted` depend on, and which inputs they do."""
    needed = {jaxpr.outvars[number] for number in wanted if not isinstance(jaxpr.outvars[number], Constant)}
    kept: list[JaxprEqn] = []
    for equation in reversed(jaxpr.eqns):
        if any(var in needed for var in equation.outvars):
            kept.append(equation)
            needed |= {atom for atom in equation.invars if not isinstance(atom, Constant)}
    return kept[::-1], [var in needed for var in jaxpr.invars]


def pruned(closed: ClosedJaxpr, wanted: Sequence[int]) -> tuple[Callable[..., list[Any]], list[bool]]:
    """Return the function of a flat program that gives its outputs number `wanted`, and which inputs it takes."""
    equations, used = live(closed.jaxpr, wanted)
    names = [var for var, takes in zip(closed.jaxpr.invars, used, strict=True) if takes]

    def function(*inputs: Any) -> list[Any]:
        values = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
        values |= dict(zip(names, inputs, strict=True))
        read = lambda atom: atom.val if isinstance(atom, Constant) else values[atom]  # noqa: E731
        for equation in equations:
            found = _bind(equation, [read(atom) for atom in equation.invars])
            values.update(zip(equation.outvars, found, strict=True))
        return [read(closed.jaxpr.outvars[number]) for number in wanted]

    return function, used


def flat(keyed: ClosedJaxpr, inputs: Sequence[jax.ShapeDtypeStruct]) -> tuple[ClosedJaxpr, list[Draw]]:
    """Return a program of `inputs` and of the numbers of its draws, from one of `inputs` and a random key."""
    draws: list[Draw] = []
    key = jax.random.key(0)

    def look(draw: Draw, *_: Any) -> Any:
        draws.append(draw)
        return jnp.zeros(draw.shape, draw.dtype)

    jax.eval_shape(lambda *values: inline(keyed, values, key, look), *inputs)
    found = list(draws)
    shapes = [jax.ShapeDtypeStruct(draw.shape, draw.dtype) for draw in found]

    def function(*values: Any) -> list[Any]:
        numbers: Iterator[Any] = iter(values[len(inputs) :])
        return inline(keyed, values[: len(inputs)], key, lambda *_: next(numbers))

    return jax.make_jaxpr(function)(*inputs, *shapes), found


def drawn_by(keyed: ClosedJaxpr, inputs: Sequence[Any], key: Any) -> list[Any]:
    """Return the numbers that a program draws from a random key, in the order of `flat`'s draws."""
    found: list[Any] = []

    def record(draw: Draw, equation: JaxprEqn, values: list[Any]) -> Any:
        found.append(jnp.asarray(numbers_of(draw, equation, values), draw.dtype))
        return found[-1]

    inline(keyed, inputs, key, record)
    return found
