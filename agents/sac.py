"""SAC and RLPD: maximum-entropy actor-critic with a critic ensemble; CQL, Cal-QL and WSRL build on the same step.

Soft Actor-Critic, arXiv 1801.01290 and 1812.05905; RLPD, "Efficient Online RL with Offline Data", arXiv 2302.02948.
Idea: a tanh-Gaussian policy climbs Q plus entropy; the critics regress to a target bootstrapped from slow copies of
(some of) them; the temperature holds the entropy at a target. RLPD adds ten LayerNorm critics, many critic steps per
environment step, and half of every minibatch from a dataset (the buffer mixes it: each minibatch arrives mixed).

Where we differ
- Actor and temperature step from the same pre-step parameters. RLPD's code steps the temperature second, but with the
  entropy and alpha of the actor step just done: the same numbers.
- SAC's defaults are those of stable-baselines3, with Xavier initialisation; its entropy target is -dim(A).
- An optimiser moves only when its loss ran; `zero_grad_steps` reproduces WSRL's code.
- Kitchen is not in RLPD's paper: its preset takes UTD 10 and three layers of 256 from the DPPO port, no more of it.
  "pointmaze" follows AntMaze. On Adroit success is terminal and the whole dataset is used; RLPD ran on without
  terminals, on 90 % of each file. Its shift of -1 on mazes is applied before storage, not to each batch.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import optax
from flax import struct

from o2o.agents.minibatches import check_counts, check_flat, minibatches_in
from o2o.errors import ConfigError
from o2o.nn.modules import SQRT2, Adam, CriticEnsemble, GaussianActor, Init, Model, Scalar, draw_members
from o2o.rl import losses
from o2o.types import Agent, AgentConfig, Array, Batch, Carry, Info, OnlineConfig, Params, Preset

Positive = Literal["exp", "softplus"]


@dataclass(frozen=True)
class SACConfig(AgentConfig):
    """Settings of SAC; the defaults are standard SAC, other agents of this family change them."""

    online: OnlineConfig = OnlineConfig(random_steps=100)
    """Schedule of the online phase."""
    actor_hidden_dims: tuple[int, ...] = (256, 256)
    """Widths of the actor's hidden layers."""
    critic_hidden_dims: tuple[int, ...] = (256, 256)
    """Widths of every critic's hidden layers."""
    actor_layer_norm: bool = False
    """LayerNorm after each hidden layer of the actor."""
    critic_layer_norm: bool = False
    """LayerNorm after each hidden layer of the critics."""
    init_scheme: Init = "xavier"
    """Initialiser of every kernel."""
    last_gain: float | None = None
    """Orthogonal gain of the last hidden layer of actor and critics; `None` for sqrt(2)."""
    output_gain: float = SQRT2
    """Orthogonal gain of the critics' output layer."""
    shared_output: bool = False
    """One output layer for all critics (WSRL's code) instead of one each."""
    std_mode: Literal["exp", "scaled", "uniform"] = "exp"
    """`exp`: log-std is a head of the state; `scaled`: with a learned scale and offset; `uniform`: one free vector."""
    log_std_range: tuple[float, float] | None = (-20.0, 2.0)
    """Clip of the log-std; `None` clips the std itself to [1e-5, 10]."""
    num_critics: int = 2
    """Members of the critic ensemble."""
    target_subset: int | None = None
    """Target members drawn for each minibatch, whose minimum is the target; `None` for all."""
    subset_replace: bool = False
    """Draw those members with replacement (WSRL's code)."""
    actor_reduce: Literal["min", "mean"] = "min"
    """How the actor loss reduces over the critics."""
    backup_entropy: bool = True
    """Subtract alpha * log pi(a'|s') in the target."""
    max_target_actions: int | None = None
    """Next actions of which the target takes the best; `None` for a single one."""
    target_entropy: float = 1.0
    """Entropy target as a multiple of -dim(A)."""
    temperature_param: Positive = "exp"
    """How alpha is made from its free parameter."""
    temperature_init: float = 1.0
    """Initial alpha."""
    temperature_objective: Literal["alpha", "log_alpha"] = "log_alpha"
    """Whether the temperature loss multiplies the entropy gap by alpha or by its logarithm (needs `exp`)."""
    entropy_on: Literal["current", "next"] = "current"
    """Where the entropy is measured: at s with the actor step's sample, or at s' with `entropy_samples` fresh ones."""
    entropy_samples: int = 1
    """Samples per next state of that measurement."""
    actor_batch: Literal["last", "all"] = "last"
    """Rows of the actor step: the last minibatch, or all `utd * B`."""
    joint_single: bool = False
    """With one critic step per call, actor and temperature step beside the critic, from the same parameters."""
    bc_weight: float = 0.0
    """Weight w of behaviour cloning in the actor loss, (1 - w) L_pi + w L_BC."""
    actor_lr: float = 3e-4
    """Adam's rate of the actor."""
    critic_lr: float = 3e-4
    """Adam's rate of the critics."""
    temperature_lr: float = 3e-4
    """Adam's rate of the temperature."""
    tau: float = 0.005
    """Weight of the new parameters in the target's average, after every critic step."""
    zero_grad_steps: bool = False
    """Replica of the WSRL code: step the Adam of networks whose loss did not run with zero gradients."""

    def __post_init__(self) -> None:
        """Check the counts, and the settings that contradict each other."""
        check_counts(self, "num_critics", "entropy_samples", "max_target_actions")
        subset = self.target_subset
        if subset is not None and (subset < 1 or (not self.subset_replace and subset > self.num_critics)):
            raise ConfigError(f"target_subset is {subset}; expected 1 to num_critics={self.num_critics}, or None")
        if self.temperature_objective == "log_alpha" and self.temperature_param != "exp":
            raise ConfigError("temperature_objective='log_alpha' needs temperature_param='exp'; set it, or use 'alpha'")
        if self.temperature_init <= 0:
            raise ConfigError(f"temperature_init is {self.temperature_init}; expected a positive number, such as 1.0")


@dataclass(frozen=True)
class RLPDConfig(SACConfig):
    """Settings of RLPD; the defaults are the paper's for D4RL locomotion."""

    online: OnlineConfig = OnlineConfig(utd_ratio=20, random_steps=5000, replay="mixed", offline_ratio=0.5)
    """Schedule of the online phase."""
    critic_layer_norm: bool = True
    """LayerNorm after each hidden layer of the critics."""
    num_critics: int = 10
    """Members of the critic ensemble."""
    target_subset: int | None = 2
    """Target members drawn for each minibatch, whose minimum is the target; `None` for all."""
    actor_reduce: Literal["min", "mean"] = "mean"
    """How the actor loss reduces over the critics."""
    target_entropy: float = 0.5
    """Entropy target as a multiple of -dim(A)."""
    temperature_objective: Literal["alpha", "log_alpha"] = "alpha"
    """Whether the temperature loss multiplies the entropy gap by alpha or by its logarithm (needs `exp`)."""


def positive(value: Array, param: Positive) -> Array:
    """Map a free parameter to a positive multiplier; `exp` is capped at 1e6 as in Cal-QL's code."""
    return jnp.minimum(jnp.exp(value), 1e6) if param == "exp" else jax.nn.softplus(value)


def positive_model(rng: Array, initial: float, param: Positive, learning_rate: float) -> Model:
    """Return the `Model` of a scalar that `positive` maps to `initial`."""
    free = math.log(initial) if param == "exp" else math.log(math.expm1(initial))
    return Model.create(rng, Scalar(free), Adam(learning_rate))


def build_actor(action_dim: int, config: SACConfig) -> GaussianActor:
    """Return the actor's definition for actions `[A]`."""
    low, high = config.log_std_range or (None, None)
    bounds: dict[str, Any] = {} if config.log_std_range is None else {"std_min": 0.0, "std_max": float("inf")}
    return GaussianActor(
        config.actor_hidden_dims, action_dim, config.actor_layer_norm, init_scheme=config.init_scheme,
        last_gain=config.last_gain, std_mode=config.std_mode, log_std_min=low, log_std_max=high, **bounds,
    )  # fmt: skip


def build_critic(config: SACConfig) -> CriticEnsemble:
    """Return the critics' definition."""
    return CriticEnsemble(
        config.critic_hidden_dims, config.num_critics, config.critic_layer_norm, config.init_scheme,
        config.last_gain, config.output_gain, config.shared_output,
    )  # fmt: skip


class SAC(Agent):
    """Soft actor-critic with a critic ensemble."""

    actor: Model
    critic: Model
    target_critic: Params
    temperature: Model
    rng: Array
    config: SACConfig = struct.field(pytree_node=False)

    @classmethod
    def create(cls, rng: Array, observations: Array, actions: Array, config: SACConfig = SACConfig()) -> Self:
        """Initialise from a key and example observations `[B, D]` and actions `[B, A]`."""
        check_flat(observations, cls.__name__)
        rng, actor_rng, critic_rng, temperature_rng = jax.random.split(rng, 4)
        actor = Model.create(actor_rng, build_actor(actions.shape[-1], config), Adam(config.actor_lr), observations)
        critic = Model.create(critic_rng, build_critic(config), Adam(config.critic_lr), observations, actions)
        temperature = positive_model(
            temperature_rng, config.temperature_init, config.temperature_param, config.temperature_lr
        )
        parts: dict[str, Any] = {"target_critic": jax.tree.map(jnp.copy, critic.params), "temperature": temperature}
        return jax.tree.map(jnp.asarray, cls(actor=actor, critic=critic, **parts, rng=rng, config=config))

    def alpha(self, params: Params | None = None) -> Array:
        """Return the entropy temperature, `[]`."""
        return positive(self.temperature(params=params), self.config.temperature_param)

    def next_values(self, next_observations: Array, rng: Array) -> Array:
        """Return v'(s') `[B]`: minimum of the drawn target members, best of the actions, entropy bonus if set."""
        config = self.config
        member_rng, action_rng = jax.random.split(rng)
        critic: Any = self.critic.module
        module, params = draw_members(
            critic, self.target_critic, member_rng, config.target_subset, config.subset_replace
        )
        count = () if config.max_target_actions is None else (config.max_target_actions,)
        actions, log_prob = self.actor(next_observations).sample_and_log_prob(action_rng, count)
        q: Any = module.apply(params, next_observations, actions)
        values = jnp.min(q, axis=0)
        if config.max_target_actions is not None:
            best = jnp.argmax(values, axis=0, keepdims=True)
            values = jnp.take_along_axis(values, best, axis=0)[0]
            log_prob = jnp.take_along_axis(log_prob, best, axis=0)[0]
        return values - self.alpha() * log_prob if config.backup_entropy else values

    def critic_loss(self, params: Params, batch: Batch, targets: Array, rng: Array) -> tuple[Array, Info]:
        """Return the critics' loss `[]` on leaves `[B, ...]`; `rng` serves agents that add terms."""
        q = self.critic(batch["observations"], batch["actions"], params=params)
        loss = losses.critic_loss(q, targets)
        return loss, {"critic/loss": loss, "critic/q": jnp.mean(q), "critic/target": jnp.mean(targets)}

    def critic_step(self, batch: Batch, rng: Array) -> tuple[Self, Info]:
        """Step the critics on one minibatch `[B, ...]`, then move the targets towards them."""
        target_rng, loss_rng = jax.random.split(rng)
        values = self.next_values(batch["next_observations"], target_rng)
        targets = losses.td_target(batch["rewards"], batch["masks"], values, self.config.discount)
        grads, info = jax.grad(self.critic_loss, has_aux=True)(self.critic.params, batch, targets, loss_rng)
        critic = self.critic.apply_gradients(grads)
        target = optax.incremental_update(critic.params, self.target_critic, self.config.tau)
        return self.replace(critic=critic, target_critic=target), info

    def policy_step(self, batch: Batch, rng: Array, critic: Model) -> tuple[Self, Info]:
        """Step actor and temperature on rows `[B, ...]`, both from the present parameters, judged by `critic`."""
        config, alpha = self.config, self.alpha()
        actor_rng, entropy_rng = jax.random.split(rng)

        def actor_loss(params: Params) -> tuple[Array, Array]:
            policy = self.actor(batch["observations"], params=params)
            actions, log_prob = policy.sample_and_log_prob(actor_rng)
            q = critic(batch["observations"], actions)
            q = jnp.min(q, axis=0) if config.actor_reduce == "min" else jnp.mean(q, axis=0)
            loss = losses.sac_actor_loss(log_prob, q, alpha)
            if config.bc_weight:
                cloning = -jnp.mean(policy.log_prob(batch["actions"]))
                loss = (1.0 - config.bc_weight) * loss + config.bc_weight * cloning
            return loss, -jnp.mean(log_prob)

        (loss, entropy), grads = jax.value_and_grad(actor_loss, has_aux=True)(self.actor.params)
        if config.entropy_on == "next":
            policy = self.actor(batch["next_observations"])
            entropy = -jnp.mean(policy.sample_and_log_prob(entropy_rng, (config.entropy_samples,))[1])
        target_entropy = -config.target_entropy * batch["actions"].shape[-1]

        def temperature_loss(params: Params) -> Array:
            free = config.temperature_objective == "log_alpha"
            multiplier = self.temperature(params=params) if free else self.alpha(params)
            return losses.temperature_loss(multiplier, entropy, target_entropy)

        dual_loss, dual_grads = jax.value_and_grad(temperature_loss)(self.temperature.params)
        actor, temperature = self.actor.apply_gradients(grads), self.temperature.apply_gradients(dual_grads)
        info = {"actor/loss": loss, "actor/entropy": entropy, "temperature/alpha": alpha, "temperature/loss": dual_loss}
        return self.replace(actor=actor, temperature=temperature), info

    def update(self, batch: Batch) -> tuple[Self, Info]:
        """Run `utd` critic steps and one actor and temperature step on leaves `[utd, B, ...]`."""
        config, utd = self.config, minibatches_in(batch)
        rng, critic_rng, policy_rng = jax.random.split(self.rng, 3)
        replica = config.zero_grad_steps and not (utd == 1 and config.joint_single)

        def step(agent: Self, inputs: tuple[Batch, Array]) -> tuple[Self, Info]:
            agent, info = agent.critic_step(*inputs)
            if replica:
                agent = agent.replace(actor=zero_step(agent.actor), temperature=zero_step(agent.temperature))
            return agent, info

        agent, infos = jax.lax.scan(step, self.replace(rng=rng), (batch, jax.random.split(critic_rng, utd)))
        rows = jax.tree.map(lambda leaf: leaf[-1], batch)
        if config.actor_batch == "all":
            rows = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), batch)
        critic = self.critic if utd == 1 and config.joint_single else agent.critic
        agent, info = agent.policy_step(rows, policy_rng, critic)
        if replica:
            agent = agent.replace(critic=zero_step(agent.critic))
        return agent, {**jax.tree.map(jnp.mean, infos), **info}

    def sample_actions(
        self, observations: Array, carry: Carry, rng: Array, deterministic: bool = False
    ) -> tuple[Array, Carry]:
        """Return actions `[..., A]` in [-1, 1] for observations `[..., D]`: a sample, or tanh of the mean."""
        policy = self.actor(observations)
        return policy.mode() if deterministic else policy.sample(rng), carry

    @classmethod
    def preset(cls, family: str, size: Literal["paper", "small"] = "paper") -> Preset:
        """Return standard SAC for a task family; `small` shrinks networks and budget."""
        config, steps = (shrink(SACConfig(), utd_ratio=1), 10_000) if size == "small" else (SACConfig(), 1_000_000)
        return Preset(config, 0, steps)


class RLPD(SAC):
    """SAC with RLPD's defaults: LayerNorm ensemble, high update ratio, half of each minibatch from the dataset."""

    @classmethod
    def create(cls, rng: Array, observations: Array, actions: Array, config: SACConfig = RLPDConfig()) -> Self:
        """Initialise from a key and example observations `[B, D]` and actions `[B, A]`."""
        return super().create(rng, observations, actions, config)

    @classmethod
    def preset(cls, family: str, size: Literal["paper", "small"] = "paper") -> Preset:
        """Return RLPD's settings for a task family (arXiv 2302.02948); `small` for a laptop."""
        config, steps, reward = RLPDConfig(), 250_000, None
        deep = {"actor_hidden_dims": (256, 256, 256), "critic_hidden_dims": (256, 256, 256), "backup_entropy": False}
        if family in ("antmaze", "pointmaze"):
            config, steps, reward = replace(config, **deep, target_subset=1), 300_000, (1.0, -1.0)
        elif family == "adroit":
            config, steps, reward = replace(config, **deep), 1_000_000, (1.0, 0.0)
        elif family == "kitchen":
            config = replace(config, **deep, online=replace(config.online, utd_ratio=10))
        if size == "small":
            return Preset(shrink(config, utd_ratio=4), 0, 8_000, reward)
        return Preset(config, 0, steps, reward)


def zero_step(model: Model) -> Model:
    """Return `model` after an optimiser step with zero gradients: stale momentum still moves it."""
    return model.apply_gradients(jax.tree.map(jnp.zeros_like, model.params))


def shrink(config: Any, utd_ratio: int) -> Any:
    """Return `config` at laptop size: 2 x 128 wide, at most 4 critics, batch 128, rates 3e-4, starts by step 1000."""
    online = replace(
        config.online, utd_ratio=utd_ratio, warmup_steps=min(config.online.warmup_steps, 1000),
        random_steps=min(config.online.random_steps, 1000), min_rows=min(config.online.min_rows, 128),
    )  # fmt: skip
    return replace(
        config, batch_size=128, online=online, actor_hidden_dims=(128, 128), critic_hidden_dims=(128, 128),
        num_critics=min(config.num_critics, 4), actor_lr=3e-4, critic_lr=3e-4, temperature_lr=3e-4,
        entropy_samples=min(config.entropy_samples, 4),
        max_target_actions=config.max_target_actions and min(config.max_target_actions, 4),
    )  # fmt: skip
