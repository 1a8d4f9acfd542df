"""Image encoders and random-shift augmentation; images are uint8 `[..., H, W, C]` until they are inside a module.

An observation with images is a dict: `state` `[..., D]` float32 and one uint8 entry per camera; other entries (a base
action) are the agent's business and pass by. `ObservationEncoder` makes flat features of it, so that an agent's other
networks never see an image. Encoders: ResFiT's small vision transformer (arXiv 2509.19301, released code) and the four
convolutions of DrQ (arXiv 2004.13649), for small presets with larger strides.

Where we differ
- DrQ's kernels are orthogonal; here Xavier-uniform (batched orthogonal draws can deadlock on XLA's CPU back end).
- Biases begin at zero; ResFiT's convolutions keep the random ones of their framework.
- `latent_dim` projects the features and squashes them with tanh, as RLPD's pixel agent does. ResFiT projects in its
  heads instead: `latent_dim=0`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from o2o.data.spaces import STATE
from o2o.errors import ConfigError
from o2o.nn.kernels import add_row, convolution
from o2o.nn.modules import Adam, Model
from o2o.settings import Amount, Count, Settings, Width, Widths
from o2o.types import Array, Batch, Params


@dataclass(frozen=True)
class EncoderConfig(Settings):
    """How camera images become features; used only where observations have images."""

    kind: Literal["patch", "conv"] = "patch"
    """`patch`: two convolutions to patches and a transformer (ResFiT); `conv`: plain convolutions (DrQ), cheaper."""
    width: Width = 128
    """Channels of every patch of the `patch` encoder."""
    blocks: Count = 1
    """Transformer blocks of the `patch` encoder."""
    heads: Count = 4
    """Attention heads of each block; must divide `width`."""
    conv_features: Widths = (32, 32, 32, 32)
    """Channels of the `conv` encoder's 3x3 convolutions."""
    conv_strides: tuple[Count, ...] = (2, 1, 1, 1)
    """Their strides."""
    latent_dim: Amount = 0
    """Width that each camera's features are projected to (Dense, LayerNorm, tanh); 0 leaves them as they are."""
    shift_pad: Amount = 4
    """Images are shifted by up to so many pixels in every update (random-shift augmentation); 0 for none."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` for values out of range, or that do not go together."""
        super().__post_init__()
        if self.width % self.heads:
            raise self.refuse("width", f"a multiple of heads={self.heads}")
        if not self.conv_features or len(self.conv_features) != len(self.conv_strides):
            raise ConfigError(
                f"EncoderConfig has {len(self.conv_features)} conv_features and {len(self.conv_strides)} conv_strides; "
                "expected as many of both, at least one"
            )

    @classmethod
    def small(cls) -> "EncoderConfig":
        """Return the encoder of the small presets: convolutions that halve twice, 50 features per camera."""
        return cls(kind="conv", conv_features=(16, 32, 32, 32), conv_strides=(2, 2, 1, 1), latent_dim=50)


def random_shift(rng: Array, images: Array, pad: int = 4) -> Array:
    """Shift every image of `[..., H, W, C]` by up to `pad` pixels each way, edges repeated; same shape and dtype.

    Equal to a random crop of the edge-padded image (DrQ); each image draws its own offsets.
    """
    lead, (height, width) = images.shape[:-3], images.shape[-3:-1]
    offsets = jax.random.randint(rng, (2, *lead), -pad, pad + 1)
    rows = jnp.clip(jnp.arange(height) + offsets[0][..., None], 0, height - 1)
    columns = jnp.clip(jnp.arange(width) + offsets[1][..., None], 0, width - 1)
    images = jnp.take_along_axis(images, rows[..., :, None, None], axis=-3)
    return jnp.take_along_axis(images, columns[..., None, :, None], axis=-2)


def image_names(observations: Any) -> tuple[str, ...]:
    """Return the names of the cameras of an observation or space-like dict of arrays, sorted; () for a flat one."""
    if not isinstance(observations, Mapping):
        return ()
    return tuple(sorted(name for name, value in observations.items() if jnp.result_type(value) == jnp.uint8))


def shift_observations(rng: Array, observations: Any, pad: int = 4) -> Any:
    """Shift all images of an observation, each camera with offsets of its own; flat observations stay as they are."""
    names = image_names(observations)
    if not names or not pad:
        return observations
    keys = jax.random.split(rng, len(names))
    shifted = {name: random_shift(key, observations[name], pad) for name, key in zip(names, keys, strict=True)}
    return {**observations, **shifted}


def augment(rng: Array, batch: Batch, pad: int = 4) -> Batch:
    """Shift the images of a batch's observations and next observations, independently of each other."""
    now_rng, next_rng = jax.random.split(rng)
    return {
        **batch,
        "observations": shift_observations(now_rng, batch["observations"], pad),
        "next_observations": shift_observations(next_rng, batch["next_observations"], pad),
    }


def _scaled(images: Array) -> Array:
    """Return uint8 pixels as float32 in [-0.5, 0.5]."""
    return images.astype(jnp.float32) / 255.0 - 0.5


SMALL = nn.initializers.truncated_normal(0.02)
CONV = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Conv(nn.Module):
    """Convolution without padding plus bias: `[..., H, W, C]` to `[..., H', W', features]`."""

    features: int
    side: int
    stride: int = 1
    kernel_init: Callable[..., Array] = CONV

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Return the feature map."""
        kernel = self.param("kernel", self.kernel_init, (self.side, self.side, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return add_row(convolution(x, kernel, self.stride), bias)


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and a GELU MLP four times as wide: `[..., P, C]` to the same."""

    heads: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Return the patches after the block."""
        width = x.shape[-1]
        attention = nn.MultiHeadDotProductAttention(self.heads, kernel_init=SMALL, name="attention")
        x = x + attention(nn.LayerNorm(name="norm_attention")(x))
        hidden = nn.Dense(4 * width, kernel_init=SMALL, name="hidden")(nn.LayerNorm(name="norm_mlp")(x))
        return x + nn.Dense(width, kernel_init=SMALL, name="output")(nn.gelu(hidden, approximate=False))


class PatchEncoder(nn.Module):
    """Conv 8x8/4, ReLU, conv 3x3/2, learned positions, transformer, LayerNorm: `[..., H, W, C]` to `[..., P, width]`.

    84x84 pixels give 81 patches; 16 pixels are the least.
    """

    width: int = 128
    blocks: int = 1
    heads: int = 4

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Return the patches of uint8 images."""
        x = Conv(self.width, 8, 4, name="conv_0")(_scaled(images))
        x = Conv(self.width, 3, 2, name="conv_1")(nn.relu(x))
        x = x.reshape(*x.shape[:-3], -1, self.width)
        x = x + self.param("positions", SMALL, x.shape[-2:])
        for i in range(self.blocks):
            x = TransformerBlock(self.heads, name=f"block_{i}")(x)
        return nn.LayerNorm(name="norm")(x)


class ConvEncoder(nn.Module):
    """3x3 convolutions, each with ReLU: `[..., H, W, C]` to `[..., P, features[-1]]`, one patch per last pixel."""

    features: tuple[int, ...] = (32, 32, 32, 32)
    strides: tuple[int, ...] = (2, 1, 1, 1)

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Return the last feature map of uint8 images, its pixels in one axis."""
        x = _scaled(images)
        for i, (features, stride) in enumerate(zip(self.features, self.strides, strict=True)):
            init = nn.initializers.xavier_uniform()
            x = nn.relu(Conv(features, 3, stride, init, name=f"conv_{i}")(x))
        return x.reshape(*x.shape[:-3], -1, self.features[-1])


class ObservationEncoder(nn.Module):
    """One encoder per camera: dict observations to flat features `[..., F]`, cameras by name, then the state.

    Without `config.latent_dim` a camera's features are its patches, flattened; `patches` gives them unflattened.
    """

    config: EncoderConfig
    cameras: tuple[str, ...]

    def setup(self) -> None:
        """Make the encoders."""
        config = self.config
        for i in range(len(self.cameras)):
            encoder = (
                PatchEncoder(config.width, config.blocks, config.heads)
                if config.kind == "patch"
                else ConvEncoder(config.conv_features, config.conv_strides)
            )
            setattr(self, f"camera_{i}", encoder)
            if config.latent_dim:
                setattr(self, f"project_{i}", nn.Dense(config.latent_dim, kernel_init=nn.initializers.xavier_uniform()))
                setattr(self, f"norm_{i}", nn.LayerNorm())

    def _camera(self, index: int, images: Array) -> Array:
        patches = getattr(self, f"camera_{index}")(images)
        flat = patches.reshape(*patches.shape[:-2], -1)
        if not self.config.latent_dim:
            return flat
        return jnp.tanh(getattr(self, f"norm_{index}")(getattr(self, f"project_{index}")(flat)))

    def __call__(self, observations: Mapping[str, Array]) -> Array:
        """Return the features of observations with `state [..., D]` (may be absent) and uint8 cameras."""
        parts = [self._camera(i, observations[name]) for i, name in enumerate(self.cameras)]
        return jnp.concatenate([*parts, observations[STATE]] if STATE in observations else parts, axis=-1)

    def patches(self, observations: Mapping[str, Array]) -> Array:
        """Return the patches of all cameras `[..., P, channels]`, one camera after the other."""
        return jnp.concatenate(
            [getattr(self, f"camera_{i}")(observations[name]) for i, name in enumerate(self.cameras)], axis=-2
        )


def smallest_side(config: EncoderConfig) -> int:
    """Return the least height and width, in pixels, that the encoder can take."""
    layers = [(8, 4), (3, 2)] if config.kind == "patch" else [(3, stride) for stride in config.conv_strides]
    side = 1
    for kernel, stride in reversed(layers):
        side = (side - 1) * stride + kernel
    return side


def observation_encoder(config: EncoderConfig, observations: Any) -> ObservationEncoder | None:
    """Return the encoder for observations like the example, None if they have no images.

    Raises `ConfigError` naming a camera whose images are too small for it.
    """
    names, least = image_names(observations), smallest_side(config)
    for name in names:
        shape = jnp.shape(observations[name])[-3:]
        if min(shape[:2]) < least:
            raise ConfigError(
                f"camera {name!r} has images of {shape[0]}x{shape[1]} pixels; the {config.kind} encoder needs "
                f"{least}x{least} at least: raise image_size, or lower the encoder's strides"
            )
    return ObservationEncoder(config, names) if names else None


def create_encoder(rng: Array, config: EncoderConfig, observations: Any, optimizer: Adam) -> Model | None:
    """Return the encoder with its optimiser for observations like the example, None if they have no images."""
    module = observation_encoder(config, observations)
    return None if module is None else Model.create(rng, module, optimizer, observations)


def encode(encoder: Model | None, observations: Any, params: Params | None = None) -> Any:
    """Return the features of observations, with `params` for a loss to differentiate; flat ones stay as they are."""
    return observations if encoder is None else encoder(observations, params=params)
