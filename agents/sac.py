"""SAC and RLPD: maximum-entropy actor-critic with a critic ensemble; CQL, Cal-QL and WSRL build on the same step.

Soft Actor-Critic, arXiv 1801.01290 and 1812.05905; RLPD, "Efficient Online RL with Offline Data", arXiv 2302.02948.
Idea: a tanh-Gaussian policy climbs Q plus entropy; the critics regress to a target bootstrapped from slow copies of
(some of) them; the temperature holds the entropy at a target. RLPD adds ten LayerNorm critics, many critic steps per
environment step, and half of every minibatch from a dataset (the buffer mixes it: each minibatch arrives mixed).

| what | paper (RLPD) | its code | `paper` preset | default |
| --- | --- | --- | --- | --- |
| Adroit's data | - | 90 % of each file, no terminals | the same (`ADROIT_DATA`) | all; success is terminal |
| Adroit's episodes | - | run on after success | the same | end at success |
| entropy target | -dim(A) / 2 | the same | the same | RLPD the same, SAC -dim(A) |
| OGBench | - | QAM's: chunks of 5, mean - rho std of all critics, one update a step | the same | - |
| optimisers whose loss did not run | rest | rest | rest; WSRL's step | rest (`zero_grad_steps`) |

Where we differ
- Actor and temperature step from the same pre-step parameters. RLPD's code steps the temperature second, but with the
  entropy and alpha of the actor step just done: the same numbers.
- SAC's defaults are those of stable-baselines3, with Xavier initialisation.
- No pixels (RLPD on V-D4RL: DrQ's encoder, one target member, UTD 10): these agents see flat states.
- Kitchen is not in RLPD's paper: its preset takes UTD 10 and three layers of 256 from the DPPO port, no more of it.
  "pointmaze" follows AntMaze. The shift of -1 on mazes is applied before storage, not to each batch.

Options that exist because a published code has them, and presets need them
- `shared_output`, `subset_replace`, `log_std_range=None`: WSRL's networks and its draw of target critics.
- `joint_policy_step`, `next_entropy_samples`: the order of steps, and the place of the entropy, in the codes of Cal-QL
  and WSRL.
- `temperature_param`, `temperature_objective`: SAC and Cal-QL learn log alpha, RLPD alpha, WSRL alpha by softplus.
- `std_mode="scaled"`, `output_gain`, `policy_output_gain`: the networks of Cal-QL's and FamO2O's codes.
- `zero_grad_steps`: WSRL's published curves were made with it.

Options for a switch from pre-training that loses less, all off
- `critic_warmup` "td": a critic-only phase on the warm-up's rows, the policy frozen (as in ResFiT, arXiv 2509.19301).
- `critic_warmup` "mc": there the critics are refitted to the Monte-Carlo returns of the policy's own episodes.
- `actor_lr_warmup`: the actor's first steps are small.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import struct

from o2o.agents import ogbench
from o2o.agents.chunked import ByChunks
from o2o.agents.minibatches import check_flat, each_minibatch, minibatches_in
from o2o.agents.registry import register_agent
from o2o.errors import ConfigError
from o2o.nn.distributions import TanhNormal
from o2o.nn.kernels import branch
from o2o.nn.modules import (
    SQRT2,
    Activation,
    Adam,
    CriticEnsemble,
    GaussianActor,
    Init,
    Model,
    Scalar,
    draw_members,
    where_leading,
)  # fmt: skip
from o2o.rl import losses
from o2o.settings import AboveZero, Amount, Average, Count, Interval, NotNegative, Rate, Real, Share, Widths
from o2o.types import Agent, AgentConfig, Array, Batch, Carry, ChunkedConfig, Info, Needs, OnlineConfig, Params, Preset

ADROIT_DATA: dict[str, Any] = {"terminate_on_success": False, "data_share": 0.9}
"""Fields of a `Preset`: RLPD's code takes 90 % of each Adroit file, without terminals, and runs on after success."""
Positive = Literal["exp", "softplus"]
Actor = TypeVar("Actor", bound=GaussianActor)


@dataclass(frozen=True)
class SACConfig(AgentConfig):
    """Settings of SAC; the defaults are standard SAC, other agents of this family change them."""

    online: OnlineConfig = OnlineConfig(random_steps=100)
    """Schedule of the online phase."""
    actor_hidden_dims: Widths = (256, 256)
    """Widths of the actor's hidden layers."""
    critic_hidden_dims: Widths = (256, 256)
    """Widths of every critic's hidden layers."""
    actor_layer_norm: bool = False
    """LayerNorm after each hidden layer of the actor."""
    critic_layer_norm: bool = False
    """LayerNorm after each hidden layer of the critics."""
    init_scheme: Init = "xavier"
    """Initialiser of every kernel."""
    last_gain: NotNegative | None = None
    """Orthogonal gain of the last hidden layer of actor and critics; `None` for sqrt(2)."""
    output_gain: AboveZero = SQRT2
    """Orthogonal gain of the critics' output layer."""
    policy_output_gain: NotNegative = SQRT2
    """Orthogonal gain of the actor's output layer."""
    shared_output: bool = False
    """One output layer for all critics (WSRL's code) instead of one each."""
    std_mode: Literal["exp", "scaled", "uniform"] = "exp"
    """`exp`: log-std is a head of the state; `scaled`: with a learned scale and offset; `uniform`: one free vector."""
    log_std_range: Interval | None = (-20.0, 2.0)
    """Clip of the log-std; `None` clips the std itself to [1e-5, 10]."""
    num_critics: Count = 2
    """Members of the critic ensemble."""
    target_subset: Count | None = None
    """Target members drawn for each minibatch, whose minimum is the target; `None` for all."""
    subset_replace: bool = False
    """Draw those members with replacement (WSRL's code)."""
    actor_reduce: Literal["min", "mean"] = "min"
    """How the actor loss reduces over the critics."""
    backup_entropy: bool = True
    """Subtract alpha * log pi(a'|s') in the target."""
    max_target_actions: Count | None = None
    """Next actions of which the target takes the best; `None` for a single one."""
    target_entropy: Real = 1.0
    """Entropy target as a multiple of -dim(A)."""
    temperature_param: Positive = "exp"
    """How alpha is made from its free parameter."""
    temperature_init: AboveZero = 1.0
    """Initial alpha."""
    temperature_objective: Literal["alpha", "log_alpha"] = "log_alpha"
    """Whether the temperature loss multiplies the entropy gap by alpha or by its logarithm (needs `exp`)."""
    next_entropy_samples: Count | None = None
    """The temperature sees the entropy of this many samples at each next state; `None`: that of the actor's loss."""
    joint_policy_step: bool = False
    """True: actor and temperature step on the rows of all minibatches of a call, `utd * B`; in a call with one
    minibatch they are judged by the critics from before their step. False: on the last minibatch, by the new critics.
    """
    bc_weight: Share = 0.0
    """Weight w of behaviour cloning in the actor loss, (1 - w) L_pi + w L_BC."""
    actor_lr: Rate = 3e-4
    """Adam's rate of the actor."""
    critic_lr: Rate = 3e-4
    """Adam's rate of the critics."""
    temperature_lr: Rate = 3e-4
    """Adam's rate of the temperature."""
    tau: Average = 0.005
    """Weight of the new parameters in the target's average, after every critic step."""
    zero_grad_steps: bool = False
    """As WSRL's code: networks whose loss did not run take an Adam step with gradients of zero."""
    critic_warmup: Literal["off", "td", "mc"] = "off"
    """What learns in the `online.initial_updates`. `off`: everything. `td`: the critics alone, which evaluate the
    frozen policy by their usual target. `mc`: the critics alone, refitted to the Monte-Carlo returns of the warm-up's
    episodes (recalibration); online rows are then drawn from finished episodes only."""
    actor_lr_warmup: Amount = 0
    """Critic steps over which the actor's rate rises linearly from 0 to `actor_lr` once the actor learns online."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` for values out of range, or that do not go together."""
        super().__post_init__()
        subset = self.target_subset
        if subset is not None and not self.subset_replace and subset > self.num_critics:
            raise self.refuse("target_subset", f"1 to num_critics={self.num_critics}, or None")
        if self.temperature_objective == "log_alpha" and self.temperature_param != "exp":
            raise ConfigError("temperature_objective='log_alpha' needs temperature_param='exp'; set it, or use 'alpha'")

    @property
    def needs(self) -> Needs:
        """What an agent with these settings needs of its data and its run."""
        return Needs(batch_keys=("mc_returns",)) if self.critic_warmup == "mc" else Needs()

    @property
    def critic_only_steps(self) -> int:
        """Critic steps at the beginning of the online phase in which actor and temperature rest."""
        return 0 if self.critic_warmup == "off" else self.online.initial_updates

    def check_switch(self, prefix: str = "config.") -> None:
        """Raise `ConfigError` for a critic warm-up without updates; `prefix` is that of the names of the settings."""
        if self.critic_warmup != "off" and not self.online.initial_updates:
            raise ConfigError(
                f"{prefix}critic_warmup is {self.critic_warmup!r} and config.online.initial_updates 0: set both, such "
                "as 2000 updates, or leave both"
            )


@dataclass(frozen=True)
class RLPDConfig(SACConfig, ChunkedConfig):
    """Settings of RLPD; the defaults are the paper's for D4RL locomotion."""

    online: OnlineConfig = OnlineConfig(utd_ratio=20, random_steps=5000, replay="mixed", offline_ratio=0.5)
    """Schedule of the online phase."""
    critic_layer_norm: bool = True
    """LayerNorm after each hidden layer of the critics."""
    num_critics: Count = 10
    """Members of the critic ensemble."""
    target_subset: Count | None = 2
    """Target members drawn for each minibatch, whose minimum is the target; `None` for all."""
    actor_reduce: Literal["min", "mean"] = "mean"
    """How the actor loss reduces over the critics."""
    target_entropy: Real = 0.5
    """Entropy target as a multiple of -dim(A)."""
    temperature_objective: Literal["alpha", "log_alpha"] = "alpha"
    """Whether the temperature loss multiplies the entropy gap by alpha or by its logarithm (needs `exp`)."""
    pessimism: NotNegative | None = None
    """Target and actor take mean - pessimism * std (rho) over the critics in place of `target_subset`'s minimum and of
    `actor_reduce`; it needs `target_subset` None, for all critics."""
    activation: Activation = "relu"
    """Activation of actor and critics."""
    norm_last: bool = False
    """LayerNorm behind each activation of the critics instead of before it."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` for values out of range, or that do not go together."""
        super().__post_init__()
        if self.pessimism is not None and self.target_subset is not None:
            raise self.refuse("target_subset", "None with a pessimism, which is for all critics")
        if self.chunk > 1 and self.critic_warmup == "mc":
            raise self.refuse("critic_warmup", "off or td with chunks: Monte-Carlo returns are those of single rows")

    @property
    def needs(self) -> Needs:
        """SAC's, in windows of one chunk."""
        return replace(super().needs, window=self.chunk)


def positive(value: Array, param: Positive) -> Array:
    """Map a free parameter to a positive multiplier; `exp` is capped at 1e6 as in Cal-QL's code."""
    return jnp.minimum(jnp.exp(value), 1e6) if param == "exp" else jax.nn.softplus(value)


def positive_model(rng: Array, initial: float, param: Positive, learning_rate: float) -> Model:
    """Return the `Model` of a scalar that `positive` maps to `initial`."""
    free = math.log(initial) if param == "exp" else initial + math.log(-math.expm1(-initial))
    return Model.create(rng, Scalar(free), Adam(learning_rate))


def build_actor(action_dim: int, config: SACConfig, kind: type[Actor] = GaussianActor, **extra: Any) -> Actor:
    """Return the definition of an actor for actions `[A]`, of class `kind` with the fields `extra` of its own."""
    if config.log_std_range is not None:
        low, high = config.log_std_range
        extra |= {"log_std_min": low, "log_std_max": high, "std_min": 0.0, "std_max": float("inf")}
    return kind(
        hidden_dims=config.actor_hidden_dims,
        action_dim=action_dim,
        layer_norm=config.actor_layer_norm,
        init_scheme=config.init_scheme,
        last_gain=config.last_gain,
        output_gain=config.policy_output_gain,
        std_mode=config.std_mode,
        **extra,
    )


def build_critic(config: SACConfig) -> CriticEnsemble:
    """Return the critics' definition."""
    return CriticEnsemble(
        hidden_dims=config.critic_hidden_dims,
        num=config.num_critics,
        layer_norm=config.critic_layer_norm,
        init_scheme=config.init_scheme,
        last_gain=config.last_gain,
        output_gain=config.output_gain,
        shared_output=config.shared_output,
    )


@register_agent("sac")
class SAC(Agent):
    r"""Soft actor-critic with a critic ensemble: climbs Q plus entropy.

    Equations (method, and the settings that enter):
    - `targets` (`target_subset`, `backup_entropy`, `max_target_actions`):
      $y = r + \gamma m (\min_{i \in S} Q^-_i(s', a') - \alpha \log \pi(a' \mid s')),\; a' \sim \pi(\cdot \mid
      s')$
    - `critic_loss` (`num_critics`, `critic_layer_norm`): $L_Q = \frac{1}{E} \sum_i (Q_i(s, a) - y)^2$
    - `actor_loss` (`actor_reduce`):
      $L_\pi = \alpha \log \pi(\tilde a \mid s) - Q(s, \tilde a),\; \tilde a \sim \pi(\cdot \mid s)$
    - `update_temperature` (`target_entropy`): $L_\alpha = \alpha (H - \bar H),\; \bar H = -c \dim A$
    """

    actor: Model
    critic: Model
    target_critic: Params
    temperature: Model
    rng: Array
    config: SACConfig = struct.field(pytree_node=False)
    online_steps: Array | None = None
    """Critic steps of the online phase, int32 `[]`; None offline, and where no setting asks for them."""

    @classmethod
    def create(cls, rng: Array, observations: Array, actions: Array, config: SACConfig = SACConfig()) -> Self:
        """Initialise from a key and example observations `[B, D]` and actions `[B, A]`."""
        check_flat(observations, cls.__name__)
        config.check_switch()
        rng, actor_rng, critic_rng, temperature_rng = jax.random.split(rng, 4)
        actor = Model.create(actor_rng, build_actor(actions.shape[-1], config), Adam(config.actor_lr), observations)
        critic = Model.create(critic_rng, build_critic(config), Adam(config.critic_lr), observations, actions)
        temperature = positive_model(
            temperature_rng, config.temperature_init, config.temperature_param, config.temperature_lr
        )
        agent = cls(
            actor=actor,
            critic=critic,
            target_critic=jax.tree.map(jnp.copy, critic.params),
            temperature=temperature,
            rng=rng,
            config=config,
        )
        return jax.tree.map(jnp.asarray, agent)

    def policy(self, batch: Batch, params: Params | None = None) -> TanhNormal:
        """Return pi(.|s) at the batch's observations `[..., D]`, with `params` in place of the actor's own."""
        return self.actor(batch["observations"], params=params)

    def next_policy(self, batch: Batch) -> TanhNormal:
        """Return pi(.|s') at the batch's next observations `[..., D]`."""
        return self.actor(batch["next_observations"])

    def alpha(self, params: Params | None = None) -> Array:
        """Return the entropy temperature, `[]`."""
        return positive(self.temperature(params=params), self.config.temperature_param)

    def targets(self, batch: Batch, rng: Array) -> Array:
        """Return the critics' targets y `[B]` on leaves `[B, ...]`.

        y = r + discount * m * (min Q'(s', a') - alpha log pi(a'|s')), a' ~ pi(.|s'), over target critics drawn once
        (RLPD, arXiv 2302.02948, algorithm 1). With `max_target_actions` a' is the best of several samples; without
        `backup_entropy` there is no entropy term.
        """
        config = self.config
        member_rng, action_rng = jax.random.split(rng)
        samples = () if config.max_target_actions is None else (config.max_target_actions,)
        next_actions, log_prob = self.next_policy(batch).sample_and_log_prob(action_rng, samples)
        ensemble: Any = self.critic.module
        critic, drawn = draw_members(
            ensemble, self.target_critic, member_rng, config.target_subset, config.subset_replace
        )
        q: Any = critic.apply(drawn, batch["next_observations"], next_actions)
        next_q = self.target_value(q)
        if samples:
            best = jnp.argmax(next_q, axis=0, keepdims=True)
            next_q, log_prob = (jnp.take_along_axis(each, best, axis=0)[0] for each in (next_q, log_prob))
        if config.backup_entropy:
            next_q = next_q - self.alpha() * log_prob
        return losses.td_target(batch["rewards"], batch["masks"], next_q, config.discount)

    def target_value(self, q: Array) -> Array:
        """Return the value `[...]` that targets take of the drawn target critics' `q [E, ...]`: the least."""
        return jnp.min(q, axis=0)

    def critic_loss(self, params: Params, batch: Batch, targets: Array, rng: Array) -> tuple[Array, Info]:
        """Return mean (Q(s, a) - y)^2 over critics and rows `[]`, and metrics; `rng` is for agents that add terms."""
        q = self.critic(batch["observations"], batch["actions"], params=params)
        loss = losses.critic_loss(q, targets, batch.get("valid"))
        return loss, {"critic/loss": loss, "critic/q": jnp.mean(q), "critic/target": jnp.mean(targets)}

    def update_critic(self, batch: Batch, rng: Array) -> tuple[Self, Info]:
        """Step the critics on one minibatch `[B, ...]`, then move the target critics towards them."""
        target_rng, loss_rng = jax.random.split(rng)
        targets = self.targets(batch, target_rng)
        if self.resting is not None and self.config.critic_warmup == "mc":
            targets = jnp.where(self.resting, batch["mc_returns"], targets)
        grads, info = jax.grad(self.critic_loss, has_aux=True)(self.critic.params, batch, targets, loss_rng)
        critic = self.critic.apply_gradients(grads)
        target_critic = optax.incremental_update(critic.params, self.target_critic, self.config.tau)
        return self.replace(critic=critic, target_critic=target_critic), info

    def policy_value(self, batch: Batch, actions: Array, critic: Model) -> Array:
        """Return what the actor climbs `[B]`: minimum or mean of the critics at the batch's states and `actions`."""
        return self.reduced(critic(batch["observations"], actions))

    def reduced(self, q: Array) -> Array:
        """Return the minimum or, with `actor_reduce="mean"`, the mean `[...]` over the critics' values `[E, ...]`."""
        return jnp.min(q, axis=0) if self.config.actor_reduce == "min" else jnp.mean(q, axis=0)

    def q_value(self, observations: Array, actions: Array) -> Array | None:
        """Return the reduced critics' value `[...]` of actions `[..., A]` at observations `[..., D]`."""
        return self.reduced(self.critic(observations, actions))

    def actor_loss(self, params: Params, batch: Batch, rng: Array, critic: Model) -> tuple[Array, Info]:
        """Return mean (alpha log pi(a|s) - Q(s, a)) `[]`, a ~ pi(.|s), and metrics (arXiv 1812.05905, eq. 7)."""
        policy, weight = self.policy(batch, params), self.config.bc_weight
        actions, log_prob = policy.sample_and_log_prob(rng)
        loss = losses.sac_actor_loss(log_prob, self.policy_value(batch, actions, critic), self.alpha())
        if weight:
            loss = (1.0 - weight) * loss - weight * jnp.mean(policy.log_prob(batch["actions"]))
        return loss, {"actor/loss": loss, "actor/entropy": -jnp.mean(log_prob)}

    def update_actor(self, batch: Batch, rng: Array, critic: Model) -> tuple[Model, Info]:
        """Return the actor after a step on rows `[B, ...]`, judged by `critic`, and metrics."""
        grads, info = jax.grad(self.actor_loss, has_aux=True)(self.actor.params, batch, rng, critic)
        return self.actor.apply_gradients(grads, self.actor_rate), info

    @property
    def resting(self) -> Array | None:
        """Whether actor and temperature rest in the present call, bool `[]`; None: they never do."""
        if self.online_steps is None or not self.config.critic_only_steps:
            return None
        return self.online_steps < self.config.critic_only_steps

    @property
    def actor_rate(self) -> Array | None:
        """Part of the actor's rate at which it learns now, `[]`; None: all of it."""
        if self.online_steps is None or not self.config.actor_lr_warmup:
            return None
        learnt = self.online_steps - self.config.critic_only_steps
        return jnp.clip((learnt + 1) / self.config.actor_lr_warmup, 0.0, 1.0)

    def update_temperature(self, entropy: Array, action_dim: int) -> tuple[Model, Info]:
        """Return the temperature after a step on alpha (H - target), H the `entropy` `[]`, and metrics."""
        target = -self.config.target_entropy * action_dim

        def loss(params: Params) -> Array:
            log_alpha = self.config.temperature_objective == "log_alpha"
            multiplier = self.temperature(params=params) if log_alpha else self.alpha(params)
            return losses.temperature_loss(multiplier, entropy, target)

        value, grads = jax.value_and_grad(loss)(self.temperature.params)
        info = {"actor/entropy": entropy, "temperature/alpha": self.alpha(), "temperature/loss": value}
        return self.temperature.apply_gradients(grads), info

    def update_policy(self, batch: Batch, rng: Array, critic: Model) -> tuple[Self, Info]:
        """Step actor and temperature on rows `[B, ...]`, both from the present parameters, judged by `critic`."""
        actor_rng, entropy_rng = jax.random.split(rng)
        actor, info = self.update_actor(batch, actor_rng, critic)
        entropy, samples = info["actor/entropy"], self.config.next_entropy_samples
        if samples is not None:
            entropy = -jnp.mean(self.next_policy(batch).sample_and_log_prob(entropy_rng, (samples,))[1])
        temperature, more = self.update_temperature(entropy, batch["actions"].shape[-1])
        return self.replace(actor=actor, temperature=temperature), {**info, **more}

    def update(self, batch: Batch) -> tuple[Self, Info]:
        """Run `utd` critic steps and one step of actor and temperature on leaves `[utd, B, ...]`."""
        config, utd = self.config, minibatches_in(batch)
        rng, critic_rng, policy_rng = jax.random.split(self.rng, 3)
        together = config.joint_policy_step and utd == 1
        idle_steps = config.zero_grad_steps and not together
        resting = self.resting

        def step(agent: Self, rows: Batch, rng: Array) -> tuple[Self, Info]:
            agent, info = agent.update_critic(rows, rng)
            if idle_steps:
                moved = zero_step(agent.actor, self.actor_rate), zero_step(agent.temperature)
                if resting is not None:
                    moved = where_leading(resting, (agent.actor, agent.temperature), moved)
                agent = agent.replace(actor=moved[0], temperature=moved[1])
            return agent, info

        def learn(agent: Self) -> tuple[Self, Info]:
            agent, info = agent.update_policy(rows, policy_rng, self.critic if together else agent.critic)
            return agent.replace(critic=zero_step(agent.critic)) if idle_steps else agent, info

        agent, info = each_minibatch(step, self.replace(rng=rng), batch, critic_rng)
        if config.joint_policy_step:
            rows = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), batch)
        else:
            rows = jax.tree.map(lambda leaf: leaf[-1], batch)
        if resting is None:
            agent, policy_info = learn(agent)
        else:
            shapes = jax.eval_shape(lambda agent: learn(agent)[1], agent)
            nothing = {name: jnp.zeros(shape.shape, shape.dtype) for name, shape in shapes.items()}
            agent, policy_info = branch(~resting, learn, lambda agent: (agent, nothing), agent)
        if self.online_steps is not None:
            agent = agent.replace(online_steps=self.online_steps + utd)
        return agent, {**info, **policy_info}

    def online(self) -> Self:
        """Return the agent for the online phase; where settings ask for it, it begins to count its critic steps."""
        counts = self.config.critic_only_steps or self.config.actor_lr_warmup
        if not counts or self.online_steps is not None:
            return self
        return self.replace(online_steps=jnp.zeros((), jnp.int32))

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


@register_agent("rlpd")
class RLPD(ByChunks, SAC):
    r"""RLPD: SAC with ten critics, many updates a step, half of each minibatch from the dataset.

    Equations (method, and the settings that enter):
    - `targets` (`num_critics`, `target_subset`, `backup_entropy`):
      $y = r + \gamma m (\min_{i \in S} Q^-_i(s', a') - \alpha \log \pi(a' \mid s')),\; \lvert S \rvert = 2
      \text{ of } 10$
    - `update` (`online.replay`, `online.offline_ratio`):
      $B = B_{\mathrm{data}} \cup B_{\mathrm{online}}, \text{ half each}$
    - `update` (`online.utd_ratio`, `actor_reduce`):
      $20 \text{ critic steps for one of } L_\pi = \alpha \log \pi - \frac{1}{E} \sum_i Q_i$
    """

    config: RLPDConfig = struct.field(pytree_node=False)  # pyright: ignore[reportIncompatibleVariableOverride]

    @classmethod
    def create(cls, rng: Array, observations: Array, actions: Array, config: SACConfig = RLPDConfig()) -> Self:
        """Initialise from a key and example observations `[B, D]` and actions `[B, A]`."""
        own: Any = config
        agent = super().create(rng, observations, jnp.tile(actions, own.chunk), config)
        actor: Any = agent.actor.module
        critic: Any = agent.critic.module
        actor = actor.clone(activation=own.activation)  # the parameters are the same
        critic = critic.clone(activation=own.activation, norm_last=own.norm_last)
        return agent.replace(actor=agent.actor.replace(module=actor), critic=agent.critic.replace(module=critic))

    def target_value(self, q: Array) -> Array:
        """Return the value `[...]` of the target critics' `q [E, ...]`: the least, or mean - rho std."""
        rho = self.config.pessimism
        return super().target_value(q) if rho is None else losses.lower_bound(q, rho)

    def policy_value(self, batch: Batch, actions: Array, critic: Model) -> Array:
        """Return what the actor climbs `[B]`: the critics' mean (`actor_reduce`), or mean - rho std."""
        rho = self.config.pessimism
        if rho is None:
            return super().policy_value(batch, actions, critic)
        return losses.lower_bound(critic(batch["observations"], actions), rho)

    def q_value(self, observations: Array, actions: Array) -> Array | None:
        """Return the reduced critics' value `[...]` of actions `[..., A]`; None: the critics judge whole chunks."""
        if self.config.chunk > 1:
            return None
        if self.config.pessimism is None:
            return super().q_value(observations, actions)
        return losses.lower_bound(self.critic(observations, actions), self.config.pessimism)

    @classmethod
    def preset(cls, family: str, size: Literal["paper", "small"] = "paper") -> Preset:
        """Return RLPD's settings for a task family (arXiv 2302.02948); `small` for a laptop.

        OGBench's tasks have the settings of the published curves (`o2o.agents.ogbench`).
        """
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
        own = ADROIT_DATA if family == "adroit" else {}
        return Preset(config, 0, steps, reward, tasks=_ogbench(), **own)


def _ogbench() -> dict[str, Preset]:
    """Return RLPD's settings of OGBench's tasks (QAM's table): no pre-training, one update a step."""
    config = RLPDConfig(
        **ogbench.CHUNKS,
        actor_hidden_dims=ogbench.WIDTHS,
        critic_hidden_dims=ogbench.WIDTHS,
        activation="gelu",
        norm_last=True,
        target_subset=None,
        pessimism=0.5,
        backup_entropy=False,
        online=replace(RLPDConfig().online, utd_ratio=1),
    )
    return ogbench.presets(config, {}, updates=0)


def zero_step(model: Model, rate: Array | None = None) -> Model:
    """Return `model` after an optimiser step with zero gradients, at `rate` times its own: stale momentum moves it."""
    return model.apply_gradients(jax.tree.map(jnp.zeros_like, model.params), rate)


def shrink(config: Any, utd_ratio: int, rate: float = 3e-4) -> Any:
    """Return `config` at laptop size: batch 128, networks of `shrink_networks`, all rates `rate`."""
    online = shrink_online(config.online, utd_ratio)
    return replace(shrink_networks(with_rate(config, rate)), batch_size=128, online=online)


def shrink_online(online: OnlineConfig, utd_ratio: int) -> OnlineConfig:
    """Return the schedule with this update ratio and with updates that start by step 1000."""
    return replace(
        online,
        utd_ratio=utd_ratio,
        warmup_steps=min(online.warmup_steps, 1000),
        random_steps=min(online.random_steps, 1000),
        min_rows=min(online.min_rows, 128),
    )


def shrink_networks(config: Any) -> Any:
    """Return `config` with networks 2 x 128 wide, at most 4 critics and at most 4 sampled actions."""
    return replace(
        config,
        actor_hidden_dims=(128, 128),
        critic_hidden_dims=(128, 128),
        num_critics=min(config.num_critics, 4),
        next_entropy_samples=config.next_entropy_samples and min(config.next_entropy_samples, 4),
        max_target_actions=config.max_target_actions and min(config.max_target_actions, 4),
    )


def with_rate(config: Any, rate: float) -> Any:
    """Return `config` with one learning rate for actor, critics and temperature."""
    return replace(config, actor_lr=rate, critic_lr=rate, temperature_lr=rate)
