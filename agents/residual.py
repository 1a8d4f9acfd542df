"""ResFiT: a small residual policy learnt off-policy on top of a frozen base policy (arXiv 2509.19301).

Idea. Any policy that imitates well but not well enough is frozen and asked for one base action b per step. A residual
policy sees the state and b, and adds a correction of at most `residual_scale` per coordinate: a = clamp(b + rho). It is
learnt as in TD3 and REDQ: a deterministic actor, ten LayerNorm critics of the combined action a, n-step returns, many
updates per step, half of every minibatch from demonstrations. The residual starts at exactly zero, so the performance
starts at the base's.

Observations are dicts: `state` (normalised), `base_action`, cameras. The run asks the base (`o2o.policies.base`); b is
stored with s and s' and never computed again. The run's action range is the dataset's, widened by the residual scale.

| what | paper | its code | `paper` preset | default |
| --- | --- | --- | --- | --- |
| critics' loss | mean squared error | square of the heads' mean absolute error | as the code | `mse` |
| time limits | failures | failures | the same; Kitchen and locomotion bootstrap | failures (`timeouts`) |
| scale, actor's rate | 0.1, 1e-6; by task | the same; BoxCleanup 0.2, 5e-6 | the same; Adroit the latter | 0.1, 1e-6 |

Episodes of Kitchen and locomotion run out of time without having failed. An episode that a resume or a robot's
evaluation breaks off counts as one that ran out of time.

Where we differ
- The stored action is the executed one, clamped as the environment clamps it; the code stores b + rho unclamped.
- [-1, 1] never reaches beyond the action space: there is no headroom where the data touch its bounds.
- What a human or the base does beyond the run's action range is clipped to it before it is stored or seen as b.
  Recordings (`--record`) keep the original.
- State only (no images): there is no encoder and no trunk; the critics are independent networks of concat(s, a).
- Heads and trunk start from LeCun's normal draw; the code has PyTorch's default, uniform and smaller by sqrt(3).
- Windows are cut by index: the newest n - 1 rows, and a dataset's last ones, begin no window yet.
- The base begins every episode afresh, in labels too; in the code a chunk may run on into the next episode.
- An episode's last observation is normalised and has its base action; the code's is raw, with b = 0, and never counts.
- Demonstrations keep all their rows and rewards. The code pays the next frame's done flag and drops the last frame.
- The replay keeps the whole run (`loop.replay_capacity`); the code keeps the last 200k to 300k steps.
- Images: s and s' are shifted independently. Encoder, trunk and heads each have their own gradient clip.
- No prioritised replay, no distributional critics, no other reductions of the actor's loss.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

from o2o.agents.minibatches import each_minibatch
from o2o.agents.registry import register_agent
from o2o.errors import ConfigError
from o2o.nn.encoders import EncoderConfig, create_encoder, shift_observations
from o2o.nn.kernels import branch
from o2o.nn.modules import Adam, CriticEnsemble, Model, draw_members, kernel_init
from o2o.rl.windows import Timeouts, n_step_rows
from o2o.settings import AboveZero, Average, Count, Interval, NotNegative, Rate, Width, Widths
from o2o.types import Agent, AgentConfig, Array, Batch, Carry, Info, Needs, OnlineConfig, Params, Preset

ACTION_LIMIT = 1.0 - 1e-6
"""Residuals with noise are clipped to this."""


@dataclass(frozen=True)
class ResidualConfig(AgentConfig):
    """Settings of residual RL; the defaults are the paper's for robomimic Can and Square."""

    residual_scale: Average = 0.1
    """Bound of the mean residual per coordinate, in units where the dataset's actions span about [-1, 1]."""
    n_step: Count = 3
    """Rewards summed before the target bootstraps."""
    timeouts: Timeouts = "terminal"
    """`terminal`: nothing is worth anything behind an episode's end, time limits included (the paper). `bootstrap`:
    only a true termination stops the target."""
    noise_std: NotNegative = 0.05
    """Standard deviation of the exploration noise on the residual, and of the noise on the target's residual."""
    noise_clip: NotNegative = 0.3
    """Bound of the target's noise."""
    warmup_noise: NotNegative = 0.2
    """Bound of the uniform noise on the base action in the environment warm-up."""
    warmup_actions: Literal["base", "uniform"] = "base"
    """What the environment warm-up plays: the base with noise, or uniform actions (the paper's ablation)."""
    online: OnlineConfig = OnlineConfig(
        utd_ratio=4, random_steps=10_000, replay="mixed", offline_ratio=0.5, initial_updates=10_000
    )
    """Schedule: `random_steps` is the environment warm-up, `initial_updates` the critic warm-up."""
    actor_hidden_dims: Widths = (1024, 1024)
    """Widths of the residual actor's hidden layers."""
    critic_hidden_dims: Widths = (1024, 1024)
    """Widths of every critic's hidden layers."""
    actor_layer_norm: bool = True
    """LayerNorm after each hidden layer of the actor."""
    critic_layer_norm: bool = True
    """LayerNorm after each hidden layer of the critics."""
    num_critics: Count = 10
    """Critics in the ensemble."""
    target_subset: Count = 2
    """Target critics drawn for each minibatch without replacement; their minimum is the target."""
    critic_loss: Literal["mse", "squared_mean"] = "mse"
    """`mse`: squared error of every head. `squared_mean`: square of the heads' mean absolute error (the code)."""
    target_clip: Interval | None = None
    """Bounds of the target, such as (0, 1) for 0/1 rewards, against over-estimation; `None` for no bounds."""
    residual_penalty: NotNegative = 0.0
    """Weight lambda of the residual's squared length in the actor's loss."""
    actor_lr: Rate = 1e-6
    """Learning rate of the actor, AdamW. It is tiny on purpose: this keeps early learning safe."""
    critic_lr: Rate = 1e-4
    """Learning rate of critics, trunk and encoder, AdamW."""
    weight_decay: NotNegative = 1e-2
    """AdamW's weight decay, PyTorch's default."""
    clip_norm: AboveZero = 1.0
    """Largest norm of each network's gradient."""
    tau: Average = 0.005
    """Weight of the new parameters in the targets' averages, each after every step of its network."""
    encoder: EncoderConfig = EncoderConfig()
    """Image encoder per camera, if observations have images."""
    trunk_width: Width = 1024
    """Width of the critics' trunk over image patches."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` for values out of range, or that do not go together."""
        super().__post_init__()
        if self.target_subset > self.num_critics:
            raise self.refuse("target_subset", f"1 to num_critics={self.num_critics}")

    @property
    def needs(self) -> Needs:
        """A base policy, windows of at least two rows, and room for the residual.

        One row cannot say where an episode ended. The room lets a full residual fit on every action of the dataset.
        """
        return Needs(window=max(self.n_step, 2), base_policy=True, action_margin=self.residual_scale)


class Seen(NamedTuple):
    """What the networks see of observations with leading axes `[...]`."""

    state: Array
    """`[..., D]`; D is 0 where there are only images."""
    base: Array
    """The base action `[..., A]`; not an input of the critics."""
    patches: Array | None
    """Image patches of all cameras, `[..., P, C]`; `None` without cameras."""


def seen(encoder: Model | None, observations: Any, action_dim: int, encoder_params: Params = None) -> Seen:
    """Return what the networks see of dict observations `[..., D]`.

    Observations joined over time hold several base actions; the last one counts.
    """
    base = observations["base_action"][..., -action_dim:]
    state = observations.get("state", jnp.zeros((*base.shape[:-1], 0), jnp.float32))
    if encoder is None:
        return Seen(state, base, None)
    params = encoder.params if encoder_params is None else encoder_params
    return Seen(state, base, jnp.asarray(encoder.module.apply(params, observations, method="patches")))


class ResidualActor(nn.Module):
    """Mean residual mu = scale * tanh(.) of state, base action and patches: `Seen` to `[..., A]`.

    Its output layer starts at exactly zero.
    """

    hidden_dims: tuple[int, ...]
    action_dim: int
    scale: float
    layer_norm: bool = True
    image_features: int = 128
    """Width that the flattened patches are projected to."""

    @nn.compact
    def __call__(self, observed: Seen) -> Array:
        """Return the mean residual."""
        parts = [observed.state, observed.base]
        init = kernel_init("orthogonal", 1.0)
        if observed.patches is not None:
            flat = observed.patches.reshape(*observed.patches.shape[:-2], -1)
            flat = nn.Dense(self.image_features, kernel_init=init, name="project")(flat)
            parts = [nn.relu(nn.LayerNorm(name="project_norm")(flat)), *parts]
        x = jnp.concatenate(parts, axis=-1)
        for i, width in enumerate(self.hidden_dims):
            x = nn.Dense(width, kernel_init=init, name=f"dense_{i}")(x)
            if self.layer_norm:
                x = nn.LayerNorm(name=f"norm_{i}")(x)
            x = nn.relu(x)
        zeros = nn.initializers.zeros
        return self.scale * nn.tanh(nn.Dense(self.action_dim, kernel_init=zeros, bias_init=zeros, name="output")(x))


class Trunk(nn.Module):
    """Patches `[..., P, C]`, actions and states to `[..., width]`: a layer per channel, summed by a learned map."""

    width: int

    @nn.compact
    def __call__(self, patches: Array, actions: Array, state: Array) -> Array:
        """Return the features that all heads share."""
        channels = jnp.swapaxes(patches, -1, -2)
        rest = jnp.concatenate([actions, state], axis=-1)[..., None, :]
        rest = jnp.broadcast_to(rest, (*channels.shape[:-1], rest.shape[-1]))
        x = nn.Dense(self.width, name="dense")(jnp.concatenate([channels, rest], axis=-1))
        x = nn.relu(nn.LayerNorm(name="norm")(x))
        weights = self.param("weights", nn.initializers.normal(1.0), (channels.shape[-2], self.width))
        return jnp.sum(x * weights, axis=-2)


def critic_loss(q: Array, targets: Array, kind: Literal["mse", "squared_mean"]) -> Array:
    """Return the loss `[]` of heads `q [E, B]` against `targets [B]`."""
    if kind == "mse":
        return jnp.mean(jnp.square(q - targets))
    return jnp.mean(jnp.square(jnp.mean(jnp.abs(q - targets), axis=0)))


_DEFAULT = ResidualConfig()


@register_agent("residual")
class Residual(Agent):
    r"""Residual RL: bounded corrections of any frozen base policy.

    The base policy acts outside of the agent.

    Equations (method, and the settings that enter):
    - `combine` (`residual_scale`): $a = \mathrm{clip}(b + \rho),\quad \rho = \mathrm{scale} \tanh f(s, b)$
    - `targets` (`n_step`, `target_subset`, `noise_std`):
      $y = \sum_{j < k} \gamma^j r_j + \gamma^k m \min_{i \in S} Q^-_i(s_k, \mathrm{clip}(b_k + \mu^-(s_k,
      b_k) + \epsilon))$
    - `critic_step` (`num_critics`, `critic_loss`): $L_Q = \frac{1}{E} \sum_i (Q_i(s, a) - y)^2$
    - `actor_step` (`residual_penalty`, `online.initial_updates`):
      $L_\mu = -\frac{1}{E} \sum_i Q_i(s, \mathrm{clip}(b + \mu(s, b))) + \lambda \lVert \mu \rVert^2$
    """

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
    action_dim: int = struct.field(pytree_node=False)

    @classmethod
    def create(cls, rng: Array, observations: Any, actions: Array, config: ResidualConfig = _DEFAULT) -> Self:
        """Initialise from a key, example observations with a `base_action [B, A]`, and actions `[B, A]`.

        Raises `ConfigError` for observations without a base action.
        """
        if not isinstance(observations, Mapping) or "base_action" not in observations:
            raise ConfigError("Residual needs observations with a base_action: train it with `base`")
        rng, actor_rng, critic_rng, encoder_rng, trunk_rng = jax.random.split(rng, 5)
        action_dim = actions.shape[-1]
        critic_adam = Adam(config.critic_lr, weight_decay=config.weight_decay, clip_norm=config.clip_norm)
        actor_adam = replace(critic_adam, learning_rate=config.actor_lr)
        encoder = create_encoder(encoder_rng, config.encoder, observations, critic_adam)
        example = seen(encoder, observations, action_dim)
        policy = ResidualActor(config.actor_hidden_dims, action_dim, config.residual_scale, config.actor_layer_norm)
        actor = Model.create(actor_rng, policy, actor_adam, example)
        trunk = None
        features = example.state
        if example.patches is not None:
            module = Trunk(config.trunk_width)
            trunk = Model.create(trunk_rng, module, critic_adam, example.patches, actions, example.state)
            features = jnp.zeros((*example.state.shape[:-1], config.trunk_width + example.state.shape[-1]))
        heads = CriticEnsemble(config.critic_hidden_dims, config.num_critics, config.critic_layer_norm, "lecun")
        critic = Model.create(critic_rng, heads, critic_adam, features, actions)
        agent = cls(
            actor=actor,
            target_actor=jax.tree.map(jnp.copy, actor.params),
            critic=critic,
            target_critic=jax.tree.map(jnp.copy, critic.params),
            encoder=encoder,
            trunk=trunk,
            target_trunk=None if trunk is None else jax.tree.map(jnp.copy, trunk.params),
            updates=jnp.zeros((), jnp.int32),
            rng=rng,
            config=config,
            action_dim=action_dim,
        )
        return jax.tree.map(jnp.asarray, agent)

    def see(self, observations: Any, encoder_params: Params = None) -> Seen:
        """Return what the networks see of observations `[..., D]`."""
        return seen(self.encoder, observations, self.action_dim, encoder_params)

    def combine(self, observed: Seen, residual: Array) -> Array:
        """Return the combined action a = clamp(b + rho), `[..., A]`."""
        return jnp.clip(observed.base + residual, -1.0, 1.0)

    def values(
        self,
        observed: Seen,
        actions: Array,
        critic_params: Params,
        trunk_params: Params,
        subset_rng: Array | None = None,
    ) -> Array:
        """Return Q_i(s, a) `[E, ...]` of combined actions `[..., A]`; with images the trunk comes first.

        With `subset_rng` only `target_subset` randomly drawn critics are evaluated, `[target_subset, ...]`.
        """
        features = observed.state
        if self.trunk is not None:
            shared = self.trunk(observed.patches, actions, observed.state, params=trunk_params)
            features = jnp.concatenate([shared, observed.state], axis=-1)
        heads = self.critic.module
        assert isinstance(heads, CriticEnsemble)
        if subset_rng is not None:
            heads, critic_params = draw_members(heads, critic_params, subset_rng, self.config.target_subset)
        return jnp.asarray(heads.apply(critic_params, features, actions))

    def targets(self, rows: Batch, rng: Array) -> Array:
        """Return y = R + gamma^k c min_2 Q'(s', a') `[B]` of rows from `n_step_rows`, without gradient.

        a' = clamp(b' + mu'(s', b') + clipped noise). There is no noise in the critic warm-up.
        """
        config = self.config
        subset_rng, noise_rng = jax.random.split(rng)
        observed = self.see(rows["next_observations"])
        std = jnp.where(self.updates < config.online.initial_updates, 0.0, config.noise_std)
        noise = std * jax.random.normal(noise_rng, observed.base.shape)
        noise = jnp.clip(noise, -config.noise_clip, config.noise_clip)
        residual = jnp.clip(self.actor(observed, params=self.target_actor) + noise, -ACTION_LIMIT, ACTION_LIMIT)
        actions = self.combine(observed, residual)
        q = self.values(observed, actions, self.target_critic, self.target_trunk, subset_rng)
        targets = rows["rewards"] + rows["masks"] * jnp.min(q, axis=0)
        if config.target_clip is not None:
            targets = jnp.clip(targets, *config.target_clip)
        return jax.lax.stop_gradient(targets)

    def critic_step(self, batch: Batch, rng: Array) -> tuple[Self, Info]:
        """Step critics, trunk and encoder on windows `[B, W, ...]`, then move the targets of critics and trunk."""
        config = self.config
        now_rng, next_rng, target_rng = jax.random.split(rng, 3)
        rows = n_step_rows(batch, config.n_step, config.discount, config.timeouts)
        pad = config.encoder.shift_pad
        rows["observations"] = shift_observations(now_rng, rows["observations"], pad)
        rows["next_observations"] = shift_observations(next_rng, rows["next_observations"], pad)
        targets = self.targets(rows, target_rng)

        def loss_of(critic: Params, trunk: Params, encoder: Params) -> tuple[Array, Array]:
            q = self.values(self.see(rows["observations"], encoder), rows["actions"], critic, trunk)
            return critic_loss(q, targets, config.critic_loss), jnp.mean(q)

        trunk_params = None if self.trunk is None else self.trunk.params
        encoder_params = None if self.encoder is None else self.encoder.params
        gradient = jax.value_and_grad(loss_of, argnums=(0, 1, 2), has_aux=True)
        (loss, q), (critic_grads, trunk_grads, encoder_grads) = gradient(
            self.critic.params, trunk_params, encoder_params
        )
        critic = self.critic.apply_gradients(critic_grads)
        agent = self.replace(
            critic=critic,
            target_critic=optax.incremental_update(critic.params, self.target_critic, config.tau),
            updates=self.updates + 1,
        )
        if self.encoder is not None:
            agent = agent.replace(encoder=self.encoder.apply_gradients(encoder_grads))
        if self.trunk is not None:
            trunk = self.trunk.apply_gradients(trunk_grads)
            target_trunk = optax.incremental_update(trunk.params, self.target_trunk, config.tau)
            agent = agent.replace(trunk=trunk, target_trunk=target_trunk)
        return agent, {"critic/loss": loss, "critic/q": q, "critic/target": jnp.mean(targets)}

    def actor_step(self, batch: Batch, rng: Array) -> tuple[Self, Info]:
        """Step the actor on the first rows of windows `[B, W, ...]`, then move its target.

        The loss is -mean_i Q_i(s, clamp(b + mu(s, b))) + lambda |mu|^2; no gradient reaches the encoder.
        """
        config = self.config
        observations = jax.tree.map(lambda leaf: leaf[:, 0], batch["observations"])
        observations = shift_observations(rng, observations, config.encoder.shift_pad)
        observed = jax.lax.stop_gradient(self.see(observations))
        trunk_params = None if self.trunk is None else self.trunk.params

        def loss_of(params: Params) -> tuple[Array, Array]:
            residual = self.actor(observed, params=params)
            q = self.values(observed, self.combine(observed, residual), self.critic.params, trunk_params)
            penalty = config.residual_penalty * jnp.mean(jnp.sum(jnp.square(residual), axis=-1))
            return -jnp.mean(q) + penalty, jnp.mean(jnp.abs(residual))

        (loss, size), grads = jax.value_and_grad(loss_of, has_aux=True)(self.actor.params)
        actor = self.actor.apply_gradients(grads)
        target = optax.incremental_update(actor.params, self.target_actor, config.tau)
        return self.replace(actor=actor, target_actor=target), {"actor/loss": loss, "actor/residual": size}

    def update(self, batch: Batch) -> tuple[Self, Info]:
        """Run critic steps on leaves `[utd, B, W, ...]`, then one actor step on the last minibatch.

        The actor rests while fewer than `online.initial_updates` critic steps were taken before the call.
        """
        rng, critic_rng, actor_rng = jax.random.split(self.rng, 3)
        warmed_up = self.updates >= self.config.online.initial_updates
        start = self.replace(rng=rng)
        agent, means = each_minibatch(lambda agent, rows, key: agent.critic_step(rows, key), start, batch, critic_rng)
        last = jax.tree.map(lambda leaf: leaf[-1], batch)

        def move(agent: Self) -> tuple[Self, Info]:
            return agent.actor_step(last, actor_rng)

        def rest(agent: Self) -> tuple[Self, Info]:
            return agent, {"actor/loss": jnp.zeros(()), "actor/residual": jnp.zeros(())}

        agent, info = branch(warmed_up, move, rest, agent)
        return agent, {**means, **info}

    def q_value(self, observations: Any, actions: Array) -> Array:
        """Return the critics' mean value `[...]` of combined actions `[..., A]` at observations `[..., D]`."""
        trunk_params = None if self.trunk is None else self.trunk.params
        return self.values(self.see(observations), actions, self.critic.params, trunk_params).mean(axis=0)

    def sample_actions(
        self, observations: Any, carry: Carry, rng: Array, deterministic: bool = False
    ) -> tuple[Array, Carry]:
        """Return combined actions `[..., A]` in [-1, 1]: base plus mean residual, plus noise unless `deterministic`."""
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
        """Return the settings for a family of tasks; none of the families is in the paper.

        `paper`: "adroit" takes TwoArmBoxCleanup's settings (hands; scale 0.2, actor rate 5e-6, 500k steps), the others
        those of Can and Square (300k steps). Rewards are 0/1 on mazes and Adroit, the task's own elsewhere. Kitchen and
        locomotion bootstrap at time limits.

        `small`, for a laptop: 2 x 128, 4 critics, batch 128, warm-ups of 1000 steps and 5000 updates, and rates that
        learn in 10k steps. An actor rate of 3e-4 instead of 3e-5 saturates the residual within 500 steps, and success
        dips (seen on hand_dapg/pen/noisy).
        """
        run = {"normalize": True, "std_floor": 0.1, "action_range": "data"}
        config = ResidualConfig()
        steps = 300_000
        reward = None
        if family == "adroit":
            config = replace(config, residual_scale=0.2, actor_lr=5e-6)
            steps = 500_000
            reward = (1.0, 1.0)
        elif family in ("antmaze", "pointmaze"):
            reward = (1.0, 0.0)
        elif family in ("kitchen", "locomotion"):
            config = replace(config, timeouts="bootstrap")
        if size == "paper":
            return Preset(replace(config, critic_loss="squared_mean"), 0, steps, reward, run=run)
        config = replace(
            config,
            online=replace(config.online, random_steps=1_000, initial_updates=5_000),
            batch_size=128,
            actor_hidden_dims=(128, 128),
            critic_hidden_dims=(128, 128),
            num_critics=4,
            actor_lr=3e-5,
            critic_lr=1e-3,
            trunk_width=128,
            encoder=replace(EncoderConfig.small(), latent_dim=0),
        )
        return Preset(config, 0, 10_000, reward, run=run)
