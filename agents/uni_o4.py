"""Uni-O4: one on-policy objective offline and online (arXiv 2311.03351; the release is Lei-Kun/Uni-O4).

Offline, in stages: V and Q of the data by expectile regression, then frozen; an ensemble of dynamics models; an
ensemble of clones, kept apart by a diversity term; then clipped policy-gradient steps of every clone against a
reference, with advantages of the frozen critic. Every so often AM-Q, the mean of Q along roll-outs in the model, says
whether a policy beats its best score so far; only then it becomes its own new reference. Online the best of the
ensemble goes on as plain PPO (`o2o.agents.ppo`) with the offline V: no data of old, no Q, no constraint.

Where we differ
- Time limits bootstrap offline as online (`timeouts_bootstrap`); the clip falls linearly to the end (`freeze_clip_at`);
  AM-Q is judged on common random numbers (`common_noise`); the diversity term is the paper's (`diversity`), with a cap.
  Each names the released behaviour as an option.
- One policy head serves both phases; the release squashes the log-std twice online.
- States are standardised by std + 0.001, constant dimensions only centred; the release adds 1e-10.
- The dynamics models see every pair within an episode and none across; see `o2o.nn.dynamics` for the rest. A roll-out
  that is not finite, or leaves the data's range a hundredfold or that of the task's rule, keeps its last Q to the end
  (the rule would end it); where more than a tenth of them do, the policy is put back to its reference with a fresh
  optimiser, and `amq/diverged` counts it.
- Where datasets are mixed by weights, minibatches and AM-Q's start states follow them; the dynamics models, their
  hold-out rows and all statistics see every row alike.
- Policies are judged at the improvement's end too. New noise, where asked for, is shared by the members.
- Dataset actions are clipped to 0.99999 on every task (release: Adroit), sampled ones never. The Q loss is a mean over
  both critics, the same step under Adam. Biases begin at zero. `analytic_kl` sums over action dimensions.
- Candidates for the online phase play the resets of the last offline evaluation, which are not counted as environment
  steps, and are judged by success where there is one; the release looks at its last offline evaluations.
- Tasks and rewards are the toolkit's (Adroit binary, Kitchen minus 4), not D4RL's.
- V is not fitted anew for scaled rewards: `reward_scale` holds in both phases. The release's "dynamic" scaling, its
  SARSA critic (medium-expert sets), filtered cloning (AntMaze) and KL term in the improvement are left out.
- Up to the last stage the first clone acts in evaluations; from then on the one with the best last score, where the
  release reports all, and a mixture.
- `update` (for use without stages) takes one step of critic and cloning on given minibatches.
"""

from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from o2o.agents.minibatches import check_flat, each_minibatch
from o2o.agents.ppo import PPO
from o2o.agents.uni_o4_clones import clone_step
from o2o.agents.uni_o4_config import UniO4Config, preset
from o2o.data.normalizer import Normalizer
from o2o.nn.distributions import Normal
from o2o.nn.dynamics import Dynamics, holdout_rows
from o2o.nn.modules import Adam, BoundedGaussianActor, CriticEnsemble, Model, Value, where_leading
from o2o.nn.terminations import RULES
from o2o.rl.losses import clipped_surrogate, critic_loss, expectile_loss, td_target
from o2o.types import Agent, Array, Batch, Carry, Info, Params, Phase, Preset

LOWEST = float(np.finfo(np.float32).min)
FAR, LOST = 100.0, 0.1
"""A roll-out state is lost beyond so many standard deviations; a policy is where such a share of roll-outs is."""

_DEFAULT = UniO4Config()


class UniO4(Agent):
    """Uni-O4 before the switch; `online()` returns a `PPO`."""

    value: Model
    critic: Model
    target_critic: Params
    policies: Model
    """Stacked members `[n, ...]`, optimiser states included."""
    reference: Params
    """The policies that the improvement starts from and returns to, `[n, ...]`."""
    best: Array
    """Best score of each member, `[n]`."""
    scores: Array
    """Last score of each member, `[n]`."""
    replaced: Array
    """Accepted replacements of each member, `[n]`."""
    diverged: Array
    """Times that a member's roll-outs diverged, `[n]`."""
    dynamics: Dynamics
    mean: Array
    std: Array
    steps: Array
    """Gradient steps of the critic, `[]`."""
    chosen: Array
    """Member that acts; -1: the one with the best score."""
    rng: Array
    config: UniO4Config = struct.field(pytree_node=False)

    @classmethod
    def create(cls, rng: Array, observations: Array, actions: Array, config: UniO4Config = _DEFAULT) -> Self:
        """Initialise from a key, observations `[B, D]` and actions `[B, A]`; dict observations raise `ConfigError`."""
        check_flat(observations, "Uni-O4")
        rng, value_rng, critic_rng, policy_rng, dynamics_rng = jax.random.split(rng, 5)
        count, optimizer = config.num_policies, Adam(config.pretrain_lr)
        actor = BoundedGaussianActor(config.actor_hidden_dims, actions.shape[-1], config.activation)
        members = [Model.create(key, actor, optimizer, observations) for key in jax.random.split(policy_rng, count)]
        policies = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
        value = Value(config.value_hidden_dims, init_scheme=config.value_init)
        critics = CriticEnsemble(config.critic_hidden_dims, 2, init_scheme=config.value_init)
        critic = Model.create(critic_rng, critics, optimizer, observations, actions)
        termination = "learned" if config.termination == "auto" else config.termination
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
            dynamics=Dynamics.create(
                dynamics_rng, observations, actions, hidden_dims=config.dynamics_hidden_dims,
                num=config.dynamics_members, elites=config.dynamics_elites, learning_rate=config.dynamics_lr,
                patience=config.dynamics_patience, termination=termination,
            ),
            mean=jnp.zeros(observations.shape[-1]),
            std=jnp.ones(observations.shape[-1]),
            steps=jnp.zeros((), jnp.int32),
            chosen=jnp.full((), -1, jnp.int32),
            rng=rng,
            config=config,
        )  # fmt: skip
        return jax.tree.map(jnp.asarray, agent)

    def phases(self, steps: int) -> tuple[Phase, ...]:
        """Return critic, dynamics, cloning and improvement, stretched to `steps` gradient steps in all."""
        config, kind = self.config, type(self)
        own = (config.critic_steps, config.dynamics_steps, config.clone_steps, config.improve_steps)
        critic, dynamics, clone = (part * steps // sum(own) for part in own[:3])
        return (
            Phase("critic", critic, kind.fit_critic, enter=kind.take_statistics),
            Phase(
                "dynamics", dynamics, kind.fit_dynamics, enter=kind.begin_dynamics, check=kind.validate_dynamics,
                check_every=config.validate_every,
            ),
            Phase("clone", clone, kind.fit_clones),
            Phase(
                "improve", steps - critic - dynamics - clone, kind.improve, enter=kind.begin_improvement,
                check=kind.judge, check_every=config.judge_every,
            ),
        )  # fmt: skip

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
        agent, batch, _ = self._drawn(data)
        return agent.critic_step(batch)

    def begin_dynamics(self, data: Any) -> Self:
        """Return the agent whose dynamics models know the dataset's statistics and hold-out rows."""
        return self.replace(dynamics=self.dynamics.prepare(data))

    def fit_dynamics(self, data: Any, progress: Array) -> tuple[Self, Info]:
        """Run one gradient step of the dynamics models."""
        rng, key, _ = jax.random.split(self.rng, 3)
        dynamics, info = self.dynamics.train_step(data, key)
        return self.replace(rng=rng, dynamics=dynamics), {**info, "dynamics/best": self.dynamics.best_error.mean()}

    def validate_dynamics(self, data: Any) -> Self:
        """Return the agent with the best weights that its dynamics models had on the hold-out rows."""
        return self.replace(dynamics=self.dynamics.validate(data))

    def fit_clones(self, data: Any, progress: Array) -> tuple[Self, Info]:
        """Run one gradient step of every clone on rows of the dataset."""
        agent, batch, key = self._drawn(data)
        return agent.clone_step(batch, key)

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
        agent, batch, key = self._drawn(data)
        return agent.improve_step(batch, key, progress)

    def _drawn(self, data: Any) -> tuple[Self, Batch, Array]:
        """Return the agent with its next key, rows `[B, ...]` of the dataset, and a key for their step."""
        rng, key, step_key = jax.random.split(self.rng, 3)
        return self.replace(rng=rng), data.sample(key, (self.config.offline_batch_size,)), step_key

    def judge(self, data: Any) -> Self:
        """Score the policies, promote the better ones, put lost ones back."""
        scores, lost = self.amq(self.policies.params, data)
        better = (scores > self.best) & ~lost
        agent = self.replace(
            reference=where_leading(better, self.policies.params, self.reference),
            best=jnp.where(better, scores, self.best),
            scores=jnp.where(lost, self.best, scores),
            replaced=self.replaced + better,
            diverged=self.diverged + lost,
        )
        moments, params = self.policies.opt_state, self.policies.params
        anew = where_leading(lost, jax.tree.map(jnp.zeros_like, moments), moments)
        policies = self.policies.replace(params=where_leading(lost, agent.reference, params), opt_state=anew)
        return agent.replace(policies=policies, rng=jax.random.split(self.rng)[0])

    def scaled(self, observations: Array) -> Array:
        """Return what the networks see of observations `[..., D]`."""
        return (observations - self.mean) / self.std

    def critic_step(self, batch: Batch) -> tuple[Self, Info]:
        """Step V, then Q with the new V, on rows `[B, ...]`; the targets follow on every second step."""
        config, actions = self.config, batch["actions"]
        observations, following = self.scaled(batch["observations"]), self.scaled(batch["next_observations"])
        masks = batch["masks"]
        if not config.timeouts_bootstrap:
            masks = masks * (1.0 - batch["ends"])
        target = self.critic(observations, actions, params=self.target_critic).min(axis=0)
        difference = lambda params: target - self.value(observations, params=params)  # noqa: E731
        value_loss, grads = jax.value_and_grad(lambda params: expectile_loss(difference(params), config.expectile))(
            self.value.params
        )
        value = self.value.apply_gradients(grads)
        y = td_target(config.reward_scale * batch["rewards"], masks, value(following), config.discount)
        loss = lambda params: critic_loss(self.critic(observations, actions, params=params), y)  # noqa: E731
        q_loss, grads = jax.value_and_grad(loss)(self.critic.params)
        critic, steps = self.critic.apply_gradients(grads), self.steps + 1
        moved = optax.incremental_update(critic.params, self.target_critic, config.tau)
        target_critic = jax.tree.map(lambda new, old: jnp.where(steps % 2 == 0, new, old), moved, self.target_critic)
        agent = self.replace(value=value, critic=critic, target_critic=target_critic, steps=steps)
        return agent, {"value/loss": value_loss, "critic/loss": q_loss, "critic/target": y.mean()}

    def advantages(self, observations: Array, actions: Array) -> Array:
        """Return min Q - V of scaled observations `[B, D]`, normalised over the batch, no gradient."""
        raw = self.critic(observations, actions).min(axis=0) - self.value(observations)
        return jax.lax.stop_gradient((raw - raw.mean()) / (raw.std() + 1e-10))

    def policy(self, params: Params, observations: Array) -> Normal:
        """Return one member's distribution at scaled observations `[..., D]`."""
        return self.policies(observations, params=params)

    def clone_step(self, batch: Batch, rng: Array) -> tuple[Self, Info]:
        """Step the members one after the other, in random order, on rows `[B, ...]`; each sees the steps before."""
        observations = self.scaled(batch["observations"])
        policies, loss = clone_step(self.policies, observations, batch["actions"], rng, self.config)
        return self.replace(policies=policies), {"clone/loss": loss}

    def improve_loss(
        self, params: Params, reference: Params, observations: Array, rng: Array, clip: Array
    ) -> tuple[Array, Info]:
        """Return a member's negative clipped surrogate at scaled dataset states, actions of its reference."""
        actions, old = jax.lax.stop_gradient(self.policy(reference, observations).sample_and_log_prob(rng))
        advantages = self.advantages(observations, actions)
        ratio = jnp.exp(self.policy(params, observations).log_prob(actions) - old)
        loss = -jnp.mean(clipped_surrogate(ratio, advantages, clip))
        return loss, {"improve/loss": loss, "improve/clipped": jnp.mean(jnp.abs(ratio - 1.0) > clip)}

    def improve_step(self, batch: Batch, rng: Array, progress: Array) -> tuple[Self, Info]:
        """Step every member against its reference on the same states."""
        config, observations = self.config, self.scaled(batch["observations"])
        held = progress if config.freeze_clip_at is None else jnp.minimum(progress, config.freeze_clip_at)
        clip, rate = config.improve_clip * (1.0 - held), config.improve_lr / config.pretrain_lr * (1.0 - progress)
        limit = optax.clip_by_global_norm(config.improve_grad_norm)

        def one(policy: Model, reference: Params, key: Array) -> tuple[Model, Info]:
            grads, info = jax.grad(self.improve_loss, has_aux=True)(policy.params, reference, observations, key, clip)
            grads, _ = limit.update(grads, limit.init(policy.params))
            return policy.apply_gradients(grads, rate), info

        policies, infos = jax.vmap(one)(self.policies, self.reference, jax.random.split(rng, config.num_policies))
        info = {name: value.mean() for name, value in infos.items()}
        info |= {"amq/score": self.scores.mean(), "amq/best": self.best.max()}
        info |= {"amq/replaced": self.replaced.mean(), "amq/diverged": self.diverged.sum().astype(jnp.float32)}
        return self.replace(policies=policies), info

    def amq(self, params: Params, data: Any) -> tuple[Array, Array]:
        """Return the scores `[n]` of stacked policies, and whether their roll-outs diverged."""
        config = self.config
        key = jax.random.fold_in(self.dynamics.bootstrap if config.common_noise else self.rng, 1)
        start_rng, noise_rng = jax.random.split(key)
        starts = data.sample(start_rng, (config.judge_rows,))["observations"]
        size, rule = starts.shape[-1], RULES.get(self.dynamics.termination, RULES["never"])
        middle, width = self.dynamics.mean[:size], self.dynamics.std[:size]

        def member(own: Params) -> tuple[Array, Array]:
            def step(state: tuple[Array, ...], key: Array) -> tuple[tuple[Array, ...], Array]:
                raw, alive, lost, last = state
                seen = self.scaled(raw)
                actions = jnp.clip(self.policy(own, seen).mode(), -1.0, 1.0)
                q = self.critic(seen, actions).min(axis=0)
                last = jnp.where(alive, q, last)  # what was lost keeps its last Q: no gain where Q is below 0
                values = jnp.stack([jnp.where(alive | lost, last, 0.0).sum(), (alive | lost).sum().astype(jnp.float32)])
                following, _, ended = self.dynamics.step(key, raw, actions)
                wild = ~jnp.all(jnp.isfinite(following) & (jnp.abs((following - middle) / width) < FAR), axis=-1)
                wild = wild | rule.out_of_range(following)
                lost = lost | (alive & wild)
                alive = alive & ~ended & ~wild
                return (jnp.where(alive[:, None], following, raw), alive, lost, last), values

            full, keys = jnp.ones(config.judge_rows, bool), jax.random.split(noise_rng, config.horizon)
            begin = (starts, full, ~full, jnp.zeros(config.judge_rows))
            (_, _, lost, _), values = jax.lax.scan(step, begin, keys)
            total, count = values.sum(axis=0)
            score = total / (config.judge_rows if config.judge_sum else count)
            return score, (lost.mean() > LOST) | ~jnp.isfinite(score)

        return jax.vmap(member)(params)

    def update(self, batch: Batch) -> tuple[Self, Info]:
        """Step critic and clones once per leading row of the leaves `[utd, B, ...]`; metrics are means over them."""

        def body(agent: Self, rows: Batch) -> tuple[Self, Info]:
            rng, key = jax.random.split(agent.rng)
            agent, critic_info = agent.replace(rng=rng).critic_step(rows)
            agent, clone_info = agent.clone_step(rows, key)
            return agent, {**critic_info, **clone_info}

        return each_minibatch(body, self, batch)

    @property
    def candidates(self) -> int:
        """How many policies may be tried in the environment before the online phase."""
        return self.config.candidates

    def take_candidate(self, rank: Array) -> Self:
        """Return the agent with the policy of the `rank`-th best last score, 0 the best, acting and going online."""
        return self.replace(chosen=jnp.argsort(-self.scores)[rank].astype(jnp.int32))

    @property
    def acting(self) -> Params:
        """Parameters of the member that acts."""
        member = jnp.where(self.chosen < 0, jnp.argmax(self.scores), self.chosen)
        return jax.tree.map(lambda leaf: leaf[member], self.policies.params)

    def sample_actions(
        self, observations: Array, carry: Carry, rng: Array, deterministic: bool = False
    ) -> tuple[Array, Carry]:
        """Return actions `[..., A]`, clipped to [-1, 1], and the unused carry."""
        dist = self.policy(self.acting, self.scaled(observations))
        actions = dist.mode() if deterministic else dist.sample(rng)
        return jnp.clip(actions, -1.0, 1.0), carry

    def online(self) -> PPO:
        """Return PPO with the chosen policy, the offline V and the dataset's statistics, optimisers anew."""
        optimizer = self.policies.optimizer
        actor = Model(self.acting, optimizer.build().init(self.acting), self.policies.module, optimizer)
        steps = jnp.zeros((), jnp.int32)
        return PPO(actor, self.value, self.mean, self.std, steps, self.rng, self.config).online()

    @classmethod
    def preset(cls, family: str, size: Literal["paper", "small"] = "paper") -> Preset:
        """Return the settings for a family of tasks (`o2o.agents.uni_o4_config.preset`)."""
        return preset(family, size)
