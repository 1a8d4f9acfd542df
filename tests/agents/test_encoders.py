"""Image encoders: shapes, the random shift, gradients, leading axes, and clear errors."""

import re
from dataclasses import replace
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o2o.errors import ConfigError
from o2o.nn import encoders
from o2o.nn.encoders import ConvEncoder, EncoderConfig, PatchEncoder, create_encoder, encode, random_shift
from o2o.nn.modules import Adam

QUICK = {"xla_backend_optimization_level": 0}
PATCH = EncoderConfig(width=8, heads=2)
CONV = replace(EncoderConfig.small(), conv_features=(4, 4, 4, 4), latent_dim=6)


def images(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def observations(*lead, size=32):
    state = jnp.asarray(np.random.default_rng(1).normal(size=(*lead, 3)), jnp.float32)
    front, wrist = images(*lead, size, size, 3), images(*lead, size + 4, size, 3, seed=2)
    return {"state": state, "wrist": wrist, "front": front, "base_action": jnp.ones((*lead, 2))}


shift = jax.jit(random_shift, static_argnums=2)


def test_shift_is_padded_crop():
    """A shift is a crop of the padded image."""
    batch = images(16, 12, 10, 3)
    shifted = np.asarray(shift(jax.random.key(0), batch, 2))
    assert shifted.dtype == np.uint8 and shifted.shape == batch.shape
    padded = np.pad(np.asarray(batch), ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
    offsets = set()
    for image, whole in zip(shifted, padded, strict=True):
        crops = {(i, j) for i in range(5) for j in range(5) if np.array_equal(image, whole[i : i + 12, j : j + 10])}
        assert len(crops) == 1
        offsets |= crops
    assert len(offsets) > 8


def test_shift_randomness():
    """Shifts differ by image and repeat with the key."""
    batch = jnp.broadcast_to(images(12, 12, 3), (2, 8, 12, 12, 3))
    once, again, other = (np.asarray(shift(jax.random.key(seed), batch, 4)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(once, again)
    assert np.any(once != other)
    assert len(np.unique(once.reshape(16, -1), axis=0)) > 10
    np.testing.assert_array_equal(shift(jax.random.key(0), batch, 0), batch)


def test_shift_offsets_uniform():
    """Every offset is equally likely."""
    ramp = jnp.broadcast_to(jnp.arange(9, dtype=jnp.uint8)[:, None, None], (2000, 9, 9, 1))
    middle = np.asarray(shift(jax.random.key(3), ramp, 2))[:, 4, 4, 0]
    counts = np.bincount(middle, minlength=9)
    assert counts[[0, 1, 7, 8]].sum() == 0
    assert np.all(np.abs(counts[2:7] - 400) < 5 * np.sqrt(2000 * 0.2 * 0.8))


def test_augment_shifts_images_only():
    """Augmentation shifts both observations' images by offsets of their own, and nothing else."""
    batch = {"observations": observations(5), "next_observations": observations(5), "rewards": jnp.ones(5)}
    result = jax.jit(encoders.augment)(jax.random.key(0), batch)
    now, after = result["observations"], result["next_observations"]
    for name in ("front", "wrist"):
        assert now[name].dtype == jnp.uint8
        assert np.any(now[name] != batch["observations"][name]) and np.any(now[name] != after[name])
    for name in ("state", "base_action"):
        np.testing.assert_array_equal(now[name], batch["observations"][name])
    np.testing.assert_array_equal(result["rewards"], batch["rewards"])
    flat = {"observations": jnp.ones((5, 3)), "next_observations": jnp.ones((5, 3))}
    assert encoders.augment(jax.random.key(0), flat)["observations"] is flat["observations"]


def test_patch_encoder_shapes():
    """An image of 84 pixels a side gives 81 patches of 128 channels."""
    shapes = jax.eval_shape(PatchEncoder().init_with_output, jax.random.key(0), images(1, 84, 84, 3))
    output, params = shapes
    assert output.shape == (1, 81, 128)
    assert params["params"]["positions"].shape == (81, 128)
    assert params["params"]["conv_0"]["kernel"].shape == (8, 8, 3, 128)
    assert params["params"]["conv_1"]["kernel"].shape == (3, 3, 128, 128)
    assert params["params"]["block_0"]["hidden"]["kernel"].shape == (128, 512)


def test_conv_encoder_shape():
    """DrQ convolutions give 35 by 35 pixels."""
    output, _ = jax.eval_shape(ConvEncoder().init_with_output, jax.random.key(0), images(2, 84, 84, 3))
    assert output.shape == (2, 35 * 35, 32)


def make(config, size=32):
    optimizer = Adam(1e-3)
    created = jax.jit(
        lambda key: create_encoder(key, config, observations(1, size=size), optimizer), compiler_options=QUICK
    )(jax.random.key(0))
    return created


@pytest.mark.parametrize(("config", "features"), [(PATCH, 2 * 9 * 8 + 3), (CONV, 2 * 6 + 3)], ids=["patch", "conv"])
def test_feature_shapes(config, features):
    """Features hold all cameras and the state, for any leading axes."""
    encoder = make(config)
    apply = jax.jit(lambda encoder, seen: encode(encoder, seen), compiler_options=QUICK)
    seen = observations(2, 3)
    result = apply(encoder, seen)
    assert result.shape == (2, 3, features) and result.dtype == jnp.float32
    np.testing.assert_array_equal(result[..., -3:], seen["state"])
    rows = jax.tree.map(lambda leaf: leaf[1], seen)
    np.testing.assert_allclose(apply(encoder, rows), result[1], atol=1e-4)
    each = jax.jit(jax.vmap(encode, (None, 0)), compiler_options=QUICK)(encoder, seen)
    np.testing.assert_allclose(each, result, atol=1e-4)


def test_encoders_under_vmap():
    """Two encoders under vmap are two encoders."""
    create = jax.vmap(lambda key: create_encoder(key, CONV, observations(1), Adam(1e-3)))
    both = jax.jit(create, compiler_options=QUICK)(jax.random.split(jax.random.key(0), 2))
    seen = observations(3)
    result = jax.jit(jax.vmap(encode, (0, None)), compiler_options=QUICK)(both, seen)
    assert result.shape == (2, 3, 15)
    assert np.any(np.asarray(result[0]) != np.asarray(result[1]))


@pytest.mark.parametrize("config", [PATCH, CONV], ids=["patch", "conv"])
def test_gradient_reaches_all_parameters(config):
    """The gradient reaches every parameter."""
    encoder = make(config)
    seen = observations(4)
    weights = jax.random.normal(jax.random.key(5), (2 * (config.latent_dim or 72) + 3,))
    loss = lambda params: jnp.sum(jnp.square(encode(encoder, seen, params) @ weights))  # noqa: E731
    grads = jax.jit(jax.grad(loss), compiler_options=QUICK)(encoder.params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        if "'key']['bias']" in name:
            continue  # a bias of the keys cancels in the softmax
        assert float(jnp.abs(leaf).max()) > 0, name


def test_pixel_scaling():
    """Pixels matter, and their scale is half around zero."""
    encoder = make(CONV)
    seen = observations(1)
    brighter = {**seen, "front": jnp.full_like(seen["front"], 255)}
    assert np.any(np.asarray(encode(encoder, seen)) != np.asarray(encode(encoder, brighter)))
    ends = encoders._scaled(jnp.asarray([0, 255], jnp.uint8))
    np.testing.assert_allclose(ends, [-0.5, 0.5], atol=1e-7)


def test_patches_match_features():
    """Patches are the flat features in order."""
    encoder = make(PATCH)
    seen = observations(2)
    patches = encoder(seen, method="patches")
    assert patches.shape == (2, 18, 8)
    np.testing.assert_allclose(patches.reshape(2, -1), encode(encoder, seen)[:, :-3], atol=1e-6)


def test_no_images_no_encoder():
    """Observations without images need no encoder."""
    assert create_encoder(jax.random.key(0), PATCH, jnp.ones((1, 3)), Adam()) is None
    assert create_encoder(jax.random.key(0), PATCH, {"state": jnp.ones((1, 3))}, Adam()) is None
    flat = jnp.ones((2, 3))
    assert encode(None, flat) is flat


@pytest.mark.parametrize(
    ("config", "least"),
    [(PATCH, 16), (EncoderConfig(kind="conv"), 15), (EncoderConfig.small(), 23)],
    ids=["patch", "conv", "small"],
)
def test_small_images_refused(config, least):
    """Images that are too small are refused by the camera's name."""
    assert encoders.smallest_side(config) == least
    fits = encoders.observation_encoder(config, {"top": images(least, least, 3)})
    output, _ = jax.eval_shape(fits.init_with_output, jax.random.key(0), {"top": images(1, least, least, 3)})
    assert output.shape[-1] > 0
    with pytest.raises(ConfigError, match=f"camera 'top' .* {least - 1}x{least} pixels.*image_size"):
        encoders.observation_encoder(config, {"top": images(1, least - 1, least, 3)})


@pytest.mark.parametrize(
    "changes",
    [{"kind": "vit"}, {"width": 10, "heads": 4}, {"conv_strides": (1,)}, {"latent_dim": -1}, {"shift_pad": -1}],
    ids=str,
)
def test_wrong_settings_refused(changes):
    """Settings that cannot be used are refused."""
    with pytest.raises(ConfigError, match="EncoderConfig"):
        EncoderConfig(**changes)


@pytest.mark.parametrize(
    ("lead", "height", "width", "side", "stride"),
    [((5,), 13, 11, 3, 2), ((2, 3), 9, 12, 3, 1), ((4,), 21, 20, 8, 4), ((), 10, 9, 3, 2)],
)
def test_conv_matches_flax(lead, height, width, side, stride):
    """A convolution is that of Flax, with its first parameters and gradients."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(*lead, height, width, 3)), jnp.float32)
    kinds = encoders.Conv(4, side, stride), nn.Conv(4, (side, side), stride, "VALID", kernel_init=encoders.CONV)

    def results(kind, params, x):
        loss = lambda params, x: jnp.sum(jnp.sin(kind.apply(params, x)))  # noqa: E731
        return jax.value_and_grad(loss, argnums=(0, 1))(params, x)

    params = [kind.init(jax.random.key(3), x) for kind in kinds]
    jax.tree.map(np.testing.assert_array_equal, *params)
    alike = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    ours, flax = (results(kind, params[0], x) for kind in kinds)
    jax.tree.map(alike, ours, flax)
    seeds = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), (params[0], x))
    batched = jax.jit(jax.vmap(partial(results, kinds[0])))(*seeds)
    jax.tree.map(alike, batched, jax.vmap(partial(results, kinds[1]))(*seeds))


@pytest.mark.skipif("jax.default_backend() != 'cpu'", reason="not a CPU")
def test_conv_forms_on_cpu():
    """Convolutions in loops on a CPU have the form of its fast kernels."""

    def forms(kind):
        x = jnp.ones((2, 3, 9, 9, 3))
        params = kind.init(jax.random.key(0), x[0])
        step = lambda p, x: jax.tree.map(jnp.add, p, jax.grad(lambda p: jnp.sum(kind.apply(p, x) ** 2))(p))  # noqa: E731
        loop = jax.jit(lambda p, x: jax.lax.scan(lambda p, x: (step(p, x), None), p, x)[0])
        return set(re.findall(r"dim_labels=(\S+?),", loop.lower(params, x).compile().as_text()))

    class Two(nn.Module):
        ours: bool

        @nn.compact
        def __call__(self, x):
            for i in range(2):
                x = encoders.Conv(4, 3, name=f"c{i}")(x) if self.ours else nn.Conv(4, (3, 3), padding="VALID")(x)
            return x

    assert forms(Two(True)) == {"b01f_01io->b01f"}
    assert len(forms(Two(False))) > 1  # the slow forms, as XLA derives them
