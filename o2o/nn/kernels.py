"""How the same mathematics is laid out on different back ends: what is fast on a GPU need not be on a CPU.

- Sums over rows, for the gradients of biases and scales, and means over features are products with ones: XLA makes
  several passes of each. Only on a CPU; on a GPU products may round more coarsely than sums.
- Convolutions have gradients of their own on a CPU: XLA brings convolutions into the form of its fast kernels there
  outside of loops only (its pass ConvCanonicalization), and an update is always inside one. Seeds go through them one
  after the other. On a GPU they are JAX's.
- Seeds of small networks are batched, those of large ones follow one another within each call. Policies that plan
  chunks act one seed after the other on a CPU, each planning only when its own queue is empty.
- A branch that only some steps take stays a branch when seeds are batched, where `jax.vmap` alone computes both.

Functions with a gradient of their own can be differentiated in reverse mode only.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap, sequential_vmap

from o2o.types import Array

BATCHED_NUMBERS = 2_000_000
"""Numbers in an agent from which on a CPU updates seed after seed faster (`benchmarks/results/seeds`)."""


def sums_as_products() -> bool:
    """Return whether sums over rows and means are products with ones on this back end."""
    return jax.default_backend() == "cpu"


def seeds_in_turn(agents: Any) -> bool:
    """Return whether `agents`, leaves `[S, ...]`, are updated one after the other on this back end, not batched."""
    seeds = jax.tree.leaves(agents)[0].shape[0]
    numbers = sum(leaf.size for leaf in jax.tree.leaves(agents)) // seeds
    return jax.default_backend() == "cpu" and numbers >= BATCHED_NUMBERS


def plans_in_turn() -> bool:
    """Return whether seeds whose policies plan chunks act one after the other on this back end, not batched."""
    return jax.default_backend() == "cpu"


@custom_vmap
def any_seed(flag: Array) -> Array:
    """Return `flag` `[]`. Under `jax.vmap`: whether the flag of any seed is true, one value that is not batched."""
    return flag


@any_seed.def_vmap
def _(size: int, batched: list[bool], flag: Array) -> tuple[Array, bool]:
    return any_seed(flag.any()) if batched[0] else any_seed(flag), False


def branch(flag: Array, then: Callable[..., Any], rest: Callable[..., Any], *operands: Any) -> Any:
    """Return `jax.lax.cond(flag, then, rest, *operands)`, with `then` under `jax.vmap` only if a seed does it."""
    return jax.lax.cond(any_seed(flag), lambda *args: jax.lax.cond(flag, then, rest, *args), rest, *operands)


def product(x: Array, kernel: Array) -> Array:
    """Return `x [..., i] @ kernel [i, o]`, or with every member's own `x [E, ..., i] @ kernel [E, i, o]`."""
    flat = x.reshape(*x.shape[: kernel.ndim - 2], -1, x.shape[-1])
    return (flat @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


def _conv(images: Array, kernel: Array, steps: int = 1, pads: Any = "VALID", **spread: Any) -> Array:
    axes = ("NHWC", "HWIO", "NHWC")  # the only form that is fast inside of loops
    return jax.lax.conv_general_dilated(images, kernel, (steps, steps), pads, dimension_numbers=axes, **spread)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv_on_cpu(images: Array, kernel: Array, stride: int) -> Array:
    return sequential_vmap(partial(_conv, steps=stride))(images, kernel)


def _conv_backward(stride: int, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    images, kernel = saved
    sizes = zip(images.shape[1:3], kernel.shape[:2], g.shape[1:3], strict=True)
    unread = [(width, side - (stride * (out - 1) + width)) for side, width, out in sizes]
    around, within = [(width - 1, width - 1 + rest) for width, rest in unread], [(0, -rest) for _, rest in unread]

    @sequential_vmap
    def by_images(kernel: Array, g: Array) -> Array:
        return _conv(g, jnp.flip(kernel, (0, 1)).swapaxes(2, 3), pads=around, lhs_dilation=(stride, stride))

    @sequential_vmap
    def by_kernel(images: Array, g: Array) -> Array:
        turned = _conv(images.swapaxes(0, 3), g.transpose(1, 2, 0, 3), pads=within, rhs_dilation=(stride, stride))
        return turned.transpose(1, 2, 0, 3)

    return by_images(kernel, g), by_kernel(images, g)


_conv_on_cpu.defvjp(lambda images, kernel, stride: (_conv_on_cpu(images, kernel, stride), (images, kernel)),
                    _conv_backward)  # fmt: skip


def convolution(images: Array, kernel: Array, stride: int = 1) -> Array:
    """Return `images [..., H, W, C]` convolved with `kernel [h, w, C, F]`, no padding: `[..., H', W', F]`."""
    flat = images.reshape(-1, *images.shape[-3:])
    convolve: Any = _conv_on_cpu if jax.default_backend() == "cpu" else _conv
    out = convolve(flat, kernel, stride)
    return out.reshape(*images.shape[:-3], *out.shape[1:])


def sum_rows(x: Array, lead: int = 0) -> Array:
    """Return the sum of `x [*lead, ..., F]` over all axes between the `lead` first and the last: `[*lead, F]`."""
    flat = x.reshape(*x.shape[:lead], -1, x.shape[-1])
    if not sums_as_products():
        return jnp.sum(flat, axis=-2)
    ones = jnp.ones((*flat.shape[:-2], 1, flat.shape[-2]), x.dtype)
    return jnp.squeeze(ones @ flat, -2)


def mean_features(x: Array) -> Array:
    """Return the mean of `x [..., F]` over its last axis: `[..., 1]`."""
    if not sums_as_products():
        return jnp.mean(x, axis=-1, keepdims=True)
    shares = jnp.full((x.shape[-1], 1), 1.0 / x.shape[-1], x.dtype)
    return (x.reshape(-1, x.shape[-1]) @ shares).reshape(*x.shape[:-1], 1)


def _spread(row: Array, x: Array) -> Array:
    """Return `row [*lead, F]` with the axes that it lacks of `x [*lead, ..., F]`."""
    return row.reshape(*row.shape[:-1], *(1,) * (x.ndim - row.ndim), row.shape[-1])


@jax.custom_vjp
def add_row(x: Array, row: Array) -> Array:
    """Return `x [*lead, ..., F] + row [*lead, F]`."""
    return x + _spread(row, x)


add_row.defvjp(lambda x, row: (add_row(x, row), row), lambda row, g: (g, sum_rows(g, row.ndim - 1)))


@jax.custom_vjp
def centred(x: Array) -> Array:
    """Return `x [..., F]` less its mean over the last axis."""
    return x - mean_features(x)


centred.defvjp(lambda x: (centred(x), None), lambda _, g: (centred(g),))


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def unit_rows(x: Array, scale: Array, bias: Array, epsilon: float) -> Array:
    """Return `x / sqrt(mean(x^2) + epsilon) * scale + bias`, the mean over the last axis of `x [*lead, ..., F]`.

    `scale` and `bias` are `[*lead, F]`. Of an `x` whose own mean is 0 this is layer norm.
    """
    return _unit_forward(x, scale, bias, epsilon)[0]


def _unit_forward(x: Array, scale: Array, bias: Array, epsilon: float) -> tuple[Array, tuple[Array, Array, Array]]:
    inverse = jax.lax.rsqrt(mean_features(jnp.square(x)) + epsilon)
    unit = x * inverse
    return unit * _spread(scale, x) + _spread(bias, x), (unit, inverse, scale)


def _unit_backward(_: float, saved: tuple[Array, Array, Array], g: Array) -> tuple[Array, Array, Array]:
    unit, inverse, scale = saved
    through, lead = g * _spread(scale, g), scale.ndim - 1
    grads = inverse * (through - unit * mean_features(through * unit))
    return grads, sum_rows(g * unit, lead), sum_rows(g, lead)


unit_rows.defvjp(_unit_forward, _unit_backward)


def over_seeds(function: Callable[..., Any], seeds: int, in_axes: Any = 0, in_turn: bool = False) -> Callable[..., Any]:
    """Map `function` over the leading seed axis of its arguments (those with in_axes 0).

    `in_turn`: one seed after the other, all arguments per seed and copied; not for a replay buffer.
    """
    if seeds > 1 and in_turn:
        return lambda *args: jax.lax.map(lambda each: function(*each), args)
    if seeds > 1:
        return jax.vmap(function, in_axes=in_axes)

    def single(*args: Any) -> Any:
        axes = in_axes if isinstance(in_axes, tuple) else (in_axes,) * len(args)
        stripped = [jax.tree.map(lambda leaf: leaf[0], a) if ax == 0 else a for a, ax in zip(args, axes, strict=True)]
        return jax.tree.map(lambda leaf: leaf[None], function(*stripped))

    return single


def each_seed(function: Callable[[Any], Any], stacked: Any) -> Any:
    """Apply `function` to one seed after the other and stack the results; for initialisation.

    Not `vmap`: batched orthogonal initialisers can deadlock on XLA's CPU back end (jaxlib 0.10.2, 2 cores).
    """
    seeds = jax.tree.leaves(stacked)[0].shape[0]
    results = [function(jax.tree.map(lambda leaf, m=member: leaf[m], stacked)) for member in range(seeds)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)
