"""TD3: twin delayed deterministic policy gradients (arXiv 1802.09477), the step that TD3+BC and IBRL share.

A deterministic actor climbs a critic ensemble. Targets come from slow copies of both, with clipped noise on the next
action. The actor steps once every `policy_delay` critic steps. TD3 is not an agent of its own; an agent overrides
`targets` and `actor_loss` to add its terms.

The actor's metrics are zero on critic steps without an actor step, and are multiplied by `policy_delay` on the others.
So their mean over many critic steps is the mean over the actor's steps.
"""

from dataclasses import dataclass
from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

from o2o.agents.minibatches import check_flat, each_minibatch
from o2o.nn.kernels import branch
from o2o.nn.modules import MLP, Activation, Adam, CriticEnsemble, Init, Model, kernel_init
from o2o.rl import losses
from o2o.settings import Average, Count, Dropout, NotNegative, Rate, Widths
from o2o.types import Agent, AgentConfig, Array, Batch, Carry, Info, OnlineConfig, Params


@dataclass(frozen=True)
class TD3Config(AgentConfig):
    """Settings of the TD3 step; the defaults are those of its authors' later code (TD3+BC's)."""

    online: OnlineConfig = OnlineConfig()
    """Schedule of the online phase."""
    actor_hidden_dims: Widths = (256, 256)
    """Widths of the actor's hidden layers."""
    critic_hidden_dims: Widths = (256, 256)
    """Widths of every critic's hidden layers."""
    critic_layer_norm: bool = False
    """LayerNorm before each activation of the critics."""
    actor_dropout: Dropout = 0.0
    """Dropout in the actor's hidden layers, on in every loss and in the targets, off when it acts."""
    init_scheme: Init = "linear"
    """Initialiser of every kernel."""
    num_critics: Count = 2
    """Critics in the ensemble."""
    policy_delay: Count = 2
    """Critic steps per actor step."""
    delayed_targets: bool = True
    """True: the critics' targets move with the actor's, every `policy_delay` steps. False: after every critic step."""
    exploration_noise: NotNegative = 0.1
    """Standard deviation of the Gaussian noise on sampled actions."""
    target_noise: NotNegative = 0.2
    """Standard deviation of the noise on the target's next action."""
    noise_clip: NotNegative = 0.5
    """Bound of that noise."""
    actor_lr: Rate = 3e-4
    """Adam's rate of the actor."""
    critic_lr: Rate = 3e-4
    """Adam's rate of the critics."""
    tau: Average = 0.005
    """Weight of the new parameters in the targets' averages."""


class DeterministicActor(nn.Module):
    """Observations `[..., D]` to actions `[..., A]` in (-1, 1): an MLP, a linear layer, tanh."""

    hidden_dims: tuple[int, ...]
    action_dim: int
    dropout: float = 0.0
    init_scheme: Init = "linear"
    activation: Activation = "relu"

    @nn.compact
    def __call__(self, observations: Array, training: bool = False) -> Array:
        """Return the actions; `training` switches dropout on (rng collection `dropout`)."""
        trunk = MLP(self.hidden_dims, False, self.dropout, self.init_scheme, activation=self.activation)
        x = trunk(observations, training)
        return jnp.tanh(nn.Dense(self.action_dim, kernel_init=kernel_init(self.init_scheme))(x))


class TD3(Agent):
    """Deterministic actor, critic ensemble, slow copies of both."""

    actor: Model
    target_actor: Params
    critic: Model
    target_critic: Params
    updates: Array
    """Critic steps of the present phase, int32."""
    rng: Array
    config: Any = struct.field(pytree_node=False)

    @classmethod
    def create(cls, rng: Array, observations: Array, actions: Array, config: Any) -> Self:
        """Initialise from a key and example observations `[B, D]` and actions `[B, A]`."""
        check_flat(observations, cls.__name__)
        rng, actor_rng, critic_rng = jax.random.split(rng, 3)
        policy = DeterministicActor(
            config.actor_hidden_dims, actions.shape[-1], config.actor_dropout, config.init_scheme
        )
        ensemble = CriticEnsemble(
            config.critic_hidden_dims, config.num_critics, config.critic_layer_norm, config.init_scheme
        )
        actor = Model.create(actor_rng, policy, Adam(config.actor_lr), observations)
        critic = Model.create(critic_rng, ensemble, Adam(config.critic_lr), observations, actions)
        agent = cls(
            actor=actor,
            target_actor=jax.tree.map(jnp.copy, actor.params),
            critic=critic,
            target_critic=jax.tree.map(jnp.copy, critic.params),
            updates=jnp.zeros((), jnp.int32),
            rng=rng,
            config=config,
        )
        return jax.tree.map(jnp.asarray, agent)

    def noisy_actions(self, observations: Array, params: Params, rng: Array) -> Array:
        """Return the actor's actions with dropout and clipped target noise, `[..., A]`, clipped to [-1, 1].

        Gradients pass the clip unchanged.
        """
        config = self.config
        dropout_rng, noise_rng = jax.random.split(rng)
        actions = self.actor(observations, training=True, params=params, rngs={"dropout": dropout_rng})
        noise = config.target_noise * jax.random.normal(noise_rng, actions.shape)
        noisy = actions + jnp.clip(noise, -config.noise_clip, config.noise_clip)
        return noisy + jax.lax.stop_gradient(jnp.clip(noisy, -1.0, 1.0) - noisy)

    def next_values(self, next_observations: Array, rng: Array) -> Array:
        """Return v'(s') `[B]`: the lowest target critic at the target actor's noisy action."""
        actions = self.noisy_actions(next_observations, self.target_actor, rng)
        return self.critic(next_observations, actions, params=self.target_critic).min(axis=0)

    def targets(self, batch: Batch, rng: Array) -> tuple[Array, Info]:
        """Return y = r + discount * m * v'(s') `[B]` of a minibatch `[B, ...]`, without gradient, and metrics."""
        values = self.next_values(batch["next_observations"], rng)
        return losses.td_target(batch["rewards"], batch["masks"], values, self.config.discount), {}

    def critic_step(self, batch: Batch, rng: Array) -> tuple[Self, Info]:
        """Step the critics on one minibatch `[B, ...]`; the loss is the sum over critics of mean (Q_i(s, a) - y)^2."""
        config = self.config
        targets, made = self.targets(batch, rng)

        def loss_of(params: Params) -> tuple[Array, Info]:
            q = self.critic(batch["observations"], batch["actions"], params=params)
            loss = config.num_critics * losses.critic_loss(q, targets, batch.get("valid"))
            return loss, {"critic/loss": loss, "critic/q": q.mean(), "critic/target": targets.mean(), **made}

        grads, info = jax.grad(loss_of, has_aux=True)(self.critic.params)
        agent = self.replace(critic=self.critic.apply_gradients(grads), updates=self.updates + 1)
        return agent if config.delayed_targets else agent.track_critic(), info

    def actor_loss(self, params: Params, batch: Batch, rng: Array) -> tuple[Array, Info]:
        """Return -mean Q_1(s, pi(s)) `[]` on leaves `[B, ...]`, and metrics."""
        actions = self.actor(batch["observations"], training=True, params=params, rngs={"dropout": rng})
        loss = -self.critic(batch["observations"], actions)[0].mean()
        return loss, {"actor/loss": loss}

    def actor_step(self, batch: Batch, rng: Array) -> tuple[Self, Info]:
        """Step the actor on one minibatch `[B, ...]`, then move its target, and with `delayed_targets` the critics'."""
        grads, info = jax.grad(self.actor_loss, has_aux=True)(self.actor.params, batch, rng)
        agent = self.replace(actor=self.actor.apply_gradients(grads)).track_actor()
        return agent.track_critic() if self.config.delayed_targets else agent, info

    def track_critic(self) -> Self:
        """Return the agent with the target critics moved by tau towards the critics."""
        target = optax.incremental_update(self.critic.params, self.target_critic, self.config.tau)
        return self.replace(target_critic=target)

    def track_actor(self) -> Self:
        """Return the agent with the target actor moved by tau towards the actor."""
        target = optax.incremental_update(self.actor.params, self.target_actor, self.config.tau)
        return self.replace(target_actor=target)

    def _step(self, batch: Batch) -> tuple[Self, Info]:
        """Step the critics on one minibatch `[B, ...]`, and the actor if it is its turn."""
        rng, critic_rng, actor_rng = jax.random.split(self.rng, 3)
        agent, info = self.replace(rng=rng).critic_step(batch, critic_rng)
        shapes = jax.eval_shape(lambda: agent.actor_step(batch, actor_rng)[1])
        delay = self.config.policy_delay

        def move(agent: Self) -> tuple[Self, Info]:
            agent, info = agent.actor_step(batch, actor_rng)
            return agent, {name: delay * value for name, value in info.items()}

        def rest(agent: Self) -> tuple[Self, Info]:
            return agent, {name: jnp.zeros(shape.shape, shape.dtype) for name, shape in shapes.items()}

        agent, actor_info = branch(agent.updates % delay == 0, move, rest, agent)
        return agent, {**info, **actor_info}

    def update(self, batch: Batch) -> tuple[Self, Info]:
        """Take one critic step per minibatch of the leaves `[utd, B, ...]`, and actor steps in their turn."""
        return each_minibatch(lambda agent, rows: agent._step(rows), self, batch)

    def explore(self, actions: Array, rng: Array) -> Array:
        """Return actions `[..., A]` with exploration noise, clipped to [-1, 1]."""
        noise = self.config.exploration_noise * jax.random.normal(rng, actions.shape)
        return jnp.clip(actions + noise, -1.0, 1.0)

    def q_value(self, observations: Array, actions: Array) -> Array | None:
        """Return the first critic's value `[...]` of actions `[..., A]` at observations `[..., D]`."""
        return self.critic(observations, actions)[0]

    def sample_actions(
        self, observations: Array, carry: Carry, rng: Array, deterministic: bool = False
    ) -> tuple[Array, Carry]:
        """Return actions `[..., A]` in [-1, 1], with exploration noise unless `deterministic`, and the unused carry."""
        actions = self.actor(observations)
        return actions if deterministic else self.explore(actions, rng), carry
