"""BC: behaviour cloning, the plain reference of every offline comparison.

A tanh-squashed Gaussian fitted by maximum likelihood (so that WSRL or SAC can start from it), a plain Gaussian, or a
deterministic policy fitted by squared error (CORL `any_percent_bc.py`). It collects online but learns nothing there.

| what | CORL's code | `paper` preset | default |
| --- | --- | --- | --- |
| loss | squared error (`mse`) | likelihood of a tanh-Gaussian | the same |
| states | normalised | as they are (the run's `normalize`) | as they are |
| rows | all, or the best 10 % of the trajectories | as IQL's preset; no 10 % | all |
"""

from dataclasses import dataclass
from typing import Literal, Self

import jax
import jax.numpy as jnp
from flax import struct

from o2o.agents.minibatches import check_flat, each_minibatch
from o2o.agents.registry import register_agent
from o2o.nn.modules import Adam, GaussianActor, Init, Model
from o2o.settings import Dropout, Interval, NotNegative, Rate, Widths
from o2o.types import Agent, AgentConfig, Array, Batch, Carry, Info, OnlineConfig, Params, Preset

ACTION_LIMIT = 1.0 - 1e-5
"""Actions of the data are clipped to this before a squashed actor's log-density, which is infinite at 1."""


@dataclass(frozen=True)
class BCConfig(AgentConfig):
    """Settings of behaviour cloning."""

    loss: Literal["nll", "mse"] = "nll"
    """`nll`: negative log-likelihood of a Gaussian; `mse`: squared error of the mode, and a deterministic policy."""
    squash: bool = True
    """Tanh-squashed Gaussian; otherwise a plain one whose samples are clipped."""
    actor_hidden_dims: Widths = (256, 256)
    """Widths of the hidden layers."""
    actor_layer_norm: bool = False
    """LayerNorm in the actor (WSRL's actor has it)."""
    dropout: Dropout = 0.0
    """Dropout in the hidden layers, active in the loss only."""
    init_scheme: Init = "orthogonal"
    """Initialiser of every kernel."""
    last_gain: NotNegative | None = None
    """Orthogonal gain of the last hidden layer; `None` is sqrt(2)."""
    std_mode: Literal["exp", "uniform"] = "exp"
    """`exp`: log-std is a linear head of the state; `uniform`: one free vector."""
    log_std_range: Interval | None = (-5.0, 2.0)
    """Clip of the log-std; `None` clips the std itself to [1e-5, 10]. The likelihood has no maximum without a floor."""
    actor_lr: Rate = 3e-4
    """Adam rate."""
    online: OnlineConfig = OnlineConfig(replay="none")
    """Online phase: act and store, never update."""


_DEFAULT = BCConfig()


@register_agent("bc")
class BC(Agent):
    r"""Behaviour cloning: imitates the recorded actions.

    Equations (method, and the settings that enter):
    - `actor_loss` (`loss`, `squash`, `log_std_range`): $L = -\log \pi(a \mid s)$
    - `actor_loss` (`loss`): $L = (\mu(s) - a)^2$
    """

    actor: Model
    rng: Array
    config: BCConfig = struct.field(pytree_node=False)

    @classmethod
    def create(cls, rng: Array, observations: Array, actions: Array, config: BCConfig = _DEFAULT) -> Self:
        """Initialise from a key, observations `[B, D]` and actions `[B, A]`; dict observations raise `ConfigError`."""
        check_flat(observations, "BC")
        rng, actor_rng = jax.random.split(rng)
        low, high = config.log_std_range or (None, None)
        actor = GaussianActor(
            config.actor_hidden_dims,
            actions.shape[-1],
            layer_norm=config.actor_layer_norm,
            dropout=config.dropout,
            init_scheme=config.init_scheme,
            last_gain=config.last_gain,
            std_mode=config.std_mode,
            log_std_min=low,
            log_std_max=high,
            squash=config.squash,
        )
        model = Model.create(actor_rng, actor, Adam(config.actor_lr), observations)
        return jax.tree.map(jnp.asarray, cls(actor=model, rng=rng, config=config))

    def actor_loss(self, params: Params, batch: Batch, rng: Array) -> tuple[Array, Info]:
        """Return the negative log-likelihood or the squared error of a minibatch's actions, and metrics."""
        dist = self.actor(batch["observations"], training=True, params=params, rngs={"dropout": rng})
        error = jnp.mean(jnp.square(dist.mode() - batch["actions"]))
        if self.config.loss == "mse":
            return error, {"actor/loss": error, "actor/mse": error}
        actions = batch["actions"]
        if self.config.squash:
            actions = jnp.clip(actions, -ACTION_LIMIT, ACTION_LIMIT)
        loss = -jnp.mean(dist.log_prob(actions))
        return loss, {"actor/loss": loss, "actor/mse": error, "actor/std": dist.std.mean()}

    def _step(self, batch: Batch) -> tuple[Self, Info]:
        rng, dropout_rng = jax.random.split(self.rng)
        grads, info = jax.grad(self.actor_loss, has_aux=True)(self.actor.params, batch, dropout_rng)
        return self.replace(actor=self.actor.apply_gradients(grads), rng=rng), info

    def update(self, batch: Batch) -> tuple[Self, Info]:
        """Run one step per leading row of the leaves `[utd, B, ...]`; metrics are means over them."""
        return each_minibatch(lambda agent, rows: agent._step(rows), self, batch)

    def sample_actions(
        self, observations: Array, carry: Carry, rng: Array, deterministic: bool = False
    ) -> tuple[Array, Carry]:
        """Return actions `[..., A]`, clipped to [-1, 1], and the unused carry; with `loss="mse"` always the mode."""
        dist = self.actor(observations)
        actions = dist.mode() if deterministic or self.config.loss == "mse" else dist.sample(rng)
        return jnp.clip(actions, -1.0, 1.0), carry

    @classmethod
    def preset(cls, family: str, size: Literal["paper", "small"] = "paper") -> Preset:
        """Return the settings for a family of tasks.

        `paper`: 2x256, batch 256 (CORL), as many updates as IQL's preset for the family, on the same rows, so that the
        two compare; no online steps. `small`: 2x128 (Adroit 2x256), 10k updates.
        """
        offline = {"adroit": 20_000, "kitchen": 250_000}.get(family, 1_000_000)
        width, batch_size = 256, 256
        if size == "small":
            offline = 10_000
            width, batch_size = (256, 256) if family == "adroit" else (128, 128)
        config = BCConfig(actor_hidden_dims=(width, width), batch_size=batch_size)
        return Preset(config, offline, online_steps=0, only_successes=size == "paper" and family == "adroit")
