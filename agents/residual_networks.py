"""ResFiT's networks: the bounded residual actor, and the critics' trunk over image patches."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from o2o.nn.modules import CriticEnsemble, Model, kernel_init
from o2o.types import Array, Params


class Seen(NamedTuple):
    """What the networks see of observations with leading axes `[...]`."""

    state: Array
    """`[..., D]`; D is 0 where there are only images."""
    base: Array
    """The base action `[..., A]`; not an input of the critics."""
    patches: Array | None
    """Of all cameras, `[..., P, C]`."""


class ResidualActor(nn.Module):
    """Mean residual `scale * tanh(.)`: state and base action `[..., D]`, `[..., A]`, patches, to `[..., A]`.

    Its output layer starts at exactly zero.
    """

    hidden_dims: tuple[int, ...]
    action_dim: int
    scale: float
    layer_norm: bool = True
    image_features: int = 128
    """Width that the flattened patches are projected to."""

    @nn.compact
    def __call__(self, seen: Seen) -> Array:
        """Return the mean residual."""
        parts = [seen.state, seen.base]
        init = kernel_init("orthogonal", 1.0)
        if seen.patches is not None:
            flat = seen.patches.reshape(*seen.patches.shape[:-2], -1)
            flat = nn.Dense(self.image_features, kernel_init=init, name="project")(flat)
            parts = [nn.relu(nn.LayerNorm(name="project_norm")(flat)), *parts]
        x = jnp.concatenate(parts, axis=-1)
        for i, width in enumerate(self.hidden_dims):
            x = nn.Dense(width, kernel_init=init, name=f"dense_{i}")(x)
            if self.layer_norm:
                x = nn.LayerNorm(name=f"norm_{i}")(x)
            x = nn.relu(x)
        zeros = nn.initializers.zeros
        return self.scale * nn.tanh(nn.Dense(self.action_dim, kernel_init=zeros, bias_init=zeros, name="output")(x))


class Trunk(nn.Module):
    """Patches `[..., P, C]`, actions and states to `[..., width]`: a layer per channel, summed by a learned map."""

    width: int

    @nn.compact
    def __call__(self, patches: Array, actions: Array, state: Array) -> Array:
        """Return the features that all heads share."""
        channels = jnp.swapaxes(patches, -1, -2)
        rest = jnp.concatenate([actions, state], axis=-1)[..., None, :]
        rest = jnp.broadcast_to(rest, (*channels.shape[:-1], rest.shape[-1]))
        x = nn.Dense(self.width, name="dense")(jnp.concatenate([channels, rest], axis=-1))
        x = nn.relu(nn.LayerNorm(name="norm")(x))
        weights = self.param("weights", nn.initializers.normal(1.0), (channels.shape[-2], self.width))
        return jnp.sum(x * weights, axis=-2)


def values(
    heads: CriticEnsemble, params: Params, trunk: Model | None, trunk_params: Params, seen: Seen, actions: Array
) -> Any:
    """Return Q `[E, ...]` of combined actions `[..., A]`; with images through the trunk."""
    if trunk is None or seen.patches is None:
        return heads.apply(params, seen.state, actions)
    features = trunk(seen.patches, actions, seen.state, params=trunk_params)
    return heads.apply(params, jnp.concatenate([features, seen.state], axis=-1), actions)
