"""ResFiT: a small residual policy learnt off-policy on top of a frozen base policy, arXiv 2509.19301.

Idea: any policy that imitates well but not well enough is frozen and asked for one action b per step; a residual policy
that sees the state and b adds a correction of at most `residual_scale` per coordinate. It is learnt as in TD3 and REDQ:
deterministic actor, ten LayerNorm critics of the combined action, n-step returns, many updates per step, half of every
minibatch from demonstrations. It starts at exactly zero, so that the performance starts at the base's.

Observations are dicts: `state` (normalised), `base_action`, cameras. The run asks the base (`o2o.policies.base`): b is
stored with s and s' and never computed again; the run's action range is the dataset's, widened by the residual scale.

Where we differ
- The stored action is the executed one, clamped as the environment clamps it; the code stores b + residual unclamped.
- [-1, 1] never reaches beyond the action space: where the data touch its bounds there is no headroom behind them.
- What a human or the base does beyond the run's action range is stored, and b is seen, clipped to it; recordings
  (`--record`) have it as it was.
- State only (no images): encoder and trunk fall away, the critics are independent ensembles of concat(s, a).
- Heads and trunk start from LeCun's normal draw, where the code has PyTorch's default: uniform, and smaller by sqrt(3).
- `critic_loss="mse"` is the paper's; the code squares the mean absolute error over the heads ("squared_mean").
- Windows are cut by index: the newest n - 1 rows, and a dataset's last ones, begin none yet, whatever ended there.
- The base begins every episode afresh, in labels too; in the code a chunk may run on into the next episode.
- An episode's last observation is normalised and has its base action; the code's is raw, with b = 0, and never counts.
- Demonstrations keep all their rows and rewards; the code pays the next frame's done flag, and drops the last frame.
- The replay keeps the whole run (`loop.replay_capacity`), the code the last 200k to 300k steps.
- Vision: the encoder's random shift differs for s and s'; encoder, trunk and heads are clipped each on its own.
- `timeouts="terminal"` (the paper) is the default for sparse tasks; Kitchen and locomotion presets bootstrap there, as
  a time limit without a reward for success is no failure. An episode that a resume or a robot's evaluation breaks off
  counts as one that ran out of time, so under "terminal" as a failure.
- No prioritised replay, no distributional critics, no other reductions of the actor's loss.
- Families of tasks, none of which is in the paper: see `o2o.agents.residual_config`.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, Protocol, Self

import jax
import jax.numpy as jnp
import optax
from flax import struct

from o2o.agents.minibatches import minibatches_in
from o2o.agents.residual_config import ResidualConfig, residual_preset
from o2o.agents.residual_networks import ResidualActor, Seen, Trunk, values
from o2o.errors import ConfigError
from o2o.nn.encoders import create_encoder, shift_observations
from o2o.nn.kernels import branch
from o2o.nn.modules import Adam, CriticEnsemble, Model, draw_members
from o2o.types import Agent, Array, Batch, Carry, Info, Params, Preset

_DEFAULT = ResidualConfig()
ACTION_LIMIT = 1.0 - 1e-6
"""Residuals with noise are clipped to this (the code)."""


class NStep(Protocol):
    """What `n_step_rows` reads of a config."""

    @property
    def n_step(self) -> int:
        """Rewards summed before the target bootstraps."""
        ...

    @property
    def discount(self) -> float:
        """Discount factor per step."""
        ...

    @property
    def timeouts(self) -> Literal["terminal", "bootstrap"]:
        """Whether a time limit is worth nothing, or bootstraps."""
        ...


def n_step_rows(batch: Batch, config: NStep) -> Batch:
    """Return rows `[B, ...]` of windows `[B, W, ...]`: `rewards` are n-step sums, `masks` gamma^k c.

    k is the number of steps inside the window and its episode; c is 1 where the value behind them counts.
    """
    n = config.n_step
    valid, ends = batch["valid"][:, :n], batch["ends"][:, :n]
    powers = config.discount ** jnp.arange(n + 1)
    steps = jnp.sum(valid, axis=1).astype(jnp.int32)
    last = jnp.maximum(steps - 1, 0)
    going_on = jnp.min(jnp.where(valid > 0, batch["masks"][:, :n], 1.0), axis=1)
    if config.timeouts == "terminal":
        going_on = going_on * (steps == n) * (1.0 - jnp.max(ends * valid, axis=1))

    def at(index: Array) -> Any:
        return lambda leaf: jnp.take_along_axis(leaf, index.reshape(-1, *[1] * (leaf.ndim - 1)), axis=1)[:, 0]

    return {
        "observations": jax.tree.map(lambda leaf: leaf[:, 0], batch["observations"]),
        "actions": batch["actions"][:, 0],
        "rewards": jnp.sum(powers[:n] * valid * batch["rewards"][:, :n], axis=1),
        "masks": powers[steps] * going_on,
        "next_observations": jax.tree.map(at(last), batch["next_observations"]),
    }


def critic_loss(q: Array, targets: Array, kind: str) -> Array:
    """Return the loss `[]` of heads `q [E, B]` against `targets [B]`."""
    if kind == "mse":
        return jnp.mean(jnp.square(q - targets))
    return jnp.mean(jnp.square(jnp.mean(jnp.abs(q - targets), axis=0)))


class Residual(Agent):
    """Residual policy and critics on top of a base policy that acts outside."""

    actor: Model
    target_actor: Params
    critic: Model
    target_critic: Params
    encoder: Model | None
    trunk: Model | None
    target_trunk: Params
    updates: Array
    """Critic steps of the present phase, int32."""
    rng: Array
    config: ResidualConfig = struct.field(pytree_node=False)

    @classmethod
    def create(cls, rng: Array, observations: Any, actions: Array, config: ResidualConfig = _DEFAULT) -> Self:
        """Initialise from a key, example observations with a `base_action [B, A]`, and actions `[B, A]`."""
        if not isinstance(observations, Mapping) or "base_action" not in observations:
            raise ConfigError("Residual needs observations with a base_action: train it with --base")
        rng, actor_rng, critic_rng, encoder_rng, trunk_rng = jax.random.split(rng, 5)
        critic_adam = Adam(config.critic_lr, weight_decay=config.weight_decay, clip_norm=config.clip_norm)
        encoder = create_encoder(encoder_rng, config.encoder, observations, critic_adam)
        example = seen(encoder, observations, actions.shape[-1])
        policy = ResidualActor(
            config.actor_hidden_dims, actions.shape[-1], config.residual_scale, config.actor_layer_norm
        )
        actor = Model.create(actor_rng, policy, replace(critic_adam, learning_rate=config.actor_lr), example)
        trunk, features = None, example.state
        if example.patches is not None:
            trunk = Model.create(
                trunk_rng, Trunk(config.trunk_width), critic_adam, example.patches, actions, example.state
            )
            features = jnp.zeros((*example.state.shape[:-1], config.trunk_width + example.state.shape[-1]))
        heads = CriticEnsemble(config.critic_hidden_dims, config.num_critics, config.critic_layer_norm, "lecun")
        critic = Model.create(critic_rng, heads, critic_adam, features, actions)
        copies: dict[str, Any] = {
            "target_actor": jax.tree.map(jnp.copy, actor.params),
            "target_critic": jax.tree.map(jnp.copy, critic.params),
            "target_trunk": None if trunk is None else jax.tree.map(jnp.copy, trunk.params),
        }
        parts: dict[str, Any] = {"actor": actor, "critic": critic, "encoder": encoder, "trunk": trunk, **copies}
        agent = cls(**parts, updates=jnp.zeros((), jnp.int32), rng=rng, config=config)
        return jax.tree.map(jnp.asarray, agent)

    def see(self, observations: Any, encoder_params: Params = None) -> Seen:
        """Return what the networks see of observations `[..., D]`."""
        return seen(self.encoder, observations, self.actor.module.action_dim, encoder_params)  # pyright: ignore[reportAttributeAccessIssue]

    def combine(self, observed: Seen, residual: Array) -> Array:
        """Return the combined action clamp(b + residual), `[..., A]`."""
        return jnp.clip(observed.base + residual, -1.0, 1.0)

    def targets(self, rows: Batch, rng: Array) -> Array:
        """Return the n-step targets `[B]` of rows from `n_step_rows`."""
        config = self.config
        member_rng, noise_rng = jax.random.split(rng)
        behind = self.see(rows["next_observations"])
        std = jnp.where(self.updates < config.online.initial_updates, 0.0, config.noise_std)
        noise = jnp.clip(std * jax.random.normal(noise_rng, behind.base.shape), -config.noise_clip, config.noise_clip)
        residual = jnp.clip(self.actor(behind, params=self.target_actor) + noise, -ACTION_LIMIT, ACTION_LIMIT)
        heads: Any = self.critic.module
        heads, params = draw_members(heads, self.target_critic, member_rng, config.target_subset)
        actions = self.combine(behind, residual)
        q = values(heads, params, self.trunk, self.target_trunk, behind, actions)
        targets = rows["rewards"] + rows["masks"] * jnp.min(q, axis=0)
        if config.target_clip is not None:
            targets = jnp.clip(targets, *config.target_clip)
        return jax.lax.stop_gradient(targets)

    def critic_step(self, batch: Batch, rng: Array) -> tuple[Self, Info]:
        """Step critics, trunk and encoder on windows `[B, W, ...]`, then move the critics' targets."""
        config = self.config
        now_rng, next_rng, target_rng = jax.random.split(rng, 3)
        rows = n_step_rows(batch, config)
        pad = config.encoder.shift_pad
        rows["observations"] = shift_observations(now_rng, rows["observations"], pad)
        rows["next_observations"] = shift_observations(next_rng, rows["next_observations"], pad)
        targets = self.targets(rows, target_rng)
        models = {"critic": self.critic, "encoder": self.encoder, "trunk": self.trunk}
        learnt = {name: model for name, model in models.items() if model is not None}

        def loss_of(params: dict[str, Params]) -> tuple[Array, Array]:
            observed = self.see(rows["observations"], params.get("encoder"))
            heads: Any = self.critic.module
            q = values(heads, params["critic"], self.trunk, params.get("trunk"), observed, rows["actions"])
            return critic_loss(q, targets, config.critic_loss), jnp.mean(q)

        params = {name: model.params for name, model in learnt.items()}
        (loss, q), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        stepped: dict[str, Any] = {name: model.apply_gradients(grads[name]) for name, model in learnt.items()}
        target = optax.incremental_update(stepped["critic"].params, self.target_critic, config.tau)
        if self.trunk is not None:
            trunk = optax.incremental_update(stepped["trunk"].params, self.target_trunk, config.tau)
            stepped["target_trunk"] = trunk
        info = {"critic/loss": loss, "critic/q": q, "critic/target": jnp.mean(targets)}
        return self.replace(**stepped, target_critic=target, updates=self.updates + 1), info

    def actor_step(self, batch: Batch, rng: Array) -> tuple[Self, Info]:
        """Step the actor on the first rows of windows `[B, W, ...]`, features detached, then move its target."""
        config = self.config
        observations = jax.tree.map(lambda leaf: leaf[:, 0], batch["observations"])
        observations = shift_observations(rng, observations, config.encoder.shift_pad)
        observed = jax.lax.stop_gradient(self.see(observations))
        heads: Any = self.critic.module

        def loss_of(params: Params) -> tuple[Array, Array]:
            residual = self.actor(observed, params=params)
            trunk_params = None if self.trunk is None else self.trunk.params
            actions = self.combine(observed, residual)
            q = values(heads, self.critic.params, self.trunk, trunk_params, observed, actions)
            penalty = config.residual_penalty * jnp.mean(jnp.sum(jnp.square(residual), axis=-1))
            return -jnp.mean(q) + penalty, jnp.mean(jnp.abs(residual))

        (loss, size), grads = jax.value_and_grad(loss_of, has_aux=True)(self.actor.params)
        actor = self.actor.apply_gradients(grads)
        target = optax.incremental_update(actor.params, self.target_actor, config.tau)
        return self.replace(actor=actor, target_actor=target), {"actor/loss": loss, "actor/residual": size}

    def update(self, batch: Batch) -> tuple[Self, Info]:
        """Run critic steps on leaves `[utd, B, W, ...]` and, after the critic warm-up, one actor step on the last."""
        rng, critic_rng, actor_rng = jax.random.split(self.rng, 3)
        warmed_up = self.updates >= self.config.online.initial_updates
        keys = jax.random.split(critic_rng, minibatches_in(batch))
        agent, infos = jax.lax.scan(lambda a, rows: a.critic_step(*rows), self.replace(rng=rng), (batch, keys))
        last = jax.tree.map(lambda leaf: leaf[-1], batch)

        def rest(agent: Self) -> tuple[Self, Info]:
            return agent, {"actor/loss": jnp.zeros(()), "actor/residual": jnp.zeros(())}

        agent, info = branch(warmed_up, lambda agent: agent.actor_step(last, actor_rng), rest, agent)
        return agent, {**jax.tree.map(jnp.mean, infos), **info}

    def sample_actions(
        self, observations: Any, carry: Carry, rng: Array, deterministic: bool = False
    ) -> tuple[Array, Carry]:
        """Return combined actions `[..., A]` in [-1, 1]: base plus mean residual, with exploration noise on samples."""
        observed = self.see(observations)
        residual = self.actor(observed)
        if not deterministic:
            noise = self.config.noise_std * jax.random.normal(rng, residual.shape)
            residual = jnp.clip(residual + noise, -ACTION_LIMIT, ACTION_LIMIT)
        return self.combine(observed, residual), carry

    def random_actions(self, observations: Any, rng: Array, action_dim: int) -> Array:
        """Return the actions `[..., A]` of the environment warm-up."""
        base = self.see(observations).base
        if self.config.warmup_actions == "uniform":
            return jax.random.uniform(rng, base.shape, minval=-1.0, maxval=1.0)
        bound = self.config.warmup_noise
        return jnp.clip(base + jax.random.uniform(rng, base.shape, minval=-bound, maxval=bound), -1.0, 1.0)

    def online(self) -> Self:
        """Return the agent with its count of updates at 0: the critic warm-up is still to come."""
        return self.replace(updates=jnp.zeros((), jnp.int32))

    @classmethod
    def preset(cls, family: str, size: Literal["paper", "small"] = "paper") -> Preset:
        """Return the settings for a family of tasks (`o2o.agents.residual_config`); `small` for a laptop."""
        return residual_preset(family, size)


def seen(encoder: Model | None, observations: Any, action_dim: int, encoder_params: Params = None) -> Seen:
    """Return what the networks see of dict observations `[..., D]`; of joined base actions the last."""
    base = observations["base_action"][..., -action_dim:]
    state = observations.get("state", jnp.zeros((*base.shape[:-1], 0), jnp.float32))
    if encoder is None:
        return Seen(state, base, None)
    params = encoder.params if encoder_params is None else encoder_params
    patches: Any = encoder.module.apply(params, observations, method="patches")
    return Seen(state, base, patches)
