"""QC: Q-learning on chunks of actions, tied to the data by a flow model of behaviour ("Q-chunking", arXiv 2507.07969).

The critic judges h actions in a row, played open loop, so its h-step target needs no correction for off-policy actions;
chunks come from a flow fitted to the data. `best_of_n` plays the best of N flow samples; `distilled` (QC-FQL) trains a
one-step policy on the critic while holding it to the flow, noise for noise. A chunk of 1 is FQL (2502.02538) or its
best-of-N form: plain transitions, no queue.

Deterministic acting starts from fixed noise: zero (distilled), or zero and N - 1 fixed draws (best of N), the same for
every observation. The paper evaluates samples: `deterministic_eval` False in the run's loop.

Where we differ
- The targets move towards the critics' new parameters; the released code takes those from before the step.
- One Adam for each network, where the code has one over the sum of the losses: the same steps.
- `pad_terminal`, on by default: a window with a true terminal before its last step counts. Its last action is repeated,
  for critic and flow, its reward ends there and nothing is bootstrapped. The code (off) drops it, so a critic whose
  episodes end at success, as on Adroit or in mazes, never learns the last h - 1 states of a success, though the policy
  queries it there and other windows bootstrap from them. Time limits inside a window drop it in both.
- A window crosses neither an episode's end nor the ring's cursor nor two datasets; the code cuts by index alone.
- The ring has room for the dataset and `loop.replay_capacity` own steps; the code's, max(2M, dataset + 1) rows for
  both, overwrites the dataset.
- The flow's layers start from flax's default draw (o2o.nn.generative), critic and one-step policy as in the code.
- Left out: CO-RFT's prefix critic (2508.02219), n-step backups of one-step critics (FQL-n), QC on RLPD, and datasets
  swapped file by file. Rewards: -1/0 as in the code's sparse tasks on mazes and Adroit, else the task's own.
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

from o2o.agents.minibatches import check_flat, each_minibatch
from o2o.errors import ConfigError
from o2o.nn.generative import Denoiser, Flow
from o2o.nn.modules import MLP, Adam, CriticEnsemble, Model, kernel_init
from o2o.rl.chunks import ActionQueue, empty_queue, next_action
from o2o.rl.losses import td_target
from o2o.types import Agent, AgentConfig, Array, Batch, Carry, Info, Needs, OnlineConfig, Params, Preset


@dataclass(frozen=True)
class QCConfig(AgentConfig):
    """Settings of Q-chunking; the defaults are the paper's."""

    chunk: int = 5
    """Actions h that are judged and played as one."""
    policy: Literal["best_of_n", "distilled"] = "best_of_n"
    """`best_of_n` (QC): the best of the flow's samples; `distilled` (QC-FQL): a one-step policy that climbs Q."""
    num_samples: int = 32
    """Flow samples N of `best_of_n`, for acting and in the target; fewer stay closer to the data."""
    alpha: float = 100.0
    """Weight of `distilled`'s distance to the flow, on the scale of Q."""
    aggregate: Literal["mean", "min"] = "mean"
    """How the target reduces over the target critics."""
    pad_terminal: bool = True
    """Keep windows that a true terminal cuts short, the last action repeated; False drops them."""
    num_critics: int = 2
    """Members of the critic ensemble."""
    flow_steps: int = 10
    """Euler steps of the flow."""
    actor_hidden_dims: tuple[int, ...] = (512, 512, 512, 512)
    """Widths of the flow's and the one-step policy's hidden layers."""
    critic_hidden_dims: tuple[int, ...] = (512, 512, 512, 512)
    """Widths of every critic's hidden layers."""
    actor_lr: float = 3e-4
    """Adam's rate of the flow and of the one-step policy."""
    critic_lr: float = 3e-4
    """Adam's rate of the critics."""
    tau: float = 0.005
    """Weight of the new parameters in the target's average, after every update."""
    online: OnlineConfig = OnlineConfig(warmup_steps=5000, replay="append")
    """Online phase: one buffer that starts with the dataset, one update per step after 5000 steps."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` for values that cannot be used."""
        for name in ("chunk", "num_samples", "num_critics"):
            if getattr(self, name) < 1:
                raise ConfigError(f"QCConfig.{name} is {getattr(self, name)}; expected at least 1.")
        if self.policy not in ("best_of_n", "distilled"):
            raise ConfigError(f"QCConfig.policy is {self.policy!r}; expected 'best_of_n' or 'distilled'.")
        if self.aggregate not in ("mean", "min"):
            raise ConfigError(f"QCConfig.aggregate is {self.aggregate!r}; expected 'mean' or 'min'.")
        if self.alpha < 0:
            raise ConfigError(f"QCConfig.alpha is {self.alpha}; expected 0 or more, such as 100.")

    @property
    def needs(self) -> Needs:
        """What an agent with these settings needs of its data and its run."""
        return Needs(window=self.chunk)


_DEFAULT = QCConfig()


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


class Chunks(NamedTuple):
    """What the losses see of a minibatch of windows; n = h A numbers per chunk."""

    observations: Array
    """At the chunk's first action, `[B, D]`."""
    actions: Array
    """`[B, n]`."""
    entries: Array
    """1 where a number of `actions` counts, `[B, n]`."""
    returns: Array
    """Discounted reward inside the window, up to its episode's end, `[B]`."""
    masks: Array
    """0 where the episode terminates in the window, `[B]`."""
    valid: Array
    """1 where the whole window counts for the critic, `[B]`."""
    next_observations: Array
    """Behind the last action, `[B, D]`."""


def cut(batch: Batch, discount: float, pad_terminal: bool) -> Chunks:
    """Return the chunks of windows, leaves `[B, h, ...]` with `valid`."""
    valid, actions = batch["valid"], batch["actions"]
    steps = jnp.arange(valid.shape[-1])
    returns = jnp.sum(discount**steps * valid * batch["rewards"], axis=-1)
    masks = jnp.min(jnp.where(valid > 0, batch["masks"], 1.0), axis=-1)
    whole = valid[..., -1]
    if pad_terminal:
        last = jnp.maximum(jnp.sum(valid, axis=-1).astype(jnp.int32) - 1, 0)
        actions = jnp.take_along_axis(actions, jnp.minimum(steps, last[..., None])[..., None], axis=-2)
        whole = jnp.maximum(whole, 1.0 - masks)
        valid = jnp.maximum(valid, (1.0 - masks)[..., None])
    return Chunks(
        observations=batch["observations"][..., 0, :],
        actions=actions.reshape(*actions.shape[:-2], -1),
        entries=jnp.repeat(valid, actions.shape[-1], axis=-1),
        returns=returns,
        masks=masks,
        valid=whole,
        next_observations=batch["next_observations"][..., -1, :],
    )


class QC(Agent):
    """Q-chunking; `actor` is the flow, `one_step` the distilled policy where there is one."""

    actor: Model
    critic: Model
    target_critic: Params
    one_step: Model | None
    rng: Array
    config: QCConfig = struct.field(pytree_node=False)
    action_dim: int = struct.field(pytree_node=False)

    @classmethod
    def create(cls, rng: Array, observations: Array, actions: Array, config: QCConfig = _DEFAULT) -> Self:
        """Initialise from a key and example observations `[B, D]` and actions `[B, A]`."""
        check_flat(observations, cls.__name__)
        rng, actor_rng, critic_rng, policy_rng = jax.random.split(rng, 4)
        chunks = jnp.tile(actions, config.chunk)
        flow = Denoiser("mlp", hidden_dims=config.actor_hidden_dims)
        judges = CriticEnsemble(
            config.critic_hidden_dims, config.num_critics, layer_norm=True, init_scheme="xavier", activation="gelu",
            norm_last=True,
        )  # fmt: skip
        critic = Model.create(critic_rng, judges, Adam(config.critic_lr), observations, chunks)
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

    def flow_chunks(self, observations: Array, noise: Array) -> Array:
        """Return the flow's chunks `[..., n]` from `noise [..., n]`; leading axes broadcast."""
        flow = Flow(self.config.flow_steps)
        return flow.sample(lambda x, t: self.actor(observations, x, t), noise, self.rng)

    def propose(self, observations: Array, rng: Array, deterministic: bool = False) -> Array:
        """Return the chunks `[..., n]` in [-1, 1] that the policy plays at observations `[..., D]`."""
        count = 1 if self.one_step is not None else self.config.num_samples
        size = self.config.chunk * self.action_dim
        lead = observations.shape[:-1]
        if deterministic:
            fixed = jax.random.normal(jax.random.key(0), (count, size)).at[0].set(0.0)
            noise = jnp.broadcast_to(fixed.reshape(count, *(1,) * len(lead), size), (count, *lead, size))
        else:
            noise = jax.random.normal(rng, (count, *lead, size))
        if self.one_step is not None:
            return jnp.clip(self.one_step(observations, noise[0]), -1.0, 1.0)
        candidates = self.flow_chunks(observations, noise)
        scores = jnp.mean(self.critic(observations, candidates), axis=0)
        best = jnp.argmax(scores, axis=0)[None, ..., None]
        return jnp.take_along_axis(candidates, best, axis=0)[0]

    def targets(self, chunks: Chunks, rng: Array) -> Array:
        """Return y = R + discount^h m Q'(s_h, A') `[B]`, A' as the policy plays it there."""
        actions = self.propose(chunks.next_observations, rng)
        q = self.critic(chunks.next_observations, actions, params=self.target_critic)
        values = jnp.mean(q, axis=0) if self.config.aggregate == "mean" else jnp.min(q, axis=0)
        return td_target(chunks.returns, chunks.masks, values, self.config.discount**self.config.chunk)

    def critic_loss(self, params: Params, chunks: Chunks, targets: Array) -> tuple[Array, Info]:
        """Return the mean over critics and windows of valid * (Q - y)^2, and metrics (means over what is valid)."""
        q = self.critic(chunks.observations, chunks.actions, params=params)
        loss = jnp.mean(chunks.valid * jnp.square(q - targets))
        count = jnp.maximum(jnp.sum(chunks.valid), 1.0)
        known = {"critic/q": jnp.mean(q, axis=0), "critic/target": targets}
        metrics = {name: jnp.sum(chunks.valid * value) / count for name, value in known.items()}
        return loss, {"critic/loss": loss, **metrics, "critic/valid": jnp.mean(chunks.valid)}

    def flow_loss(self, params: Params, chunks: Chunks, rng: Array) -> tuple[Array, Info]:
        """Return the flow's squared error, a mean over all entries of which the invalid ones are zeros."""
        apply = lambda x, t: self.actor(chunks.observations, x, t, params=params)  # noqa: E731
        loss = jnp.mean(chunks.entries * Flow(self.config.flow_steps).loss(apply, chunks.actions, rng))
        return loss, {"actor/loss": loss}

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
        """Step all networks on one minibatch of windows `[B, h, ...]`, every loss at the present parameters."""
        chunks = cut(batch, self.config.discount, self.config.pad_terminal)
        rng, target_rng, flow_rng, policy_rng = jax.random.split(self.rng, 4)
        targets = self.targets(chunks, target_rng)
        critic_grads, critic_info = jax.grad(self.critic_loss, has_aux=True)(self.critic.params, chunks, targets)
        flow_grads, info = jax.grad(self.flow_loss, has_aux=True)(self.actor.params, chunks, flow_rng)
        one_step = self.one_step
        if one_step is not None:
            grads, policy_info = jax.grad(self.policy_loss, has_aux=True)(one_step.params, chunks, policy_rng)
            one_step, info = one_step.apply_gradients(grads), {**info, **policy_info}
        critic = self.critic.apply_gradients(critic_grads)
        agent = self.replace(
            actor=self.actor.apply_gradients(flow_grads),
            critic=critic,
            target_critic=optax.incremental_update(critic.params, self.target_critic, self.config.tau),
            one_step=one_step,
            rng=rng,
        )
        return agent, {**critic_info, **info}

    def update(self, batch: Batch) -> tuple[Self, Info]:
        """Run one step per leading row of the leaves, `[utd, B, h, ...]`, with h = 1 `[utd, B, ...]`; mean metrics."""
        if self.needs.window == 1:
            batch = {**batch, "valid": jnp.ones_like(batch["rewards"])}
            batch = {key: jnp.expand_dims(value, 2) for key, value in batch.items()}
        return each_minibatch(lambda agent, rows: agent._step(rows), self, batch)

    def sample_actions(
        self, observations: Array, carry: Carry, rng: Array, deterministic: bool = False
    ) -> tuple[Array, Carry]:
        """Return the next actions `[..., A]` of the chunks under way, or of new ones, and the queues behind them."""
        if self.needs.window == 1:
            return self.propose(observations, rng, deterministic), carry

        def chunks() -> Array:
            flat = self.propose(observations, rng, deterministic)
            return flat.reshape(*flat.shape[:-1], self.config.chunk, self.action_dim)

        return next_action(carry, chunks, self.config.chunk)

    def initial_carry(self, batch_shape: tuple[int, ...]) -> ActionQueue | None:
        """Return empty queues `[*batch_shape, h, A]`; `None` with h = 1."""
        return None if self.needs.window == 1 else empty_queue(batch_shape, self.config.chunk, self.action_dim)

    @classmethod
    def preset(cls, family: str, size: Literal["paper", "small"] = "paper") -> Preset:
        """Return the settings for a family of tasks.

        `paper`: the paper's for OGBench and robomimic, 1M updates and 1M environment steps; it has none of these
        families. `small`: 2x128, batch 128, 8 samples, 10k updates and 10k environment steps, the first update at 1000.
        """
        reward = (1.0, -1.0) if family in ("antmaze", "pointmaze") else (1.0, 0.0) if family == "adroit" else None
        if size == "paper":
            return Preset(QCConfig(), 1_000_000, 1_000_000, reward)
        config = QCConfig(
            num_samples=8, actor_hidden_dims=(128, 128), critic_hidden_dims=(128, 128), actor_lr=1e-3, batch_size=128,
        )  # fmt: skip
        config = replace(config, online=replace(config.online, warmup_steps=1000))
        return Preset(config, 10_000, 10_000, reward)
