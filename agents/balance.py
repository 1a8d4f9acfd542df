"""What FamO2O's agents share: the balance coefficient, its encoding, and a policy network for a whole family.

"Train Once, Get a Family: State-Adaptive Balances for Offline-to-Online Reinforcement Learning", arXiv 2310.17966.
The policy gets a coefficient beta per state, `[...]`, as its second input; a larger one means more improvement and
less constraint.
"""

from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from o2o.nn.distributions import Normal, TanhNormal
from o2o.nn.modules import GaussianActor
from o2o.settings import AboveZero, Ordered, Range, Rate, Settings, Widths
from o2o.types import Array, Info

Ends = Annotated[tuple[float, float], Ordered(equal=True)]


@dataclass(frozen=True)
class BalanceConfig(Settings):
    """Settings of the balance coefficient."""

    balance_range: Ends = (8.0, 14.0)
    """Smallest and largest coefficient; equal ones make a constant balance."""
    encoding_dim: Annotated[int, Range(least=2, most=1024)] = 6
    """Numbers that encode the coefficient for the policy: half of them sines, half cosines."""
    encoding_base: AboveZero = 10_000.0
    """Frequencies of the encoding are encoding_base^(-2i / encoding_dim), i = 0, 1, ..."""
    balance_hidden_dims: Widths = (256, 256)
    """Widths of the balance network's hidden layers."""
    balance_lr: Rate = 3e-4
    """Adam rate of the balance network, and of its temperature where it has one."""

    @property
    def reach(self) -> Ends:
        """Smallest and largest coefficient that the balance network can choose."""
        return self.balance_range

    def __post_init__(self) -> None:
        """Raise `ConfigError` for a value out of range."""
        super().__post_init__()
        if self.encoding_dim % 2:
            raise self.refuse("encoding_dim", "an even number from 2, such as 6")


def encode(beta: Array, dim: int = 6, base: float = 10_000.0) -> Array:
    """Return sin and cos of beta / base^(2i / dim) for i = 0 .. dim/2 - 1, in turn: `[...]` to `[..., dim]`."""
    wavelengths = base ** (np.arange(0, dim, 2) / dim)
    phases = beta[..., None] / jnp.asarray(wavelengths, jnp.float32)
    return jnp.stack([jnp.sin(phases), jnp.cos(phases)], axis=-1).reshape(*beta.shape, dim)


def coefficient(x: Array, ends: Ends) -> Array:
    """Map x in [-1, 1] to the balance range, -1 and 1 to its ends; any shape."""
    low, high = ends
    return jnp.clip(low + (x + 1.0) / 2.0 * (high - low), low, high)


def uniform_betas(rng: Array, shape: tuple[int, ...], ends: Ends) -> Array:
    """Draw coefficients `shape` from all of the range: the offline phase's."""
    return jax.random.uniform(rng, shape, minval=ends[0], maxval=ends[1])


class FamilyActor(GaussianActor):
    """A family of policies: a Gaussian actor that also sees the encoded balance coefficient."""

    encoding_dim: int = 6
    encoding_base: float = 10_000.0

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]  # a second input
        self, observations: Array, beta: Array, training: bool = False
    ) -> TanhNormal | Normal:
        """Return the action distribution at `observations [..., D]` with coefficients `beta [...]`."""
        encoding = encode(beta, self.encoding_dim, self.encoding_base)
        return super().__call__(jnp.concatenate([observations, encoding], axis=-1), training)


def balance_info(greedy: Array, log_prob: Array) -> Info:
    """Return mean and spread over states of the deterministic coefficients `[B]`, and the balance policy's entropy.

    `log_prob` `[B]` is the log-density of samples x in (-1, 1): entropy in that space, log 2 at most.
    """
    return {
        "balance/beta": greedy.mean(),
        "balance/std": greedy.std(),
        "balance/entropy": -log_prob.mean(),
    }
