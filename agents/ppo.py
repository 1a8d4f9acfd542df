"""PPO: proximal policy optimisation (arXiv 1707.06347) with GAE, the online phase of Uni-O4 and a baseline.

A rollout of several environments gives advantages by GAE. Epochs of minibatches then climb the clipped surrogate and
regress V on the returns, with V's change clipped too. No older data are kept. Pre-training clones the dataset's actions
and fits V to its Monte-Carlo returns. So `ppo` is "PPO from BC" with offline steps and "PPO from scratch" without them.
Settings are those of Uni-O4's released online phase (arXiv 2311.03351; Lei-Kun/Uni-O4).

| what | paper (Uni-O4) | its code | `paper` preset | default |
| --- | --- | --- | --- | --- |
| log-std online | as offline | squashed twice | once (`uni_o4`: twice) | once (`double_squash`) |
| V's output | linear | ReLU where rewards are scaled | linear (`uni_o4` locomotion: ReLU) | linear (`value_relu`) |
| scaled rewards | yes | x0.1 or by the running std of the return | locomotion x0.1 | none (`reward_scale`) |

Where we differ
- Several environments share a rollout; the release has one. Advantages are normalised over the whole rollout, as there.
- The log-probabilities of the collecting policy are computed at the update, from the parameters that collected.
- `reward_scale` is the release's "number" scaling. It holds offline and online, so V need not be fitted again at the
  switch. The "dynamic" scaling (by the running std of the discounted return) is left out.
- The code fits a V with ReLU anew to the scaled rewards; with `value_relu` ours goes on and is cut at 0. Time limits
  bootstrap online. The Monte-Carlo returns of pre-training end at time
  limits, except in failed trajectories of sparse tasks, where the failure's reward goes on for ever (Cal-QL's rule).
- The last minibatch of an epoch is padded with rows of weight 0 instead of being shorter.
- Biases begin at zero; `linear` kernels are PyTorch's.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Literal, Self

import jax
import jax.numpy as jnp
from flax import struct

from o2o.agents.minibatches import check_flat, each_minibatch
from o2o.agents.registry import register_agent
from o2o.errors import ConfigError, DatasetError
from o2o.nn.modules import Activation, Adam, BoundedGaussianActor, Init, Model, Value
from o2o.rl.losses import clipped_surrogate, generalised_advantages
from o2o.settings import AboveZero, Count, NotNegative, NotZero, Rate, Share, Widths
from o2o.types import Agent, AgentConfig, Array, Batch, Carry, Info, Needs, OnlineConfig, Params, Preset


@dataclass(frozen=True)
class PPOConfig(AgentConfig):
    """Settings of PPO."""

    actor_hidden_dims: Widths = (256, 256, 256)
    """Widths of the actor's hidden layers."""
    value_hidden_dims: Widths = (256, 256, 256)
    """Widths of V's hidden layers."""
    activation: Activation = "relu"
    """Activation of the actor's hidden layers."""
    value_init: Init = "linear"
    """Initialiser of V's kernels."""
    actor_lr: Rate = 2e-5
    """Adam's rate of the actor online."""
    value_lr: Rate = 2e-4
    """Adam's rate of V online."""
    pretrain_lr: Rate = 1e-4
    """Adam's rate of actor and V offline; the moments start anew at the switch."""
    decay_steps: Count | None = 3_000_000
    """Environment steps over which both rates fall linearly to 0; `None` for constant rates."""
    adam_eps: AboveZero = 1e-5
    """Adam's epsilon online."""
    clip: AboveZero = 0.05
    """The probability ratio is clipped to within this of 1."""
    value_clip: AboveZero | None = 0.05
    """V's change per update is clipped to this, in units of the scaled return; `None`: no clip."""
    gae_lambda: Share = 0.95
    """Lambda of the generalised advantage estimate."""
    epochs: Count = 10
    """Passes over a rollout per update."""
    entropy_coef: NotNegative = 0.01
    """Weight of the entropy bonus."""
    max_grad_norm: AboveZero = 0.5
    """Gradients of each network are scaled down to this norm."""
    double_squash: bool = False
    """Squash the log-std twice online, as Uni-O4's release: the same weights then give log-stds in (-4.4, -0.6) where
    they gave (-5, 0) offline."""
    value_relu: bool = False
    """ReLU on V's output online, as Uni-O4's release where it scales rewards; for returns of 0 and more."""
    reward_scale: Annotated[float, NotZero()] = 1.0
    """Factor of all rewards that the agent sees, offline and online (0.1: Uni-O4's "number")."""
    batch_size: Count = 128
    """Rows per minibatch."""
    online: OnlineConfig = OnlineConfig(replay="rollout", num_envs=8, rollout_steps=2048)
    """Online phase: rollouts of 2048 steps in all."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` for values out of range, or that do not go together."""
        super().__post_init__()
        if self.online.replay != "rollout":
            raise ConfigError(f"online.replay is {self.online.replay!r}; an on-policy agent needs 'rollout'")
        self.online.check_rollout()

    @property
    def needs(self) -> Needs:
        """Monte-Carlo returns, which V is fitted to in pre-training."""
        return Needs(batch_keys=("mc_returns",))


_DEFAULT = PPOConfig()


def fresh(model: Model, optimizer: Adam) -> Model:
    """Return the model with another optimiser, whose state begins anew."""
    return model.replace(optimizer=optimizer, opt_state=optimizer.build().init(model.params))


def minibatch_orders(rng: Array, size: int, batch_size: int, epochs: int) -> tuple[Array, Array]:
    """Return row indices and weights, `[epochs * minibatches, B]` each, that visit `size` rows once per epoch.

    B is the smaller of `batch_size` and `size`. The last minibatch of an epoch is padded with rows of weight 0.
    """
    count = min(batch_size, size)
    minibatches = -(-size // count)
    padding = minibatches * count - size
    weights = jnp.concatenate([jnp.ones(size), jnp.zeros(padding)]).reshape(minibatches, count)
    orders = jax.vmap(lambda key: jax.random.permutation(key, size))(jax.random.split(rng, epochs))
    orders = jnp.pad(orders, ((0, 0), (0, padding))).reshape(epochs * minibatches, count)
    return orders, jnp.tile(weights, (epochs, 1))


@register_agent("ppo")
class PPO(Agent):
    r"""Proximal policy optimisation: on-policy, from scratch or from a clone.

    Equations (method, and the settings that enter):
    - `advantages` (`gae_lambda`, `discount`):
      $\delta = r + \gamma m V(s') - V(s),\quad A_t = \sum_k (\gamma \lambda)^k \delta_{t + k}$
    - `actor_loss` (`clip`, `entropy_coef`, `epochs`):
      $\rho = \frac{\pi(a \mid s)}{\pi_{\mathrm{old}}(a \mid s)},\quad L_\pi = -\min(\rho A, \mathrm{clip}(\rho,
      1 - c, 1 + c) A) - k H$
    - `value_loss` (`value_clip`):
      $L_V = \max((V - R)^2, (V_{\mathrm{old}} + \mathrm{clip}(V - V_{\mathrm{old}}, -c_V, c_V) - R)^2)$
    - `pretrain_step` (`pretrain_lr`): $\text{offline: } -\log \pi(a \mid s),\quad (V(s) - G)^2$
    """

    actor: Model
    value: Model
    mean: Array
    """Subtracted from observations, `[D]`; zero unless Uni-O4 made the agent."""
    std: Array
    """Observations are divided by this, `[D]`."""
    seen: Array
    """Environment steps learnt from, `[]`."""
    rng: Array
    config: PPOConfig = struct.field(pytree_node=False)
    is_online: bool = struct.field(pytree_node=False, default=False)

    @classmethod
    def create(cls, rng: Array, observations: Array, actions: Array, config: PPOConfig = _DEFAULT) -> Self:
        """Initialise from a key, observations `[B, D]` and actions `[B, A]`; dict observations raise `ConfigError`."""
        check_flat(observations, "PPO")
        rng, actor_rng, value_rng = jax.random.split(rng, 3)
        policy = BoundedGaussianActor(config.actor_hidden_dims, actions.shape[-1], config.activation)
        value = Value(config.value_hidden_dims, init_scheme=config.value_init)
        optimizer = Adam(config.pretrain_lr)
        agent = cls(
            actor=Model.create(actor_rng, policy, optimizer, observations),
            value=Model.create(value_rng, value, optimizer, observations),
            mean=jnp.zeros(observations.shape[-1]),
            std=jnp.ones(observations.shape[-1]),
            seen=jnp.zeros((), jnp.int32),
            rng=rng,
            config=config,
        )
        return jax.tree.map(jnp.asarray, agent)

    @property
    def updates_per_call(self) -> int:
        """Gradient steps that one rollout is worth."""
        return self.config.epochs * -(-self.config.online.rollout_steps // self.config.batch_size)

    def scaled(self, observations: Array) -> Array:
        """Return what the networks see of observations `[..., D]`."""
        return (observations - self.mean) / self.std

    def update(self, batch: Batch) -> tuple[Self, Info]:
        """Learn from a rollout `[T, N, ...]` online; offline clone and regress on minibatches `[utd, B, ...]`.

        Raises `DatasetError` for an offline batch without `mc_returns`.
        """
        if self.is_online:
            return self.update_on_rollout(batch)
        if "mc_returns" not in batch:
            raise DatasetError("batch has no mc_returns, which PPO's V is fitted to; sample them from the dataset")
        return each_minibatch(lambda agent, rows: agent.pretrain_step(rows), self, batch)

    def pretrain_step(self, batch: Batch) -> tuple[Self, Info]:
        """Raise the likelihood of a minibatch's actions and regress V on its returns `mc_returns` `[B]`."""
        observations = self.scaled(batch["observations"])
        returns = self.config.reward_scale * batch["mc_returns"]

        def clone(params: Params) -> Array:
            return -jnp.mean(self.actor(observations, params=params).log_prob(batch["actions"]))

        def regress(params: Params) -> Array:
            return jnp.mean(jnp.square(self.value(observations, params=params) - returns))

        actor_loss, actor_grads = jax.value_and_grad(clone)(self.actor.params)
        value_loss, value_grads = jax.value_and_grad(regress)(self.value.params)
        agent = self.replace(
            actor=self.actor.apply_gradients(actor_grads),
            value=self.value.apply_gradients(value_grads),
            rng=jax.random.split(self.rng)[0],
        )
        return agent, {"actor/loss": actor_loss, "value/loss": value_loss}

    def advantages(self, rows: Batch) -> tuple[Array, Array]:
        """Return GAE and returns, `[T, N]` each, of a rollout; a time limit ends the sum and bootstraps.

        delta = r + discount * m * V(s') - V(s).
        """
        config = self.config
        values = self.value(self.scaled(rows["observations"]))
        next_values = self.value(self.scaled(rows["next_observations"]))
        deltas = config.reward_scale * rows["rewards"] + config.discount * rows["masks"] * next_values - values
        advantages = generalised_advantages(deltas, rows["ends"], config.discount, config.gae_lambda)
        return advantages, advantages + values

    def update_on_rollout(self, rows: Batch) -> tuple[Self, Info]:
        """Run all epochs of minibatches on a rollout, leaves `[T, N, ...]`."""
        config = self.config
        rng, key = jax.random.split(self.rng)
        advantages, returns = self.advantages(rows)
        size = advantages.size
        observations = self.scaled(rows["observations"])
        table = {
            "observations": observations,
            "actions": rows["actions"],
            "advantages": (advantages - advantages.mean()) / (advantages.std() + 1e-5),
            "returns": returns,
            "old_values": self.value(observations),
            "old_log_prob": self.actor(observations).log_prob(rows["actions"]),
        }
        table = jax.tree.map(lambda leaf: leaf.reshape(size, *leaf.shape[2:]), table)
        orders, weights = minibatch_orders(key, size, config.batch_size, config.epochs)
        rate = 1.0 if config.decay_steps is None else jnp.maximum(1.0 - self.seen / config.decay_steps, 0.0)

        def step(agent: Self, work: tuple[Array, Array]) -> tuple[Self, Info]:
            order, weight = work
            return agent.minibatch_step(jax.tree.map(lambda leaf: leaf[order], table), weight, rate)

        agent, infos = jax.lax.scan(step, self, (orders, weights))
        info = {name: value.mean() for name, value in infos.items()}
        info |= {"ppo/first_ratio": infos["ppo/ratio"][0], "ppo/return": returns.mean(), "ppo/rate": jnp.asarray(rate)}
        return agent.replace(rng=rng, seen=self.seen + size), info

    def minibatch_step(self, rows: Batch, weight: Array, rate: Array | float = 1.0) -> tuple[Self, Info]:
        """Step actor and V on rows `[B, ...]` with weights `[B]`, at `rate` times their learning rates."""
        actor_grads, actor_info = jax.grad(self.actor_loss, has_aux=True)(self.actor.params, rows, weight)
        value_loss, value_grads = jax.value_and_grad(self.value_loss)(self.value.params, rows, weight)
        actor = self.actor.apply_gradients(actor_grads, rate)
        value = self.value.apply_gradients(value_grads, rate)
        return self.replace(actor=actor, value=value), {**actor_info, "value/loss": value_loss}

    def actor_loss(self, params: Params, rows: Batch, weight: Array) -> tuple[Array, Info]:
        """Return the negative clipped surrogate with entropy bonus, weighted mean `[]`, and metrics."""

        def mean(x: Array) -> Array:
            return jnp.sum(weight * x) / jnp.sum(weight)

        dist = self.actor(rows["observations"], params=params)
        ratio = jnp.exp(dist.log_prob(rows["actions"]) - rows["old_log_prob"])
        entropy = mean(dist.entropy())
        surrogate = mean(clipped_surrogate(ratio, rows["advantages"], self.config.clip))
        loss = -surrogate - self.config.entropy_coef * entropy
        clipped = mean(jnp.abs(ratio - 1.0) > self.config.clip)
        info = {"actor/loss": loss, "actor/entropy": entropy, "ppo/ratio": mean(ratio), "ppo/clipped": clipped}
        return loss, info

    def value_loss(self, params: Params, rows: Batch, weight: Array) -> Array:
        """Return the weighted mean `[]` of the squared error of V to the returns.

        With `value_clip` a row counts by the larger of the errors of V and of V with its change clipped.
        """
        v = self.value(rows["observations"], params=params)
        error = jnp.square(v - rows["returns"])
        if self.config.value_clip is not None:
            old = rows["old_values"]
            width = self.config.value_clip
            clipped = old + jnp.clip(v - old, -width, width)
            error = jnp.maximum(error, jnp.square(clipped - rows["returns"]))
        return jnp.sum(weight * error) / jnp.sum(weight)

    def sample_actions(
        self, observations: Array, carry: Carry, rng: Array, deterministic: bool = False
    ) -> tuple[Array, Carry]:
        """Return actions `[..., A]`, clipped to [-1, 1], and the unused carry."""
        dist = self.actor(self.scaled(observations))
        actions = dist.mode() if deterministic else dist.sample(rng)
        return jnp.clip(actions, -1.0, 1.0), carry

    def online(self) -> Self:
        """Return the agent ready for rollouts: fresh optimisers at the online rates, the same weights.

        With `double_squash` and `value_relu` the weights mean another std and another V.
        """
        if self.is_online:
            return self
        config = self.config
        actor_adam = Adam(config.actor_lr, clip_norm=config.max_grad_norm, eps=config.adam_eps)
        actor = self.actor.replace(module=self.actor.module.clone(double_squash=config.double_squash))
        value = self.value.replace(module=self.value.module.clone(relu_output=config.value_relu))
        return self.replace(
            actor=fresh(actor, actor_adam),
            value=fresh(value, replace(actor_adam, learning_rate=config.value_lr)),
            is_online=True,
        )

    @classmethod
    def preset(cls, family: str, size: Literal["paper", "small"] = "paper") -> Preset:
        """Return the settings for a family of tasks (Uni-O4's release, `ppo_finetune/scripts`).

        `paper`: 1M steps. Locomotion has 20 epochs at 2e-5 and rewards x0.1, Adroit 10 epochs of 256 rows at 8e-6;
        families without a script follow Adroit. `small`: PPO's usual settings, which also learn without pre-training:
        2x64 tanh networks, rates of 3e-4, clip 0.2, no value clip, 30k steps.
        """
        reward_scale = 0.1 if family == "locomotion" else 1.0
        if size == "small":
            config = PPOConfig(
                actor_hidden_dims=(64, 64),
                value_hidden_dims=(64, 64),
                activation="tanh",
                actor_lr=3e-4,
                value_lr=1e-3,
                pretrain_lr=1e-3,
                decay_steps=None,
                clip=0.2,
                value_clip=None,
                entropy_coef=0.0,
                reward_scale=reward_scale,
                online=OnlineConfig(replay="rollout", num_envs=4, rollout_steps=1024),
            )
            return Preset(config, offline_steps=5_000, online_steps=30_000)
        config = PPOConfig(actor_lr=8e-6, batch_size=256, reward_scale=reward_scale)
        if family == "locomotion":
            config = PPOConfig(actor_lr=2e-5, epochs=20, reward_scale=reward_scale)
        return Preset(config, offline_steps=400_000, online_steps=1_000_000)
