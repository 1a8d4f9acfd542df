"""AWAC: advantage-weighted actor-critic (arXiv 2006.09359).

Critics bootstrap from the policy's own next action. The actor is cloned from the buffer with weights exp(A / lambda),
where A compares the logged action with one action of the policy. Online only the data change: one buffer that starts
with the dataset. Numbers and the order of the steps (critics, actor, targets) follow CORL's `awac.py`. CORL's scores
are 0 on the medium and large AntMazes, before and after going online.

| what | paper | CORL's code | `paper` preset | default |
| --- | --- | --- | --- | --- |
| lambda | tuned by task | 1, mazes and Adroit 0.1 | the same, Kitchen 0.1 | 1 |
| cap on the weight | none | 100 | 100, of the exponent | 100 |
| states | raw | normalised | normalised | as they are |
| Adroit's rewards | sparse -1/0 | dense | -1/0 | the task's |

Where we differ
- Kernels start as in CORL, uniform within 1 / sqrt(inputs). Biases start at zero; CORL draws them too.
- The exponent is capped instead of the weight: the same weights, without overflow for a small lambda.
- The policy's samples are clipped to [-1, 1], both when they are played and in the losses.
- The presets turn the run's `normalize` on, as CORL does: states over std + 1e-3, frozen online.
- Rewards are r - 1 on mazes (as CORL), -1/0 on Adroit (CORL keeps the dense reward), otherwise the task's own.
- "pointmaze" follows AntMaze; "kitchen" takes Adroit's lambda; "other" follows locomotion.
- The online buffer is a ring: once it is full, the oldest rows, the dataset's, are overwritten first.
"""

from dataclasses import dataclass, replace
from typing import Literal, Self

import jax
import jax.numpy as jnp
import optax
from flax import struct

from o2o.agents.minibatches import check_flat, each_minibatch
from o2o.agents.registry import register_agent
from o2o.nn.modules import Adam, CriticEnsemble, GaussianActor, Init, Model
from o2o.rl import losses
from o2o.settings import AboveZero, Average, Count, Interval, Rate, Widths
from o2o.types import Agent, AgentConfig, Array, Batch, Carry, Info, OnlineConfig, Params, Preset


@dataclass(frozen=True)
class AWACConfig(AgentConfig):
    """Settings of AWAC."""

    temperature: AboveZero = 1.0
    """Lambda: advantages are divided by it; larger is closer to behaviour cloning."""
    weight_cap: AboveZero = 100.0
    """Largest advantage weight; without it a small lambda explodes."""
    actor_hidden_dims: Widths = (256, 256, 256)
    """Widths of the actor's hidden layers."""
    critic_hidden_dims: Widths = (256, 256, 256)
    """Widths of the critics' hidden layers."""
    num_critics: Count = 2
    """Ensemble size; targets and advantages use the minimum over it."""
    init_scheme: Init = "linear"
    """Initialiser of every kernel."""
    log_std_range: Interval = (-20.0, 2.0)
    """Clip of the free log-std, one per action dimension."""
    actor_lr: Rate = 3e-4
    """Adam's rate of the actor."""
    critic_lr: Rate = 3e-4
    """Adam's rate of the critics."""
    tau: Average = 0.005
    """Weight of the new parameters in the target critics' average, after every update."""
    online: OnlineConfig = OnlineConfig(replay="append")
    """Online phase: one buffer that starts with the dataset, one update per step."""


_DEFAULT = AWACConfig()


@register_agent("awac")
class AWAC(Agent):
    r"""Advantage-weighted actor-critic: clones its buffer, better actions with more weight.

    Equations (method, and the settings that enter):
    - `next_values` (`discount`, `tau`): $y = r + \gamma m \min_i Q^-_i(s', a'),\; a' \sim \pi(\cdot \mid s')$
    - `critic_loss` (`num_critics`): $L_Q = \frac{1}{E} \sum_i (Q_i(s, a) - y)^2$
    - `actor_loss`: $A = \min_i Q_i(s, a) - \min_i Q_i(s, \tilde a),\; \tilde a \sim \pi(\cdot \mid s)$
    - `actor_loss` (`temperature`, `weight_cap`): $L_\pi = -\min(e^{A / \lambda}, w) \log \pi(a \mid s)$
    """

    actor: Model
    critic: Model
    target_critic: Params
    rng: Array
    config: AWACConfig = struct.field(pytree_node=False)

    @classmethod
    def create(cls, rng: Array, observations: Array, actions: Array, config: AWACConfig = _DEFAULT) -> Self:
        """Initialise from a key and example observations `[B, D]` and actions `[B, A]`."""
        check_flat(observations, cls.__name__)
        rng, actor_rng, critic_rng = jax.random.split(rng, 3)
        low, high = config.log_std_range
        actor = GaussianActor(
            config.actor_hidden_dims,
            actions.shape[-1],
            init_scheme=config.init_scheme,
            std_mode="uniform",
            log_std_min=low,
            log_std_max=high,
            std_min=0.0,
            std_max=float("inf"),
            squash=False,
        )
        critics = CriticEnsemble(config.critic_hidden_dims, config.num_critics, init_scheme=config.init_scheme)
        critic = Model.create(critic_rng, critics, Adam(config.critic_lr), observations, actions)
        agent = cls(
            actor=Model.create(actor_rng, actor, Adam(config.actor_lr), observations),
            critic=critic,
            target_critic=jax.tree.map(jnp.copy, critic.params),
            rng=rng,
            config=config,
        )
        return jax.tree.map(jnp.asarray, agent)

    def play(self, observations: Array, rng: Array) -> Array:
        """Return one clipped sample of the policy, `[..., A]`, at observations `[..., D]`."""
        return jnp.clip(self.actor(observations).sample(rng), -1.0, 1.0)

    def next_values(self, next_observations: Array, rng: Array) -> Array:
        """Return v'(s') `[B]`: the lowest target critic at one action of the policy in s'."""
        actions = self.play(next_observations, rng)
        return self.critic(next_observations, actions, params=self.target_critic).min(axis=0)

    def critic_loss(self, params: Params, batch: Batch, targets: Array) -> tuple[Array, Info]:
        """Return the mean squared error `[]` of all critics to the targets `[B]`, and metrics."""
        q = self.critic(batch["observations"], batch["actions"], params=params)
        loss = losses.critic_loss(q, targets)
        return loss, {"critic/loss": loss, "critic/q": q.mean(), "critic/target": targets.mean()}

    def actor_loss(self, params: Params, batch: Batch, critic: Model, rng: Array) -> tuple[Array, Info]:
        """Return the advantage-weighted negative log-likelihood `[]` of the batch's actions, judged by `critic`."""
        observations = batch["observations"]
        actions = batch["actions"]
        baseline = critic(observations, self.play(observations, rng)).min(axis=0)
        advantages = jax.lax.stop_gradient(critic(observations, actions).min(axis=0) - baseline)
        weights = losses.advantage_weights(advantages, 1.0 / self.config.temperature, self.config.weight_cap)
        dist = self.actor(observations, params=params)
        log_prob = dist.log_prob(actions)
        loss = -jnp.mean(weights * log_prob)
        return loss, {
            "actor/loss": loss,
            "actor/log_prob": log_prob.mean(),
            "actor/advantage": advantages.mean(),
            "actor/weight": weights.mean(),
            "actor/std": dist.std.mean(),
        }

    def _step(self, batch: Batch) -> tuple[Self, Info]:
        """Step the critics, then the actor with the new critics, then the targets, on one minibatch `[B, ...]`."""
        rng, target_rng, actor_rng = jax.random.split(self.rng, 3)
        values = self.next_values(batch["next_observations"], target_rng)
        targets = losses.td_target(batch["rewards"], batch["masks"], values, self.config.discount)
        critic_grads, critic_info = jax.grad(self.critic_loss, has_aux=True)(self.critic.params, batch, targets)
        critic = self.critic.apply_gradients(critic_grads)
        actor_grads, actor_info = jax.grad(self.actor_loss, has_aux=True)(self.actor.params, batch, critic, actor_rng)
        agent = self.replace(
            actor=self.actor.apply_gradients(actor_grads),
            critic=critic,
            target_critic=optax.incremental_update(critic.params, self.target_critic, self.config.tau),
            rng=rng,
        )
        return agent, {**critic_info, **actor_info}

    def update(self, batch: Batch) -> tuple[Self, Info]:
        """Take one whole update per minibatch of the leaves `[utd, B, ...]`; metrics are means over them."""
        return each_minibatch(lambda agent, rows: agent._step(rows), self, batch)

    def q_value(self, observations: Array, actions: Array) -> Array:
        """Return the least critic's value `[...]` of actions `[..., A]` at observations `[..., D]`."""
        return self.critic(observations, actions).min(axis=0)

    def sample_actions(
        self, observations: Array, carry: Carry, rng: Array, deterministic: bool = False
    ) -> tuple[Array, Carry]:
        """Return actions `[..., A]`, clipped to [-1, 1], and the unused carry."""
        if deterministic:
            return jnp.clip(self.actor(observations).mode(), -1.0, 1.0), carry
        return self.play(observations, rng), carry

    @classmethod
    def preset(cls, family: str, size: Literal["paper", "small"] = "paper") -> Preset:
        """Return the settings for a family of tasks.

        `paper`: CORL's, 3x256, lambda 0.1 on mazes and Adroit and 1 on locomotion, 1M updates and 1M environment steps.
        `small`: 2x128, batch 128, rates of 1e-3, 10k updates and 10k environment steps. Locomotion has lambda 10: after
        so few updates advantages are mostly the critics' error, which lambda 1 clones. On o2o/hopper/medium, 6000
        updates, one seed, the return was 22 with lambda 1 and 1477 with 10.
        """
        temperature = 0.1 if family in ("antmaze", "pointmaze", "adroit", "kitchen") else 1.0
        reward = {"antmaze": (1.0, -1.0), "pointmaze": (1.0, -1.0), "adroit": (1.0, 0.0)}.get(family)
        config = AWACConfig(temperature=temperature)
        if size == "paper":
            return Preset(config, 1_000_000, 1_000_000, reward, run={"normalize": True})
        small = replace(
            config,
            temperature=10.0 if family == "locomotion" else temperature,
            actor_hidden_dims=(128, 128),
            critic_hidden_dims=(128, 128),
            batch_size=128,
            actor_lr=1e-3,
            critic_lr=1e-3,
            tau=0.01,
        )
        return Preset(small, 10_000, 10_000, reward, run={"normalize": True})
