"""ReBRAC: behaviour-regularised actor-critic revisited (arXiv 2305.09836).

TD3+BC with two penalties on the distance to the data, each with its own weight. One is in the actor's loss, between its
action and the logged one. The other is in the critics' target, between the target actor's next action and the logged
next action. The critics have LayerNorm, all networks three hidden layers.

Where we differ from the paper and its code (tinkoff-ai/ReBRAC)

| what | paper and code | `paper` preset | default |
| --- | --- | --- | --- |
| last row before a time limit | dropped | kept, no penalty in its target: it has no next action | the same |
| actor's target | averages the actor from before its step | averages the new one (`o2o.agents.td3`) | the same |
| the actor's turns | calls 0, 2, 4, ... | calls 1, 3, 5, ...: as often | the same |
| initial values | biases 0.1, outputs within 1e-3 (actor), 3e-3 (critics) | 0; as the other layers | the same |
| weights of the penalties | one pair for each dataset | one for each family, the middle of the paper's | see settings |
| PointMaze, Kitchen | none | AntMaze's settings; the defaults | - |
| Adroit's rewards | dense | -1/0 for success, the house's task | the task's |
| online | none | same losses, one buffer, action noise 0.2 (seohongpark/fql) | the same |
"""

from dataclasses import dataclass, replace
from typing import Literal, Self

import jax
import jax.numpy as jnp

from o2o.agents.registry import register_agent
from o2o.agents.td3 import TD3, TD3Config
from o2o.rl.losses import td_target
from o2o.settings import NotNegative, Widths
from o2o.types import Array, Batch, Info, Needs, OnlineConfig, Params, Preset


@dataclass(frozen=True)
class ReBRACConfig(TD3Config):
    """Settings of ReBRAC."""

    actor_penalty: NotNegative = 0.01
    """Weight of |pi(s) - a|^2 in the actor's loss (beta_1), on a scale where Q has the mean size 1."""
    critic_penalty: NotNegative = 0.01
    """Weight of |a' - a'_data|^2 in the target (beta_2), in units of the reward."""
    actor_hidden_dims: Widths = (256, 256, 256)
    """Widths of the actor's hidden layers."""
    critic_hidden_dims: Widths = (256, 256, 256)
    """Widths of every critic's hidden layers."""
    critic_layer_norm: bool = True
    """LayerNorm behind each activation of the critics."""
    exploration_noise: NotNegative = 0.2
    """Standard deviation of the Gaussian noise on sampled actions."""
    online: OnlineConfig = OnlineConfig(replay="append")
    """Online phase: one buffer that starts with the dataset, one update per step."""

    @property
    def needs(self) -> Needs:
        """The next action of the data, and where there is one."""
        return Needs(batch_keys=("next_actions", "next_valid"))


_DEFAULT = ReBRACConfig()


@register_agent("rebrac")
class ReBRAC(TD3):
    r"""TD3 with a penalty on the distance to the data in the actor's loss and in the critics' target.

    Equations (method, and the settings that enter):
    - `targets` (`critic_penalty`):
      $y = r + \gamma m (\min_k Q^-_k(s', a') - \beta_2 \lVert a' - a'_{\mathrm{data}} \rVert^2)$
    - `critic_step` (`critic_layer_norm`): $L_Q = \frac{1}{E} \sum_i (Q_i(s, a) - y)^2$
    - `actor_loss` (`actor_penalty`):
      $L_\pi = \beta_1 \lVert \pi(s) - a \rVert^2 - \frac{\min_k Q_k(s, \pi(s))}{\mathrm{mean} \lvert Q \rvert}$
    """

    @classmethod
    def create(cls, rng: Array, observations: Array, actions: Array, config: ReBRACConfig = _DEFAULT) -> Self:
        """Initialise from a key and example observations `[B, D]` and actions `[B, A]`."""
        agent = super().create(rng, observations, actions, config)
        judges = agent.critic.module.clone(norm_last=True)  # LayerNorm behind the activation; the same parameters
        return agent.replace(critic=agent.critic.replace(module=judges))

    def targets(self, batch: Batch, rng: Array) -> tuple[Array, Info]:
        """Return y = r + discount m (min_k Q'_k(s', a') - beta_2 |a' - a'_data|^2) `[B]`, and the mean distance.

        a' is the target actor's action with clipped noise. Without a next action in the data there is no penalty.
        """
        actions = self.noisy_actions(batch["next_observations"], self.target_actor, rng)
        q = self.critic(batch["next_observations"], actions, params=self.target_critic).min(axis=0)
        distance = batch["next_valid"] * jnp.sum(jnp.square(actions - batch["next_actions"]), axis=-1)
        values = q - self.config.critic_penalty * distance
        targets = td_target(batch["rewards"], batch["masks"], values, self.config.discount)
        return targets, {"critic/distance": distance.mean()}

    def actor_loss(self, params: Params, batch: Batch, rng: Array) -> tuple[Array, Info]:
        """Return mean(beta_1 |pi(s) - a|^2 - min_k Q_k(s, pi(s)) / mean |min_k Q_k|) `[]` on leaves `[B, ...]`."""
        actions = self.actor(batch["observations"], training=True, params=params, rngs={"dropout": rng})
        q = self.critic(batch["observations"], actions).min(axis=0)
        size = jnp.maximum(jax.lax.stop_gradient(jnp.abs(q).mean()), 1e-8)
        distance = jnp.sum(jnp.square(actions - batch["actions"]), axis=-1).mean()
        loss = self.config.actor_penalty * distance - q.mean() / size
        return loss, {"actor/loss": loss, "actor/distance": distance, "actor/q_size": size}

    @classmethod
    def preset(cls, family: str, size: Literal["paper", "small"] = "paper") -> Preset:
        """Return the settings for a family of tasks.

        `paper`: 1M updates (the paper's) and 1M environment steps. Batch 1024 and rates of 1e-3 on locomotion, else
        256 and 3e-4; on mazes 5e-5 for the critics. `small`: 2x128, batch 128, rates of 1e-3, 10k updates and 10k
        environment steps. Its policy stays closer to the data on locomotion (0.4, TD3+BC's weight): the paper's 0.01
        is too little for so few updates.
        """
        maze = family in ("antmaze", "pointmaze")
        config = ReBRACConfig()
        if family == "locomotion":
            config = replace(config, batch_size=1024, actor_lr=1e-3, critic_lr=1e-3)
        if family == "adroit":
            config = replace(config, actor_penalty=0.1, critic_penalty=0.1)
        if maze:
            config = replace(config, actor_penalty=0.002, critic_penalty=0.001, critic_lr=5e-5, discount=0.999)
        reward = (100.0, 0.0) if maze else (1.0, 0.0) if family == "adroit" else None
        if size == "paper":
            return Preset(config, 1_000_000, 1_000_000, reward)
        widths = {"actor_hidden_dims": (128, 128), "critic_hidden_dims": (128, 128)}
        small = replace(config, **widths, batch_size=128, actor_lr=1e-3, critic_lr=1e-3, tau=0.01)
        if family == "locomotion":
            small = replace(small, actor_penalty=0.4)
        return Preset(small, 10_000, 10_000, reward)
