"""Diffusion and flow: schedules by their numbers, losses by hand, samplers on exact fields and on known data."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from o2o.agents import DiffusionBCConfig, FlowBCConfig
from o2o.errors import ConfigError
from o2o.nn.generative import Denoiser, Diffusion, Flow
from tests.helpers.probes import LONG

DDPM, DDIM = Diffusion(), Diffusion(sampler="ddim")
CLEAN = [Diffusion(20, "cosine", sampler, clip="prediction") for sampler in ("ddpm", "ddim")]
MODELS = [DDPM, DDIM, *CLEAN, Diffusion(20, "linear", clip="prediction"), Flow()]
KEY = jax.random.key(0)


def name_of(model: Any) -> str:
    return "flow" if isinstance(model, Flow) else f"{model.schedule}-{model.sampler}-{model.clip}"


def exact(model: Any, point: float) -> Any:
    """Return the field of a data set that consists of one point, known in closed form."""

    def diffusion(x: jax.Array, t: jax.Array) -> jax.Array:
        bar = jnp.asarray(model.alpha_bars, jnp.float32)[t.astype(jnp.int32)][..., None]
        return (x - jnp.sqrt(bar) * point) / jnp.sqrt(1.0 - bar)

    return diffusion if isinstance(model, Diffusion) else lambda x, t: (point - x) / (1.0 - t[..., None])


@functools.cache
def fitted(model: Any, style: str, share: float) -> jax.Array:
    """Return 4000 samples `[4000]` of a network trained on points 0.7 (of this share) and -0.7."""
    module = Denoiser(style, hidden_dims=(64, 64), blocks=1, width=32, time_dim=16)  # type: ignore[arg-type]
    nothing = jnp.zeros((1, 1))
    params = module.init(KEY, nothing, nothing, jnp.zeros(1))
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, 2000))

    def step(state: Any, key: jax.Array) -> tuple[Any, None]:
        params, opt_state = state
        data_key, key = jax.random.split(key)
        data = jnp.where(jax.random.uniform(data_key, (256, 1)) < share, 0.7, -0.7)
        loss = lambda p: model.loss(lambda x, t: module.apply(p, nothing, x, t), data, key).mean()  # noqa: E731
        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    def run(params: Any) -> jax.Array:
        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(KEY, 2000))
        noise = jax.random.normal(jax.random.key(1), (4000, 1))
        return model.sample(lambda x, t: module.apply(params, nothing, x, t), noise, jax.random.key(2))[:, 0]

    return jax.jit(run, compiler_options=LONG)(params)


def test_vp_schedule() -> None:
    """The VP schedule has the numbers of EXPO."""
    bars = DDPM.alpha_bars
    assert bars[-1] == pytest.approx(np.exp(-5.05), rel=1e-6) and bars[-1] == pytest.approx(0.0064, abs=1e-4)
    assert bars[0] == pytest.approx(np.exp(-0.01 - 0.0495), rel=1e-6)
    assert Diffusion(100).alpha_bars[-1] == pytest.approx(np.exp(-5.05), rel=1e-6)


def test_cosine_schedule() -> None:
    """The cosine schedule follows its curve but for the capped last step."""
    bars = Diffusion(20, "cosine").alpha_bars
    curve = np.cos((np.arange(21) / 20 + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(bars[:-1], curve[1:-1] / curve[0], rtol=1e-9)
    assert bars[-1] == pytest.approx(bars[-2] * 0.001)


def test_linear_schedule() -> None:
    """The linear schedule at a thousand steps is the original one."""
    diffusion = Diffusion(1000, "linear")
    np.testing.assert_allclose(1.0 - diffusion.alphas, np.linspace(1e-4, 2e-2, 1000), rtol=1e-6)
    assert diffusion.alpha_bars[-1] == pytest.approx(4.04e-5, rel=0.01)
    assert Diffusion(100, "linear").alpha_bars[50] == pytest.approx(diffusion.alpha_bars[509], rel=0.1)


@pytest.mark.parametrize("model", [DDPM, CLEAN[0], Diffusion(50, "linear")], ids=name_of)
def test_alpha_bars_fall(model: Diffusion) -> None:
    """The alpha bars fall from almost one to almost nothing."""
    bars = model.alpha_bars
    assert bars.shape == (model.steps,) and np.all(np.diff(bars) < 0) and np.all((bars > 0) & (bars < 1))
    assert bars[0] > 0.9 and bars[-1] < 0.01
    np.testing.assert_allclose(np.cumprod(model.alphas), bars)


@pytest.mark.parametrize("model", MODELS, ids=name_of)
def test_samples_finite_and_bounded(model: Any) -> None:
    """Samples are finite and in range under a wild network."""
    wild = lambda x, t: 7.0 * jnp.sin(30.0 * x + t[..., None])  # noqa: E731
    samples = jax.jit(lambda noise: model.sample(wild, noise, KEY))(4.0 * jax.random.normal(KEY, (3, 50, 4)))
    assert samples.shape == (3, 50, 4) and np.all(np.isfinite(samples)) and float(jnp.abs(samples).max()) <= 1.0


@pytest.mark.parametrize("model", MODELS, ids=name_of)
def test_only_ddpm_uses_key(model: Any) -> None:
    """Only DDPM looks at the key."""
    noise = jax.random.normal(KEY, (50, 2))
    blurred = lambda x, t: 0.3 * x  # noqa: E731

    def differs(model: Any) -> bool:
        one, two = (model.sample(blurred, noise, jax.random.key(key)) for key in (1, 2))
        return bool(np.any(one != two))

    assert differs(model) == (isinstance(model, Diffusion) and model.sampler == "ddpm")
    assert not differs(model.deterministic())
    other = model.deterministic().sample(blurred, noise + 0.1, KEY)
    assert np.any(other != model.deterministic().sample(blurred, noise, KEY))


@pytest.mark.parametrize("model", MODELS, ids=name_of)
def test_exact_field_of_point(model: Any) -> None:
    """The exact field of a point maps all noise to it and has no loss."""
    field = exact(model, 0.3)
    samples = model.sample(field, 3.0 * jax.random.normal(KEY, (200, 2)), jax.random.key(1))
    np.testing.assert_allclose(samples, 0.3, atol=2e-3)
    assert float(jnp.max(model.loss(field, jnp.full((200, 2), 0.3), KEY))) < 1e-4


def test_zero_temperature() -> None:
    """Temperature zero takes DDPM's noise away."""
    cold = Diffusion(temperature=0.0)
    noise = jax.random.normal(KEY, (20, 1))
    still = lambda x, t: 0.5 * x  # noqa: E731
    one, two = (cold.sample(still, noise, jax.random.key(i)) for i in (1, 2))
    np.testing.assert_array_equal(one, two)


def test_ddpm_recursion_by_hand() -> None:
    """DDPM with a constant network is the recursion of the paper written out."""
    diffusion = Diffusion(3, temperature=0.0)
    x = np.asarray([2.0, -0.1])
    for t in (2, 1, 0):
        mean = (x - (1 - diffusion.alphas[t]) / np.sqrt(1 - diffusion.alpha_bars[t]) * 0.2) / np.sqrt(
            diffusion.alphas[t]
        )
        x = np.clip(mean, -1, 1)
    sample = diffusion.sample(lambda x, t: jnp.full_like(x, 0.2), jnp.asarray([2.0, -0.1]), KEY)
    np.testing.assert_allclose(sample, x, rtol=1e-5)


def test_flow_euler_steps() -> None:
    """The flow is Euler with the velocity at the left end."""
    x = np.asarray([0.1, -0.2])
    for t in (0.0, 0.5):
        x = x + 0.5 * (t - x)
    sample = Flow(2).sample(lambda x, t: t[..., None] - x, jnp.asarray([[0.1, -0.2]]), KEY)
    np.testing.assert_allclose(sample[0], x, rtol=1e-6)


def test_loss_scale() -> None:
    """Losses are squared errors by element, and of unit scale for a zero network."""
    data = jnp.full((5000, 2), 0.5)
    zero = lambda x, t: jnp.zeros_like(x)  # noqa: E731
    assert DDPM.loss(zero, data, KEY).shape == (5000, 2)
    assert float(DDPM.loss(zero, data, KEY).mean()) == pytest.approx(1.0, abs=0.05)
    assert float(Flow().loss(zero, data, KEY).mean()) == pytest.approx(1.25, abs=0.06)


def test_training_times_cover_range() -> None:
    """Training times cover all steps and the whole interval."""
    seen: list[np.ndarray] = []

    def spy(x: jax.Array, t: jax.Array) -> jax.Array:
        seen.append(np.asarray(t))
        return x

    DDPM.loss(spy, jnp.zeros((2000, 1)), KEY)
    Flow().loss(spy, jnp.zeros((2000, 1)), KEY)
    assert sorted(set(seen[0].tolist())) == list(range(10))
    assert 0.0 <= seen[1].min() < 0.01 and 0.99 < seen[1].max() < 1.0


@pytest.mark.parametrize("model", [DDPM, *CLEAN, Flow(20)], ids=name_of)
def test_two_modes_reproduced(model: Any) -> None:
    """Two modes are reproduced in their proportion."""
    samples = np.asarray(fitted(model, "residual" if model is DDPM else "mlp", 0.7))
    assert np.mean(samples > 0) == pytest.approx(0.7, abs=0.06)
    assert np.mean(np.abs(np.abs(samples) - 0.7) < 0.25) > 0.9
    assert np.mean(np.abs(samples) < 0.3) < 0.05


@pytest.mark.parametrize("style", ["residual", "mlp"])
def test_network_broadcasts(style: Any) -> None:
    """The network broadcasts leading axes and depends on all inputs."""
    module = Denoiser(style, hidden_dims=(16, 16), blocks=2, width=16, time_dim=8)
    keys = jax.random.split(KEY, 3)
    observations, x = jax.random.normal(keys[0], (5, 3)), jax.random.normal(keys[1], (4, 5, 2))
    params = module.init(keys[2], observations, x, jnp.zeros(()))
    apply = jax.jit(module.apply)
    out = apply(params, observations, x, jnp.asarray(2.0))
    assert out.shape == (4, 5, 2)
    np.testing.assert_allclose(out[1, 2], apply(params, observations[2], x[1, 2], jnp.asarray(2.0)), atol=1e-5)
    assert np.all(out != apply(params, observations + 0.5, x, jnp.asarray(2.0)))
    assert np.all(out != apply(params, observations, x + 0.5, jnp.asarray(2.0)))
    assert np.all(out != apply(params, observations, x, jnp.asarray(3.0)))


def test_residual_network_sizes() -> None:
    """The residual network has the sizes of EXPO."""
    module = Denoiser()
    shapes = jax.eval_shape(module.init, KEY, jnp.zeros((1, 29)), jnp.zeros((1, 8)), jnp.zeros(1))["params"]
    kernels = [shapes[f"Dense_{i}"]["kernel"].shape for i in range(9)]
    assert shapes["frequencies"].shape == (64,) and shapes["inputs"]["kernel"].shape == (8 + 29 + 256, 256)
    assert kernels[:2] == [(128, 256), (256, 256)] and kernels[2:8] == [(256, 1024), (1024, 256)] * 3
    assert kernels[8] == (256, 8) and "Dense_9" not in shapes


@pytest.mark.parametrize("style", ["residual", "mlp"])
def test_shared_inputs_computed_once(style: Any) -> None:
    """What is the same for many rows is computed once, with the same result.

    Several vectors at one observation and one time, against one row each of all three.
    """
    module = Denoiser(style, hidden_dims=(16, 16), blocks=1, width=16, time_dim=8)
    observations, x = jax.random.normal(KEY, (4, 3)), jax.random.normal(jax.random.key(3), (5, 4, 2))
    params = module.init(KEY, observations, x[0], jnp.zeros(4))
    once = module.apply(params, observations, x, jnp.asarray(0.3))
    rows = module.apply(params, jnp.broadcast_to(observations, (5, 4, 3)), x, jnp.full((5, 4), 0.3))
    assert isinstance(once, jax.Array) and once.shape == (5, 4, 2) and np.std(once) > 0.1
    np.testing.assert_allclose(once, np.asarray(rows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("style", ["residual", "mlp"])
def test_dropout_in_training_only(style: Any) -> None:
    """Dropout acts in training only."""
    module = Denoiser(style, hidden_dims=(16, 16), blocks=1, width=16, time_dim=8, dropout=0.5)
    x = jnp.ones((3, 2))
    params = module.init(KEY, x, x, jnp.zeros(3))
    one, two = (module.apply(params, x, x, jnp.zeros(3), True, rngs={"dropout": jax.random.key(i)}) for i in (1, 2))
    assert np.any(one != two)
    plain = Denoiser(style, hidden_dims=(16, 16), blocks=1, width=16, time_dim=8)
    np.testing.assert_array_equal(module.apply(params, x, x, jnp.zeros(3)), plain.apply(params, x, x, jnp.zeros(3)))  # type: ignore[arg-type]


def test_wrong_settings_refused() -> None:
    """Settings that cannot be used are refused."""
    with pytest.raises(ConfigError, match=r"Diffusion\.steps is 0; expected at least 1"):
        Diffusion(0)
    with pytest.raises(ConfigError, match="Diffusion.steps is 10; expected at least 20 with schedule 'linear'"):
        Diffusion(10, "linear")
    with pytest.raises(ConfigError, match=r"Flow\.steps is 0; expected at least 1"):
        Flow(0)


@pytest.mark.parametrize(
    ("make", "field", "expected"),
    [
        (Diffusion, "schedule", "vp or cosine or linear"),
        (Diffusion, "sampler", "ddpm or ddim"),
        (Diffusion, "clip", "step or prediction"),
        (Denoiser, "style", "residual or mlp"),
        (DiffusionBCConfig, "network", "residual or mlp"),
        (FlowBCConfig, "network", "residual or mlp"),
    ],
)
def test_unknown_choice_refused(make: Any, field: str, expected: str) -> None:
    """A choice that does not exist is refused."""
    with pytest.raises(ConfigError, match=rf"{make.__name__}\.{field} is 'Cosine'; expected {expected}"):
        make(**{field: "Cosine"})
