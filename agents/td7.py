"""TD7: TD3 on learnt embeddings, with priorities and policy checkpoints ("For SALE", arXiv 2306.02451).

Four additions to TD3. SALE: an encoder makes z(s) of a state and z(s, a) of a pair, so that z(s, a) predicts z(s'), and
actor and critics see both beside state and action. LAP: rows are drawn by the size of their TD error, and the critics'
loss fits that. Values in targets are clipped to the range of the targets so far. Checkpoints: a policy is tried for
several training episodes, and the one whose worst return was best is the one that is evaluated. Offline, cloning is
added to the actor's loss.

| what | paper and code (sfujim/TD7) | `paper` preset | default |
| --- | --- | --- | --- |
| a run | online, or offline | offline, then online on one buffer | online, 25,000 random steps |
| offline draws | by priority | evenly | - |
| updates | between two trials, as many as its steps | at every step; the policy on trial stands still | the same |
| cloning online | - | none (`online_cloning`) | none |
| rewards | the task's | -1/0 on mazes and Adroit, else the task's | the task's |

Where we differ
- Biases begin at zero; the code draws them, as the kernels, within 1 / sqrt(inputs).
- The highest priority, which a new row gets, is that of the buffer now; the code looks every 250 updates.
- Trials grow from 1 episode to 20 after 750,000 updates of the online phase; both are settings.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from o2o.agents.minibatches import check_flat
from o2o.agents.registry import register_agent
from o2o.agents.td3 import TD3
from o2o.nn.kernels import branch
from o2o.nn.modules import MLP, Activation, Adam, EnsembleDense, Model, kernel_init, where_leading
from o2o.rl.losses import td_target
from o2o.settings import Amount, Count, NotNegative, Rate, Share, Width, Widths
from o2o.types import PRIORITIES, AgentConfig, Array, Batch, Carry, Info, Needs, OnlineConfig, Params, Preset

HUGE = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class TD7Config(AgentConfig):
    """Settings of TD7; the defaults are the paper's, online."""

    online: OnlineConfig = OnlineConfig(random_steps=25_000)
    """Schedule of the online phase."""
    actor_hidden_dims: Widths = (256, 256)
    """Widths of the actor's hidden layers; its first layer, of the state alone, is as wide as the first of them."""
    critic_hidden_dims: Widths = (256, 256)
    """Widths of every critic's hidden layers; its first layer, of the pair alone, is as wide as the first of them."""
    encoder_hidden_dims: Widths = (256, 256)
    """Widths of the hidden layers of both encoders."""
    embedding: Width = 256
    """Numbers of an embedding."""
    num_critics: Count = 2
    """Critics, whose minimum is the target."""
    policy_delay: Count = 2
    """Critic steps per actor step."""
    target_every: Count = 250
    """Critic steps from one replacement of all targets to the next."""
    exploration_noise: NotNegative = 0.1
    """Standard deviation of the Gaussian noise on sampled actions."""
    target_noise: NotNegative = 0.2
    """Standard deviation of the noise on the target's next action."""
    noise_clip: NotNegative = 0.5
    """Bound of that noise."""
    priority_power: NotNegative = 0.4
    """A row's priority is max(largest TD error, 1) to this power; 0 draws evenly."""
    cloning: NotNegative = 0.1
    """Weight of the squared distance to the data in the actor's loss before `online()`, in units of mean |Q|."""
    online_cloning: NotNegative = 0.0
    """That weight after `online()`."""
    actor_lr: Rate = 3e-4
    """Adam's rate of the actor."""
    critic_lr: Rate = 3e-4
    """Adam's rate of the critics."""
    encoder_lr: Rate = 3e-4
    """Adam's rate of the encoders."""
    trial_episodes: Count = 20
    """Training episodes that a policy is tried for, from update `trials_from` on; before it is one."""
    trials_from: Amount = 750_000
    """Updates of the online phase after which trials are long."""
    trial_reset: Share = 0.9
    """The best worst return so far is multiplied by this there."""

    @property
    def needs(self) -> Needs:
        """Draws by priority, and the returns of training episodes."""
        return Needs(priorities=True, episode_returns=True)


def unit(x: Array) -> Array:
    """Return `x [..., n]` divided by its mean size (AvgL1Norm)."""
    return x / jnp.maximum(jnp.mean(jnp.abs(x), axis=-1, keepdims=True), 1e-8)


class Layers(nn.Module):
    """Hidden layers and a linear one: `[..., D]` to `[..., features]`."""

    hidden_dims: tuple[int, ...]
    features: int
    activation: Activation = "elu"

    @nn.compact
    def __call__(self, *parts: Array) -> Array:
        """Return the last layer's output of the joined parts."""
        x = jnp.concatenate(parts, axis=-1)
        x = MLP(self.hidden_dims, init_scheme="linear", activation=self.activation)(x)
        return nn.Dense(self.features, kernel_init=kernel_init("linear"))(x)


class Encoder(nn.Module):
    """Embeddings z(s) of mean size 1, and z(s, a) of z(s) and the action."""

    hidden_dims: tuple[int, ...]
    width: int

    def setup(self) -> None:
        """Make both parts."""
        self.of_state = Layers(self.hidden_dims, self.width)
        self.of_pair = Layers(self.hidden_dims, self.width)

    def states(self, observations: Array) -> Array:
        """Return z(s) `[..., width]`."""
        return unit(self.of_state(observations))

    def __call__(self, observations: Array, actions: Array) -> tuple[Array, Array]:
        """Return z(s) and z(s, a), `[..., width]` each."""
        state = self.states(observations)
        return state, self.of_pair(state, actions)


class Policy(nn.Module):
    """State and its embedding to an action in (-1, 1)."""

    hidden_dims: tuple[int, ...]
    action_dim: int

    @nn.compact
    def __call__(self, observations: Array, state: Array) -> Array:
        """Return the actions `[..., A]`."""
        x = unit(nn.Dense(self.hidden_dims[0], kernel_init=kernel_init("linear"))(observations))
        return jnp.tanh(Layers(self.hidden_dims, self.action_dim, "relu")(x, state))


class Critics(nn.Module):
    """`num` Q-functions of state, action and both embeddings."""

    hidden_dims: tuple[int, ...]
    num: int

    @nn.compact
    def __call__(self, observations: Array, actions: Array, state: Array, pair: Array) -> Array:
        """Return all members' values `[num, ...]`."""
        x = unit(EnsembleDense(self.num, self.hidden_dims[0], "linear", stacked=False)(observations, actions))
        both = jnp.concatenate([state, pair], axis=-1)
        x = jnp.concatenate([x, jnp.broadcast_to(both, (self.num, *both.shape))], axis=-1)
        for width in self.hidden_dims:
            x = nn.elu(EnsembleDense(self.num, width, "linear")(x))
        return jnp.squeeze(EnsembleDense(self.num, 1, "linear")(x), -1)


class Fixed(struct.PyTreeNode):
    """A policy that stands still."""

    actor: Params
    encoder: Params


class Trial(struct.PyTreeNode):
    """How the policy on trial has done."""

    episodes: Array
    lowest: Array
    """Its worst return."""
    best: Array
    """The best of the worst returns of all policies so far."""
    long: Array
    """Whether trials are long by now."""


_DEFAULT = TD7Config()


@register_agent("td7")
class TD7(TD3):
    r"""TD7: TD3 with learnt embeddings, prioritised replay, clipped values and policy checkpoints.

    Equations (method, and the settings that enter):
    - `encoder_loss` (`embedding`): $L_z = \lVert z(s, a) - z(s') \rVert^2$
    - `next_values` (`target_noise`, `noise_clip`): $v = \mathrm{clip}(\min_i Q^-_i(s', a', z(s', a'), z(s')))$
    - `critic_step` (`discount`): $y = r + \gamma m v,\quad L_Q = \sum_i \mathrm{Huber}(Q_i(s, a) - y)$
    - `critic_step` (`priority_power`): $p = \max(1, \max_i \lvert Q_i - y \rvert)^{\alpha}$
    - `actor_loss` (`cloning`): $L_\pi = -Q(s, \pi(s, z(s))) + \lambda \overline{\lvert Q \rvert} (\pi(s, z(s)) - a)^2$
    """

    encoder: Any = None
    """Learns; a `Model`."""
    fixed_encoder: Params = None
    """What actor and critics see."""
    target_encoder: Params = None
    """What their targets see."""
    bounds: Any = None
    """Lowest and highest value in targets, `[2]`; both 0 until targets are first renewed."""
    reached: Any = None
    """Lowest and highest target so far, `[2]`."""
    tried: Any = None
    """The policy that plays training episodes online, a `Fixed`."""
    kept: Any = None
    """The policy that is evaluated online, a `Fixed`."""
    trial: Any = None
    fine_tuning: bool = struct.field(pytree_node=False, default=False)

    @classmethod
    def create(cls, rng: Array, observations: Array, actions: Array, config: TD7Config = _DEFAULT) -> Self:
        """Initialise from a key and example observations `[B, D]` and actions `[B, A]`."""
        check_flat(observations, cls.__name__)
        rng, actor_rng, critic_rng, encoder_rng = jax.random.split(rng, 4)
        networks = Encoder(config.encoder_hidden_dims, config.embedding)
        encoder = Model.create(encoder_rng, networks, Adam(config.encoder_lr), observations, actions)
        state, pair = encoder(observations, actions)
        policy = Policy(config.actor_hidden_dims, actions.shape[-1])
        judges = Critics(config.critic_hidden_dims, config.num_critics)
        actor = Model.create(actor_rng, policy, Adam(config.actor_lr), observations, state)
        critic = Model.create(critic_rng, judges, Adam(config.critic_lr), observations, actions, state, pair)
        agent = cls(
            actor=actor,
            target_actor=_copy(actor.params),
            critic=critic,
            target_critic=_copy(critic.params),
            updates=jnp.zeros((), jnp.int32),
            rng=rng,
            config=config,
            encoder=encoder,
            fixed_encoder=_copy(encoder.params),
            target_encoder=_copy(encoder.params),
            bounds=jnp.zeros(2),
            reached=jnp.asarray([HUGE, -HUGE], jnp.float32),
            tried=Fixed(_copy(actor.params), _copy(encoder.params)),
            kept=Fixed(_copy(actor.params), _copy(encoder.params)),
            trial=_first_trial(),
        )
        return jax.tree.map(jnp.asarray, agent)

    def noisy_actions(self, observations: Array, params: Params, rng: Array) -> Array:
        """Return the actor's actions on the target's embedding with clipped noise, `[..., A]`, clipped to [-1, 1]."""
        config = self.config
        actions = self.actor(observations, self._states(observations, self.target_encoder), params=params)
        noise = config.target_noise * jax.random.normal(rng, actions.shape)
        return jnp.clip(actions + jnp.clip(noise, -config.noise_clip, config.noise_clip), -1.0, 1.0)

    def _states(self, observations: Array, params: Params) -> Array:
        return self.encoder(observations, params=params, method="states")

    def next_values(self, next_observations: Array, rng: Array) -> Array:
        """Return v'(s') `[B]`: the lowest target critic at the target actor's noisy action, within the bounds."""
        actions = self.noisy_actions(next_observations, self.target_actor, rng)
        seen = self.encoder(next_observations, actions, params=self.target_encoder)
        q = self.critic(next_observations, actions, *seen, params=self.target_critic)
        return jnp.clip(q.min(axis=0), *self.bounds)

    def q_value(self, observations: Array, actions: Array) -> Array:
        """Return the critics' mean `[...]` of actions `[..., A]`, on the fixed embeddings, as the actor sees it."""
        seen = self.encoder(observations, actions, params=self.fixed_encoder)
        return self.critic(observations, actions, *seen).mean(axis=0)

    def encoder_loss(self, params: Params, batch: Batch) -> Array:
        """Return the mean squared error `[]` of z(s, a) to z(s'), which gets no gradient."""
        _, pair = self.encoder(batch["observations"], batch["actions"], params=params)
        following = jax.lax.stop_gradient(self._states(batch["next_observations"], params))
        return jnp.mean(jnp.square(pair - following))

    def critic_step(self, batch: Batch, rng: Array) -> tuple[Self, Info]:
        """Step encoder and critics on one minibatch `[B, ...]`; with priorities the loss of its draw (LAP, 2007.06049).

        The loss sums over critics the mean of e^2 / 2 where e = |Q_i(s, a) - y| is below 1, else of e.
        """
        values = self.next_values(batch["next_observations"], rng)
        targets = td_target(batch["rewards"], batch["masks"], values, self.config.discount)
        loss, encoder_grads = jax.value_and_grad(self.encoder_loss)(self.encoder.params, batch)
        seen = self.encoder(batch["observations"], batch["actions"], params=self.fixed_encoder)

        def loss_of(params: Params) -> tuple[Array, tuple[Array, Array]]:
            q = self.critic(batch["observations"], batch["actions"], *seen, params=params)
            errors = jnp.abs(q - targets)
            return jnp.where(errors < 1.0, 0.5 * errors**2, errors).sum(axis=0).mean(), (errors.max(axis=0), q.mean())

        (critic_loss, (errors, q)), grads = jax.value_and_grad(loss_of, has_aux=True)(self.critic.params)
        low, high = self.reached
        agent = self.replace(
            encoder=self.encoder.apply_gradients(encoder_grads),
            critic=self.critic.apply_gradients(grads),
            reached=jnp.stack([jnp.minimum(low, targets.min()), jnp.maximum(high, targets.max())]),
            updates=self.updates + 1,
        )
        info = {"critic/loss": critic_loss, "critic/q": q, "critic/target": targets.mean(), "encoder/loss": loss}
        if "slots" in batch:
            info[PRIORITIES] = jnp.maximum(errors, 1.0) ** self.config.priority_power
        return agent, info

    def actor_loss(self, params: Params, batch: Batch, rng: Array) -> tuple[Array, Info]:
        """Return -mean Q_i(s, pi(s)) `[]` over all critics, plus cloning, and metrics."""
        observations = batch["observations"]
        actions = self.actor(observations, self._states(observations, self.fixed_encoder), params=params)
        seen = self.encoder(observations, actions, params=self.fixed_encoder)
        q = self.critic(observations, actions, *seen)
        loss, distance = -q.mean(), jnp.mean(jnp.square(actions - batch["actions"]))
        weight = self.config.online_cloning if self.fine_tuning else self.config.cloning
        if weight:
            loss = loss + weight * jax.lax.stop_gradient(jnp.abs(q).mean()) * distance
        return loss, {"actor/loss": loss, "actor/distance": distance}

    def actor_step(self, batch: Batch, rng: Array) -> tuple[Self, Info]:
        """Step the actor on one minibatch `[B, ...]`."""
        grads, info = jax.grad(self.actor_loss, has_aux=True)(self.actor.params, batch, rng)
        return self.replace(actor=self.actor.apply_gradients(grads)), info

    def _step(self, batch: Batch) -> tuple[Self, Info]:
        """Step encoder, critics and, in its turn, the actor on one minibatch; then replace the targets, if it is time.

        The fixed encoder follows the one that learns, and the targets' follows the fixed one.
        """
        agent, info = super()._step(batch)

        def renew(agent: Self) -> Self:
            return agent.replace(
                target_actor=agent.actor.params,
                target_critic=agent.critic.params,
                target_encoder=agent.fixed_encoder,
                fixed_encoder=agent.encoder.params,
                bounds=agent.reached,
            )

        return branch(agent.updates % self.config.target_every == 0, renew, lambda agent: agent, agent), info

    def after_episodes(self, returns: Array, lengths: Array, over: Array) -> Self:
        """Judge the policy on trial by its worst return: it ends early below the best one, and is kept at its end."""
        config, trial = self.config, self.trial
        long = self.updates >= config.trials_from
        best = jnp.where(long & ~trial.long, config.trial_reset * trial.best, trial.best)
        episodes, lowest = trial.episodes + 1, jnp.minimum(trial.lowest, returns[0])
        failed = lowest < best
        passed = ~failed & (episodes >= jnp.where(long, config.trial_episodes, 1))
        ended = failed | passed
        return self.replace(
            kept=where_leading(passed, self.tried, self.kept),
            tried=where_leading(ended, Fixed(self.actor.params, self.fixed_encoder), self.tried),
            trial=Trial(
                episodes=jnp.where(ended, 0, episodes),
                lowest=jnp.where(ended, HUGE, lowest),
                best=jnp.where(passed, lowest, best),
                long=long,
            ),
        )

    def sample_actions(
        self, observations: Array, carry: Carry, rng: Array, deterministic: bool = False
    ) -> tuple[Array, Carry]:
        """Return actions `[..., A]` in [-1, 1]: the kept policy's, or with noise those of the one on trial."""
        policy = Fixed(self.actor.params, self.fixed_encoder)
        if self.fine_tuning:
            policy = self.kept if deterministic else self.tried
        actions = self.actor(observations, self._states(observations, policy.encoder), params=policy.actor)
        return actions if deterministic else self.explore(actions, rng), carry

    def online(self) -> Self:
        """Return the agent whose present policy is kept and on trial; cloning ends, and updates are counted anew."""
        if self.fine_tuning:
            return self
        return self.replace(
            fine_tuning=True,
            updates=jnp.zeros((), jnp.int32),
            tried=Fixed(_copy(self.actor.params), _copy(self.fixed_encoder)),
            kept=Fixed(_copy(self.actor.params), _copy(self.fixed_encoder)),
            trial=_first_trial(),
        )

    @classmethod
    def preset(cls, family: str, size: Literal["paper", "small"] = "paper") -> Preset:
        """Return the settings for a family of tasks.

        `paper`: 1M updates, as the paper's offline runs, then 1M environment steps on one buffer that begins with the
        dataset, without random steps. `small`: 2x128, batch 128, rates of 1e-3, targets every 100 updates, trials of
        two episodes from update 2000 on, 10k updates and 10k environment steps. It normalises states and clones with
        TD3+BC's weight, a quarter of it online: on Hopper 6000 updates gave returns of 1045 with that, 635 on states as
        they are (means of two seeds), and without cloning the policies on trial fell within 200 environment steps.
        """
        reward = {"antmaze": (1.0, -1.0), "pointmaze": (1.0, -1.0), "adroit": (1.0, 0.0)}.get(family)
        config = TD7Config(online=OnlineConfig(replay="append"))
        if size == "paper":
            return Preset(config, 1_000_000, 1_000_000, reward)
        small = replace(
            config,
            actor_hidden_dims=(128, 128),
            critic_hidden_dims=(128, 128),
            encoder_hidden_dims=(128, 128),
            embedding=128,
            batch_size=128,
            target_every=100,
            trial_episodes=2,
            trials_from=2_000,
            cloning=0.4,
            online_cloning=0.1,
            actor_lr=1e-3,
            critic_lr=1e-3,
            encoder_lr=1e-3,
        )
        return Preset(small, 10_000, 10_000, reward, run={"normalize": True})


def _copy(params: Params) -> Params:
    return jax.tree.map(jnp.copy, params)


def _first_trial() -> Trial:
    return Trial(
        episodes=jnp.zeros((), jnp.int32),
        lowest=jnp.asarray(HUGE, jnp.float32),
        best=jnp.asarray(-HUGE, jnp.float32),
        long=jnp.zeros((), bool),
    )
