"""TD3+BC: TD3 whose actor is also pulled towards the data, "A Minimalist Approach to Offline RL" (arXiv 2106.06860).

The actor climbs alpha Q / mean |Q| minus its squared distance to the logged action. The division makes alpha mean the
same on every task. That is the whole difference to TD3.

States must be normalised. The presets turn the run's `normalize` on (std + 1e-3, statistics of the dataset, frozen
online). For a trainer made by hand, pass it `Normalizer.fit(observations)`.

The paper ends offline; the online phase is our choice: exploration noise of 0.1, and one buffer that starts with the
dataset. The distance's weight stays, which gains slowly, or falls to `bc_final` over `bc_decay_steps` critic steps.

| what | paper and code | `paper` preset | default |
| --- | --- | --- | --- |
| tasks | locomotion only | one setting for all families | - |
| states | normalised, std + 1e-3 | the same | as they are |
| online phase | none | noise 0.1, one buffer, the weight stays | the same |

Where we differ
- The mean |Q| that the actor's term is divided by is at least 1e-8.
- Kernels start as in the authors' code, uniform within 1 / sqrt(inputs). Biases start at zero; the code draws them too.
- As in the authors' code, the actor's loss uses the critics after their step, on the same rows.
- Rewards are -1/0 on mazes and Adroit, otherwise the task's own. The paper has locomotion only.
"""

from dataclasses import dataclass
from typing import Literal, Self

import jax
import jax.numpy as jnp
from flax import struct

from o2o.agents.registry import register_agent
from o2o.agents.td3 import TD3, TD3Config
from o2o.settings import Count, NotNegative
from o2o.types import Array, Batch, Info, OnlineConfig, Params, Preset


@dataclass(frozen=True)
class TD3BCConfig(TD3Config):
    """Settings of TD3+BC."""

    alpha: NotNegative = 2.5
    """Weight of Q / mean |Q| against the squared distance to the data."""
    bc_decay_steps: Count | None = None
    """Critic steps of the online phase over which the distance's weight falls linearly; `None` keeps it at 1."""
    bc_final: NotNegative = 0.0
    """The weight that the distance falls to."""
    online: OnlineConfig = OnlineConfig(replay="append")
    """Online phase: one buffer that starts with the dataset, one update per step."""


_DEFAULT = TD3BCConfig()


@register_agent("td3bc")
class TD3BC(TD3):
    r"""TD3+BC: TD3 with a cloning term.

    Equations (method, and the settings that enter):
    - `targets` (`target_noise`, `noise_clip`):
      $a' = \mathrm{clip}(\pi^-(s') + \mathrm{clip}(\epsilon, -c, c)),\quad y = r + \gamma m \min_i
      Q^-_i(s', a')$
    - `critic_step` (`tau`): $L_Q = \sum_i (Q_i(s, a) - y)^2$
    - `actor_loss` (`alpha`, `bc_decay_steps`, `bc_final`):
      $L_\pi = -\frac{\alpha}{\mathrm{mean} \lvert Q_1 \rvert} Q_1(s, \pi(s)) + w (\pi(s) - a)^2$
    """

    fine_tuning: bool = struct.field(pytree_node=False, default=False)

    @classmethod
    def create(cls, rng: Array, observations: Array, actions: Array, config: TD3BCConfig = _DEFAULT) -> Self:
        """Initialise from a key and example observations `[B, D]` and actions `[B, A]`."""
        return super().create(rng, observations, actions, config)

    def bc_weight(self) -> Array:
        """Return the present weight of the distance to the data, `[]`."""
        steps = self.config.bc_decay_steps
        if steps is None or not self.fine_tuning:
            return jnp.ones(())
        faded = jnp.minimum(self.updates / steps, 1.0)
        return 1.0 + (self.config.bc_final - 1.0) * faded

    def actor_loss(self, params: Params, batch: Batch, rng: Array) -> tuple[Array, Info]:
        """Return -alpha mean(Q_1) / mean |Q_1| + w mean (pi(s) - a)^2 `[]` on leaves `[B, ...]`, and metrics."""
        actions = self.actor(batch["observations"], training=True, params=params, rngs={"dropout": rng})
        q = self.critic(batch["observations"], actions)[0]
        size = jnp.maximum(jax.lax.stop_gradient(jnp.abs(q).mean()), 1e-8)
        distance = jnp.mean(jnp.square(actions - batch["actions"]))
        weight = self.bc_weight()
        loss = -self.config.alpha / size * q.mean() + weight * distance
        return loss, {"actor/loss": loss, "actor/mse": distance, "actor/bc_weight": weight, "actor/q_size": size}

    def online(self) -> Self:
        """Return the agent for the online phase: only the count of updates restarts."""
        if self.fine_tuning:
            return self
        return self.replace(fine_tuning=True, updates=jnp.zeros((), jnp.int32))

    @classmethod
    def preset(cls, family: str, size: Literal["paper", "small"] = "paper") -> Preset:
        """Return the settings for a family of tasks.

        `paper`: the authors' for locomotion, 1M updates, and as many environment steps; one setting for all families.
        `small`: 2x128, batch 128, rates of 1e-3, 10k updates and 10k environment steps.
        """
        reward = {"antmaze": (1.0, -1.0), "pointmaze": (1.0, -1.0), "adroit": (1.0, 0.0)}.get(family)
        if size == "paper":
            return Preset(TD3BCConfig(), 1_000_000, 1_000_000, reward, run={"normalize": True})
        small = TD3BCConfig(
            actor_hidden_dims=(128, 128),
            critic_hidden_dims=(128, 128),
            batch_size=128,
            actor_lr=1e-3,
            critic_lr=1e-3,
            tau=0.01,
        )
        return Preset(small, 10_000, 10_000, reward, run={"normalize": True})
