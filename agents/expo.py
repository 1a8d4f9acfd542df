"""EXPO: a diffusion or flow policy improved online without ever differentiating through its sampler.

"EXPO: Stable Reinforcement Learning with Expressive Policies", arXiv 2507.07986.
Idea: a base policy imitates every transition it is given; a small Gaussian policy edits base actions by at most
`edit_scale` and is trained like SAC's actor; the policy that acts, and that bootstraps, is assembled on the fly (OTF):
the best by Q of N base samples and their edits. The critics are RLPD's. Before `online()` only the base learns
(pre-training by imitation; then set `online.random_steps` to 0); without pre-training it is online learning with prior
data. `n_samples=1` is the base alone. It always acts on a sample, in evaluation too: there is no deterministic mode.

Where we differ
- `entropy_target="reachable"` (default) adds d ln(edit_scale) to the target entropy. Without it ("released") -d/2 is
  beyond what a scaled edit can reach at scales below 0.303, and alpha grows for ever, here up to 1e6.
- Actions are stored as executed, inside [-1, 1]; the code stores them unclipped. So edited candidates are clipped
  before they are scored; `clip_edits=False` scores them unclipped. The edit policy's loss judges unclipped edits.
- Time limits always bootstrap; the code's robomimic loader takes them for terminals. Adroit as in our RLPD: success is
  terminal, the whole dataset is used. The shift of -1 on mazes is applied before storage, not to each batch.
- With one sample, as without edits, edit policy and temperature do not learn at all. Dropout acts in the losses only.
- Independent keys: base and edit policy start from different ones, selection and value draw theirs apart.
- Pre-training draws one minibatch per base step, not 20 of which one is used; training critics or edit policy then (off
  in the code) is left out, as is its entropy in the backup, which it never reads.
- Edit policy and temperature step from the same pre-step parameters, as in our RLPD: the same numbers.
- The flow base is ours. So is what `selection="soft"` leaves open: a bonus of H / inverse_temperature, so that backup
  and draw are of one softmax; the paper's variant has no released code.
- Images (the paper has none): one encoder for all networks, trained by the critics alone, before `online()` by the
  base's loss, as nothing else learns then; targets read it without a slow copy of it, as in DrQ-v2.

A chunked variant would need: windows (`window`, `valid`) instead of single rows; base and edits over H * A numbers, the
base's loss masked behind an episode's end; critics of the whole chunk and an h-step backup (`o2o.agents.qc`); the
chosen chunk queued in the carry (`o2o.rl.chunks`), so that the operator runs every h steps; and d = H * A in the
entropy target and in the edits' log-density.
"""

from math import log
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import optax
from flax import struct

from o2o.agents.expo_config import EXPOConfig, expo_preset
from o2o.agents.expo_policy import Choice, on_the_fly
from o2o.agents.minibatches import check_flat, minibatches_in
from o2o.agents.sac import positive, positive_model
from o2o.nn.distributions import TanhNormal
from o2o.nn.encoders import augment, create_encoder, encode
from o2o.nn.generative import Denoiser
from o2o.nn.modules import Adam, CriticEnsemble, GaussianActor, Model, draw_members
from o2o.rl import losses
from o2o.types import Agent, Array, Batch, Carry, Info, Params, Preset

_DEFAULT = EXPOConfig()
__all__ = ["EXPO", "EXPOConfig"]


class EXPO(Agent):
    """Base by imitation, bounded edits, the best of both by Q; `phase` says whether only the base learns."""

    base: Model
    target_base: Params
    edit: Model
    critic: Model
    target_critic: Params
    temperature: Model
    encoder: Model | None
    rng: Array
    config: EXPOConfig = struct.field(pytree_node=False)
    phase: Literal["offline", "online"] = struct.field(pytree_node=False, default="offline")

    @classmethod
    def create(cls, rng: Array, observations: Any, actions: Array, config: EXPOConfig = _DEFAULT) -> Self:
        """Initialise from a key and example observations, `[B, D]` or a dict with images, and actions `[B, A]`."""
        rng, base_rng, edit_rng, critic_rng, temperature_rng, encoder_rng = jax.random.split(rng, 6)
        encoder = create_encoder(encoder_rng, config.encoder, observations, Adam(config.encoder_lr))
        if encoder is None:
            check_flat(observations, cls.__name__)
        observations = encode(encoder, observations)
        denoiser = Denoiser(width=config.base_width, blocks=config.base_blocks, dropout=config.base_dropout)
        adam_w = Adam(config.base_lr, config.decay_steps, config.base_weight_decay)
        base = Model.create(base_rng, denoiser, adam_w, observations, actions, jnp.zeros(actions.shape[:-1]))
        editor = GaussianActor(
            config.edit_hidden_dims, actions.shape[-1], dropout=config.edit_dropout, init_scheme="xavier",
            log_std_min=-20.0, log_std_max=2.0, std_min=0.0, std_max=float("inf"),
        )  # fmt: skip
        pair = jnp.concatenate([observations, actions], axis=-1)
        ensemble = CriticEnsemble(config.critic_hidden_dims, config.num_critics, config.critic_layer_norm, "xavier")
        critic = Model.create(critic_rng, ensemble, Adam(config.critic_lr), observations, actions)
        agent = cls(
            base=base,
            target_base=jax.tree.map(jnp.copy, base.params),
            edit=Model.create(edit_rng, editor, Adam(config.edit_lr, config.decay_steps), pair),
            critic=critic,
            target_critic=jax.tree.map(jnp.copy, critic.params),
            temperature=positive_model(temperature_rng, config.temperature_init, "exp", config.temperature_lr),
            encoder=encoder,
            rng=rng,
            config=config,
        )
        return jax.tree.map(jnp.asarray, agent)

    def alpha(self, params: Params | None = None) -> Array:
        """Return the entropy temperature, `[]`."""
        return positive(self.temperature(params=params), "exp")

    def base_samples(self, params: Params, observations: Array, count: int, rng: Array) -> Array:
        """Draw `count` base actions `[count, ..., A]` in [-1, 1] for observations (or their features) `[..., D]`."""
        noise_rng, chain_rng = jax.random.split(rng)
        module: Any = self.edit.module
        noise = jax.random.normal(noise_rng, (count, *observations.shape[:-1], module.action_dim))
        return self.config.generator.sample(lambda x, t: self.base(observations, x, t, params=params), noise, chain_rng)

    def edit_policy(self, observations: Array, actions: Array, **kwargs: Any) -> TanhNormal:
        """Return the distribution of the edits of `actions [..., A]` at `observations [..., D]`, before the scale."""
        observations = jnp.broadcast_to(observations, (*actions.shape[:-1], observations.shape[-1]))
        return self.edit(jnp.concatenate([observations, actions], axis=-1), **kwargs)

    def subset_value(self, observations: Array, actions: Array, rng: Array) -> Array:
        """Return the minimum `[...]` over freshly drawn target critics, the same ones for all rows of the call."""
        definition: Any = self.critic.module
        module, params = draw_members(definition, self.target_critic, rng, self.config.target_subset)
        values: Any = module.apply(params, observations, actions)
        return jnp.min(values, axis=0)

    def choose(self, observations: Array, base_params: Params, rng: Array) -> Choice:
        """Run the on-the-fly policy at `observations [..., D]` with the given base."""
        config = self.config
        sample_rng, choice_rng = jax.random.split(rng)
        samples = self.base_samples(base_params, observations, config.n_samples, sample_rng)
        return on_the_fly(
            samples,
            lambda key, actions: self.edit_policy(observations, actions).sample(key),
            lambda key, actions: self.subset_value(observations, actions, key),
            choice_rng,
            n_edits=config.edits,
            scale=config.edit_scale,
            clip=config.clip_edits,
            selection=config.selection,
            inverse_temperature=config.inverse_temperature,
        )

    def edit_share(self, choice: Choice) -> Array:
        """Return the share of choices that an edited candidate won, `[]`."""
        return jnp.mean((choice.place >= self.config.n_samples).astype(jnp.float32))

    def next_values(self, next_observations: Array, rng: Array) -> tuple[Array, Info]:
        """Return v'(s') `[B]`: a second subset's value of the on-the-fly (or a base) action, and metrics."""
        action_rng, value_rng = jax.random.split(rng)
        if self.config.backup == "base":
            actions = self.base_samples(self.base.params, next_observations, 1, action_rng)[0]
            return self.subset_value(next_observations, actions, value_rng), {}
        choice = self.choose(next_observations, self.base.params, action_rng)
        values = self.subset_value(next_observations, choice.actions, value_rng)
        return values + choice.entropy / self.config.inverse_temperature, {"edit/win_share": self.edit_share(choice)}

    def critic_step(self, batch: Batch, rng: Array) -> tuple[Self, Info]:
        """Step the critics on one minibatch `[B, ...]`, then move the targets towards them."""
        values, info = self.next_values(encode(self.encoder, batch["next_observations"]), rng)
        targets = losses.td_target(batch["rewards"], batch["masks"], values, self.config.discount)

        def loss(params: tuple[Params, Params]) -> tuple[Array, Array]:
            features = encode(self.encoder, batch["observations"], params[1])
            q = self.critic(features, batch["actions"], params=params[0])
            return losses.critic_loss(q, targets), jnp.mean(q)

        params = (self.critic.params, self.encoder and self.encoder.params)
        (value, q), grads = jax.value_and_grad(loss, has_aux=True)(params)
        critic, encoder = self.critic.apply_gradients(grads[0]), self.encoder and self.encoder.apply_gradients(grads[1])
        target = optax.incremental_update(critic.params, self.target_critic, self.config.tau)
        info = {**info, "critic/loss": value, "critic/q": q, "critic/target": jnp.mean(targets)}
        return self.replace(critic=critic, target_critic=target, encoder=encoder), info

    def base_step(self, batch: Batch, rng: Array) -> tuple[Self, Info]:
        """Step the base on imitation of the actions of `[B, ...]`, good or bad, then move its average.

        Before `online()`, when no critic trains the encoder, the encoder steps with it.
        """
        loss_rng, dropout_rng = jax.random.split(rng)
        taught = self.encoder if self.phase == "offline" else None

        def loss(params: tuple[Params, Params]) -> Array:
            features = encode(self.encoder, batch["observations"], params[1])

            def apply(x: Array, t: Array) -> Array:
                return self.base(features, x, t, True, params=params[0], rngs={"dropout": dropout_rng})

            return jnp.mean(jnp.sum(self.config.generator.loss(apply, batch["actions"], loss_rng), axis=-1))

        value, grads = jax.value_and_grad(loss)((self.base.params, taught and taught.params))
        base = self.base.apply_gradients(grads[0])
        average = optax.incremental_update(base.params, self.target_base, self.config.base_ema)
        encoder = self.encoder if taught is None else taught.apply_gradients(grads[1])
        return self.replace(base=base, target_base=average, encoder=encoder), {"base/loss": value}

    def edit_step(self, batch: Batch, rng: Array) -> tuple[Self, Info]:
        """Step edit policy and temperature on edits of the actions of `[B, ...]`, both from present parameters."""
        config, alpha = self.config, self.alpha()
        sample_rng, dropout_rng = jax.random.split(rng)
        features, actions = encode(self.encoder, batch["observations"]), batch["actions"]
        dim = actions.shape[-1]
        log_volume = dim * log(config.edit_scale)

        def edit_loss(params: Params) -> tuple[Array, tuple[Array, Array]]:
            policy = self.edit_policy(features, actions, training=True, params=params, rngs={"dropout": dropout_rng})
            edits, log_prob = policy.sample_and_log_prob(sample_rng)
            log_prob = log_prob - log_volume
            q = jnp.mean(self.critic(features, actions + config.edit_scale * edits), axis=0)
            loss = losses.sac_actor_loss(log_prob, q, config.entropy_scale * alpha)
            return loss, (-jnp.mean(log_prob), jnp.mean(jnp.abs(edits)))

        (loss, (entropy, size)), grads = jax.value_and_grad(edit_loss, has_aux=True)(self.edit.params)
        target = -config.target_entropy * dim + (log_volume if config.entropy_target == "reachable" else 0.0)

        def temperature_loss(params: Params) -> Array:
            return losses.temperature_loss(self.alpha(params), entropy, target)

        dual_loss, dual_grads = jax.value_and_grad(temperature_loss)(self.temperature.params)
        edit, temperature = self.edit.apply_gradients(grads), self.temperature.apply_gradients(dual_grads)
        info = {"edit/loss": loss, "edit/entropy": entropy, "edit/size": size, "temperature/loss": dual_loss}
        return self.replace(edit=edit, temperature=temperature), info

    def update(self, batch: Batch) -> tuple[Self, Info]:
        """Online: `utd` critic steps on leaves `[utd, B, ...]`, then base, edit policy and temperature on the last.

        Before `online()` one base step on the last minibatch.
        """
        rng, critic_rng, base_rng, edit_rng, share_rng, shift_rng = jax.random.split(self.rng, 6)
        utd, pad = minibatches_in(batch), self.config.encoder.shift_pad
        rows = augment(shift_rng, jax.tree.map(lambda leaf: leaf[-1], batch), pad)
        agent = self.replace(rng=rng)
        if self.phase == "offline":
            return agent.base_step(rows, base_rng)

        def step(agent: Self, inputs: tuple[Batch, Array]) -> tuple[Self, Info]:
            step_rng, pixel_rng = jax.random.split(inputs[1])
            return agent.critic_step(augment(pixel_rng, inputs[0], pad), step_rng)

        agent, infos = jax.lax.scan(step, agent, (batch, jax.random.split(critic_rng, utd)))
        info = {**jax.tree.map(jnp.mean, infos), "temperature/alpha": agent.alpha(), "edit/size": jnp.zeros(())}
        if self.config.backup == "base":
            choice = agent.choose(encode(agent.encoder, rows["observations"]), agent.target_base, share_rng)
            info["edit/win_share"] = agent.edit_share(choice)
        agent, base_info = agent.base_step(rows, base_rng)
        agent, edit_info = agent.edit_step(rows, edit_rng) if self.config.edits else (agent, {})
        return agent, {**info, **base_info, **edit_info}

    def sample_actions(
        self, observations: Any, carry: Carry, rng: Array, deterministic: bool = False
    ) -> tuple[Array, Carry]:
        """Return on-the-fly actions `[..., A]` in [-1, 1] with the averaged base; `deterministic` changes nothing."""
        choice = self.choose(encode(self.encoder, observations), self.target_base, rng)
        return jnp.clip(choice.actions, -1.0, 1.0), carry

    def online(self) -> Self:
        """Return the agent whose updates train everything; nothing is reset, and nothing else changes."""
        return self.replace(phase="online")

    @classmethod
    def preset(cls, family: str, size: Literal["paper", "small"] = "paper") -> Preset:
        """Return the settings for a task family (arXiv 2507.07986); `small` for a laptop."""
        return expo_preset(family, size)
