"""Uni-O4's behaviour-cloning ensemble (arXiv 2311.03351): members that differ by more than their initialisation.

The paper adds alpha KL(pi_i || f) to each member's likelihood, f the normalised upper envelope of the ensemble; here
of the other members, as in the release. `sampled_kl` estimates that divergence with the member's own actions and a
gradient through them; `analytic_kl` takes the divergence from the member that is likeliest at the dataset's action;
`code_heuristic` evaluates the envelope at the dataset's action with no gradient, so that it only scales the loss.
"""

from typing import Any

import jax
import jax.numpy as jnp

from o2o.agents.uni_o4_config import UniO4Config
from o2o.nn.distributions import Normal
from o2o.nn.modules import Model
from o2o.types import Array, Params


def gaussian_kl(left: Normal, right: Normal) -> Array:
    """Return KL(left || right), summed over action dimensions, `[...]`."""
    ratio = jnp.square(left.std / right.std)
    return 0.5 * jnp.sum(ratio + jnp.square((left.mean - right.mean) / right.std) - 1.0 - jnp.log(ratio), axis=-1)


def clone_loss(
    params: Params,
    member: Array,
    policies: Model,
    observations: Array,
    actions: Array,
    rng: Array,
    config: UniO4Config,
) -> Array:
    """Return a member's negative log-likelihood minus its diversity term `[]`; `policies` are all, `[n, ...]`.

    Observations `[B, D]` are those the networks see, actions `[B, A]` the dataset's.
    """
    dist = policies(observations, params=params)
    log_prob = dist.log_prob(actions)
    if config.diversity == "none" or config.num_policies == 1:
        return -jnp.mean(log_prob)
    frozen = jax.lax.stop_gradient(policies.params)
    others: Any = jax.vmap(lambda p: policies(observations, params=p))(frozen)
    mask = jnp.where(jnp.arange(config.num_policies) == member, -jnp.inf, 0.0)[:, None]
    envelope = lambda a: jax.vmap(lambda d: d.log_prob(a))(others) + mask  # noqa: E731
    if config.diversity == "code_heuristic":
        divergence = log_prob - jax.lax.stop_gradient(envelope(actions).max(axis=0))
    elif config.diversity == "analytic_kl":
        nearest = envelope(actions).argmax(axis=0)
        other = jax.tree.map(lambda leaf: leaf[nearest, jnp.arange(nearest.shape[0])], others)
        divergence = jnp.minimum(gaussian_kl(dist, other), config.diversity_cap)
    else:
        sample, own = dist.sample_and_log_prob(rng)
        divergence = jnp.minimum(own - envelope(sample).max(axis=0), config.diversity_cap)
    return -jnp.mean(log_prob + config.diversity_coef * divergence)


def clone_step(
    policies: Model, observations: Array, actions: Array, rng: Array, config: UniO4Config
) -> tuple[Model, Array]:
    """Step stacked `policies` `[n, ...]` one after the other, in random order; return them and their mean loss `[]`."""
    order_rng, loss_rng = jax.random.split(rng)
    order = jax.random.permutation(order_rng, config.num_policies)

    def body(policies: Model, work: tuple[Array, Array]) -> tuple[Model, Array]:
        member, key = work
        own = jax.tree.map(lambda leaf: leaf[member], policies)
        loss, grads = jax.value_and_grad(clone_loss)(own.params, member, policies, observations, actions, key, config)
        stepped = own.apply_gradients(grads)
        return jax.tree.map(lambda every, new: every.at[member].set(new), policies, stepped), loss

    policies, losses = jax.lax.scan(body, policies, (order, jax.random.split(loss_rng, config.num_policies)))
    return policies, losses.mean()
