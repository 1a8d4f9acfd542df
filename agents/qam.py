"""QAM: a flow policy that follows the critics by adjoint matching (arXiv 2601.14234, with 2409.08861's lean adjoint).

The policy sought is pi(a|s) ~ pi_b(a|s) exp(lambda Q(s, a)), pi_b the behaviour. Two velocity fields: the slow one v_b
clones the data and has an average v_b'; the fast one v_f is the policy. No gradient passes the steps of v_f. With T
steps of size D = 1/T, t_i = i/T and sigma_i^2 = 2 (1 - t_i + D) / (t_i + D):

    path         x_0 ~ N(0, I)
                 x_{i+1} = x_i + D (2 v_f(x_i, t_i) - x_i / (t_i + D)) + sqrt(D) sigma_i n_i      `memoryless_path`
                 x_T = x_{T-1} + D v_b'(x_{T-1}, t_{T-1}), the last step without noise
    lean adjoint a_T = -lambda grad_x mean_k Q'_k(s, clip(x)) at x_T                              `QAM.adjoints`
                 a_i = a_{i+1} + D J_i^T a_{i+1},                                                 `lean_adjoints`
                 J_i the Jacobian of 2 v_b'(x, t_i + D) - x / (t_i + D) at x_i
    fast field   mean over rows of sum_i |2 / sigma_i (v_f - v_b')(x_i, t_i) + sigma_i a_i|^2     `matching_loss`

So the optimum is v_f = v_b' - sigma_i^2 / 2 a_i. The critics, over chunks of h actions, regress on
y = R + discount^h m (mean_k - rho std_k) Q'_k(s_h, a'), a' from the policy as it acts: the ODE of v_f by Euler steps.
`form` says what acts: `flow` (QAM) v_f itself; `edit` (QAM-E) its action with a bounded Gaussian edit, which is trained
like SAC's actor (as in `o2o.agents.expo`); `one_step` (QAM-F) a one-step policy distilled from v_f (`o2o.agents.fql`).
lambda 0 is cloning: v_b acts. The policy always acts on a sample: `deterministic` changes nothing.

| what | paper | its code (ColinQiyangLi/qam) | `paper` preset | default |
| --- | --- | --- | --- | --- |
| gradient clip | - | norm 1 of all networks' gradients together | the same (`clip_together`) | norm 1 of v_f's alone |
| optimiser | - | one Adam on the sum of the losses | one each: the same steps | the same |
| noise of the path | independent | one key for x_0 and noises | independent | the same |
| window with a terminal before its last step | - | dropped | dropped | counts (`pad_terminal`) |
| slow field's loss at an episode's end | - | the window counts as zeros | its numbers behind the end do | the same |
| critics | - | 10 | 10 | 10; with 2 the published scores are no worse |
| lambda | one for each domain | the same | the same on OGBench, else 1 | 1 |
| horizon | - | chunks of 5, in mazes 1 | the same; locomotion 1 | 5 |
| online buffer | - | dataset and all own steps | dataset and `loop.replay_capacity` rows | the same |

Not here: the options of the code that no published run used (a residual policy v_f + v_b', the online critics or the
slow field itself in the adjoint, no clip there). The presets of cube-quadruple and puzzle-4x4 are for sets 100 times as
large.
lambda is on the scale of Q: other rewards need another one. The presets are those of the form `flow`; QAM-E and QAM-F
have `OGBENCH_FORMS` (`--config.form edit --config.edit-scale 0.1`). Where these have the scale or weight 0, the
published rows of these forms are QAM itself.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from o2o.agents import ogbench
from o2o.agents.chunked import OfChunks
from o2o.agents.expo import edit_actor, edit_inputs
from o2o.agents.minibatches import check_flat, each_minibatch
from o2o.agents.qc import OneStep
from o2o.agents.registry import register_agent
from o2o.nn.distributions import TanhNormal
from o2o.nn.generative import Apply, Denoiser, Flow
from o2o.nn.modules import Adam, CriticEnsemble, Model, Scalar
from o2o.rl.chunks import ActionQueue, fresh_queue, play
from o2o.rl.losses import critic_loss, lower_bound, sac_actor_loss, td_target, temperature_loss
from o2o.rl.windows import chunk_transitions
from o2o.settings import AboveZero, Average, Count, NotNegative, Rate, Real, Widths
from o2o.types import Array, Batch, Carry, ChunkedConfig, Info, OnlineConfig, Params, Preset


@dataclass(frozen=True)
class QAMConfig(ChunkedConfig):
    """Settings of QAM."""

    chunk: Count = 5
    """Actions h in a row that are judged and played as one."""
    form: Literal["flow", "edit", "one_step"] = "flow"
    """What acts: the fast field (QAM), its action with an edit (QAM-E), a one-step policy distilled from it (QAM-F)."""
    inverse_temperature: NotNegative = 1.0
    """Weight lambda of Q against the behaviour, on the scale of Q. 0: cloning."""
    edit_scale: NotNegative = 0.1
    """Bound beta of an edit per number; only form `edit`."""
    alpha: NotNegative = 30.0
    """Weight of the one-step policy's distance to the flow, on the scale of Q; only form `one_step`."""
    num_samples: Count = 1
    """Samples of the policy of which the best by the critics' mean acts, in the target too."""
    pessimism: NotNegative = 0.5
    """Standard deviations of the target critics that the target subtracts from their mean (rho)."""
    num_critics: Count = 10
    """Critics in the ensemble."""
    flow_steps: Count = 10
    """Steps T of path, adjoint and flow; below 10 the adjoint is too coarse."""
    actor_hidden_dims: Widths = (512, 512, 512, 512)
    """Widths of the hidden layers of both fields and of the edit or one-step policy."""
    critic_hidden_dims: Widths = (512, 512, 512, 512)
    """Widths of every critic's hidden layers."""
    actor_lr: Rate = 3e-4
    """Adam's rate of all networks but the critics."""
    critic_lr: Rate = 3e-4
    """Adam's rate of the critics."""
    clip_norm: AboveZero | None = 1.0
    """Gradients with a larger norm are scaled down to it: those of the fast field; `None`: never."""
    clip_together: bool = False
    """The norm is that of all networks' gradients together, and all are scaled, as published."""
    target_entropy: Real = 0.5
    """Entropy target of the unscaled edit as a multiple of -h A."""
    tau: Average = 0.005
    """Weight of critics and slow field in their averages, after every update."""
    online: OnlineConfig = OnlineConfig(warmup_steps=5000, replay="append")
    """Online phase: one buffer that starts with the dataset, one update per step after 5000 steps."""


def path_noise(steps: int) -> np.ndarray:
    """Return the noise scales sigma_i `[T]` of the memoryless path, sigma_i^2 = 2 (1 - t_i + D) / (t_i + D)."""
    late = (np.arange(steps) + 1.0) / steps
    return np.sqrt(2.0 * (1.0 + 2.0 / steps - late) / late)


def path_times(steps: int) -> np.ndarray:
    """Return the times t_i = i / T `[T]`."""
    return np.arange(steps) / steps


def memoryless_path(fast: Apply, slow: Apply, noise: Array) -> Array:
    """Return x_0 .. x_T `[T + 1, ..., n]` of the memoryless SDE of `fast`, from independent `noise [T, ..., n]`.

    `noise[0]` is x_0, the others drive the first T - 1 steps; the last step is one of the ODE of `slow`.
    """
    total = noise.shape[0]
    step = 1.0 / total
    table = np.stack([path_times(total), path_noise(total)], axis=1)[:-1]

    def move(x: Array, row: tuple[Array, Array]) -> tuple[Array, Array]:
        (t, scale), drawn = row
        drift = 2.0 * fast(x, t) - x / (t + step)
        return x + step * drift + np.sqrt(step) * scale * drawn, x

    before, path = jax.lax.scan(move, noise[0], (jnp.asarray(table, noise.dtype), noise[1:]))
    last = before + step * slow(before, jnp.asarray(1.0 - step, noise.dtype))
    return jnp.concatenate([path, before[None], last[None]])


def lean_adjoints(slow: Apply, path: Array, terminal: Array) -> Array:
    """Return the lean adjoints a_0 .. a_{T-1} `[T, ..., n]` on `path [T + 1, ..., n]` from a_T `terminal [..., n]`.

    Every step backwards is one vector-Jacobian product of the slow field, asked at t_i + D.
    """
    total = path.shape[0] - 1
    step = 1.0 / total

    def back(adjoint: Array, row: tuple[Array, Array]) -> tuple[Array, Array]:
        x, late = row
        _, pull = jax.vjp(lambda x: 2.0 * slow(x, late) - x / late, x)
        adjoint = adjoint + step * pull(adjoint)[0]
        return adjoint, adjoint

    times = jnp.asarray(path_times(total) + step, path.dtype)
    return jax.lax.scan(back, terminal, (path[:-1], times), reverse=True)[1]


def matching_loss(fast: Apply, slow: Apply, path: Array, adjoints: Array) -> Array:
    """Return sum_i |2 / sigma_i (v_f - v_b')(x_i, t_i) + sigma_i a_i|^2 `[...]` over the T points of a path."""
    total = path.shape[0] - 1
    lead = (total, *[1] * (path.ndim - 2))
    times = jnp.asarray(path_times(total), path.dtype).reshape(lead)
    scale = jnp.asarray(path_noise(total), path.dtype).reshape(*lead, 1)
    points = path[:-1]
    away = fast(points, times) - jax.lax.stop_gradient(slow(points, times))
    return jnp.sum(jnp.square(2.0 / scale * away + scale * adjoints), axis=(0, -1))


_DEFAULT = QAMConfig()


@register_agent("qam")
class QAM(OfChunks):
    r"""Q-learning with adjoint matching: a flow policy that follows the gradient of Q.

    Equations (method, and the settings that enter):
    - `behaviour_loss` (`flow_steps`): $L_b = \lVert v_b(s, x_t, t) - (a - x_0) \rVert^2$
    - `adjoints` (`inverse_temperature`): $a_T = -\lambda \nabla_x Q^-(s, x_T),\quad a_i = a_{i+1} + D J_i^T a_{i+1}$
    - `actor_loss` (`flow_steps`): $L_f = \sum_i \lVert 2 \sigma_i^{-1} (v_f - v_b^-) + \sigma_i a_i \rVert^2$
    - `critic_loss` (`pessimism`): $y = R + \gamma^h m (\mathrm{mean}_k - \rho\, \mathrm{std}_k) Q^-_k(s_h, a')$
    - `edit_loss` (`edit_scale`): $L_e = \alpha \log \pi_e(e \mid s, a) - \mathrm{mean}_k Q_k(s, a + \beta e)$
    - `policy_loss` (`alpha`): $L_\mu = \alpha (\mu(s, z) - \mathrm{Flow}(s, z))^2 - \mathrm{mean}_k Q_k(s, \mu(s, z))$
    """

    actor: Model
    """The fast field v_f(s, x, t)."""
    behaviour: Model
    """The slow field v_b(s, x, t)."""
    target_behaviour: Params
    """Its average, v_b'."""
    critic: Model
    target_critic: Params
    edit: Model | None
    """Edit policy of the form `edit`, e ~ pi_e(. | s, a)."""
    temperature: Model | None
    """Logarithm of its entropy temperature."""
    one_step: Model | None
    """Policy mu(s, z) of the form `one_step`."""
    rng: Array
    config: QAMConfig = struct.field(pytree_node=False)

    @classmethod
    def create(cls, rng: Array, observations: Array, actions: Array, config: QAMConfig = _DEFAULT) -> Self:
        """Initialise from a key, observations `[B, D]` and actions `[B, A]`; dict observations raise `ConfigError`."""
        check_flat(observations, cls.__name__)
        rng, fast_rng, slow_rng, critic_rng, policy_rng, temperature_rng = jax.random.split(rng, 6)
        chunks, times = jnp.tile(actions, config.chunk), jnp.zeros(actions.shape[:-1])
        fast = Adam(config.actor_lr, clip_norm=None if config.clip_together else config.clip_norm)
        field, adam = Denoiser("mlp", config.actor_hidden_dims), Adam(config.actor_lr)
        judges = CriticEnsemble(
            config.critic_hidden_dims, config.num_critics, True, "xavier", activation="gelu", norm_last=True
        )
        behaviour = Model.create(slow_rng, field, adam, observations, chunks, times)
        critic = Model.create(critic_rng, judges, Adam(config.critic_lr), observations, chunks)
        edit = temperature = one_step = None
        if config.form == "edit":
            editor = edit_actor(config.actor_hidden_dims, chunks.shape[-1], 0.0, "gelu")
            edit = Model.create(policy_rng, editor, adam, edit_inputs(observations, chunks))
            temperature = Model.create(temperature_rng, Scalar(), adam)
        if config.form == "one_step":
            one_step = Model.create(policy_rng, OneStep(config.actor_hidden_dims), adam, observations, chunks)
        agent = cls(
            actor=Model.create(fast_rng, field, fast, observations, chunks, times),
            behaviour=behaviour,
            target_behaviour=jax.tree.map(jnp.copy, behaviour.params),
            critic=critic,
            target_critic=jax.tree.map(jnp.copy, critic.params),
            edit=edit,
            temperature=temperature,
            one_step=one_step,
            rng=rng,
            config=config,
            action_dim=actions.shape[-1],
        )
        return jax.tree.map(jnp.asarray, agent)

    def fast(self, observations: Array, params: Params | None = None) -> Apply:
        """Return v_f(x, t) at observations `[..., D]`."""
        return lambda x, t: self.actor(observations, x, t, params=params)

    def slow(self, observations: Array, params: Params) -> Apply:
        """Return v_b(x, t) at observations `[..., D]`; its average v_b' with `params` `target_behaviour`."""
        return lambda x, t: self.behaviour(observations, x, t, params=params)

    # What acts.

    def flow_chunks(self, observations: Array, noise: Array) -> Array:
        """Return the chunks `[..., n]` in [-1, 1] that the fast field makes of `noise [..., n]`; v_b with lambda 0."""
        cloning = self.config.inverse_temperature == 0.0
        field = self.slow(observations, self.behaviour.params) if cloning else self.fast(observations)
        return Flow(self.config.flow_steps).sample(field, noise, self.rng)

    def edit_policy(self, observations: Array, chunks: Array, params: Params | None = None) -> TanhNormal:
        """Return the distribution of the edits e in (-1, 1) of `chunks [..., n]`, before the scale."""
        assert self.edit is not None
        return self.edit(edit_inputs(observations, chunks), params=params)

    def edited(self, chunks: Array, edits: Array) -> Array:
        """Return clip(a + beta e) `[..., n]`."""
        return jnp.clip(chunks + self.config.edit_scale * edits, -1.0, 1.0)

    def propose(self, observations: Array, rng: Array) -> Array:
        """Return the chunks `[..., n]` in [-1, 1] that the policy plays at observations `[..., D]`."""
        noise_rng, edit_rng = jax.random.split(rng)
        noise = jax.random.normal(noise_rng, (self.config.num_samples, *observations.shape[:-1], self.size))
        if self.one_step is not None:
            chunks = jnp.clip(self.one_step(observations, noise), -1.0, 1.0)
        else:
            chunks = self.flow_chunks(observations, noise)
        if self.edit is not None:
            chunks = self.edited(chunks, self.edit_policy(observations, chunks).sample(edit_rng))
        if self.config.num_samples == 1:
            return chunks[0]
        best = jnp.argmax(self.critic(observations, chunks).mean(axis=0), axis=0)
        return jnp.take_along_axis(chunks, best[None, ..., None], axis=0)[0]

    # The losses, on transitions of whole chunks, leaves `[B, ...]`.

    def critic_loss(self, params: Params, batch: Batch, rng: Array) -> tuple[Array, Info]:
        """Return the mean of valid (Q_k(s, a) - y)^2, y = r + discount m (mean - rho std) Q'_k(s', a')."""
        next_q = self.critic(
            batch["next_observations"], self.propose(batch["next_observations"], rng), params=self.target_critic
        )
        next_values = lower_bound(next_q, self.config.pessimism)
        targets = td_target(batch["rewards"], batch["masks"], next_values, self.config.discount)
        q = self.critic(batch["observations"], batch["actions"], params=params)
        loss = critic_loss(q, targets, batch["valid"])
        return loss, {"critic/loss": loss, "critic/q": q.mean(), "critic/target": targets.mean()}

    def behaviour_loss(self, params: Params, batch: Batch, rng: Array) -> tuple[Array, Info]:
        """Return the slow field's mean squared error on the data's chunks (`Flow.loss`), and metrics."""
        field = self.slow(batch["observations"], params)
        errors = Flow(self.config.flow_steps).loss(field, batch["actions"], rng)
        loss = jnp.mean(batch["entries"] * errors)
        return loss, {"behaviour/loss": loss}

    def adjoints(self, observations: Array, path: Array) -> Array:
        """Return the lean adjoints `[T, B, n]` on a path `[T + 1, B, n]`; coordinates outside the box begin at 0."""

        def gain(x: Array) -> Array:
            q = self.critic(observations, jnp.clip(x, -1.0, 1.0), params=self.target_critic)
            return jnp.sum(q.mean(axis=0))

        terminal = -self.config.inverse_temperature * jax.grad(gain)(path[-1])
        return lean_adjoints(self.slow(observations, self.target_behaviour), path, terminal)

    def actor_loss(self, params: Params, batch: Batch, rng: Array) -> tuple[Array, Info]:
        """Return the fast field's mean matching loss on fresh paths at the batch's states, and metrics."""
        observations = batch["observations"]
        noise = jax.random.normal(rng, (self.config.flow_steps, *batch["actions"].shape))
        slow = self.slow(observations, self.target_behaviour)
        path = jax.lax.stop_gradient(memoryless_path(self.fast(observations), slow, noise))
        adjoints = jax.lax.stop_gradient(self.adjoints(observations, path))
        loss = matching_loss(self.fast(observations, params), slow, path, adjoints).mean()
        return loss, {"actor/loss": loss, "actor/adjoint": jnp.sqrt(jnp.square(adjoints).sum(axis=-1)).mean()}

    def edit_loss(self, params: Params, batch: Batch, rng: Array) -> tuple[Array, Info]:
        """Return mean(alpha l - mean_k Q_k(s, clip(a + beta e))), a of the flow, l = ln pi_e(e | s, a); and -mean l."""
        assert self.temperature is not None
        noise_rng, edit_rng = jax.random.split(rng)
        observations = batch["observations"]
        chunks = jax.lax.stop_gradient(
            self.flow_chunks(observations, jax.random.normal(noise_rng, batch["actions"].shape))
        )
        edits, log_prob = self.edit_policy(observations, chunks, params).sample_and_log_prob(edit_rng)
        q = self.critic(observations, self.edited(chunks, edits)).mean(axis=0)
        loss = sac_actor_loss(log_prob, q, jnp.exp(self.temperature()))
        return loss, {"edit/loss": loss, "edit/entropy": -log_prob.mean(), "edit/size": jnp.abs(edits).mean()}

    def temperature_loss(self, params: Params, entropy: Array) -> tuple[Array, Info]:
        """Return alpha (H - target), alpha the edit policy's temperature and H its entropy `[]`."""
        assert self.temperature is not None
        alpha = jnp.exp(self.temperature(params=params))
        loss = temperature_loss(alpha, entropy, -self.config.target_entropy * self.size)
        return loss, {"temperature/alpha": alpha}

    def policy_loss(self, params: Params, batch: Batch, rng: Array) -> tuple[Array, Info]:
        """Return alpha mean (mu(s, z) - Flow(s, z))^2 - mean Q_k(s, clip(mu(s, z))), FQL's loss, the fast field taught.

        The noise z is the same in both terms.
        """
        assert self.one_step is not None
        observations = batch["observations"]
        noise = jax.random.normal(rng, batch["actions"].shape)
        chunks = self.one_step(observations, noise, params=params)
        distance = jnp.mean(jnp.square(chunks - jax.lax.stop_gradient(self.flow_chunks(observations, noise))))
        q = self.critic(observations, jnp.clip(chunks, -1.0, 1.0)).mean()
        return self.config.alpha * distance - q, {"policy/distance": distance, "policy/q": q}

    def gradients(self, batch: Batch, rng: Array) -> tuple[dict[str, Params], Info]:
        """Return the gradient of every network's own loss at the present parameters, by field, and metrics."""
        keys = jax.random.split(rng, 4)
        losses: dict[str, tuple[Any, Array]] = {
            "critic": (self.critic_loss, keys[0]),
            "behaviour": (self.behaviour_loss, keys[1]),
            "actor": (self.actor_loss, keys[2]),
        }
        if self.edit is not None:
            losses["edit"] = (self.edit_loss, keys[3])
        if self.one_step is not None:
            losses["one_step"] = (self.policy_loss, keys[3])
        grads: dict[str, Params] = {}
        info: Info = {}
        for name, (loss, key) in losses.items():
            grads[name], metrics = jax.grad(loss, has_aux=True)(getattr(self, name).params, batch, key)
            info |= metrics
        if self.temperature is not None:
            step = jax.grad(self.temperature_loss, has_aux=True)
            grads["temperature"], metrics = step(self.temperature.params, info["edit/entropy"])
            info |= metrics
        if self.config.clip_together and self.config.clip_norm is not None:
            clip = optax.clip_by_global_norm(self.config.clip_norm)
            grads, _ = clip.update(grads, clip.init(grads))  # pyright: ignore[reportAssignmentType, reportArgumentType]
        return grads, info

    def _step(self, batch: Batch) -> tuple[Self, Info]:
        """Step all networks on one minibatch `[B, ...]`; the averages follow the parameters from before the step."""
        rng, loss_rng = jax.random.split(self.rng)
        grads, info = self.gradients(batch, loss_rng)
        averages = {
            f"target_{name}": optax.incremental_update(
                getattr(self, name).params, getattr(self, f"target_{name}"), self.config.tau
            )
            for name in ("critic", "behaviour")
        }
        stepped = {name: getattr(self, name).apply_gradients(each) for name, each in grads.items()}
        return self.replace(**stepped, **averages, rng=rng), info

    def update(self, batch: Batch) -> tuple[Self, Info]:
        """Take one step per minibatch of the leaves `[utd, B, h, ...]`, with h = 1 `[utd, B, ...]`; mean metrics."""
        return each_minibatch(lambda agent, rows: agent._step(rows), self, chunk_transitions(batch, self.config))

    def q_value(self, observations: Array, actions: Array) -> Array | None:
        """Return mean - rho std of the critics, `[...]`, of actions `[..., A]`; None: they judge whole chunks."""
        if self.config.chunk > 1:
            return None
        return lower_bound(self.critic(observations, actions), self.config.pessimism)

    def sample_actions(
        self, observations: Array, carry: Carry, rng: Array, deterministic: bool = False
    ) -> tuple[Array, Carry]:
        """Return the next actions `[..., A]` of the chunks being played, always samples, and the queues without them.

        A new chunk is drawn where a queue is empty.
        """
        return play(self.config.chunk, carry, lambda: self.propose(observations, rng))

    def initial_carry(self, batch_shape: tuple[int, ...]) -> ActionQueue | None:
        """Return empty queues `[*batch_shape, h, A]`; `None` with h = 1."""
        return fresh_queue(self.config.chunk, batch_shape, self.action_dim)

    @classmethod
    def preset(cls, family: str, size: Literal["paper", "small"] = "paper") -> Preset:
        """Return the settings for a family of tasks.

        `paper`: 1M updates and 500k environment steps. OGBench's tasks have the published lambda of QAM; no other
        family is published: they have lambda 1, and mazes lambda 3 with single actions. `small`: 2x128, 2 critics,
        batch 128, 10k updates and 10k environment steps, the first update at 1000. Rewards are -1/0 on mazes and
        Adroit, else the task's own.
        """
        maze = family in ("antmaze", "pointmaze")
        config = QAMConfig(chunk=1, inverse_temperature=3.0) if maze else QAMConfig()
        if family == "locomotion":
            config = replace(config, chunk=1)
        reward = (1.0, -1.0) if maze else (1.0, 0.0) if family == "adroit" else None
        if size == "paper":
            return Preset(replace(config, clip_together=True), 1_000_000, 500_000, reward, tasks=_ogbench())
        small = replace(
            config,
            num_critics=2,
            actor_hidden_dims=(128, 128),
            critic_hidden_dims=(128, 128),
            batch_size=128,
            actor_lr=1e-3,
            critic_lr=1e-3,
            tau=0.01,
            online=replace(config.online, warmup_steps=1000),
        )
        return Preset(small, 10_000, 10_000, reward)


def _ogbench() -> dict[str, Preset]:
    """Return QAM's settings of OGBench's tasks: lambda."""
    weights = {"cube triple": 3.0, "puzzle 3x3": 3.0, "puzzle 4x4": 30.0, "antmaze large": 10.0, "antmaze giant": 3.0}
    weights |= {"humanoidmaze medium": 3.0, "humanoidmaze large": 3.0}
    own = {domain: {"inverse_temperature": weight} for domain, weight in weights.items()}
    return ogbench.presets(QAMConfig(pad_terminal=False, clip_together=True), own)


OGBENCH_FORMS: dict[str, dict[str, dict[str, Any]]] = {
    "edit": {
        "cube double": {"inverse_temperature": 1.0, "edit_scale": 0.0},
        "cube triple": {"inverse_temperature": 3.0, "edit_scale": 0.1},
        "scene": {"inverse_temperature": 1.0, "edit_scale": 0.0},
        "puzzle 3x3": {"inverse_temperature": 1.0, "edit_scale": 0.1},
        "puzzle 4x4": {"inverse_temperature": 0.1, "edit_scale": 0.9},
        "cube quadruple": {"inverse_temperature": 3.0, "edit_scale": 0.1},
        "antmaze large": {"inverse_temperature": 1.0, "edit_scale": 0.1},
        "antmaze giant": {"inverse_temperature": 10.0, "edit_scale": 0.1},
        "humanoidmaze medium": {"inverse_temperature": 3.0, "edit_scale": 0.1},
        "humanoidmaze large": {"inverse_temperature": 3.0, "edit_scale": 0.1},
    },
    "one_step": {
        "cube double": {"inverse_temperature": 1.0, "alpha": 0.0},
        "cube triple": {"inverse_temperature": 10.0, "alpha": 300.0},
        "scene": {"inverse_temperature": 1.0, "alpha": 300.0},
        "puzzle 3x3": {"inverse_temperature": 3.0, "alpha": 0.0},
        "puzzle 4x4": {"inverse_temperature": 3.0, "alpha": 3.0},
        "cube quadruple": {"inverse_temperature": 0.3, "alpha": 30.0},
        "antmaze large": {"inverse_temperature": 3.0, "alpha": 30.0},
        "antmaze giant": {"inverse_temperature": 3.0, "alpha": 30.0},
        "humanoidmaze medium": {"inverse_temperature": 1.0, "alpha": 30.0},
        "humanoidmaze large": {"inverse_temperature": 0.3, "alpha": 30.0},
    },
}
"""Published settings of QAM-E and QAM-F on OGBench. An edit scale or alpha of 0 stands for the form `flow`."""
