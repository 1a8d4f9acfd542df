"""EXPO: a diffusion or flow policy improved online without differentiating through its sampler (arXiv 2507.07986).

Three learners. The base policy, a diffusion or a flow, imitates every transition it is given. The edit policy, a small
Gaussian, changes a base action by at most `edit_scale` per coordinate and is trained like SAC's actor. The critics are
RLPD's. The policy that acts, and that bootstraps, is put together on the fly (OTF): draw N base samples, edit the first
`n_edits` of them, and take the candidate with the highest Q among both.

Before `online()` only the base learns, by imitation; after such a pre-training set `online.random_steps` to 0. Without
pre-training EXPO is online learning with prior data. `n_samples=1` is the base alone. The policy always acts on a
sample, in evaluation too: `deterministic` changes nothing.

| what | paper | its code | `paper` preset | default |
| --- | --- | --- | --- | --- |
| target entropy of the scaled edit | -d/2 | -d/2 ("released") | -d/2 + d ln(edit_scale) | the same ("reachable") |
| Adroit's data | RLPD's | 90 % of each file, no terminals | the same (`ADROIT_DATA`) | all; success is terminal |
| time limits of robomimic | - | terminal | bootstrap | bootstrap |
| candidates scored | - | unclipped | clipped | clipped |

The scaled edit's entropy is at most d ln(2 edit_scale), which is below -d/2 where the scale is below 0.303. There the
released alpha grows without end (here up to 1e6) and edits become noise. It matters for the published runs on AntMaze
and MimicGen (scale 0.05) and robomimic (0.05, 0.1), whose commands have no correction; not for Adroit pen (0.7). For
those as published: `--config.entropy-target released`. Whether the paper's own runs had the correction is not known.

Where we differ
- Actions are stored as executed, inside [-1, 1]; the code stores them unclipped. The edit policy's loss judges
  unclipped edits, as there.
- The shift of -1 on mazes is applied before storage, not to each batch.
- With one sample or no edits, edit policy and temperature do not learn. Dropout acts in the losses only.
- Keys are independent: base and edit policy start from different ones, and selection and value draw from their own.
- Pre-training draws one minibatch per base step; the code draws 20 and uses one. The code's unused options are left
  out: critics or edit policy in pre-training, entropy in the backup.
- Edit policy and temperature both step from the parameters before the step, as in our RLPD: the same numbers.
- The flow base is ours. The paper describes `selection="soft"` but has no code for it; our bonus is
  H / inverse_temperature, so that backup and draw belong to one softmax.
- Images (not in the paper): one encoder serves all networks. The critics train it, and before `online()` the base's
  loss. Targets use it without a slow copy, as in DrQ-v2.

Over chunks, as in the published OGBench curves ("FEdit", ColinQiyangLi/qam): with `chunk` h base samples, edits and
critics are of h actions in a row, d = h A, played open loop. The presets of OGBench are FEdit's form, by settings:

| what | FEdit's code | setting |
| --- | --- | --- |
| base | flow, 4x512 GELU, no average, no weight decay | `base`, `base_network`, `base_ema` 1, `base_weight_decay` 0 |
| policy | one flow sample with one edit, no choice | `selection="edited"`, `n_samples` 1, `n_edits` 1 |
| edit policy learns on | fresh flow samples, judged clipped | `edit_on="samples"` |
| target | mean - rho std of ten critics | `pessimism` |
| pre-training | all networks | `pretrain="all"` |
| entropy | of the unscaled edit, target -d/2 | `entropy_target="reachable"`: the same |
| order | all losses at the parameters before the step | critics first, their targets follow the new ones |
| rows of the flow's loss | dropped if the window crosses an end | numbers behind the end count as zeros |
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import log
from typing import Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import optax
from flax import struct

from o2o.agents import ogbench
from o2o.agents.chunked import OfChunks
from o2o.agents.minibatches import check_flat, each_minibatch, minibatches_in
from o2o.agents.registry import register_agent
from o2o.agents.sac import ADROIT_DATA
from o2o.nn.distributions import TanhNormal
from o2o.nn.encoders import EncoderConfig, augment, create_encoder, encode
from o2o.nn.generative import Denoiser, Diffusion, Flow
from o2o.nn.modules import Activation, Adam, CriticEnsemble, GaussianActor, Model, Scalar, draw_members
from o2o.rl import losses
from o2o.rl.chunks import ActionQueue, fresh_queue, play
from o2o.rl.windows import chunk_transitions
from o2o.settings import AboveZero, Amount, Average, Count, Dropout, NotNegative, Rate, Real, Width, Widths
from o2o.types import Array, Batch, Carry, ChunkedConfig, Info, OnlineConfig, Params, Preset

ALPHA_CAP = 1e6
"""Largest entropy temperature."""
Selection = Literal["max", "soft", "edited"]


@dataclass(frozen=True)
class EXPOConfig(ChunkedConfig):
    """Settings of EXPO; the defaults are the paper's for manipulation, online with prior data."""

    online: OnlineConfig = OnlineConfig(utd_ratio=20, random_steps=5000, replay="mixed", offline_ratio=0.5)
    """Schedule of the online phase; after pre-training the paper has no random steps."""
    base: Literal["diffusion", "flow"] = "diffusion"
    """Kind of the base policy."""
    diffusion: Diffusion = Diffusion()
    """Settings of a diffusion base."""
    flow: Flow = Flow()
    """Settings of a flow base."""
    base_network: Literal["residual", "mlp"] = "residual"
    """`residual`: EXPO's, time in Fourier features; `mlp`: FQL's, time as a number."""
    base_width: Width = 256
    """Width of `residual`; its blocks are four times as wide inside."""
    base_blocks: Count = 3
    """Blocks of `residual`."""
    base_hidden_dims: Widths = (512, 512, 512, 512)
    """Widths of `mlp`."""
    base_dropout: Dropout = 0.0
    """Dropout in the base, active in its loss only."""
    base_lr: Rate = 3e-4
    """First learning rate of the base, AdamW."""
    base_weight_decay: NotNegative = 1e-4
    """Weight decay of the base."""
    base_ema: Average = 0.001
    """Weight of the new parameters in the average of the base that acts, after every base step."""
    decay_steps: Count | None = 3_000_000
    """Cosine decay of the rates of base and edit policy to 0 over this many steps of each; `None`: constant."""
    n_samples: Count = 8
    """Base samples N of the on-the-fly policy; a single sample is neither edited nor scored."""
    n_edits: Amount = 8
    """How many of the samples are edited, the first ones. 0: best of N, and no edit policy is trained."""
    edit_scale: AboveZero = 0.05
    """Bound beta of an edit per action coordinate: 0.05 to 0.1 for precise tasks, 0.5 to 0.7 for exploration."""
    selection: Selection = "max"
    """`max`: the best candidate. `soft`: a draw by exp(Q), with the draw's entropy in the backup, for narrow data.
    `edited`: no choice, the edited sample acts; for one sample and one edit."""
    inverse_temperature: AboveZero = 1.0
    """Of the soft selection: weights exp(inverse_temperature * Q), entropy bonus H / inverse_temperature."""
    backup: Literal["otf", "base"] = "otf"
    """Next action of the target: the on-the-fly policy's, or a plain sample of the base (the paper's ablation)."""
    edit_on: Literal["data", "samples"] = "data"
    """The edit policy learns to edit the minibatch's actions, or fresh samples of the base, then judged clipped."""
    pretrain: Literal["base", "all"] = "base"
    """What learns before `online()`: the base alone, or every network as it does online."""
    edit_hidden_dims: Widths = (256, 256, 256)
    """Widths of the edit policy's hidden layers."""
    edit_dropout: Dropout = 0.0
    """Dropout in the edit policy, active in its loss only."""
    edit_lr: Rate = 3e-4
    """First learning rate of the edit policy, Adam."""
    entropy_scale: NotNegative = 1.0
    """Factor c on the entropy term of the edit policy's loss."""
    entropy_target: Literal["reachable", "released"] = "reachable"
    """`reachable` adds d ln(edit_scale) to the target entropy; `released` does not, and alpha may grow without end."""
    target_entropy: Real = 0.5
    """Entropy target as a multiple of -d, d the number of action coordinates."""
    temperature_init: AboveZero = 1.0
    """Initial entropy temperature alpha."""
    temperature_lr: Rate = 3e-4
    """Learning rate of the temperature, Adam."""
    critic_hidden_dims: Widths = (256, 256, 256)
    """Widths of every critic's hidden layers."""
    critic_layer_norm: bool = True
    """LayerNorm after each hidden layer of the critics."""
    num_critics: Count = 10
    """Critics in the ensemble."""
    target_subset: Count = 2
    """Target critics drawn for the score of candidates, and again for the target's value: their minimum counts."""
    pessimism: NotNegative | None = None
    """Score and value are mean - pessimism * std (rho) of all target critics, in place of a subset's minimum."""
    activation: Activation = "relu"
    """Activation of edit policy and critics."""
    norm_last: bool = False
    """LayerNorm behind each activation of the critics instead of before it."""
    critic_lr: Rate = 3e-4
    """Learning rate of the critics, Adam."""
    encoder: EncoderConfig = EncoderConfig(kind="conv", latent_dim=50)
    """How images become features; flat observations have no encoder."""
    encoder_lr: Rate = 3e-4
    """Learning rate of the encoder, Adam."""
    tau: Average = 0.005
    """Weight of the new parameters in the target critics' average, after every critic step."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` for values out of range, or that do not go together."""
        super().__post_init__()
        if self.n_edits > self.n_samples:
            raise self.refuse("n_edits", f"0 to n_samples={self.n_samples}: lower it or raise n_samples")
        if self.target_subset > self.num_critics:
            raise self.refuse("target_subset", f"1 to num_critics={self.num_critics}")
        if self.selection == "edited" and (self.n_samples, self.n_edits) != (1, 1):
            raise self.refuse("selection", "edited only with n_samples=1 and n_edits=1")

    @property
    def generator(self) -> Diffusion | Flow:
        """The base policy's equations."""
        return self.diffusion if self.base == "diffusion" else self.flow

    @property
    def edits(self) -> int:
        """Edits that are made: none of a single sample, unless it is the edited one that acts."""
        return self.n_edits if self.n_samples > 1 or self.selection == "edited" else 0


class Choice(NamedTuple):
    """What the on-the-fly operator chose, and from what. Candidates: first the N base samples, then the edited ones."""

    actions: Array
    """Chosen actions `[..., A]`."""
    place: Array
    """Their places among the K candidates, `[...]`; places from N on are edited candidates."""
    candidates: Array
    """`[K, ..., A]`."""
    scores: Array
    """`[K, ...]`; zeros where there was nothing to choose."""
    entropy: Array
    """Entropy of the choice, `[...]`; 0 for `max`."""


def select(scores: Array, rng: Array, selection: Selection, inverse_temperature: float) -> tuple[Array, Array]:
    """Return the chosen places `[...]` among scores `[K, ...]`, and the choice's entropy `[...]`.

    `max` takes the best; `soft` draws with probability proportional to exp(inverse_temperature * score).
    """
    if selection == "max":
        return jnp.argmax(scores, axis=0), jnp.zeros(scores.shape[1:])
    log_weights = jax.nn.log_softmax(inverse_temperature * scores, axis=0)
    entropy = -jnp.sum(jnp.exp(log_weights) * log_weights, axis=0)
    return jax.random.categorical(rng, log_weights, axis=0), entropy


def on_the_fly(
    samples: Array,
    edit: Callable[[Array, Array], Array],
    score: Callable[[Array, Array], Array],
    rng: Array,
    *,
    n_edits: int,
    scale: float,
    selection: Selection = "max",
    inverse_temperature: float = 1.0,
) -> Choice:
    """Choose among base `samples [N, ..., A]` and clipped edits clip(a + scale * u) of the first `n_edits` of them.

    `edit(key, actions)` returns edits u in (-1, 1) of `actions [n, ..., A]`, same shape. `score(key, candidates)`
    returns scores `[K, ...]` of `candidates [K, ..., A]`. A single sample is returned as it is, with selection `edited`
    its edit; nothing is scored then.
    """
    edit_rng, score_rng, select_rng = jax.random.split(rng, 3)
    zero = jnp.zeros(samples.shape[1:-1])
    if samples.shape[0] == 1 and selection != "edited":
        return Choice(samples[0], zero.astype(jnp.int32), samples, scores=zero[None], entropy=zero)
    candidates = samples
    if n_edits:
        edited = samples[:n_edits] + scale * edit(edit_rng, samples[:n_edits])
        candidates = jnp.concatenate([samples, jnp.clip(edited, -1.0, 1.0)])
    if selection == "edited":
        return Choice(candidates[1], zero.astype(jnp.int32) + 1, candidates, jnp.stack([zero, zero]), zero)
    scores = score(score_rng, candidates)
    place, entropy = select(scores, select_rng, selection, inverse_temperature)
    chosen = jnp.take_along_axis(candidates, place[None, ..., None], axis=0)[0]
    return Choice(chosen, place, candidates, scores, entropy)


def edit_actor(hidden_dims: Widths, size: int, dropout: float, activation: Activation) -> GaussianActor:
    """Return the definition of an edit policy: concat(s, a) to a tanh-Gaussian of `size` numbers."""
    return GaussianActor(
        hidden_dims,
        size,
        dropout=dropout,
        init_scheme="xavier",
        log_std_min=-20.0,
        log_std_max=2.0,
        std_min=0.0,
        std_max=float("inf"),
        activation=activation,
    )


def edit_inputs(features: Array, actions: Array) -> Array:
    """Return the inputs of an edit policy, concat(s, a), for features `[..., D]` that broadcast to actions' axes."""
    features = jnp.broadcast_to(features, (*actions.shape[:-1], features.shape[-1]))
    return jnp.concatenate([features, actions], axis=-1)


_DEFAULT = EXPOConfig()


@register_agent("expo")
class EXPO(OfChunks):
    r"""EXPO: draws actions from an imitating base, edits them by bounded steps, plays the best by Q.

    `phase` says whether only the base learns.

    Equations (method, and the settings that enter):
    - `base_step` (`base`, `base_lr`, `base_ema`): $L_b = \lVert \epsilon(s, x_t, t) - z \rVert^2$
    - `choose` (`n_samples`, `n_edits`, `edit_scale`):
      $C = \{a_n \sim \pi_b(\cdot \mid s)\}_{n \le N} \cup \{\mathrm{clip}(a_n + \beta u_n)\},\; u_n \sim
      \pi_e(\cdot \mid s, a_n)$
    - `choose` (`selection`, `target_subset`): $a^* = \arg\max_{a \in C} \min_{i \in S} Q^-_i(s, a)$
    - `critic_step` (`backup`, `num_critics`): $y = r + \gamma m \min_{i \in S} Q^-_i(s', a'^*)$
    - `edit_step` (`entropy_scale`, `entropy_target`):
      $L_e = c\, \alpha (\log \pi_e(u \mid s, a) - d \ln \beta) - \frac{1}{E} \sum_i Q_i(s, a + \beta u)$
    """

    base: Model
    target_base: Params
    """Moving average of the base, which acts."""
    edit: Model
    critic: Model
    target_critic: Params
    temperature: Model
    encoder: Model | None
    rng: Array
    config: EXPOConfig = struct.field(pytree_node=False)
    phase: Literal["offline", "online"] = struct.field(pytree_node=False, default="offline")

    @classmethod
    def create(
        cls, rng: Array, observations: Array | dict[str, Array], actions: Array, config: EXPOConfig = _DEFAULT
    ) -> Self:
        """Initialise from a key and example observations, `[B, D]` or a dict with images, and actions `[B, A]`.

        Raises `ConfigError` for dict observations without images.
        """
        rng, base_rng, edit_rng, critic_rng, temperature_rng, encoder_rng = jax.random.split(rng, 6)
        encoder = create_encoder(encoder_rng, config.encoder, observations, Adam(config.encoder_lr))
        if encoder is None:
            check_flat(observations, cls.__name__)
        features = encode(encoder, observations)
        chunks = jnp.tile(actions, config.chunk)
        denoiser = Denoiser(
            config.base_network,
            config.base_hidden_dims,
            blocks=config.base_blocks,
            width=config.base_width,
            dropout=config.base_dropout,
        )
        adam_w = Adam(config.base_lr, config.decay_steps, config.base_weight_decay)
        base = Model.create(base_rng, denoiser, adam_w, features, chunks, jnp.zeros(actions.shape[:-1]))
        editor = edit_actor(config.edit_hidden_dims, chunks.shape[-1], config.edit_dropout, config.activation)
        pair = jnp.concatenate([features, chunks], axis=-1)
        ensemble = CriticEnsemble(
            config.critic_hidden_dims,
            config.num_critics,
            config.critic_layer_norm,
            "xavier",
            activation=config.activation,
            norm_last=config.norm_last,
        )
        critic = Model.create(critic_rng, ensemble, Adam(config.critic_lr), features, chunks)
        log_alpha = Scalar(log(config.temperature_init))
        agent = cls(
            base=base,
            target_base=jax.tree.map(jnp.copy, base.params),
            edit=Model.create(edit_rng, editor, Adam(config.edit_lr, config.decay_steps), pair),
            critic=critic,
            target_critic=jax.tree.map(jnp.copy, critic.params),
            temperature=Model.create(temperature_rng, log_alpha, Adam(config.temperature_lr)),
            encoder=encoder,
            rng=rng,
            config=config,
            action_dim=actions.shape[-1],
        )
        return jax.tree.map(jnp.asarray, agent)

    # Below, an action is a chunk of h actions, of `size` numbers; with `chunk` 1 it is one action.
    # The networks' outputs. `features [..., D]` are flat observations, or the encoder's output.

    def alpha(self, params: Params | None = None) -> Array:
        """Return the entropy temperature, `[]`."""
        return jnp.minimum(jnp.exp(self.temperature(params=params)), ALPHA_CAP)

    def base_samples(self, base_params: Params, features: Array, count: int, rng: Array) -> Array:
        """Draw `count` base actions `[count, ..., A]` in [-1, 1] at `features [..., D]`."""
        noise_rng, chain_rng = jax.random.split(rng)
        noise = jax.random.normal(noise_rng, (count, *features.shape[:-1], self.size))

        def denoise(x: Array, t: Array) -> Array:
            return self.base(features, x, t, params=base_params)

        return self.config.generator.sample(denoise, noise, chain_rng)

    def edit_policy(
        self, features: Array, actions: Array, params: Params | None = None, dropout_rng: Array | None = None
    ) -> TanhNormal:
        """Return the distribution of the edits u of `actions [..., A]` at `features [..., D]`, before the scale.

        Dropout is on if `dropout_rng` is given.
        """
        rngs = None if dropout_rng is None else {"dropout": dropout_rng}
        return self.edit(edit_inputs(features, actions), params=params, training=dropout_rng is not None, rngs=rngs)

    def subset_value(self, features: Array, actions: Array, rng: Array) -> Array:
        """Return the minimum `[...]` over freshly drawn target critics, the same ones for all rows of the call.

        With `pessimism` it is mean - rho std of all of them, and nothing is drawn.
        """
        if self.config.pessimism is not None:
            q = self.critic(features, actions, params=self.target_critic)
            return losses.lower_bound(q, self.config.pessimism)
        assert isinstance(self.critic.module, CriticEnsemble)
        subset, params = draw_members(self.critic.module, self.target_critic, rng, self.config.target_subset)
        return jnp.min(jnp.asarray(subset.apply(params, features, actions)), axis=0)

    def choose(self, features: Array, base_params: Params, rng: Array) -> Choice:
        """Run the on-the-fly policy at `features [..., D]` with the given base."""
        config = self.config
        sample_rng, choice_rng = jax.random.split(rng)
        samples = self.base_samples(base_params, features, config.n_samples, sample_rng)
        return on_the_fly(
            samples,
            lambda key, actions: self.edit_policy(features, actions).sample(key),
            lambda key, actions: self.subset_value(features, actions, key),
            choice_rng,
            n_edits=config.edits,
            scale=config.edit_scale,
            selection=config.selection,
            inverse_temperature=config.inverse_temperature,
        )

    def edit_share(self, choice: Choice) -> Array:
        """Return the share of choices that an edited candidate won, `[]`."""
        return jnp.mean((choice.place >= self.config.n_samples).astype(jnp.float32))

    # The losses and their steps.

    def next_values(self, next_features: Array, rng: Array) -> tuple[Array, Info]:
        """Return v'(s') `[B]`, the on-the-fly (or base) action's value by a second subset of critics, and metrics."""
        action_rng, value_rng = jax.random.split(rng)
        if self.config.backup == "base":
            actions = self.base_samples(self.base.params, next_features, 1, action_rng)[0]
            return self.subset_value(next_features, actions, value_rng), {}
        choice = self.choose(next_features, self.base.params, action_rng)
        values = self.subset_value(next_features, choice.actions, value_rng)
        return values + choice.entropy / self.config.inverse_temperature, {"edit/win_share": self.edit_share(choice)}

    def critic_step(self, batch: Batch, rng: Array) -> tuple[Self, Info]:
        """Step critics and encoder on one minibatch `[B, ...]`, then move the target critics.

        y = r + discount * m * v'(s'); the loss is the mean over critics and rows of valid (Q_i(s, a) - y)^2.
        """
        values, info = self.next_values(encode(self.encoder, batch["next_observations"]), rng)
        targets = losses.td_target(batch["rewards"], batch["masks"], values, self.config.discount)

        def loss_of(critic: Params, encoder: Params) -> tuple[Array, Array]:
            q = self.critic(encode(self.encoder, batch["observations"], encoder), batch["actions"], params=critic)
            return losses.critic_loss(q, targets, batch.get("valid")), jnp.mean(q)

        encoder_params = None if self.encoder is None else self.encoder.params
        (loss, q), (critic_grads, encoder_grads) = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)(
            self.critic.params, encoder_params
        )
        critic = self.critic.apply_gradients(critic_grads)
        agent = self.replace(
            critic=critic,
            target_critic=optax.incremental_update(critic.params, self.target_critic, self.config.tau),
            encoder=None if self.encoder is None else self.encoder.apply_gradients(encoder_grads),
        )
        return agent, {**info, "critic/loss": loss, "critic/q": q, "critic/target": jnp.mean(targets)}

    def base_step(self, batch: Batch, rng: Array) -> tuple[Self, Info]:
        """Step the base on imitation of the actions of `[B, ...]`, good or bad, then move its average.

        The loss is the mean over rows of the squared error summed over action coordinates. Before `online()`, when no
        critic trains the encoder, the encoder steps with the base.
        """
        loss_rng, dropout_rng = jax.random.split(rng)
        trained_encoder = self.encoder if self.imitates else None

        def loss_of(base: Params, encoder: Params) -> Array:
            features = encode(self.encoder, batch["observations"], encoder)

            def denoise(x: Array, t: Array) -> Array:
                return self.base(features, x, t, training=True, params=base, rngs={"dropout": dropout_rng})

            errors = self.config.generator.loss(denoise, batch["actions"], loss_rng)
            errors = batch["entries"] * errors if "entries" in batch else errors
            return jnp.mean(jnp.sum(errors, axis=-1))

        encoder_params = None if trained_encoder is None else trained_encoder.params
        loss, (base_grads, encoder_grads) = jax.value_and_grad(loss_of, argnums=(0, 1))(
            self.base.params, encoder_params
        )
        base = self.base.apply_gradients(base_grads)
        agent = self.replace(
            base=base,
            target_base=optax.incremental_update(base.params, self.target_base, self.config.base_ema),
            encoder=self.encoder if trained_encoder is None else trained_encoder.apply_gradients(encoder_grads),
        )
        return agent, {"base/loss": loss}

    def edit_step(self, batch: Batch, rng: Array) -> tuple[Self, Info]:
        """Step edit policy and temperature on edits of the stored actions of `[B, ...]`, or of samples (`edit_on`).

        u ~ pi_e(. | s, a), and l = ln pi_e(u | s, a) - d ln(beta) is the log-density of the scaled edit. The policy's
        loss is mean[c alpha l - mean_i Q_i(s, a + beta u)], the temperature's alpha (H - target) with H = -mean l.
        """
        config = self.config
        sample_rng, dropout_rng = jax.random.split(rng)
        features = encode(self.encoder, batch["observations"])
        actions = batch["actions"]
        if config.edit_on == "samples":
            actions = self.base_samples(self.base.params, features, 1, jax.random.fold_in(rng, 1))[0]
        alpha = self.alpha()
        log_volume = self.size * log(config.edit_scale)

        def edit_loss(params: Params) -> tuple[Array, tuple[Array, Array]]:
            edits, log_prob = self.edit_policy(features, actions, params, dropout_rng).sample_and_log_prob(sample_rng)
            log_prob = log_prob - log_volume
            edited = actions + config.edit_scale * edits
            edited = jnp.clip(edited, -1.0, 1.0) if config.edit_on == "samples" else edited
            q = jnp.mean(self.critic(features, edited), axis=0)
            loss = losses.sac_actor_loss(log_prob, q, config.entropy_scale * alpha)
            return loss, (-jnp.mean(log_prob), jnp.mean(jnp.abs(edits)))

        (loss, (entropy, size)), edit_grads = jax.value_and_grad(edit_loss, has_aux=True)(self.edit.params)
        target = -config.target_entropy * self.size
        if config.entropy_target == "reachable":
            target = target + log_volume

        def temperature_loss(params: Params) -> Array:
            return losses.temperature_loss(self.alpha(params), entropy, target)

        dual_loss, dual_grads = jax.value_and_grad(temperature_loss)(self.temperature.params)
        agent = self.replace(
            edit=self.edit.apply_gradients(edit_grads),
            temperature=self.temperature.apply_gradients(dual_grads),
        )
        return agent, {
            "edit/loss": loss,
            "edit/entropy": entropy,
            "edit/size": size,
            "temperature/loss": dual_loss,
        }

    @property
    def imitates(self) -> bool:
        """Whether the base alone learns now."""
        return self.phase == "offline" and self.config.pretrain == "base"

    def update(self, batch: Batch) -> tuple[Self, Info]:
        """Run `utd` critic steps on leaves `[utd, B, ...]`, then step base, edit policy and temperature on the last.

        Chunks come as `[utd, B, h, ...]`. Before `online()`, unless `pretrain` is "all": one base step on the last
        minibatch, nothing else.
        """
        config = self.config
        batch = chunk_transitions(batch, config)
        rng, critic_rng, base_rng, edit_rng, share_rng, shift_rng = jax.random.split(self.rng, 6)
        minibatches_in(batch)  # refuses leaves [B, ...]
        pad = config.encoder.shift_pad
        last = augment(shift_rng, jax.tree.map(lambda leaf: leaf[-1], batch), pad)
        agent = self.replace(rng=rng)
        if self.imitates:
            return agent.base_step(last, base_rng)

        def critic_step(agent: Self, rows: Batch, key: Array) -> tuple[Self, Info]:
            step_rng, pixel_rng = jax.random.split(key)
            return agent.critic_step(augment(pixel_rng, rows, pad), step_rng)

        agent, means = each_minibatch(critic_step, agent, batch, critic_rng)
        info = {**means, "temperature/alpha": agent.alpha(), "edit/size": jnp.zeros(())}
        if config.backup == "base":
            choice = agent.choose(encode(agent.encoder, last["observations"]), agent.target_base, share_rng)
            info["edit/win_share"] = agent.edit_share(choice)
        agent, base_info = agent.base_step(last, base_rng)
        info |= base_info
        if config.edits:
            agent, edit_info = agent.edit_step(last, edit_rng)
            info |= edit_info
        return agent, info

    def q_value(self, observations: Array | dict[str, Array], actions: Array) -> Array | None:
        """Return the critics' mean value `[...]` of actions `[..., A]` at observations `[..., D]`.

        None: the critics judge whole chunks.
        """
        return None if self.config.chunk > 1 else self.critic(encode(self.encoder, observations), actions).mean(axis=0)

    def sample_actions(
        self, observations: Array | dict[str, Array], carry: Carry, rng: Array, deterministic: bool = False
    ) -> tuple[Array, Carry]:
        """Return on-the-fly actions `[..., A]` in [-1, 1] with the averaged base; `deterministic` changes nothing."""

        def propose() -> Array:
            choice = self.choose(encode(self.encoder, observations), self.target_base, rng)
            return jnp.clip(choice.actions, -1.0, 1.0)

        return play(self.config.chunk, carry, propose)

    def initial_carry(self, batch_shape: tuple[int, ...]) -> ActionQueue | None:
        """Return empty queues `[*batch_shape, h, A]`; `None` with h = 1."""
        return fresh_queue(self.config.chunk, batch_shape, self.action_dim)

    def online(self) -> Self:
        """Return the agent whose updates train everything; nothing is reset, and nothing else changes."""
        return self.replace(phase="online")

    @classmethod
    def preset(cls, family: str, size: Literal["paper", "small"] = "paper") -> Preset:
        """Return the settings for a family of tasks (arXiv 2507.07986 and the scripts of its repository).

        `paper`: AntMaze takes the published offline-to-online command, Adroit pen's command with prior data. The other
        families are our choice: "pointmaze" follows AntMaze. Kitchen follows MimicGen threading, manipulation with the
        same arm (scale 0.05, 500k steps of pre-training). Locomotion follows RLPD's schedule with scale 0.5. "other"
        follows robomimic square (scale 0.1, 200k steps). Rewards are r - 1 on mazes and -1/0 on Adroit. OGBench's tasks
        have FEdit's settings, those of the published curves (`o2o.agents.ogbench`).

        `small`, for a laptop: always 10k steps of imitation and no random steps, smaller networks, 4 critics,
        4 samples, `utd_ratio` 4, 8k environment steps.
        """
        pretrained = replace(EXPOConfig().online, random_steps=0)
        config = EXPOConfig(online=pretrained)
        offline_steps = 500_000
        online_steps = 1_000_000
        reward = None
        if family in ("antmaze", "pointmaze"):
            config = replace(config, target_subset=1)
            online_steps = 300_000
            reward = (1.0, -1.0)
        elif family == "adroit":
            config = replace(config, edit_scale=0.7, edit_dropout=0.1)
            offline_steps = 0
            reward = (1.0, 0.0)
        elif family == "locomotion":
            config = EXPOConfig(edit_scale=0.5)
            offline_steps = 0
            online_steps = 250_000
        elif family != "kitchen":
            config = replace(config, edit_scale=0.1)
            offline_steps = 200_000
        if size == "paper":
            own = ADROIT_DATA if family == "adroit" else {}
            return Preset(config, offline_steps, online_steps, reward, tasks=_ogbench(), **own)
        config = replace(
            config,
            batch_size=128,
            online=replace(pretrained, utd_ratio=4),
            diffusion=Diffusion(steps=5),
            flow=Flow(steps=5),
            base_width=64,
            base_blocks=2,
            base_lr=1e-3,
            base_ema=0.005,
            n_samples=4,
            n_edits=4,
            edit_hidden_dims=(128, 128),
            critic_hidden_dims=(128, 128),
            num_critics=4,
            encoder=EncoderConfig.small(),
        )
        return Preset(config, 10_000, 8_000, reward)


def _ogbench() -> dict[str, Preset]:
    """Return FEdit's settings of OGBench's tasks (QAM's table): the scale of the edits."""
    config = EXPOConfig(
        **ogbench.CHUNKS,
        base="flow",
        base_network="mlp",
        base_weight_decay=0.0,
        base_ema=1.0,
        decay_steps=None,
        n_samples=1,
        n_edits=1,
        selection="edited",
        edit_scale=0.2,
        edit_on="samples",
        pretrain="all",
        edit_hidden_dims=ogbench.WIDTHS,
        critic_hidden_dims=ogbench.WIDTHS,
        activation="gelu",
        norm_last=True,
        pessimism=0.5,
        online=ogbench.ONLINE,
    )
    scales = {"cube triple": 0.3, "cube quadruple": 0.4, "puzzle 4x4": 0.8}
    scales |= {"antmaze giant": 0.3, "humanoidmaze medium": 0.5, "humanoidmaze large": 0.1}
    return ogbench.presets(config, {domain: {"edit_scale": scale} for domain, scale in scales.items()})
