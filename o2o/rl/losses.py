"""Pure functions, one per equation that two papers share; no draws, no updates. Axis E is the critic ensemble."""

import jax
import jax.numpy as jnp

from o2o.types import Array


def td_target(rewards: Array, masks: Array, next_values: Array, discount: float) -> Array:
    """Return y = r + discount * m * v', all `[B]`; no gradient flows through it."""
    return jax.lax.stop_gradient(rewards + discount * masks * next_values)


def generalised_advantages(deltas: Array, ends: Array, discount: float, gae_lambda: float) -> Array:
    """Return GAE (arXiv 1506.02438) of TD errors `deltas` `[T, ...]` in order of time.

    Nothing is carried over a row with `ends` 1, an episode's last; a time limit's bootstrap is in its own delta.
    """

    def back(following: Array, row: tuple[Array, Array]) -> tuple[Array, Array]:
        delta, end = row
        advantage = delta + discount * gae_lambda * (1.0 - end) * following
        return advantage, advantage

    _, advantages = jax.lax.scan(back, jnp.zeros_like(deltas[0]), (deltas, ends), reverse=True)
    return advantages


def clipped_surrogate(ratio: Array, advantages: Array, clip: Array | float) -> Array:
    """Return min(rho A, clip(rho, 1 - clip, 1 + clip) A), same shape (PPO, arXiv 1707.06347, eq. 7)."""
    return jnp.minimum(ratio * advantages, jnp.clip(ratio, 1.0 - clip, 1.0 + clip) * advantages)


def lower_bound(q: Array, rho: float) -> Array:
    """Return mean - rho std over the members of `q [E, ...]`, the std of all E members (divided by E): `[...]`.

    Where all members agree, as one alone does, the gradient of the std is taken as 0.
    """
    if not rho:
        return jnp.mean(q, axis=0)
    variance = jnp.var(q, axis=0)
    agree = variance == 0.0
    return jnp.mean(q, axis=0) - rho * jnp.where(agree, 0.0, jnp.sqrt(jnp.where(agree, 1.0, variance)))


def critic_loss(q: Array, targets: Array, weights: Array | None = None) -> Array:
    """Return the mean over members and batch of w (Q_i - y)^2 for `q [E, B]`, `targets` and weights w, 1 by default."""
    errors = jnp.square(q - targets)
    return jnp.mean(errors if weights is None else weights * errors)


def sac_actor_loss(log_prob: Array, q: Array, alpha: Array) -> Array:
    """Return mean(alpha * log pi - Q) for `log_prob`, `q` `[B]` (SAC, arXiv 1812.05905, eq. 7)."""
    return jnp.mean(alpha * log_prob - q)


def temperature_loss(alpha: Array, entropy: Array, target_entropy: float) -> Array:
    """Return alpha * (H - target): alpha grows iff the entropy `[]` is below the target (arXiv 1812.05905, eq. 18)."""
    return alpha * jax.lax.stop_gradient(entropy - target_entropy)


def expectile_loss(difference: Array, expectile: float) -> Array:
    """Return mean |tau - 1(u < 0)| u^2 for `difference` u `[B]` (IQL, arXiv 2110.06169, eq. 5)."""
    weight = jnp.where(difference < 0, 1.0 - expectile, expectile)
    return jnp.mean(weight * jnp.square(difference))


def advantage_weights(advantages: Array, beta: float | Array, cap: float = 100.0) -> Array:
    """Return min(exp(beta * u), cap), clipped in the exponent so that it cannot overflow (IQL, eq. 7)."""
    return jnp.exp(jnp.minimum(beta * advantages, jnp.log(cap)))


def conservative_gap(z: Array, q_data: Array) -> Array:
    """Return logsumexp(z) - Q(s, a_data), `z [..., K, B]` and `q_data [..., B]` (CQL, arXiv 2006.04779, eq. 4)."""
    return jax.scipy.special.logsumexp(z, axis=-2) - q_data
