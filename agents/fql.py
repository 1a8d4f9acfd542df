"""FQL: flow Q-learning (arXiv 2502.02538).

A flow model clones the data and sees no critic. A one-step policy mu(s, z) maps noise straight to an action: it is held
to what the flow makes of the same noise, and climbs the critics. So no gradient passes the steps of the flow, and the
policy that acts can have several modes.

Where we differ from the paper and its code (seohongpark/fql)

| what | paper and code | `paper` preset | default |
| --- | --- | --- | --- |
| optimiser | one Adam on the sum of the losses | one Adam for each network: the same steps | the same |
| online buffer | max(2M, dataset + 1) rows, over the dataset | dataset and `loop.replay_capacity` rows | the same |
| alpha | one for each dataset | those of fine-tuning: AntMaze 10, large 3; Adroit 1000, relocate 10,000 | 10 |
| locomotion, Kitchen | none | the authors' advice for new tasks: `normalize_q`, alpha 1 | - |
| Adroit's rewards | dense | -1/0 for success, the house's task | the task's |
| updates before | 1M; for figures that are offline only D4RL 500k, with other alphas on Adroit | 1M | - |
| OGBench | single actions, 2 critics, alpha 300, puzzle 1000, dense | QAM's table: chunks of 5, 10 critics | - |
| windows cut by an end | left out (QAM's code) | left out, but the flow clones what is before | `pad_terminal` |

QAM's table (arXiv 2601.14234) has raw curves, so OGBench's presets follow it. The paper's own settings there:
`--config.chunk 1 --config.num-critics 2 --config.pessimism 0`, alpha as above, and the dense dataset.
Not here: n-step returns, and best of N over the one-step policy.
"""

from dataclasses import dataclass, replace
from typing import Literal, Self

import jax
import jax.numpy as jnp
import optax
from flax import struct

from o2o.agents import ogbench
from o2o.agents.chunked import OfChunks
from o2o.agents.minibatches import check_flat, each_minibatch
from o2o.agents.qc import OneStep
from o2o.agents.registry import register_agent
from o2o.nn.generative import Denoiser, Flow
from o2o.nn.modules import Adam, CriticEnsemble, Model
from o2o.rl.chunks import ActionQueue, fresh_queue, play
from o2o.rl.losses import critic_loss, lower_bound, td_target
from o2o.rl.windows import chunk_transitions
from o2o.settings import Average, Count, NotNegative, Rate, Widths
from o2o.types import Array, Batch, Carry, ChunkedConfig, Info, OnlineConfig, Params, Preset


@dataclass(frozen=True)
class FQLConfig(ChunkedConfig):
    """Settings of FQL."""

    alpha: NotNegative = 10.0
    """Weight of the distance to the flow; it depends on the scale of Q unless `normalize_q`."""
    normalize_q: bool = False
    """Divide the climbed Q by its mean size."""
    aggregate: Literal["mean", "min"] = "mean"
    """How the target reduces over the target critics."""
    pessimism: NotNegative = 0.0
    """Standard deviations of the target critics that `mean` subtracts (rho)."""
    num_critics: Count = 2
    """Number of critics."""
    flow_steps: Count = 10
    """Euler steps of the flow."""
    actor_hidden_dims: Widths = (512, 512, 512, 512)
    """Widths of the hidden layers of the flow and of the one-step policy."""
    critic_hidden_dims: Widths = (512, 512, 512, 512)
    """Widths of every critic's hidden layers."""
    actor_lr: Rate = 3e-4
    """Adam's rate of the flow and of the one-step policy."""
    critic_lr: Rate = 3e-4
    """Adam's rate of the critics."""
    tau: Average = 0.005
    """Weight of the critics in the target's average, after every update."""
    online: OnlineConfig = OnlineConfig(replay="append")
    """Online phase: one buffer that starts with the dataset, one update per step."""


_DEFAULT = FQLConfig()


@register_agent("fql")
class FQL(OfChunks):
    r"""Flow Q-learning: a one-step policy, pulled to a flow that imitates the data.

    Equations (method, and the settings that enter):
    - `flow_loss` (`flow_steps`): $x_t = (1 - t) z + t a,\quad L_v = \lVert v(s, x_t, t) - (a - z) \rVert^2$
    - `critic_loss` (`aggregate`, `tau`): $y = r + \gamma m\, \mathrm{mean}_k Q^-_k(s', \mu(s', z))$
    - `policy_loss` (`alpha`, `normalize_q`): $L_\mu = \alpha (\mu(s, z) - \mathrm{Flow}(s, z))^2 - Q(s, \mu(s, z))$
    """

    actor: Model
    """The flow's velocity v(s, x, t)."""
    one_step: Model
    """The policy mu(s, z) that acts."""
    critic: Model
    target_critic: Params
    rng: Array
    config: FQLConfig = struct.field(pytree_node=False)

    @classmethod
    def create(cls, rng: Array, observations: Array, actions: Array, config: FQLConfig = _DEFAULT) -> Self:
        """Initialise from a key, observations `[B, D]` and actions `[B, A]`; dict observations raise `ConfigError`."""
        check_flat(observations, "FQL")
        rng, flow_rng, policy_rng, critic_rng = jax.random.split(rng, 4)
        flow, policy = Denoiser("mlp", config.actor_hidden_dims), OneStep(config.actor_hidden_dims)
        judges = CriticEnsemble(
            config.critic_hidden_dims, config.num_critics, True, "xavier", activation="gelu", norm_last=True
        )
        times, chunks = jnp.zeros(actions.shape[:-1]), jnp.tile(actions, config.chunk)
        critic = Model.create(critic_rng, judges, Adam(config.critic_lr), observations, chunks)
        agent = cls(
            actor=Model.create(flow_rng, flow, Adam(config.actor_lr), observations, chunks, times),
            one_step=Model.create(policy_rng, policy, Adam(config.actor_lr), observations, chunks),
            critic=critic,
            target_critic=jax.tree.map(jnp.copy, critic.params),
            rng=rng,
            config=config,
            action_dim=actions.shape[-1],
        )
        return jax.tree.map(jnp.asarray, agent)

    def critic_loss(self, params: Params, batch: Batch, noise: Array) -> tuple[Array, Info]:
        """Return the mean of valid (Q_k(s, a) - y)^2, y = r + discount m agg_k Q'_k(s', clip(mu(s', z))), z `[B, A]`.

        `agg` is the minimum, or mean - rho std.
        """
        config = self.config
        next_actions = jnp.clip(self.one_step(batch["next_observations"], noise), -1.0, 1.0)
        next_q = self.critic(batch["next_observations"], next_actions, params=self.target_critic)
        next_values = next_q.min(axis=0) if config.aggregate == "min" else lower_bound(next_q, config.pessimism)
        targets = td_target(batch["rewards"], batch["masks"], next_values, config.discount)
        q = self.critic(batch["observations"], batch["actions"], params=params)
        loss = critic_loss(q, targets, batch.get("valid"))
        return loss, {"critic/loss": loss, "critic/q": q.mean(), "critic/target": targets.mean()}

    def flow_loss(self, params: Params, batch: Batch, rng: Array) -> tuple[Array, Info]:
        """Return the flow's mean squared error on the actions of the data (`Flow.loss`), and metrics.

        Numbers of a chunk behind its episode's end count as zeros.
        """
        flow = Flow(self.config.flow_steps)
        errors = flow.loss(lambda x, t: self.actor(batch["observations"], x, t, params=params), batch["actions"], rng)
        errors = batch["entries"] * errors if "entries" in batch else errors
        return errors.mean(), {"actor/loss": errors.mean()}

    def flow_actions(self, observations: Array, noise: Array) -> Array:
        """Return the actions `[..., A]` in [-1, 1] that the flow makes of noise `[..., A]`."""
        return Flow(self.config.flow_steps).sample(lambda x, t: self.actor(observations, x, t), noise, self.rng)

    def policy_loss(self, params: Params, batch: Batch, noise: Array) -> tuple[Array, Info]:
        """Return alpha mean (mu(s, z) - Flow(s, z))^2 - c mean Q_k(s, clip(mu(s, z))), noise z `[B, A]` in both.

        c is 1, or with `normalize_q` 1 / mean |Q|. Where mu leaves the box only the first term pulls.
        """
        actions = self.one_step(batch["observations"], noise, params=params)
        distance = jnp.mean(jnp.square(actions - self.flow_actions(batch["observations"], noise)))
        q = self.critic(batch["observations"], jnp.clip(actions, -1.0, 1.0)).mean(axis=0)
        size = jax.lax.stop_gradient(jnp.abs(q).mean()) if self.config.normalize_q else 1.0
        loss = self.config.alpha * distance - q.mean() / jnp.maximum(size, 1e-8)
        return loss, {"policy/loss": loss, "policy/distance": distance, "policy/q": q.mean()}

    def _step(self, batch: Batch) -> tuple[Self, Info]:
        """Step all networks on one minibatch `[B, ...]`, every loss at the present parameters."""
        rng, next_rng, flow_rng, policy_rng = jax.random.split(self.rng, 4)
        next_noise, noise = (jax.random.normal(key, batch["actions"].shape) for key in (next_rng, policy_rng))
        critic_grads, critic_info = jax.grad(self.critic_loss, has_aux=True)(self.critic.params, batch, next_noise)
        flow_grads, flow_info = jax.grad(self.flow_loss, has_aux=True)(self.actor.params, batch, flow_rng)
        policy_grads, policy_info = jax.grad(self.policy_loss, has_aux=True)(self.one_step.params, batch, noise)
        agent = self.replace(
            actor=self.actor.apply_gradients(flow_grads),
            one_step=self.one_step.apply_gradients(policy_grads),
            critic=self.critic.apply_gradients(critic_grads),
            target_critic=optax.incremental_update(self.critic.params, self.target_critic, self.config.tau),
            rng=rng,
        )  # the target follows the critics of before the step, as in the authors' code
        return agent, {**critic_info, **flow_info, **policy_info}

    def update(self, batch: Batch) -> tuple[Self, Info]:
        """Run one step per minibatch of the leaves `[utd, B, ...]`, with chunks `[utd, B, h, ...]`; mean metrics."""
        return each_minibatch(lambda agent, rows: agent._step(rows), self, chunk_transitions(batch, self.config))

    def q_value(self, observations: Array, actions: Array) -> Array | None:
        """Return the critics' mean value `[...]` of actions `[..., A]` at observations `[..., D]`.

        None: the critics judge whole chunks.
        """
        return None if self.config.chunk > 1 else self.critic(observations, actions).mean(axis=0)

    def sample_actions(
        self, observations: Array, carry: Carry, rng: Array, deterministic: bool = False
    ) -> tuple[Array, Carry]:
        """Return actions of clip(mu(s, z)) `[..., A]`, and the carry; z is drawn, `deterministic` or not."""

        def propose() -> Array:
            noise = jax.random.normal(rng, (*observations.shape[:-1], self.size))
            return jnp.clip(self.one_step(observations, noise), -1.0, 1.0)

        return play(self.config.chunk, carry, propose)

    def initial_carry(self, batch_shape: tuple[int, ...]) -> ActionQueue | None:
        """Return empty queues `[*batch_shape, h, A]`; `None` with h = 1."""
        return fresh_queue(self.config.chunk, batch_shape, self.action_dim)

    @classmethod
    def preset(cls, family: str, size: Literal["paper", "small"] = "paper") -> Preset:
        """Return the settings for a family of tasks.

        `paper`: 1M updates and 1M environment steps; 4x512, batch 256. Mazes have rewards of -1/0 and alpha 10, Adroit
        1000 and the lower target critic. OGBench's tasks have the settings of the
        published curves (`o2o.agents.ogbench`). `small`: 2x128, batch 128, rates of
        1e-3, 10k updates and 10k environment steps.
        """
        maze = family in ("antmaze", "pointmaze")
        config = FQLConfig() if maze else FQLConfig(alpha=1.0, normalize_q=True)
        if family == "adroit":
            config = FQLConfig(alpha=1000.0, aggregate="min")
        reward = (1.0, -1.0) if maze else (1.0, 0.0) if family == "adroit" else None
        if size == "paper":
            preset = Preset(config, 1_000_000, 1_000_000, reward)
            weights = {"antmaze": ("d4rl antmaze large", 3.0), "adroit": ("relocate", 10_000.0)}
            tasks = _ogbench()
            if family in weights:
                words, alpha = weights[family]
                tasks[words] = replace(preset, config=replace(config, alpha=alpha))
            return replace(preset, tasks=tasks)
        widths = {"actor_hidden_dims": (128, 128), "critic_hidden_dims": (128, 128)}
        small = replace(config, **widths, batch_size=128, actor_lr=1e-3, critic_lr=1e-3, tau=0.01)
        return Preset(small, 10_000, 10_000, reward)


def _ogbench() -> dict[str, Preset]:
    """Return the settings of OGBench's tasks (QAM's table)."""
    config = FQLConfig(**ogbench.CHUNKS, num_critics=10, pessimism=0.5, alpha=300.0, online=ogbench.ONLINE)
    weights = {"cube triple": 30.0, "cube quadruple": 100.0, "puzzle 4x4": 1.0}
    weights |= {"antmaze large": 3.0, "antmaze giant": 3.0, "humanoidmaze medium": 30.0, "humanoidmaze large": 30.0}
    return ogbench.presets(config, {domain: {"alpha": weight} for domain, weight in weights.items()})
