"""Generative models of action vectors x `[..., n]` in [-1, 1]: diffusion (DDPM, DDIM), flow matching, their network.

`Diffusion` and `Flow` are frozen settings with a loss and a sampler. Both take the network as a function
`apply(x, t) -> [..., n]` that is already conditioned on the observation. A diffusion counts steps, t in {0, ..., T-1}.
A flow runs from noise at t = 0 to data at t = 1. Equations: arXiv 2006.11239 (DDPM), 2010.02502 (DDIM), 2210.02747
(flow matching). Variants are those of EXPO, DPPO and FQL, see `Diffusion`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from o2o.errors import ConfigError
from o2o.nn.modules import join_alike, kernel_init
from o2o.settings import Count, NotNegative, Settings
from o2o.types import Array

Apply = Callable[[Array, Array], Array]
"""A conditioned network: x `[..., n]` and float t, `[...]` or one for all rows, to `[..., n]`."""
VP_BETAS = (0.1, 10.0)
"""Least and largest noise rate of the `vp` schedule."""
LINEAR_BETAS = (1e-4, 2e-2)
"""First and last beta of the `linear` schedule of `LINEAR_STEPS` steps."""
LINEAR_STEPS = 1000
"""Steps of the original linear schedule; fewer steps take the same noise in larger portions."""
MAX_BETA = 0.999
"""Largest beta of a step."""


@dataclass(frozen=True)
class Diffusion(Settings):
    """A diffusion of `steps` steps whose network predicts the noise."""

    steps: Count = 10
    """Denoising steps T."""
    schedule: Literal["vp", "cosine", "linear"] = "vp"
    """`vp`: variance preserving (EXPO). `cosine`: arXiv 2102.09672 (DPPO). `linear`: arXiv 2006.11239, at least 20
    steps."""
    sampler: Literal["ddpm", "ddim"] = "ddpm"
    """`ddpm` draws noise at every step; `ddim` is a deterministic function of the initial noise."""
    temperature: NotNegative = 1.0
    """Factor on the noise of every DDPM step."""
    clip: Literal["step", "prediction"] = "step"
    """`step`: every x is clipped to [-1, 1], and DDPM's noise has variance beta (EXPO). `prediction`: the clean vector
    predicted at every step is clipped, and the noise has the posterior's variance (DPPO)."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` for values out of range, or that do not go together."""
        super().__post_init__()
        if self.schedule == "linear" and self.steps < 20:
            raise self.refuse("steps", "at least 20 with schedule 'linear'; or use 'vp'")

    @property
    def alphas(self) -> np.ndarray:
        """Share of the signal's variance that each step keeps, `[T]`; index 0 is the step nearest the data."""
        total = self.steps
        t = np.arange(1, total + 1)
        if self.schedule == "vp":
            low, high = VP_BETAS
            return np.exp(-low / total - 0.5 * (high - low) * (2 * t - 1) / total**2)
        if self.schedule == "linear":
            scale = LINEAR_STEPS / total
            return 1.0 - np.minimum(scale * np.linspace(*LINEAR_BETAS, total), MAX_BETA)
        bars = np.cos((np.arange(total + 1) / total + 0.008) / 1.008 * np.pi / 2) ** 2
        return 1.0 - np.minimum(1.0 - bars[1:] / bars[:-1], MAX_BETA)

    @property
    def alpha_bars(self) -> np.ndarray:
        """Share of the signal's variance left after each step, `[T]`: the cumulative product of `alphas`."""
        return np.cumprod(self.alphas)

    def deterministic(self) -> Self:
        """Return the same model with the sampler that depends on the initial noise only."""
        return replace(self, sampler="ddim")

    def loss(self, apply: Apply, data: Array, rng: Array) -> Array:
        """Return (predicted - drawn noise)^2 `[..., n]` for `data [..., n]`, at one uniform step per leading index."""
        step_rng, noise_rng = jax.random.split(rng)
        t = jax.random.randint(step_rng, data.shape[:-1], 0, self.steps)
        noise = jax.random.normal(noise_rng, data.shape)
        bars = jnp.asarray(self.alpha_bars, jnp.float32)[t][..., None]
        noisy = jnp.sqrt(bars) * data + jnp.sqrt(1.0 - bars) * noise
        return jnp.square(apply(noisy, t.astype(jnp.float32)) - noise)

    def sample(self, apply: Apply, noise: Array, rng: Array) -> Array:
        """Return vectors `[..., n]` in [-1, 1] from initial `noise [..., n]`; `ddim` does not use `rng`."""
        bars = self.alpha_bars
        table = np.stack([np.arange(self.steps), self.alphas, bars, np.append(1.0, bars[:-1])], axis=1)[::-1]

        def step(carry: tuple[Array, Array], row: Array) -> tuple[tuple[Array, Array], None]:
            x, key = carry
            key, draw = jax.random.split(key)
            predicted = apply(x, row[0])
            mean, std = self._reverse(x, predicted, row[1], row[2], row[3])
            if self.sampler == "ddpm":
                mean = mean + jnp.where(row[0] > 0, self.temperature * std, 0.0) * jax.random.normal(draw, x.shape)
            return (jnp.clip(mean, -1.0, 1.0) if self.clip == "step" else mean, key), None

        (x, _), _ = jax.lax.scan(step, (noise, rng), jnp.asarray(table, jnp.float32))
        return jnp.clip(x, -1.0, 1.0)

    def _reverse(self, x: Array, predicted: Array, alpha: Array, bar: Array, before: Array) -> tuple[Array, Array]:
        """Return the mean and DDPM's std of the next, cleaner x.

        `predicted` is the network's noise `[..., n]`; `before` is alpha-bar one step nearer the data.
        """
        if self.sampler == "ddpm" and self.clip == "step":
            return (x - (1.0 - alpha) / jnp.sqrt(1.0 - bar) * predicted) / jnp.sqrt(alpha), jnp.sqrt(1.0 - alpha)
        clean = (x - jnp.sqrt(1.0 - bar) * predicted) / jnp.sqrt(bar)
        if self.clip == "prediction":
            clean = jnp.clip(clean, -1.0, 1.0)
        if self.sampler == "ddim":
            predicted = (x - jnp.sqrt(bar) * clean) / jnp.sqrt(1.0 - bar)
            return jnp.sqrt(before) * clean + jnp.sqrt(1.0 - before) * predicted, jnp.zeros(())
        weight = jnp.sqrt(before) * (1.0 - alpha) / (1.0 - bar)
        mean = weight * clean + jnp.sqrt(alpha) * (1.0 - before) / (1.0 - bar) * x
        return mean, jnp.sqrt((1.0 - alpha) * (1.0 - before) / (1.0 - bar))


@dataclass(frozen=True)
class Flow(Settings):
    """A flow along straight lines from noise to data, integrated by Euler steps (FQL)."""

    steps: Count = 10
    """Euler steps."""

    def deterministic(self) -> Self:
        """Return the model itself: its sampler depends on the initial noise only."""
        return self

    def loss(self, apply: Apply, data: Array, rng: Array) -> Array:
        """Return (v(x_t, t) - (data - noise))^2 `[..., n]` for `data [..., n]`, at one uniform t per leading index."""
        time_rng, noise_rng = jax.random.split(rng)
        t = jax.random.uniform(time_rng, data.shape[:-1])
        noise = jax.random.normal(noise_rng, data.shape)
        x = (1.0 - t[..., None]) * noise + t[..., None] * data
        return jnp.square(apply(x, t) - (data - noise))

    def sample(self, apply: Apply, noise: Array, rng: Array) -> Array:
        """Return vectors `[..., n]` in [-1, 1], a deterministic function of `noise [..., n]`; `rng` is not used."""

        def step(x: Array, t: Array) -> tuple[Array, None]:
            return x + apply(x, t) / self.steps, None

        times = jnp.arange(self.steps, dtype=jnp.float32) / self.steps
        return jnp.clip(jax.lax.scan(step, noise, times)[0], -1.0, 1.0)


@dataclass(frozen=True)
class Guidance(Settings):
    """Q's gradient, added to a flow's velocity while it samples (QGF, arXiv 2606.11087); nothing is trained for it.

    v(x, t) becomes v + w q, with q = grad Q at x^ = clip(x + (1 - t) v, -1, 1), an estimate of the finished vector.
    Neither the clip nor d x^ / d x is in q.
    """

    weight: NotNegative = 0.0
    """Weight w of the gradient; 0 leaves the flow as it is, at no cost. It goes with the scale of Q.
    With rewards of -1/0 begin with 0.01 to 1."""
    at: Literal["clean", "noisy"] = "clean"
    """Where Q is asked: `clean`, at x^ (QGF); `noisy`, at the unfinished x itself (its ablation QFQL)."""
    jacobian: bool = False
    """Multiply q by d x^ / d x, the clip included (QGF-Jacobian); the paper found it worse."""
    critics: Literal["target", "online"] = "target"
    """Whose gradient."""
    aggregate: Literal["min", "mean"] = "min"
    """How the critics are reduced; the mean is smoother."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` for values out of range, or that do not go together."""
        super().__post_init__()
        if self.jacobian and self.at == "noisy":
            raise self.refuse("jacobian", "False with at='noisy', where x^ is x")

    def guided(self, apply: Apply, value: Callable[[Array], Array], weight: Array | None = None) -> Apply:
        """Return the guided velocity; `value` maps vectors `[..., n]` to Q `[...]`, each row alone.

        `weight` `[...]` takes the place of the setting; it broadcasts against the rows. With weight 0 of the setting
        it is `apply` itself.
        """
        if weight is None and not self.weight:
            return apply
        scale = self.weight if weight is None else jnp.asarray(weight)[..., None]
        slope = jax.grad(lambda x: jnp.sum(value(x)))

        def velocity(x: Array, t: Array) -> Array:
            def finished(x: Array) -> tuple[Array, Array]:
                v = apply(x, t)
                return jnp.clip(x + (1.0 - jnp.asarray(t)[..., None]) * v, -1.0, 1.0), v

            if self.at == "noisy":
                return apply(x, t) + scale * slope(x)
            if not self.jacobian:
                clean, v = finished(x)
                return v + scale * slope(clean)
            clean, pull, v = jax.vjp(finished, x, has_aux=True)
            return v + scale * pull(slope(clean))[0]

        return velocity


class JointDense(nn.Module):
    """One Dense layer on the concatenation of its inputs, whose leading axes broadcast (`join_alike`)."""

    features: int
    kernel_init: Callable[..., Array]
    """Initialiser of the whole `[sum of widths, features]` kernel."""

    @nn.compact
    def __call__(self, *parts: Array) -> Array:
        """Return `[..., features]` for parts `[..., n_i]`."""
        kernel = self.param("kernel", self.kernel_init, (sum(part.shape[-1] for part in parts), self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        inputs, kernels = join_alike(parts, kernel)
        return sum((part @ rows for part, rows in zip(inputs, kernels, strict=True)), bias)


class Denoiser(nn.Module):
    """Network of a diffusion (predicts noise) or a flow (velocity): observation, x and t to a vector like x."""

    style: Literal["residual", "mlp"] = "residual"
    """`residual`: Fourier features of t and LayerNorm blocks (EXPO); `mlp`: GELU layers, t as a number, all kernels
    uniform by the average of fan-in and fan-out, Xavier's draw (FQL)."""
    hidden_dims: Sequence[int] = (512, 512, 512, 512)
    """Widths of `mlp`."""
    blocks: int = 3
    """Number of blocks of `residual`."""
    width: int = 256
    """Width of `residual`; its blocks are four times as wide inside."""
    time_dim: int = 128
    """Fourier features of t in `residual`, half of them cosines."""
    dropout: float = 0.0
    """Dropout at the start of every block of `residual`, after every layer of `mlp`."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` if the style is unknown."""
        if self.style not in ("residual", "mlp"):
            raise ConfigError(f"Denoiser.style is {self.style!r}; expected residual or mlp.")
        super().__post_init__()

    @nn.compact
    def __call__(self, observations: Array, x: Array, t: Array, training: bool = False) -> Array:
        """Return `[..., n]` for observations `[..., D]`, `x [..., n]`, float `t [...]`; leading axes broadcast."""
        lead = jnp.broadcast_shapes(observations.shape[:-1], x.shape[:-1], jnp.shape(t))
        size = x.shape[-1]
        t = jnp.asarray(t)[..., None]
        xavier = kernel_init("xavier")
        if self.style == "mlp":
            first = JointDense(self.hidden_dims[0], xavier, name="inputs")
            h = self._drop(nn.gelu(first(observations, x, t)), training)
            for width in self.hidden_dims[1:]:
                h = self._drop(nn.gelu(nn.Dense(width, kernel_init=xavier)(h)), training)
            return jnp.broadcast_to(nn.Dense(size, kernel_init=xavier)(h), (*lead, size))
        frequencies = self.param("frequencies", nn.initializers.normal(0.2), (self.time_dim // 2,))
        angles = 2.0 * jnp.pi * t * frequencies
        code = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        code = nn.swish(nn.Dense(self.width, kernel_init=xavier)(code))
        code = nn.Dense(self.width, kernel_init=xavier)(code)
        h = JointDense(self.width, xavier, name="inputs")(x, observations, code)
        h = jnp.broadcast_to(h, (*lead, self.width))
        for _ in range(self.blocks):
            h = h + self._block(h, training)
        return nn.Dense(size, kernel_init=xavier)(nn.swish(h))

    def _block(self, h: Array, training: bool) -> Array:
        """Return the change of one residual block, `[..., width]`."""
        h = nn.swish(nn.Dense(4 * self.width)(nn.LayerNorm()(self._drop(h, training))))
        return nn.Dense(self.width)(h)

    def _drop(self, h: Array, training: bool) -> Array:
        """Return `h` with dropout, if there is any."""
        return nn.Dropout(self.dropout)(h, deterministic=not training) if self.dropout else h
