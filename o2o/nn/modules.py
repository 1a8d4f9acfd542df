"""Linen networks for flat observations (MLP, Gaussian actor, critics, value) and `Model`: one with its optimiser.

Ensembles keep stacked weights `[E, in, out]` and are evaluated as batched products; `o2o.nn.kernels` knows how.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from o2o.nn.distributions import Normal, TanhNormal
from o2o.nn.kernels import add_row, centred, product, unit_rows
from o2o.types import Array, Params

Init = Literal["orthogonal", "xavier", "lecun", "linear", "truncated"]
Activation = Literal["relu", "gelu", "tanh"]
SQRT2 = float(np.sqrt(2.0))


def kernel_init(name: Init, gain: float = SQRT2) -> Callable[..., Array]:
    """Return the initialiser of `[in, out]` kernels; `gain` applies to `orthogonal` only.

    `linear` is uniform within 1 / sqrt(in), PyTorch's default for a linear layer; `truncated` a normal of standard
    deviation 1 / (2 sqrt(in)), cut at two of them (dynamics models).
    """
    if name == "orthogonal":
        return nn.initializers.orthogonal(gain)
    if name == "xavier":
        return nn.initializers.xavier_uniform()
    if name == "linear":
        return nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")
    if name == "truncated":
        return lambda rng, shape, dtype=jnp.float32: (
            jax.random.truncated_normal(rng, -2.0, 2.0, shape, dtype) / (2.0 * np.sqrt(shape[0]))
        )
    return nn.initializers.lecun_normal()


def activate(x: Array, name: Activation) -> Array:
    """Return the activation of `x [...]`; GELU is the tanh approximation."""
    return {"relu": nn.relu, "gelu": nn.gelu, "tanh": nn.tanh}[name](x)


class MLP(nn.Module):
    """Dense -> (dropout) -> (LayerNorm) -> activation for every width, also the last: `[..., D]` to `[..., last]`."""

    hidden_dims: Sequence[int]
    layer_norm: bool = False
    dropout: float = 0.0
    init_scheme: Init = "orthogonal"
    last_gain: float | None = None
    """Orthogonal gain of the last hidden layer; `None` leaves it at sqrt(2)."""
    activation: Activation = "relu"
    hidden_gain: float = SQRT2
    """Orthogonal gain of the other layers."""

    @nn.compact
    def __call__(self, x: Array, training: bool = False) -> Array:
        """Return the last hidden activations; `training` switches dropout on (rng collection `dropout`)."""
        for i, width in enumerate(self.hidden_dims):
            last = i == len(self.hidden_dims) - 1
            gain = self.last_gain if last and self.last_gain is not None else self.hidden_gain
            x = nn.Dense(width, kernel_init=kernel_init(self.init_scheme, gain))(x)
            if self.dropout:
                x = nn.Dropout(self.dropout)(x, deterministic=not training)
            if self.layer_norm:
                x = nn.LayerNorm()(x)
            x = activate(x, self.activation)
        return x


class GaussianActor(nn.Module):
    """MLP trunk -> mean and log-std heads -> `TanhNormal` (squash) or `Normal`, `[..., D]` to parameters `[..., A]`."""

    hidden_dims: Sequence[int]
    action_dim: int
    layer_norm: bool = False
    dropout: float = 0.0
    init_scheme: Init = "orthogonal"
    last_gain: float | None = None
    std_mode: Literal["exp", "scaled", "uniform"] = "exp"
    """`exp`: log-std is a linear head of the state; `scaled`: that head times a learned scale plus a learned offset,
    initially 1 and -1 (Cal-QL's official code); `uniform`: one free vector, initially 0."""
    log_std_min: float | None = None
    log_std_max: float | None = None
    std_min: float = 1e-5
    std_max: float = 10.0
    squash: bool = True
    """tanh of the sample (`TanhNormal`)."""
    tanh_mean: bool = False
    """tanh of the mean, for a plain Gaussian around it (IQL as published)."""
    output_gain: float = SQRT2
    """Orthogonal gain of the heads."""
    activation: Activation = "relu"

    @nn.compact
    def __call__(self, observations: Array, training: bool = False) -> TanhNormal | Normal:
        """Return the action distribution at `observations`."""
        trunk = MLP(self.hidden_dims, self.layer_norm, self.dropout, self.init_scheme, self.last_gain, self.activation)
        x = trunk(observations, training)
        head_init = kernel_init(self.init_scheme, self.output_gain)
        mean = nn.Dense(self.action_dim, kernel_init=head_init, name="mean")(x)
        if self.std_mode != "uniform":
            log_std = nn.Dense(self.action_dim, kernel_init=head_init, name="log_std")(x)
            if self.std_mode == "scaled":
                scale = self.param("log_std_scale", nn.initializers.ones, ())
                log_std = scale * log_std + self.param("log_std_offset", nn.initializers.constant(-1.0), ())
        else:
            free = self.param("log_std", nn.initializers.zeros, (self.action_dim,))
            log_std = jnp.broadcast_to(free, mean.shape)
        if self.log_std_min is not None or self.log_std_max is not None:
            log_std = jnp.clip(log_std, self.log_std_min, self.log_std_max)
        std = jnp.clip(jnp.exp(log_std), self.std_min, self.std_max)
        if self.tanh_mean:
            mean = jnp.tanh(mean)
        return TanhNormal(mean, std) if self.squash else Normal(mean, std)


class BoundedGaussianActor(nn.Module):
    """A Gaussian whose mean and log-std are both bounded by tanh (Uni-O4, arXiv 2311.03351): `[..., D]` to `Normal`.

    mean = m in (-1, 1), log-std = -5 + 2.5 (u + 1) in (-5, 0), with (m, u) = tanh of one linear layer of 2A outputs.
    """

    hidden_dims: Sequence[int]
    action_dim: int
    activation: Activation = "relu"
    double_squash: bool = False
    """Take tanh(u) for u, as Uni-O4's release online: log-std in (-4.4, -0.6)."""

    @nn.compact
    def __call__(self, observations: Array) -> Normal:
        """Return the action distribution at `observations`; samples are not clipped."""
        x = MLP(self.hidden_dims, last_gain=1.0, hidden_gain=1.0, activation=self.activation)(observations)
        x = jnp.tanh(nn.Dense(2 * self.action_dim, kernel_init=kernel_init("orthogonal", 1.0))(x))
        mean, free = jnp.split(x, 2, axis=-1)
        free = jnp.tanh(free) if self.double_squash else free
        return Normal(mean, jnp.exp(-5.0 + 2.5 * (free + 1.0)))


class EnsembleDense(nn.Module):
    """`num` independent Dense layers: `[..., in]` (one input) or `[E, ..., in]` (stacked) to `[E, ..., features]`."""

    num: int
    features: int
    init_scheme: Init = "orthogonal"
    gain: float = SQRT2
    stacked: bool = True
    centred: bool = False
    """Subtract each row's mean over the features from the result, by centring the weights: a layer norm's first half,
    at the price of the weights' size instead of the activations'."""

    @nn.compact
    def __call__(self, *parts: Array) -> Array:
        """Return every member's product plus bias; of several `parts`, of their concatenation over the last axis."""
        base = kernel_init(self.init_scheme, self.gain)

        def member_init(rng: Array, shape: tuple[int, ...]) -> Array:
            # One member after the other: XLA's CPU back end can deadlock in a batched QR (jaxlib 0.10.2, 2 cores).
            return jax.lax.map(lambda key: base(key, shape[1:], jnp.float32), jax.random.split(rng, shape[0]))

        width = sum(part.shape[-1] for part in parts)
        kernel = self.param("kernel", member_init, (self.num, width, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.num, self.features))
        if self.centred:
            kernel, bias = centred(kernel), centred(bias)
        inputs, kernels = join_alike(parts, kernel)
        if not self.stacked:
            inputs = [jnp.broadcast_to(part, (self.num, *part.shape)) for part in inputs]
        terms = [product(part, rows) for part, rows in zip(inputs, kernels, strict=True)]
        axes = max(term.ndim for term in terms)
        terms = [term.reshape(self.num, *(1,) * (axes - term.ndim), *term.shape[1:]) for term in terms]
        small, *rest = sorted(terms, key=lambda term: term.size)
        return sum(rest, start=add_row(small, bias))


def join_alike(parts: Sequence[Array], kernel: Array) -> tuple[list[Array], list[Array]]:
    """Return inputs `[..., n_i]` of one layer and their rows of its `kernel [..., sum n_i, F]`.

    Parts of the same leading axes are concatenated. The others stay apart: what is the same for many rows (an
    observation with several actions, a time) is then multiplied once, and the products broadcast.
    """
    if all(part.shape[:-1] == parts[0].shape[:-1] for part in parts):
        return [jnp.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]], [kernel]
    return list(parts), jnp.split(kernel, np.cumsum([part.shape[-1] for part in parts])[:-1], axis=-2)


class EnsembleLayerNorm(nn.Module):
    """Layer norm over the last axis of `[E, ..., F]` with each member's own scale and bias."""

    num: int
    epsilon: float = 1e-6
    centred: bool = False
    """`x` has mean 0 over its features already (`EnsembleDense.centred`)."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Return the normalised activations, same shape."""
        scale = self.param("scale", nn.initializers.ones, (self.num, x.shape[-1]))
        bias = self.param("bias", nn.initializers.zeros, (self.num, x.shape[-1]))
        return unit_rows(x if self.centred else centred(x), scale, bias, self.epsilon)


class CriticEnsemble(nn.Module):
    """`num` Q-functions of concat(s, a): `[..., D]`, `[..., A]` to `[num, ...]`.

    `shared_output` gives all members one linear output layer (WSRL's released code); otherwise each has its own
    (REDQ, RLPD).
    """

    hidden_dims: Sequence[int]
    num: int = 2
    layer_norm: bool = False
    init_scheme: Init = "orthogonal"
    last_gain: float | None = None
    output_gain: float = SQRT2
    shared_output: bool = False
    activation: Activation = "relu"
    norm_last: bool = False
    """LayerNorm behind each activation (Q-chunking) instead of before it."""

    @nn.compact
    def __call__(self, observations: Array, actions: Array) -> Array:
        """Return all members' values; leading axes of observations and actions broadcast against each other."""
        centred = self.layer_norm and not self.norm_last
        act = partial(activate, name=self.activation)
        x: Any = None
        for i, width in enumerate(self.hidden_dims):
            last = i == len(self.hidden_dims) - 1
            gain = self.last_gain if last and self.last_gain is not None else SQRT2
            layer = EnsembleDense(self.num, width, self.init_scheme, gain, i > 0, centred, name=f"dense_{i}")
            x = layer(x) if i else layer(observations, actions)
            x = act(x) if self.norm_last else x
            if self.layer_norm:
                x = EnsembleLayerNorm(self.num, centred=centred, name=f"norm_{i}")(x)
            x = x if self.norm_last else act(x)
        if not self.hidden_dims:  # linear critics, which share nothing
            head = EnsembleDense(self.num, 1, self.init_scheme, self.output_gain, stacked=False, name="output")
            x = head(observations, actions)
        elif self.shared_output:
            layer = nn.Dense(1, kernel_init=kernel_init(self.init_scheme, self.output_gain), name="shared_output")
            x = layer(x)
        else:
            x = EnsembleDense(self.num, 1, self.init_scheme, self.output_gain, name="output")(x)
        return jnp.squeeze(x, -1)


def where_leading(pick: Any, new: Any, old: Any) -> Any:
    """Return the leaves `[..., *]` of `new` where `pick [...]` is true, else those of `old`."""

    def choose(a: Array, b: Array) -> Array:
        return jnp.where(jnp.reshape(pick, jnp.shape(pick) + (1,) * (b.ndim - jnp.ndim(pick))), a, b)

    return jax.tree.map(choose, new, old)


def take_members(params: Params, members: Array) -> Params:
    """Return the parameters of a `CriticEnsemble`'s members `[k]`, for `critic.clone(num=k)`; a shared layer stays."""
    take: Callable[[Any], Any] = lambda layer: jax.tree.map(lambda leaf: leaf[members], layer)  # noqa: E731
    layers = {name: sub if name == "shared_output" else take(sub) for name, sub in params["params"].items()}
    return {"params": layers}


def sample_members(rng: Array, num: int, size: int, replace: bool) -> Array:
    """Draw `size` of `num` ensemble indices, `[size]`: without replacement in REDQ and RLPD, with it in WSRL's code."""
    return jax.random.choice(rng, num, (size,), replace=replace)


def draw_members(
    critic: CriticEnsemble, params: Params, rng: Array, size: int | None, replace: bool = False
) -> tuple[CriticEnsemble, Params]:
    """Return definition and parameters of `size` random members of `critic`; all of them where nothing is to draw.

    One draw, without replacement unless `replace`, serves everything that is evaluated with the result.
    """
    if size is None or (size >= critic.num and not replace):
        return critic, params
    members = sample_members(rng, critic.num, size, replace)
    return critic.clone(num=size), take_members(params, members)


class Value(nn.Module):
    """State value V(s): `[..., D]` to `[...]`."""

    hidden_dims: Sequence[int]
    layer_norm: bool = False
    init_scheme: Init = "orthogonal"
    relu_output: bool = False
    """ReLU on the output (Uni-O4's release, online with scaled rewards)."""

    @nn.compact
    def __call__(self, observations: Array) -> Array:
        """Return V at `observations`."""
        x = MLP(self.hidden_dims, self.layer_norm, init_scheme=self.init_scheme)(observations)
        v = jnp.squeeze(nn.Dense(1, kernel_init=kernel_init(self.init_scheme))(x), -1)
        return nn.relu(v) if self.relu_output else v


class Scalar(nn.Module):
    """One free scalar parameter: a log-temperature or a dual variable."""

    initial: float = 0.0

    @nn.compact
    def __call__(self) -> Array:
        """Return the parameter, shape `[]`."""
        return self.param("value", lambda _: jnp.asarray(self.initial, jnp.float32))


@dataclass(frozen=True)
class Adam:
    """Adam by value, so that it can be a static, comparable part of a pytree. A schedule of None is a constant rate."""

    learning_rate: float = 3e-4
    decay_steps: int | None = None
    """Cosine decay to 0 over this many steps; `None` for a constant rate."""
    weight_decay: float = 0.0
    clip_norm: float | None = None
    """Gradients with a larger global norm are scaled down to it; `None` leaves them."""
    eps: float = 1e-8
    """Adam's epsilon."""

    def build(self) -> optax.GradientTransformation:
        """Return the optax transformation."""
        rate: Any = self.learning_rate
        if self.decay_steps is not None:
            rate = optax.cosine_decay_schedule(self.learning_rate, self.decay_steps)
        if self.weight_decay:
            return optax.adamw(rate, eps=self.eps, weight_decay=self.weight_decay)
        return optax.adam(rate, eps=self.eps)


class Model(struct.PyTreeNode):
    """A network's parameters and their optimiser; definitions are static and compare by value (no recompiles)."""

    params: Params
    opt_state: Any
    module: nn.Module = struct.field(pytree_node=False)
    optimizer: Adam = struct.field(pytree_node=False)

    @classmethod
    def create(cls, rng: Array, module: nn.Module, optimizer: Adam, *inputs: Any) -> Self:
        """Initialise `module` on example `inputs`."""
        params = module.init(rng, *inputs)
        return cls(params=params, opt_state=optimizer.build().init(params), module=module, optimizer=optimizer)

    def __call__(self, *inputs: Any, params: Params | None = None, **kwargs: Any) -> Any:
        """Apply the network, with `params` in place of its own where given (for a loss to differentiate)."""
        return self.module.apply(self.params if params is None else params, *inputs, **kwargs)

    def apply_gradients(self, grads: Params, rate: Array | float | None = None) -> Self:
        """Return the model after one optimiser step, at `rate` times the optimiser's own learning rate."""
        if self.optimizer.clip_norm is not None:
            clip = optax.clip_by_global_norm(self.optimizer.clip_norm)
            grads, _ = clip.update(grads, clip.init(self.params))
        updates, opt_state = self.optimizer.build().update(grads, self.opt_state, self.params)
        updates = updates if rate is None else jax.tree.map(lambda update: rate * update, updates)
        return self.replace(params=optax.apply_updates(self.params, updates), opt_state=opt_state)
