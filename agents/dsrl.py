"""DSRL: diffusion steering by reinforcement learning, over the noise of a flow or diffusion policy (arXiv 2506.15799).

A base policy maps noise to a chunk of actions, a = Base(s, z). DSRL leaves it alone and learns which noise to feed it:
the noise is the action of SAC, with z = b u and u in (-1, 1)^d. Base is asked for actions only, never for a gradient.
What no noise can produce cannot be learnt.

This is the noise-aliased form (DSRL-NA). Its critics Q(s, a) judge executed actions, so demonstrations, whose noise
nobody knows, train them. Noise critics Qz(s, z) are regressed on Q(s, Base(s, z)), so that all z with the same action
share what is learnt. d = n = h A numbers, or A with `noise` "shared".

    a'   = Base(s_h, b u'),  u' ~ pi(.|s_h)                               `targets`
    y    = R + discount^h m (mean_k Q'_k(s_h, a') - rho std_k Q'_k(s_h, a'))
    L_Q  = mean valid (Q_k(s, a) - y)^2                                   `critic_loss`
    L_z  = mean (Qz_k(s, z~) - Q_k(s, Base(s, z~)))^2,  z~ ~ N(0, I)      `noise_critic_loss`
    L_pi = mean (alpha l - mean_k Qz_k(s, b u)),  l = ln pi(u|s)          `actor_loss`
    L_al = alpha (H - H_bar),  H = -mean l,  H_bar = -d / 2               `update_policy`
    act  : Base(s, b u)                                                   `play`

The density is that of u, not of z, so the scale b is not in H. `average` is the base that acts.

The base is one of two. Without `init_from` it is a flow of DSRL's own, cloned from every batch, offline and online, as
in the code of the published OGBench rows. With `init_from` it is that of a run of `flow_bc`, `diffusion_bc`, `fql`,
`ifql` or `qc`, which then stays as it is (`base_update`); a diffusion is sampled by DDIM, which depends on the first
noise only. Such a run begins online.

| what | paper's codes | QAM's code | `paper` preset | default |
| --- | --- | --- | --- | --- |
| base | frozen | flow, cloned along; its average acts | QAM's | QAM's; frozen with `init_from` |
| critics, rho | 2, minimum | 10, 0.5 | QAM's | 10, 0.5 |
| b | 1 to 2.5 | by domain | QAM's, else 1 | 1 |
| evaluation | samples of u | the same | the run's `deterministic_eval` | tanh of the mean |
| windows that an episode's end cuts | - | not in L_Q, L_flow | the same | `pad_terminal` |

Where we differ
- One Adam for each network, where the code has one over the sum of the losses: the same steps. Averages of Q and base
  take the parameters of before the step, as the code does.
- The entries of a cut chunk before the end are cloned; the code leaves the whole row out.
- Left out: DSRL-SAC, which needs recorded noise; best of N over u (N is 1 in the published runs); updates counted per
  query; bases in files, which compiled updates cannot ask.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import optax
from flax import struct

from o2o.agents import ogbench
from o2o.agents.chunked import Chunked, ChunkedFlow
from o2o.agents.fql import FQL
from o2o.agents.generative_bc import GenerativeBC
from o2o.agents.minibatches import check_flat
from o2o.agents.registry import register_agent
from o2o.agents.sac import positive, positive_model
from o2o.errors import ConfigError
from o2o.nn.distributions import TanhNormal
from o2o.nn.generative import Denoiser, Diffusion, Flow
from o2o.nn.modules import Adam, CriticEnsemble, GaussianActor, Model
from o2o.rl import losses
from o2o.rl.windows import Chunks, chunk_rows
from o2o.settings import AboveZero, Average, Count, NotNegative, Rate, Real, Settings, Width, Widths
from o2o.types import Array, Batch, ChunkedConfig, Info, OnlineConfig, Params, Phase, Preset


@dataclass(frozen=True)
class SteeredBase(Settings):
    """What the base is; `init_from` takes it from its run."""

    kind: Literal["flow", "diffusion"] = "flow"
    """Its equations."""
    flow: Flow = Flow()
    """Settings of a flow."""
    diffusion: Diffusion = Diffusion(20, "cosine", "ddim", clip="prediction")
    """Settings of a diffusion; it is always sampled by DDIM."""
    horizon: Count | None = None
    """Actions that it makes at once, of which a `chunk` is played; `None`: a chunk."""
    network: Literal["residual", "mlp"] = "mlp"
    """`residual`: EXPO's, time in Fourier features; `mlp`: FQL's, time as a number."""
    actor_hidden_dims: Widths = (512, 512, 512, 512)
    """Widths of `mlp`."""
    width: Width = 256
    """Width of `residual`; four times as wide inside its blocks."""
    blocks: Count = 3
    """Blocks of `residual`."""

    @property
    def generator(self) -> Diffusion | Flow:
        """Its equations; the sampler depends on the first noise only."""
        return (self.diffusion if self.kind == "diffusion" else self.flow).deterministic()


@dataclass(frozen=True)
class DSRLConfig(ChunkedConfig):
    """Settings of DSRL; the defaults are those of QAM's code on OGBench's mazes."""

    noise_scale: NotNegative = 1.0
    """Bound b of each noise number: 0.4 to 1.4 in the published runs; 0 plays Base(s, 0)."""
    noise: Literal["per_step", "shared"] = "per_step"
    """`per_step`: one number for every number of the base's chunk; `shared`: one action's, repeated for each step."""
    base: SteeredBase = SteeredBase()
    """What the base is."""
    base_update: Literal["auto", "clone", "none"] = "auto"
    """`clone`: the base learns from every batch; `none`: it stays. `auto`: cloned, but not if it is of `init_from`."""
    base_lr: Rate = 3e-4
    """Adam's rate of a base that is cloned."""
    rho: NotNegative = 0.5
    """Standard deviations below the critics' mean in the target."""
    num_critics: Count = 10
    """Number K of critics, and of noise critics."""
    actor_hidden_dims: Widths = (512, 512, 512, 512)
    """Widths of the noise policy's hidden layers."""
    critic_hidden_dims: Widths = (512, 512, 512, 512)
    """Widths of every critic's and noise critic's hidden layers."""
    actor_lr: Rate = 3e-4
    """Adam's rate of the noise policy."""
    critic_lr: Rate = 3e-4
    """Adam's rate of critics and noise critics."""
    target_entropy: Real = 0.5
    """Entropy target as a multiple of -d, d the number of noise numbers."""
    temperature_init: AboveZero = 1.0
    """Initial entropy temperature alpha."""
    temperature_lr: Rate = 3e-4
    """Adam's rate of the temperature."""
    tau: Average = 0.005
    """Weight of critics and base in their averages, after every update."""
    online: OnlineConfig = OnlineConfig(warmup_steps=5000, replay="append")
    """Online phase: one buffer that starts with the dataset, one update per step after 5000 steps. `random_steps` are
    the base's, with noise from N(0, I)."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` for values out of range, or that do not go together."""
        super().__post_init__()
        if self.horizon < self.chunk:
            raise self.refuse("chunk", f"1 to {self.horizon}, the horizon of the base")
        if self.clones and self.horizon > self.chunk:
            raise self.refuse("chunk", f"{self.horizon}, the horizon of the base, where the base is cloned")

    @property
    def horizon(self) -> int:
        """Actions that the base makes at once."""
        return self.base.horizon or self.chunk

    @property
    def clones(self) -> bool:
        """Whether the base learns."""
        return self.base_update != "none"


_DEFAULT = DSRLConfig()


@register_agent("dsrl")
class DSRL(Chunked):
    r"""Diffusion steering: chooses the noise of a frozen flow or diffusion policy.

    Equations (method, and the settings that enter):
    - `targets` (`rho`, `noise_scale`): $y = R + \gamma^h m (\mathrm{mean}_k - \rho\, \mathrm{std}_k) Q^-_k(s_h, a')$
    - `critic_loss` (`num_critics`): $L_Q = (Q_k(s, a) - y)^2$
    - `noise_critic_loss` (`noise`): $L_z = (Q^z_k(s, \tilde z) - Q_k(s, \mathrm{Base}(s, \tilde z)))^2$
    - `actor_loss` (`noise_scale`): $L_\pi = \alpha \log \pi(u \mid s) - \mathrm{mean}_k Q^z_k(s, b u)$
    - `update_policy` (`target_entropy`): $L_\alpha = \alpha (H - \bar H)$
    """

    actor: Model
    """The noise policy pi(u|s)."""
    critic: Model
    target_critic: Params
    noise_critic: Model
    """Qz(s, z)."""
    base: Model
    average: Params
    """Moving average of the base, which acts."""
    temperature: Model
    config: DSRLConfig = struct.field(pytree_node=False)

    @classmethod
    def create(cls, rng: Array, observations: Array, actions: Array, config: DSRLConfig = _DEFAULT) -> Self:
        """Initialise from a key, observations `[B, D]` and actions `[B, A]`; dict observations raise `ConfigError`."""
        check_flat(observations, "DSRL")
        rng, actor_rng, critic_rng, noise_rng, base_rng, temperature_rng = jax.random.split(rng, 6)
        whole, times = jnp.tile(actions, config.horizon), jnp.zeros(actions.shape[:-1])
        noise = actions if config.noise == "shared" else whole
        policy = GaussianActor(
            config.actor_hidden_dims,
            noise.shape[-1],
            init_scheme="xavier",
            log_std_min=-20.0,
            log_std_max=2.0,
            std_min=0.0,
            std_max=float("inf"),
            activation="gelu",
        )
        judges = CriticEnsemble(
            config.critic_hidden_dims, config.num_critics, True, "xavier", activation="gelu", norm_last=True
        )
        about = config.base
        denoiser = Denoiser(about.network, about.actor_hidden_dims, about.blocks, about.width)
        chunks = whole[..., : config.chunk * actions.shape[-1]]
        critic = Model.create(critic_rng, judges, Adam(config.critic_lr), observations, chunks)
        base = Model.create(base_rng, denoiser, Adam(config.base_lr), observations, whole, times)
        agent = cls(
            actor=Model.create(actor_rng, policy, Adam(config.actor_lr), observations),
            critic=critic,
            target_critic=jax.tree.map(jnp.copy, critic.params),
            noise_critic=Model.create(noise_rng, judges, Adam(config.critic_lr), observations, noise),
            base=base,
            average=jax.tree.map(jnp.copy, base.params),
            temperature=positive_model(temperature_rng, config.temperature_init, "exp", config.temperature_lr),
            rng=rng,
            config=config,
            action_dim=actions.shape[-1],
        )
        return jax.tree.map(jnp.asarray, agent)

    @classmethod
    def from_agent(cls, agent: Any, config: DSRLConfig) -> Self:
        """Return DSRL on the flow or diffusion of a trained agent; `config.base` becomes what that is.

        Raises `ConfigError` for agents without one, and for a chunk longer than what it makes at once.
        """
        about, params = steered(agent)
        horizon = about.horizon or 1
        if config.chunk > horizon:
            raise ConfigError(
                f"DSRLConfig.chunk is {config.chunk}, but the base makes {horizon} actions at once: set chunk to it"
            )
        update = "none" if config.base_update == "auto" else config.base_update
        config = replace(config, base=about, base_update=update)
        rng, fresh_rng = jax.random.split(agent.rng)
        numbers = horizon * agent.action_dim + (1 if about.network == "mlp" else about.width)
        rows = jnp.zeros((1, params["params"]["inputs"]["kernel"].shape[0] - numbers))
        fresh = cls.create(fresh_rng, rows, jnp.zeros((1, agent.action_dim)), config)
        return fresh.replace(base=fresh.base.replace(params=params), average=jax.tree.map(jnp.copy, params), rng=rng)

    def base_chunks(self, observations: Array, noise: Array) -> Array:
        """Return Base(s, z): chunks `[..., n]` in [-1, 1] from noise `[..., d]`, without gradient."""
        if self.config.noise == "shared":
            noise = jnp.tile(noise, self.config.horizon)

        def denoise(x: Array, t: Array) -> Array:
            return self.base(observations, x, t, params=self.average)

        whole = self.config.base.generator.sample(denoise, noise, self.rng)
        return jax.lax.stop_gradient(whole[..., : self.size])

    def policy(self, observations: Array, params: Params | None = None) -> TanhNormal:
        """Return pi(.|s), of u in (-1, 1)^d, at observations `[..., D]`."""
        return self.actor(observations, params=params)

    def alpha(self, params: Params | None = None) -> Array:
        """Return the entropy temperature, `[]`."""
        return positive(self.temperature(params=params), "exp")

    def targets(self, chunks: Chunks, rng: Array) -> Array:
        """Return y = R + discount^h m (mean - rho std) Q'(s_h, Base(s_h, b u')) `[B]`; no entropy."""
        noise = self.config.noise_scale * self.policy(chunks.next_observations).sample(rng)
        next_chunks = self.base_chunks(chunks.next_observations, noise)
        q = self.critic(chunks.next_observations, next_chunks, params=self.target_critic)
        value, discount = losses.lower_bound(q, self.config.rho), self.config.discount**self.config.chunk
        return losses.td_target(chunks.returns, chunks.masks, value, discount)

    def critic_loss(self, params: Params, chunks: Chunks, targets: Array) -> tuple[Array, Info]:
        """Return the mean over critics and windows of valid (Q_k(s, a) - y)^2, and metrics."""
        q = self.critic(chunks.observations, chunks.actions, params=params)
        loss = jnp.mean(chunks.valid * jnp.square(q - targets))
        return loss, {"critic/loss": loss, "critic/q": jnp.mean(q), "critic/target": jnp.mean(targets)}

    def q_value(self, observations: Array, actions: Array) -> Array | None:
        """Return the critics' mean `[...]` of actions `[..., A]`; None: they judge whole chunks."""
        return jnp.mean(self.critic(observations, actions), axis=0) if self.config.chunk == 1 else None

    def noise_critic_loss(self, params: Params, chunks: Chunks, noise: Array) -> tuple[Array, Info]:
        """Return the mean of (Qz_k(s, z~) - Q_k(s, Base(s, z~)))^2, head by head, z~ `[B, d]`, and metrics."""
        goal = self.critic(chunks.observations, self.base_chunks(chunks.observations, noise))
        loss = jnp.mean(jnp.square(self.noise_critic(chunks.observations, noise, params=params) - goal))
        return loss, {"noise_critic/loss": loss}

    def actor_loss(self, params: Params, chunks: Chunks, rng: Array) -> tuple[Array, Info]:
        """Return mean (alpha ln pi(u|s) - mean_k Qz_k(s, b u)), u ~ pi(.|s), and metrics."""
        noise, log_prob = self.policy(chunks.observations, params).sample_and_log_prob(rng)
        q = jnp.mean(self.noise_critic(chunks.observations, self.config.noise_scale * noise), axis=0)
        loss = losses.sac_actor_loss(log_prob, q, self.alpha())
        return loss, {"actor/loss": loss, "actor/entropy": -jnp.mean(log_prob), "actor/q": jnp.mean(q)}

    def base_loss(self, params: Params, chunks: Chunks, rng: Array) -> tuple[Array, Info]:
        """Return the mean over all entries of the base's squared error; invalid entries count as zeros."""

        def denoise(x: Array, t: Array) -> Array:
            return self.base(chunks.observations, x, t, params=params)

        loss = jnp.mean(chunks.entries * self.config.base.generator.loss(denoise, chunks.actions, rng))
        return loss, {"base/loss": loss}

    def update_policy(self, chunks: Chunks, rng: Array) -> tuple[Self, Info]:
        """Step noise policy and temperature, both from the present parameters."""
        grads, info = jax.grad(self.actor_loss, has_aux=True)(self.actor.params, chunks, rng)
        aim = -self.config.target_entropy * self.noise_dim

        def loss(params: Params) -> Array:
            return losses.temperature_loss(self.alpha(params), info["actor/entropy"], aim)

        temperature = self.temperature.apply_gradients(jax.grad(loss)(self.temperature.params))
        agent = self.replace(actor=self.actor.apply_gradients(grads), temperature=temperature)
        return agent, {**info, "temperature/alpha": self.alpha()}

    @property
    def noise_dim(self) -> int:
        """Noise numbers d."""
        return self.action_dim * (1 if self.config.noise == "shared" else self.config.horizon)

    def _step(self, batch: Batch) -> tuple[Self, Info]:
        """Step all networks on windows `[B, h, ...]`, every loss at the present parameters."""
        config = self.config
        rng, target_rng, noise_rng, actor_rng, base_rng = jax.random.split(self.rng, 5)
        chunks = chunk_rows(batch, config.discount, config.pad_terminal)
        targets = self.targets(chunks, target_rng)
        noise = jax.random.normal(noise_rng, (*chunks.valid.shape, self.noise_dim))
        critic_grads, info = jax.grad(self.critic_loss, has_aux=True)(self.critic.params, chunks, targets)
        noise_grads, more = jax.grad(self.noise_critic_loss, has_aux=True)(self.noise_critic.params, chunks, noise)
        agent, policy_info = self.update_policy(chunks, actor_rng)
        agent = agent.replace(
            critic=self.critic.apply_gradients(critic_grads),
            target_critic=optax.incremental_update(self.critic.params, self.target_critic, config.tau),
            noise_critic=self.noise_critic.apply_gradients(noise_grads),
            rng=rng,
        )
        info = {**info, **more, **policy_info}
        if not config.clones:
            return agent, info
        base_grads, base_info = jax.grad(self.base_loss, has_aux=True)(self.base.params, chunks, base_rng)
        average = optax.incremental_update(self.base.params, self.average, config.tau)
        return agent.replace(base=self.base.apply_gradients(base_grads), average=average), {**info, **base_info}

    def play(self, observations: Array, rng: Array, deterministic: bool) -> Array:
        """Return the chunks `[..., n]` that the base makes of b u, u a sample or tanh of the mean."""
        policy = self.policy(observations)
        noise = policy.mode() if deterministic else policy.sample(rng)
        return self.base_chunks(observations, self.config.noise_scale * noise)

    def random_actions(self, observations: Any, rng: Array, action_dim: int) -> Array:
        """Return the base's first actions `[N, A]` from noise of N(0, I), for observations `[N, D]`."""
        noise = jax.random.normal(rng, (*observations.shape[:-1], self.noise_dim))
        return self.base_chunks(observations, noise)[..., :action_dim]

    def phases(self, steps: int) -> tuple[Phase, ...]:
        """Return the one phase of a pre-training; raises `ConfigError` if its base would stay untrained."""
        if steps and not self.config.clones:
            raise ConfigError("DSRLConfig.base_update is 'none', but there is no base yet: give `init_from`, or clone")
        return super().phases(steps)

    @classmethod
    def preset(cls, family: str, size: Literal["paper", "small"] = "paper") -> Preset:
        """Return the settings for a family of tasks.

        `paper`: QAM's on OGBench (`o2o.agents.ogbench`), 1M updates and 500k environment steps, 4x512, batch 256; none
        of the other families is in the paper. Mazes and Adroit have rewards of -1/0. `small`: 2x128, 2 critics, batch
        128, rates of 1e-3, 10k updates and 10k environment steps, the first update at 1000.
        """
        reward = {"antmaze": (1.0, -1.0), "pointmaze": (1.0, -1.0), "adroit": (1.0, 0.0)}.get(family)
        if size == "paper":
            return Preset(DSRLConfig(), 1_000_000, 500_000, reward, tasks=_ogbench())
        config = DSRLConfig(
            base=SteeredBase(actor_hidden_dims=(128, 128)),
            base_lr=1e-3,
            num_critics=2,
            actor_hidden_dims=(128, 128),
            critic_hidden_dims=(128, 128),
            actor_lr=1e-3,
            critic_lr=1e-3,
            temperature_lr=1e-3,
            tau=0.01,
            batch_size=128,
            online=OnlineConfig(warmup_steps=1000, replay="append"),
        )
        return Preset(config, 10_000, 10_000, reward)


def steered(agent: Any) -> tuple[SteeredBase, Params]:
    """Return what the flow or diffusion of a trained agent is, and its parameters; raises `ConfigError` without one."""
    config = agent.config
    if isinstance(agent, GenerativeBC):
        kind = "diffusion" if isinstance(config.model, Diffusion) else "flow"
        model: dict[str, Any] = {"kind": kind, kind: config.model}
        about = SteeredBase(
            horizon=config.horizon,
            network=config.network,
            actor_hidden_dims=config.actor_hidden_dims,
            width=config.width,
            blocks=config.blocks,
            **model,
        )
        return about, agent.average
    if isinstance(agent, ChunkedFlow | FQL):
        chunk = config.chunk if isinstance(agent, ChunkedFlow) else 1
        flow = Flow(config.flow_steps)
        return SteeredBase(flow=flow, horizon=chunk, actor_hidden_dims=config.actor_hidden_dims), agent.actor.params
    if isinstance(agent, DSRL):
        return replace(config.base, horizon=config.horizon), agent.average
    known = "flow_bc, diffusion_bc, fql, ifql, qc or dsrl"
    raise ConfigError(f"DSRL cannot steer {type(agent).__name__}, which has no noise to steer by; expected {known}")


def _ogbench() -> dict[str, Preset]:
    """Return the settings of OGBench's tasks (QAM's table): the bound b of the noise."""
    bounds = {"cube triple": 1.4, "cube quadruple": 1.4, "scene": 0.4}
    bounds |= {"antmaze large": 0.8, "antmaze giant": 1.2, "humanoidmaze medium": 0.6, "humanoidmaze large": 0.8}
    own = {domain: {"noise_scale": bound} for domain, bound in bounds.items()}
    return ogbench.presets(DSRLConfig(**ogbench.CHUNKS), own, rho="rho")
