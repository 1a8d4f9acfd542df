"""QC: Q-learning on chunks of actions, tied to the data by a flow model of behaviour ("Q-chunking", arXiv 2507.07969).

The critic judges h actions in a row that are played open loop. So its h-step target needs no correction for off-policy
actions. Chunks come from a flow fitted to the data. `best_of_n` (QC) plays the best of N flow samples. `distilled`
(QC-FQL) trains a one-step policy on the critic and holds it to the flow, noise for noise. With h = 1 it is FQL
(2502.02538) or its best-of-N form: plain transitions, no queue.

Deterministic acting starts from fixed noise: zero (`distilled`), or zero and N - 1 fixed draws (`best_of_n`), the same
for every observation. The paper evaluates samples: set `deterministic_eval` of the run's loop to False.

| what | paper | its code | `paper` preset | default |
| --- | --- | --- | --- | --- |
| window with a terminal before its last step | - | dropped | dropped | counts (`pad_terminal`) |
| target and ranking of candidates | mean of two critics | mean, or both the minimum | mean | mean (`aggregate`) |
| first draw of all networks | - | uniform by average fan | the same | the same |

Without `pad_terminal` a critic whose episodes end at success, as on Adroit or in mazes, never learns the last h - 1
states of a success, although the policy asks it there and other windows bootstrap from them. With it such a window
counts: its last action is repeated for critic and flow, its reward ends there, nothing is bootstrapped. A time limit
inside a window drops it in both cases.

Where we differ
- The target critics move towards the critics' new parameters; the code takes those from before the step.
- Each network has its own Adam; the code has one over the sum of the losses: the same steps.
- A window crosses neither an episode's end nor the ring's cursor nor two datasets; the code cuts by index alone.
- The ring has room for the dataset and `loop.replay_capacity` own steps. The code's ring, of max(2M, dataset + 1) rows
  in all, overwrites the dataset.
- Left out: CO-RFT's prefix critic (2508.02219), n-step backups of one-step critics (FQL-n), QC on RLPD, and datasets
  swapped file by file.
"""

from dataclasses import dataclass, replace
from typing import Literal, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

from o2o.agents import ogbench
from o2o.agents.chunked import ChunkedFlow, chunk_noise
from o2o.agents.minibatches import check_flat
from o2o.agents.registry import register_agent
from o2o.nn.generative import Denoiser, Guidance
from o2o.nn.modules import MLP, Adam, CriticEnsemble, Model, kernel_init
from o2o.rl.losses import td_target
from o2o.rl.windows import Chunks, chunk_rows
from o2o.settings import Average, Count, NotNegative, Rate, Widths
from o2o.types import Array, Batch, ChunkedConfig, Info, OnlineConfig, Params, Preset


@dataclass(frozen=True)
class QCConfig(ChunkedConfig):
    """Settings of Q-chunking; the defaults are the paper's."""

    chunk: Count = 5
    """Actions h of a chunk."""
    policy: Literal["best_of_n", "distilled"] = "best_of_n"
    """`best_of_n` (QC): the best of the flow's samples; `distilled` (QC-FQL): a one-step policy that climbs Q."""
    num_samples: Count = 32
    """Flow samples N of `best_of_n`, for acting and in the target; fewer stay closer to the data."""
    alpha: NotNegative = 100.0
    """Weight of `distilled`'s distance to the flow, on the scale of Q."""
    aggregate: Literal["mean", "min"] = "mean"
    """How the target reduces over the target critics, and the ranking of candidates over the critics."""
    num_critics: Count = 2
    """Critics in the ensemble."""
    flow_steps: Count = 10
    """Euler steps of the flow."""
    guidance: Guidance = Guidance()
    """Q's gradient in the flow's steps, when acting only; `best_of_n` has a flow that acts."""
    actor_hidden_dims: Widths = (512, 512, 512, 512)
    """Widths of the flow's and the one-step policy's hidden layers."""
    critic_hidden_dims: Widths = (512, 512, 512, 512)
    """Widths of every critic's hidden layers."""
    actor_lr: Rate = 3e-4
    """Adam's rate of the flow and of the one-step policy."""
    critic_lr: Rate = 3e-4
    """Adam's rate of the critics."""
    tau: Average = 0.005
    """Weight of the new parameters in the target's average, after every update."""
    online: OnlineConfig = OnlineConfig(warmup_steps=5000, replay="append")
    """Online phase: one buffer that starts with the dataset, one update per step after 5000 steps."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` for values out of range, or that do not go together."""
        super().__post_init__()
        if self.guidance.weight and self.policy == "distilled":
            raise self.refuse("guidance", "weight 0 with policy 'distilled', which acts without the flow's steps")


class OneStep(nn.Module):
    """One-step policy: observations `[..., D]` and noise `[..., n]` to chunks `[..., n]`, not clipped."""

    hidden_dims: tuple[int, ...]

    @nn.compact
    def __call__(self, observations: Array, noise: Array) -> Array:
        """Return the chunks, leading axes broadcast."""
        lead = jnp.broadcast_shapes(observations.shape[:-1], noise.shape[:-1])
        parts = [jnp.broadcast_to(x, (*lead, x.shape[-1])) for x in (observations, noise)]
        x = MLP(self.hidden_dims, init_scheme="xavier", activation="gelu")(jnp.concatenate(parts, axis=-1))
        return nn.Dense(noise.shape[-1], kernel_init=kernel_init("xavier"))(x)


_DEFAULT = QCConfig()


@register_agent("qc")
class QC(ChunkedFlow):
    r"""Q-chunking: Q-learning on chunks of actions.

    `actor` is the flow, `one_step` the distilled policy where there is one.

    Equations (method, and the settings that enter):
    - `update` (`chunk`, `pad_terminal`): $A = (a_0, \ldots, a_{h-1}),\quad R = \sum_{k < h} \gamma^k r_k$
    - `targets` (`aggregate`, `discount`): $y = R + \gamma^h m\, Q^-(s_h, A')$
    - `propose` (`num_samples`): $A' = \arg\max_{A_n \sim \mathrm{Flow}(s_h, z_n)} Q(s_h, A_n)$
    - `flow_loss` (`flow_steps`): $L_v = \lVert v(s, x_t, t) - (A - z) \rVert^2$
    - `policy_loss` (`policy`, `alpha`): $L_\mu = \alpha (\mu(s, z) - \mathrm{Flow}(s, z))^2 - Q(s, \mu(s, z))$
    """

    one_step: Model | None
    config: QCConfig = struct.field(pytree_node=False)

    @classmethod
    def create(cls, rng: Array, observations: Array, actions: Array, config: QCConfig = _DEFAULT) -> Self:
        """Initialise from a key and example observations `[B, D]` and actions `[B, A]`."""
        check_flat(observations, cls.__name__)
        rng, actor_rng, critic_rng, policy_rng = jax.random.split(rng, 4)
        chunks = jnp.tile(actions, config.chunk)
        flow = Denoiser("mlp", hidden_dims=config.actor_hidden_dims)
        ensemble = CriticEnsemble(
            config.critic_hidden_dims,
            config.num_critics,
            layer_norm=True,
            init_scheme="xavier",
            activation="gelu",
            norm_last=True,
        )
        critic = Model.create(critic_rng, ensemble, Adam(config.critic_lr), observations, chunks)
        one_step = None
        if config.policy == "distilled":
            module = OneStep(config.actor_hidden_dims)
            one_step = Model.create(policy_rng, module, Adam(config.actor_lr), observations, chunks)
        times = jnp.zeros(actions.shape[:-1])
        agent = cls(
            actor=Model.create(actor_rng, flow, Adam(config.actor_lr), observations, chunks, times),
            critic=critic,
            target_critic=jax.tree.map(jnp.copy, critic.params),
            one_step=one_step,
            rng=rng,
            config=config,
            action_dim=actions.shape[-1],
        )
        return jax.tree.map(jnp.asarray, agent)

    def reduced(self, q: Array) -> Array:
        """Return the mean or, with `aggregate="min"`, the minimum `[...]` over the critics' values `[E, ...]`."""
        return jnp.mean(q, axis=0) if self.config.aggregate == "mean" else jnp.min(q, axis=0)

    def score(self, observations: Array, chunks: Array) -> Array:
        """Return the values `[...]` that chunks `[..., n]` are ranked by: those of the critics, not of the targets."""
        return self.reduced(self.critic(observations, chunks))

    def propose(
        self, observations: Array, rng: Array, deterministic: bool = False, guidance: Guidance | None = None
    ) -> Array:
        """Return the chunks `[..., n]` in [-1, 1] of the best of N or of the one-step policy, at `[..., D]`."""
        if self.one_step is None:
            return super().propose(observations, rng, deterministic, guidance)
        noise = chunk_noise(rng, 1, observations.shape[:-1], self.size, deterministic)[0]
        return jnp.clip(self.one_step(observations, noise), -1.0, 1.0)

    def targets(self, chunks: Chunks, rng: Array) -> Array:
        """Return y = R + discount^h m Q'(s_h, A') `[B]`; A' is the chunk that the policy plays at s_h."""
        next_chunks = self.propose(chunks.next_observations, rng)
        q = self.critic(chunks.next_observations, next_chunks, params=self.target_critic)
        return td_target(chunks.returns, chunks.masks, self.reduced(q), self.config.discount**self.config.chunk)

    def critic_loss(self, params: Params, chunks: Chunks, targets: Array) -> tuple[Array, Info]:
        """Return the mean over critics and windows of valid * (Q_i(s, A) - y)^2, and metrics of the valid windows."""
        q = self.critic(chunks.observations, chunks.actions, params=params)
        loss = jnp.mean(chunks.valid * jnp.square(q - targets))

        def mean_of_valid(x: Array) -> Array:
            return jnp.sum(chunks.valid * x) / jnp.maximum(jnp.sum(chunks.valid), 1.0)

        return loss, {
            "critic/loss": loss,
            "critic/q": mean_of_valid(jnp.mean(q, axis=0)),
            "critic/target": mean_of_valid(targets),
            "critic/valid": jnp.mean(chunks.valid),
        }

    def policy_loss(self, params: Params, chunks: Chunks, rng: Array) -> tuple[Array, Info]:
        """Return alpha * mean (mu(s, z) - Flow(s, z))^2 - mean Q(s, clip(mu(s, z))), the same z in both terms."""
        assert self.one_step is not None
        noise = jax.random.normal(rng, chunks.actions.shape)
        played = self.one_step(chunks.observations, noise, params=params)
        goal = jax.lax.stop_gradient(self.flow_chunks(chunks.observations, noise))
        distance = jnp.mean(jnp.square(played - goal))
        q = jnp.mean(self.critic(chunks.observations, jnp.clip(played, -1.0, 1.0)))
        return self.config.alpha * distance - q, {"policy/distance": distance, "policy/q": q}

    def _step(self, batch: Batch) -> tuple[Self, Info]:
        """Step all networks on windows `[B, h, ...]`; every loss sees the parameters before the step."""
        config = self.config
        rng, target_rng, flow_rng, policy_rng = jax.random.split(self.rng, 4)
        chunks = chunk_rows(batch, config.discount, config.pad_terminal)
        targets = self.targets(chunks, target_rng)
        critic_grads, info = jax.grad(self.critic_loss, has_aux=True)(self.critic.params, chunks, targets)
        flow_grads, flow_info = jax.grad(self.flow_loss, has_aux=True)(self.actor.params, chunks, flow_rng)
        critic = self.critic.apply_gradients(critic_grads)
        agent = self.replace(
            actor=self.actor.apply_gradients(flow_grads),
            critic=critic,
            target_critic=optax.incremental_update(critic.params, self.target_critic, config.tau),
            rng=rng,
        )
        info |= flow_info
        if self.one_step is not None:
            grads, policy_info = jax.grad(self.policy_loss, has_aux=True)(self.one_step.params, chunks, policy_rng)
            agent = agent.replace(one_step=self.one_step.apply_gradients(grads))
            info |= policy_info
        return agent, info

    @classmethod
    def preset(cls, family: str, size: Literal["paper", "small"] = "paper") -> Preset:
        """Return the settings for a family of tasks.

        `paper`: the paper's for OGBench and robomimic, 1M updates and 1M environment steps; the paper has none of the
        other families. On OGBench samples are evaluated, 50 episodes of them. `small`: 2x128, batch 128, 8 samples,
        10k updates and 10k environment steps, the first update at 1000. Rewards are -1/0 on mazes and Adroit, as in the
        code's sparse tasks, else the task's own.
        """
        reward = {"antmaze": (1.0, -1.0), "pointmaze": (1.0, -1.0), "adroit": (1.0, 0.0)}.get(family)
        if size == "paper":
            config = QCConfig(pad_terminal=False)
            tasks = ogbench.presets(config, {}, steps=1_000_000, rho=None)
            return Preset(config, 1_000_000, 1_000_000, reward, tasks=tasks)
        config = QCConfig(
            num_samples=8,
            actor_hidden_dims=(128, 128),
            critic_hidden_dims=(128, 128),
            actor_lr=1e-3,
            batch_size=128,
            online=replace(QCConfig().online, warmup_steps=1000),
        )
        return Preset(config, 10_000, 10_000, reward)
