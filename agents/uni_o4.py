"""Uni-O4: one on-policy objective offline and online (arXiv 2311.03351; the release is Lei-Kun/Uni-O4).

Offline, in four phases:
1. critic: V and Q of the data by expectile regression, frozen afterwards;
2. dynamics: an ensemble of dynamics models, frozen afterwards;
3. clone: an ensemble of cloned policies, kept apart by a diversity term;
4. improve: clipped policy-gradient steps of every policy against its reference, with advantages of the frozen critic.
   At intervals the off-line evaluation AM-Q, the mean of Q along roll-outs in the model, judges every policy. A policy
   that beats its best score so far becomes its own new reference.

Online the best policy goes on as plain PPO (`o2o.agents.ppo`) with the offline V: no old data, no Q, no constraint.
A member is one policy of the ensemble.

| what | paper | release | `paper` preset | default |
| --- | --- | --- | --- | --- |
| diversity of the clones | a divergence | only scales the gradient | `code_heuristic` | the paper's, capped |
| dataset's time limits | - | terminals | terminals | bootstrap (`timeouts_bootstrap`) |
| clip of the improvement | falls | stays after 200 steps | stays after 200 steps | falls to 0 (`freeze_clip_at`) |
| starts and noise of AM-Q | - | new each time | new each time | the same (`common_noise`) |
| AM-Q's score | sum over the horizon | mean over steps alive | mean | mean; small: sum (`judge_sum`) |
| log-std online | as offline | squashed twice | squashed twice | once (`double_squash`) |
| V online, scaled rewards | - | ReLU on its output, fitted anew | ReLU, goes on | linear (`value_relu`) |
| steps and settings by task | - | scripts | `SCRIPTS`, by the dataset's id | - |

With `code_heuristic` members differ by their start only. A best score over many noisy ones drifts upwards, so by
default all policies see the same starts and noise; new noise is shared by the members.

Where we differ
- States are standardised by std + 0.001, and constant dimensions only centred; the release adds 1e-10.
- The dynamics models learn all pairs within an episode and none across episodes; see `o2o.nn.dynamics` for the rest.
- A roll-out is lost if it is not finite, leaves the data's range a hundredfold, or leaves the range of the task's rule.
  It keeps its last Q to the end; in the release the rule would end it. A policy with more than a tenth of its roll-outs
  lost is put back to its reference with a fresh optimiser, and `amq/diverged` counts it.
- Datasets mixed by weights: minibatches and AM-Q's start states follow the weights. Dynamics models, their hold-out
  rows and all statistics use every row alike.
- Policies are judged at the improvement's end too.
- Dataset actions are clipped to 0.99999 on every task (release: Adroit), sampled actions never. The Q loss is a mean
  over both critics, the same step under Adam. Biases begin at zero. `analytic_kl` sums over action dimensions.
- Candidates for the online phase play the resets of the last offline evaluation and are judged by success where there
  is one. Their steps do not count as environment steps. The release looks at its last offline evaluations.
- Tasks and rewards are the toolkit's (Adroit binary, Kitchen minus 4), not D4RL's.
- Adroit's rewards are not scaled; the scripts of pen and hammer scale its dense ones.
- `reward_scale` holds in both phases, so V is not fitted again for scaled rewards. Left out are the release's "dynamic"
  scaling (x0.1 stands for it), its SARSA critic (medium-expert sets), filtered cloning (AntMaze) and KL term in the
  improvement.
- Up to the last phase the first clone acts in evaluations; then the policy with the best last score. The release
  reports all policies and a mixture.
- `update` is for use without phases: one step of critic and clones on given minibatches.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from o2o.agents.minibatches import check_flat, each_minibatch
from o2o.agents.ppo import PPO, PPOConfig
from o2o.agents.registry import register_agent
from o2o.data.normalizer import Normalizer
from o2o.nn.distributions import Normal
from o2o.nn.dynamics import Dynamics, holdout_rows
from o2o.nn.modules import Adam, BoundedGaussianActor, CriticEnsemble, Model, Value, where_leading
from o2o.nn.terminations import RULES, Termination
from o2o.rl.losses import clipped_surrogate, critic_loss, expectile_loss, td_target
from o2o.settings import AboveZero, Amount, Average, Between, Count, NotNegative, Rate, Share, Widths
from o2o.types import Agent, Array, Batch, Carry, Info, Needs, OnlineConfig, Params, Phase, Preset

LOWEST = float(np.finfo(np.float32).min)
"""Score of a policy that cannot be judged."""
FAR = 100.0
"""A roll-out is lost if its state is further than this many standard deviations from the data's mean."""
LOST_SHARE = 0.1
"""A policy is put back to its reference if more than this share of its roll-outs is lost."""
UNSCALED: dict[str, Any] = {"reward_scale": 1.0, "value_relu": False}
PEN: dict[str, Any] = {"actor_lr": 3e-6, "epochs": 8}
SCRIPTS: dict[str, dict[str, dict[str, Any]]] = {
    "locomotion": {
        "halfcheetah medium replay": {"activation": "tanh", "normalize_states": False, "actor_lr": 3e-5},
        "halfcheetah medium expert": {"epochs": 10},
        "halfcheetah": {"activation": "tanh", "actor_lr": 3e-5, "epochs": 30},
        "hopper medium expert": {"actor_lr": 6e-6, "epochs": 5},
        "hopper": {"epochs": 10},
        "walker2d medium replay": {**UNSCALED, "actor_lr": 1e-5, "critic_steps": 500_000},
        "walker2d": {**UNSCALED, "actor_lr": 1e-5},
    },
    "adroit": {
        "pen human": {**PEN, "dynamics_patience": 20, "critic_steps": 1_000_000, "clone_steps": 200_000},
        "pen": PEN,
        "door human": {"dynamics_patience": 20, "improve_steps": 5_000},
        "hammer human": {"dynamics_patience": 20, "activation": "tanh", "normalize_states": True},
        "hammer": {"activation": "tanh", "normalize_states": True},
        "relocate human": {"dynamics_patience": 20, "activation": "tanh"},
        "relocate": {"activation": "tanh"},
    },
    "kitchen": {
        "complete": {"critic_steps": 500_000, "clone_steps": 100_000, "normalize_states": False, "horizon": 10},
        "mixed": {"diversity_coef": 0.0},
    },
    "antmaze": {"umaze diverse": {"horizon": 70}},
}
"""What the release's script of a task (words of the dataset's id) changes in the `paper` preset of its family; of a
sweep one value. The first match counts."""
Diversity = Literal["none", "code_heuristic", "analytic_kl", "sampled_kl"]


@dataclass(frozen=True)
class UniO4Config(PPOConfig):
    """Settings of Uni-O4; those of `PPOConfig` are its online phase's."""

    value_hidden_dims: Widths = (512, 512, 512)
    """Widths of V's hidden layers, offline and online."""
    critic_hidden_dims: Widths = (1024, 1024)
    """Widths of the two Q-functions' hidden layers."""
    normalize_states: bool = True
    """Standardise states by the dataset's mean and std, which then stay with the agent."""
    num_policies: Count = 4
    """Policies in the ensemble."""
    offline_batch_size: Count = 512
    """Rows per minibatch offline."""
    expectile: Between = 0.7
    """Weight of positive errors in V's loss, in (0, 1)."""
    tau: Average = 0.005
    """Weight of the new parameters in the target critics' average, on every second step."""
    timeouts_bootstrap: bool = True
    """Bootstrap at the dataset's time limits; False treats them as terminals (the release)."""
    diversity: Diversity = "sampled_kl"
    """Term that keeps the clones apart. `sampled_kl`: as the paper means it. `code_heuristic`: as released, which
    only scales the gradient. `analytic_kl`: the divergence from the nearest other clone. `none`: no term."""
    diversity_coef: NotNegative = 0.1
    """Weight alpha of that term."""
    diversity_cap: AboveZero = 10.0
    """Largest divergence that counts, per state; the divergence itself has no upper bound."""
    dynamics_hidden_dims: Widths = (200, 200, 200, 200)
    """Widths of the dynamics models' hidden layers."""
    dynamics_members: Count = 7
    """Dynamics models."""
    dynamics_elites: Count = 5
    """Dynamics models that roll-outs sample: those with the least hold-out error."""
    dynamics_lr: Rate = 1e-3
    """Learning rate of the dynamics models, Adam."""
    dynamics_patience: Count = 5
    """Validations in a row without an improvement after which the dynamics models stay as they are."""
    validate_every: Count = 1000
    """Gradient steps from one validation of the dynamics models to the next."""
    termination: Termination | Literal["auto"] = "auto"
    """Rule that ends a roll-out. `auto`: the task's rule if a preset knows one, otherwise `learned`."""
    improve_lr: Rate = 1e-4
    """Learning rate of the improvement, Adam, falling linearly to 0 over it."""
    improve_clip: AboveZero = 0.25
    """Clip of the probability ratio in the improvement, falling linearly to 0 over it."""
    freeze_clip_at: Share | None = None
    """Share of the improvement after which its clip stays as it is; `None`: never. The release: 200 of 10,000 steps."""
    improve_grad_norm: AboveZero = 0.5
    """Largest norm of a policy's gradient in the improvement."""
    judge_every: Count = 100
    """Gradient steps of the improvement from one off-line evaluation to the next."""
    horizon: Count = 1000
    """Steps H of a roll-out in the model."""
    judge_rows: Count = 512
    """Roll-outs of one off-line evaluation."""
    judge_sum: bool = False
    """Score a roll-out by the sum of its Q-values over the horizon (the paper). False: the mean of all Q-values of
    roll-outs still alive (the release)."""
    common_noise: bool = True
    """Judge all policies, every time, on the same start states and noise; False draws new ones (the release)."""
    candidates: Count = 3
    """Policies with the best scores that are tried in the environment before the online phase; 1 trusts the scores."""
    critic_steps: Amount = 2_000_000
    """Gradient steps of V and Q."""
    dynamics_steps: Amount = 200_000
    """Gradient steps of the dynamics models."""
    clone_steps: Amount = 400_000
    """Gradient steps of cloning."""
    improve_steps: Amount = 10_000
    """Gradient steps of improvement. A run whose offline steps are not the sum of these four stretches all of them."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` for values out of range, or that do not go together."""
        super().__post_init__()
        if self.dynamics_elites > self.dynamics_members:
            raise self.refuse("dynamics_elites", f"1 to dynamics_members={self.dynamics_members}")
        if self.candidates > self.num_policies:
            raise self.refuse("candidates", f"1 to num_policies={self.num_policies}")

    @property
    def needs(self) -> Needs:
        """Raw observations: the agent standardises them itself."""
        return Needs(raw_observations=True)

    @property
    def offline_steps(self) -> int:
        """Gradient steps of the four phases."""
        return self.critic_steps + self.dynamics_steps + self.clone_steps + self.improve_steps


def gaussian_kl(left: Normal, right: Normal) -> Array:
    """Return KL(left || right), summed over action dimensions, `[...]`."""
    ratio = jnp.square(left.std / right.std)
    return 0.5 * jnp.sum(ratio + jnp.square((left.mean - right.mean) / right.std) - 1.0 - jnp.log(ratio), axis=-1)


def clone_loss(
    params: Params,
    member: Array,
    policies: Model,
    observations: Array,
    actions: Array,
    rng: Array,
    config: UniO4Config,
) -> Array:
    """Return a member's loss `[]`: -mean[ln pi_i(a | s) + alpha KL(pi_i || f)] at dataset states and actions.

    `params` are the member's, `member` `[]` its index, `policies` all members stacked, `[n, ...]`. Observations
    `[B, D]` are standardised, actions are `[B, A]`. f is the normalised upper envelope of the other members; no
    gradient reaches them. `sampled_kl` estimates the divergence with one action of the member and a gradient through
    it. `analytic_kl` takes the divergence from the member that is likeliest at the dataset's action. `code_heuristic`
    evaluates the envelope at the dataset's action, without gradient, which only scales the loss.
    """
    own = policies(observations, params=params)
    log_prob = own.log_prob(actions)
    if config.diversity == "none" or config.num_policies == 1:
        return -jnp.mean(log_prob)
    frozen = jax.lax.stop_gradient(policies.params)
    every: Any = jax.vmap(lambda member_params: policies(observations, params=member_params))(frozen)
    itself = jnp.where(jnp.arange(config.num_policies) == member, -jnp.inf, 0.0)[:, None]

    def others_log_prob(at: Array) -> Array:
        return jax.vmap(lambda policy: policy.log_prob(at))(every) + itself

    if config.diversity == "code_heuristic":
        divergence = log_prob - jax.lax.stop_gradient(others_log_prob(actions).max(axis=0))
    elif config.diversity == "analytic_kl":
        nearest = others_log_prob(actions).argmax(axis=0)
        other = jax.tree.map(lambda leaf: leaf[nearest, jnp.arange(nearest.shape[0])], every)
        divergence = jnp.minimum(gaussian_kl(own, other), config.diversity_cap)
    else:
        sample, sample_log_prob = own.sample_and_log_prob(rng)
        divergence = jnp.minimum(sample_log_prob - others_log_prob(sample).max(axis=0), config.diversity_cap)
    return -jnp.mean(log_prob + config.diversity_coef * divergence)


class RollOuts(NamedTuple):
    """Roll-outs of one policy in the model, at one step."""

    states: Array
    """Raw states `[B, D]`; they stand still once a roll-out has ended."""
    alive: Array
    """Whether a roll-out has neither ended nor been lost, bool `[B]`."""
    lost: Array
    """Whether it is lost: its state is no state of the task, bool `[B]`."""
    q: Array
    """Q at the last step at which it was alive, `[B]`."""


_DEFAULT = UniO4Config()


@register_agent("uni_o4")
class UniO4(Agent):
    r"""Uni-O4: improves an ensemble of clones against frozen critics, then PPO.

    This is the agent before the switch; `online()` returns a `PPO`.

    Equations (method, and the settings that enter):
    - `critic_step` (`expectile`, `critic_steps`): $L_V, L_Q \text{ of IQL}$
    - `clone_step` (`num_policies`, `diversity`, `diversity_coef`):
      $L_i = -\log \pi_i(a \mid s) - \alpha\, \mathrm{KL}(\pi_i \parallel \max_{j \ne i} \pi_j)$
    - `improve_loss` (`improve_lr`, `improve_clip`):
      $L_i = -\min(\rho A, \mathrm{clip}(\rho, 1 - c, 1 + c) A),\; A = \min Q - V$
    - `amq` (`horizon`, `judge_rows`, `judge_sum`):
      $\hat J(\pi) = \sum_{t < H} Q(s_t, \pi(s_t)),\; s_{t+1} \sim \hat T; \text{ a better policy
      becomes its own reference}$
    """

    value: Model
    critic: Model
    target_critic: Params
    policies: Model
    """The members, stacked, `[n, ...]`, with their optimiser states."""
    reference: Params
    """The policies that the improvement starts from and returns to, `[n, ...]`."""
    best: Array
    """Best score of each member, `[n]`."""
    scores: Array
    """Last score of each member, `[n]`."""
    replaced: Array
    """How often each member became its own new reference, `[n]`."""
    diverged: Array
    """How often each member was put back, `[n]`."""
    dynamics: Dynamics
    mean: Array
    """Subtracted from states, `[D]`."""
    std: Array
    """States are divided by this, `[D]`."""
    steps: Array
    """Gradient steps of the critic, `[]`."""
    chosen: Array
    """Member that acts, `[]`; -1: the one with the best score."""
    rng: Array
    config: UniO4Config = struct.field(pytree_node=False)

    @classmethod
    def create(cls, rng: Array, observations: Array, actions: Array, config: UniO4Config = _DEFAULT) -> Self:
        """Initialise from a key, observations `[B, D]` and actions `[B, A]`; dict observations raise `ConfigError`."""
        check_flat(observations, "Uni-O4")
        rng, value_rng, critic_rng, policy_rng, dynamics_rng = jax.random.split(rng, 5)
        count = config.num_policies
        optimizer = Adam(config.pretrain_lr)
        actor = BoundedGaussianActor(config.actor_hidden_dims, actions.shape[-1], config.activation)
        members = [Model.create(key, actor, optimizer, observations) for key in jax.random.split(policy_rng, count)]
        policies = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
        value = Value(config.value_hidden_dims, init_scheme=config.value_init)
        critics = CriticEnsemble(config.critic_hidden_dims, 2, init_scheme=config.value_init)
        critic = Model.create(critic_rng, critics, optimizer, observations, actions)
        dynamics = Dynamics.create(
            dynamics_rng,
            observations,
            actions,
            hidden_dims=config.dynamics_hidden_dims,
            num=config.dynamics_members,
            elites=config.dynamics_elites,
            learning_rate=config.dynamics_lr,
            patience=config.dynamics_patience,
            termination="learned" if config.termination == "auto" else config.termination,
        )
        agent = cls(
            value=Model.create(value_rng, value, optimizer, observations),
            critic=critic,
            target_critic=jax.tree.map(jnp.copy, critic.params),
            policies=policies,
            reference=jax.tree.map(jnp.copy, policies.params),
            best=jnp.full((count,), LOWEST, jnp.float32),
            scores=jnp.zeros(count),
            replaced=jnp.zeros(count, jnp.int32),
            diverged=jnp.zeros(count, jnp.int32),
            dynamics=dynamics,
            mean=jnp.zeros(observations.shape[-1]),
            std=jnp.ones(observations.shape[-1]),
            steps=jnp.zeros((), jnp.int32),
            chosen=jnp.full((), -1, jnp.int32),
            rng=rng,
            config=config,
        )
        return jax.tree.map(jnp.asarray, agent)

    def phases(self, steps: int) -> tuple[Phase, ...]:
        """Return critic, dynamics, cloning and improvement, stretched to `steps` gradient steps in all."""
        config = self.config
        kind = type(self)
        whole = config.offline_steps
        critic_steps = config.critic_steps * steps // whole
        dynamics_steps = config.dynamics_steps * steps // whole
        clone_steps = config.clone_steps * steps // whole
        return (
            Phase("critic", critic_steps, kind.fit_critic, enter=kind.take_statistics),
            Phase(
                "dynamics",
                dynamics_steps,
                kind.fit_dynamics,
                enter=kind.begin_dynamics,
                check=kind.validate_dynamics,
                check_every=config.validate_every,
            ),
            Phase("clone", clone_steps, kind.fit_clones),
            Phase(
                "improve",
                steps - critic_steps - dynamics_steps - clone_steps,
                kind.improve,
                enter=kind.begin_improvement,
                check=kind.judge,
                check_every=config.judge_every,
            ),
        )

    def draw(self, data: Any) -> tuple[Self, Batch, Array]:
        """Return the agent with its next key, rows `[B, ...]` of the dataset, and a key for one step on them."""
        rng, rows_rng, step_rng = jax.random.split(self.rng, 3)
        return self.replace(rng=rng), data.sample(rows_rng, (self.config.offline_batch_size,)), step_rng

    def scaled(self, observations: Array) -> Array:
        """Return what V, Q and the policies see of observations `[..., D]`."""
        return (observations - self.mean) / self.std

    def policy(self, params: Params, observations: Array) -> Normal:
        """Return one member's distribution at scaled observations `[..., D]`."""
        return self.policies(observations, params=params)

    # Phase 1, critic: V and Q of the data.

    def take_statistics(self, data: Any) -> Self:
        """Return the agent with the mean and standard deviation of the dataset's states, if it standardises them.

        Raises `DatasetError` for a dataset with too few rows to hold some out.
        """
        holdout_rows(data.size)
        if not self.config.normalize_states:
            return self
        statistics = Normalizer.fit(data.rows["observations"])
        return self.replace(mean=statistics.mean, std=statistics.std)

    def fit_critic(self, data: Any, progress: Array) -> tuple[Self, Info]:
        """Run one gradient step of V and Q on rows of the dataset."""
        agent, batch, _ = self.draw(data)
        return agent.critic_step(batch)

    def critic_step(self, batch: Batch) -> tuple[Self, Info]:
        """Step V, then Q with the new V, on rows `[B, ...]`; the target critics follow on every second step.

        V's loss is the expectile loss of min Q'(s, a) - V(s). Q's is the mean of (Q_i - y)^2, y = r + discount * m *
        V(s').
        """
        config = self.config
        observations = self.scaled(batch["observations"])
        next_observations = self.scaled(batch["next_observations"])
        actions = batch["actions"]
        masks = batch["masks"]
        if not config.timeouts_bootstrap:
            masks = masks * (1.0 - batch["ends"])
        target_q = self.critic(observations, actions, params=self.target_critic).min(axis=0)

        def value_loss(params: Params) -> Array:
            return expectile_loss(target_q - self.value(observations, params=params), config.expectile)

        v_loss, value_grads = jax.value_and_grad(value_loss)(self.value.params)
        value = self.value.apply_gradients(value_grads)
        y = td_target(config.reward_scale * batch["rewards"], masks, value(next_observations), config.discount)

        def q_loss(params: Params) -> Array:
            return critic_loss(self.critic(observations, actions, params=params), y)

        loss, critic_grads = jax.value_and_grad(q_loss)(self.critic.params)
        critic = self.critic.apply_gradients(critic_grads)
        steps = self.steps + 1
        moved = optax.incremental_update(critic.params, self.target_critic, config.tau)
        target_critic = jax.tree.map(lambda new, old: jnp.where(steps % 2 == 0, new, old), moved, self.target_critic)
        agent = self.replace(value=value, critic=critic, target_critic=target_critic, steps=steps)
        return agent, {"value/loss": v_loss, "critic/loss": loss, "critic/target": y.mean()}

    # Phase 2, dynamics.

    def begin_dynamics(self, data: Any) -> Self:
        """Return the agent whose dynamics models know the dataset's statistics and hold-out rows."""
        return self.replace(dynamics=self.dynamics.prepare(data))

    def fit_dynamics(self, data: Any, progress: Array) -> tuple[Self, Info]:
        """Run one gradient step of the dynamics models."""
        rng, key, _ = jax.random.split(self.rng, 3)
        dynamics, info = self.dynamics.train_step(data, key)
        best = self.dynamics.best_error.mean()
        known = best < jnp.finfo(best.dtype).max  # there is none before the first validation
        info["dynamics/best"] = jnp.where(known, best, info["dynamics/error"])
        return self.replace(rng=rng, dynamics=dynamics), info

    def validate_dynamics(self, data: Any) -> Self:
        """Return the agent with the best weights that its dynamics models had on the hold-out rows."""
        return self.replace(dynamics=self.dynamics.validate(data))

    # Phase 3, cloning.

    def fit_clones(self, data: Any, progress: Array) -> tuple[Self, Info]:
        """Run one gradient step of every clone on rows of the dataset."""
        agent, batch, step_rng = self.draw(data)
        return agent.clone_step(batch, step_rng)

    def clone_step(self, batch: Batch, rng: Array) -> tuple[Self, Info]:
        """Step the members one after the other, in random order, on rows `[B, ...]`; each sees the steps before."""
        config = self.config
        observations = self.scaled(batch["observations"])
        order_rng, loss_rng = jax.random.split(rng)
        order = jax.random.permutation(order_rng, config.num_policies)

        def step(policies: Model, work: tuple[Array, Array]) -> tuple[Model, Array]:
            member, key = work
            own = jax.tree.map(lambda leaf: leaf[member], policies)
            loss, grads = jax.value_and_grad(clone_loss)(
                own.params, member, policies, observations, batch["actions"], key, config
            )
            stepped = own.apply_gradients(grads)
            return jax.tree.map(lambda every, new: every.at[member].set(new), policies, stepped), loss

        policies, losses = jax.lax.scan(step, self.policies, (order, jax.random.split(loss_rng, config.num_policies)))
        return self.replace(policies=policies), {"clone/loss": losses.mean()}

    # Phase 4, improvement.

    def begin_improvement(self, data: Any) -> Self:
        """Return the agent whose clones are their own references, scored, with fresh optimisers."""
        copies = jax.tree.map(jnp.copy, self.policies.params)
        fresh = jax.tree.map(jnp.zeros_like, self.policies.opt_state)
        agent = self.replace(reference=copies, policies=self.policies.replace(opt_state=fresh))
        scores, lost = jax.jit(lambda a: a.amq(a.policies.params, data))(agent)
        scores = jnp.where(lost, LOWEST, scores)
        return agent.replace(best=scores, scores=jnp.copy(scores))

    def improve(self, data: Any, progress: Array) -> tuple[Self, Info]:
        """Run one policy-gradient step of every policy, at `progress` `[]` in [0, 1) of the phase."""
        agent, batch, step_rng = self.draw(data)
        return agent.improve_step(batch, step_rng, progress)

    def advantages(self, observations: Array, actions: Array) -> Array:
        """Return min Q - V at scaled observations `[B, D]`, normalised over the batch `[B]`, without gradient."""
        raw = self.critic(observations, actions).min(axis=0) - self.value(observations)
        return jax.lax.stop_gradient((raw - raw.mean()) / (raw.std() + 1e-10))

    def improve_loss(
        self, params: Params, reference: Params, observations: Array, rng: Array, clip: Array
    ) -> tuple[Array, Info]:
        """Return a member's negative clipped surrogate at scaled dataset states; its reference draws the actions."""
        actions, old_log_prob = jax.lax.stop_gradient(self.policy(reference, observations).sample_and_log_prob(rng))
        advantages = self.advantages(observations, actions)
        ratio = jnp.exp(self.policy(params, observations).log_prob(actions) - old_log_prob)
        loss = -jnp.mean(clipped_surrogate(ratio, advantages, clip))
        return loss, {"improve/loss": loss, "improve/clipped": jnp.mean(jnp.abs(ratio - 1.0) > clip)}

    def improve_step(self, batch: Batch, rng: Array, progress: Array) -> tuple[Self, Info]:
        """Step every member against its reference on the same states; rate and clip fall linearly with `progress`."""
        config = self.config
        observations = self.scaled(batch["observations"])
        clip_progress = progress if config.freeze_clip_at is None else jnp.minimum(progress, config.freeze_clip_at)
        clip = config.improve_clip * (1.0 - clip_progress)
        rate = config.improve_lr / config.pretrain_lr * (1.0 - progress)  # relative to the optimiser's own rate
        limit = optax.clip_by_global_norm(config.improve_grad_norm)

        def step(policy: Model, reference: Params, key: Array) -> tuple[Model, Info]:
            grads, info = jax.grad(self.improve_loss, has_aux=True)(policy.params, reference, observations, key, clip)
            grads, _ = limit.update(grads, limit.init(policy.params))
            return policy.apply_gradients(grads, rate), info

        policies, infos = jax.vmap(step)(self.policies, self.reference, jax.random.split(rng, config.num_policies))
        info = {name: value.mean() for name, value in infos.items()}
        info["amq/score"] = self.scores.mean()
        info["amq/best"] = self.best.max()
        info["amq/replaced"] = self.replaced.mean()
        info["amq/diverged"] = self.diverged.sum().astype(jnp.float32)
        return self.replace(policies=policies), info

    # The off-line evaluation AM-Q and what follows from it.

    def roll_out(self, params: Params, starts: Array, rng: Array) -> tuple[RollOuts, Array, Array]:
        """Play one policy's mean actions in the model for H steps from raw states `starts [B, D]`.

        Returns the roll-outs at their end, the sum of Q over those that count at each step `[H]`, and their number
        `[H]`. A roll-out counts while it is alive. A lost one goes on counting with its last Q, so that being lost is
        no gain where Q is below 0.
        """
        rule = RULES.get(self.dynamics.termination, RULES["never"])
        rows, dim = starts.shape
        middle = self.dynamics.mean[:dim]
        width = self.dynamics.std[:dim]

        def step(now: RollOuts, key: Array) -> tuple[RollOuts, tuple[Array, Array]]:
            observations = self.scaled(now.states)
            actions = jnp.clip(self.policy(params, observations).mode(), -1.0, 1.0)
            q = jnp.where(now.alive, self.critic(observations, actions).min(axis=0), now.q)
            counted = now.alive | now.lost
            states, _, ended = self.dynamics.step(key, now.states, actions)
            inside = jnp.isfinite(states) & (jnp.abs((states - middle) / width) < FAR)
            wild = ~jnp.all(inside, axis=-1) | rule.out_of_range(states)
            alive = now.alive & ~ended & ~wild
            later = RollOuts(
                states=jnp.where(alive[:, None], states, now.states),
                alive=alive,
                lost=now.lost | (now.alive & wild),
                q=q,
            )
            return later, (jnp.where(counted, q, 0.0).sum(), counted.sum().astype(jnp.float32))

        every = jnp.ones(rows, bool)
        start = RollOuts(states=starts, alive=every, lost=~every, q=jnp.zeros(rows))
        end, (totals, counts) = jax.lax.scan(step, start, jax.random.split(rng, self.config.horizon))
        return end, totals, counts

    def amq(self, params: Params, data: Any) -> tuple[Array, Array]:
        """Return the scores `[n]` of stacked policies, and whether too many of their roll-outs were lost, `[n]`."""
        config = self.config
        key = jax.random.fold_in(self.dynamics.bootstrap if config.common_noise else self.rng, 1)
        start_rng, noise_rng = jax.random.split(key)
        starts = data.sample(start_rng, (config.judge_rows,))["observations"]

        def judge(policy: Params) -> tuple[Array, Array]:
            end, totals, counts = self.roll_out(policy, starts, noise_rng)
            score = totals.sum() / (config.judge_rows if config.judge_sum else counts.sum())
            return score, (end.lost.mean() > LOST_SHARE) | ~jnp.isfinite(score)

        return jax.vmap(judge)(params)

    def judge(self, data: Any) -> Self:
        """Score the policies. Better ones become their own references; lost ones are put back to theirs."""
        scores, lost = self.amq(self.policies.params, data)
        better = (scores > self.best) & ~lost
        agent = self.replace(
            reference=where_leading(better, self.policies.params, self.reference),
            best=jnp.where(better, scores, self.best),
            scores=jnp.where(lost, self.best, scores),
            replaced=self.replaced + better,
            diverged=self.diverged + lost,
        )
        fresh = jax.tree.map(jnp.zeros_like, self.policies.opt_state)
        policies = self.policies.replace(
            params=where_leading(lost, agent.reference, self.policies.params),
            opt_state=where_leading(lost, fresh, self.policies.opt_state),
        )
        return agent.replace(policies=policies, rng=jax.random.split(self.rng)[0])

    def update(self, batch: Batch) -> tuple[Self, Info]:
        """Step critic and clones once per minibatch of the leaves `[utd, B, ...]`; metrics are means over them."""

        def step(agent: Self, rows: Batch) -> tuple[Self, Info]:
            rng, step_rng = jax.random.split(agent.rng)
            agent, critic_info = agent.replace(rng=rng).critic_step(rows)
            agent, clone_info = agent.clone_step(rows, step_rng)
            return agent, {**critic_info, **clone_info}

        return each_minibatch(step, self, batch)

    # Acting, and the switch to PPO.

    @property
    def candidates(self) -> int:
        """How many policies are tried in the environment before the online phase."""
        return self.config.candidates

    def take_candidate(self, rank: Array) -> Self:
        """Return the agent with the policy of the `rank`-th best last score, 0 the best, acting and going online."""
        return self.replace(chosen=jnp.argsort(-self.scores)[rank].astype(jnp.int32))

    @property
    def acting(self) -> Params:
        """Parameters of the member that acts."""
        member = jnp.where(self.chosen < 0, jnp.argmax(self.scores), self.chosen)
        return jax.tree.map(lambda leaf: leaf[member], self.policies.params)

    def q_value(self, observations: Array, actions: Array) -> Array:
        """Return the least critic's value `[...]` of actions `[..., A]` at observations `[..., D]`."""
        return self.critic(self.scaled(observations), actions).min(axis=0)

    def sample_actions(
        self, observations: Array, carry: Carry, rng: Array, deterministic: bool = False
    ) -> tuple[Array, Carry]:
        """Return actions `[..., A]`, clipped to [-1, 1], and the unused carry."""
        dist = self.policy(self.acting, self.scaled(observations))
        actions = dist.mode() if deterministic else dist.sample(rng)
        return jnp.clip(actions, -1.0, 1.0), carry

    def online(self) -> PPO:
        """Return PPO with the chosen policy, the offline V and the dataset's statistics; optimisers start anew."""
        params = self.acting
        optimizer = self.policies.optimizer
        agent = PPO(
            actor=Model(
                params=params,
                opt_state=optimizer.build().init(params),
                module=self.policies.module,
                optimizer=optimizer,
            ),
            value=self.value,
            mean=self.mean,
            std=self.std,
            seen=jnp.zeros((), jnp.int32),
            rng=self.rng,
            config=self.config,
        )
        return agent.online()

    @classmethod
    def preset(cls, family: str, size: Literal["paper", "small"] = "paper") -> Preset:
        """Return the settings for a family of tasks (the tables of Lei-Kun/Uni-O4's scripts).

        `paper`: the release as it is. `SCRIPTS` has what tasks have of their own; of each sweep it is one value (width
        256). Otherwise states are normalised in locomotion and Kitchen, not in Adroit and mazes. The improvement has
        10,000 steps (Kitchen 1,000). H is 1000, Adroit 50, Kitchen 6, mazes 150. Dynamics patience is 5, Adroit 10,
        Kitchen 20, counted in validations every 1,000 steps, not in epochs. "other" has locomotion's settings,
        "pointmaze" AntMaze's. Online: rewards x0.1 and 20 epochs in locomotion; Adroit 10 epochs of 256 rows at 8e-6.
        Mazes and Kitchen have no online script; their rate is 2e-5.

        `small`: 2x128 networks (Adroit 2x256), three policies, 10k gradient steps in all. Roll-outs have at most 100
        steps from 128 states and are judged every 50 steps by the sum of Q (`judge_sum`). With a critic of so few steps
        the mean prefers policies that fall at once in states of high Q: Hopper went from 1300 to 20. The improvement's
        rate is 3e-5 at most. Online: PPO's small preset with the paper's caution (clip 0.1, actor rate 1e-4).
        """
        config = UniO4Config(actor_lr=2e-5, epochs=20)
        reward = None
        if family == "locomotion":
            config = replace(config, reward_scale=0.1)
        elif family == "adroit":
            config = replace(
                config,
                normalize_states=False,
                improve_lr=1e-5,
                horizon=50,
                actor_lr=8e-6,
                epochs=10,
                batch_size=256,
                dynamics_hidden_dims=(400,) * 4,
                dynamics_lr=3e-4,
                dynamics_patience=10,
            )
        elif family == "kitchen":
            config = replace(
                config,
                improve_lr=1e-5,
                horizon=6,
                dynamics_hidden_dims=(400,) * 4,
                dynamics_lr=3e-4,
                dynamics_patience=20,
                critic_steps=1_000_000,
                clone_steps=200_000,
                improve_steps=1_000,
                epochs=10,
            )
        elif family in ("antmaze", "pointmaze"):
            reward = (10.0, -5.0)
            config = replace(
                config,
                normalize_states=False,
                expectile=0.9,
                improve_lr=3e-5,
                horizon=150,
                value_hidden_dims=(256,) * 3,
                critic_hidden_dims=(256,) * 3,
                dynamics_hidden_dims=(400,) * 4,
                dynamics_lr=3e-4,
            )
        if size == "small":
            width = (256, 256) if family == "adroit" else (128, 128)
            config = replace(
                config,
                actor_hidden_dims=width,
                value_hidden_dims=width,
                critic_hidden_dims=width,
                dynamics_hidden_dims=(128, 128),
                dynamics_members=4,
                dynamics_elites=3,
                dynamics_lr=1e-3,
                num_policies=3,
                candidates=3,
                offline_batch_size=128,
                pretrain_lr=1e-3,
                tau=0.01,
                improve_lr=min(config.improve_lr, 3e-5),
                horizon=min(config.horizon, 100),
                judge_sum=True,
                judge_rows=128,
                judge_every=50,
                validate_every=500,
                critic_steps=6_000,
                dynamics_steps=2_000,
                clone_steps=1_400,
                improve_steps=600,
                actor_lr=1e-4,
                value_lr=1e-3,
                decay_steps=None,
                clip=0.1,
                value_clip=None,
                entropy_coef=0.0,
                batch_size=128,
                epochs=10,
                online=OnlineConfig(replay="rollout", num_envs=4, rollout_steps=1024),
            )
            return Preset(config, config.offline_steps, online_steps=30_000, reward=reward)
        config = replace(
            config,
            diversity="code_heuristic",
            timeouts_bootstrap=False,
            common_noise=False,
            double_squash=True,
            value_relu=family == "locomotion",
        )

        def of_script(changes: dict[str, Any]) -> Preset:
            own = replace(config, **changes)
            own = replace(own, freeze_clip_at=200 / own.improve_steps)  # the release's decay ends at step 200
            return Preset(own, own.offline_steps, online_steps=1_000_000, reward=reward)

        tasks = {words: of_script(changes) for words, changes in SCRIPTS.get(family, {}).items()}
        return replace(of_script({}), tasks=tasks)
