"""CQL and Cal-QL: offline actor-critic that lowers Q on actions the data do not support.

CQL, arXiv 2006.04779; Cal-QL, arXiv 2303.05479.
Idea: add to SAC's critic loss the gap between a soft maximum of Q over sampled actions and Q of the logged action.
Cal-QL stops pushing a policy action's value below the Monte-Carlo return of the logged trajectory, max(Q, G), so that
values stay on the scale of true returns and fine-tuning does not begin with unlearning.

The `paper` preset is the official Cal-QL repository's (O, `official`). The default is the WSRL repository's ensemble
(W), from which WSRL starts; a WSRL run without online steps trains it at the paper's size.

| what | paper | code (O) | `paper` preset | default (W) |
| --- | --- | --- | --- | --- |
| critics | two | two, no LayerNorm | as O | ten with LayerNorm and one output layer |
| gap taken of | both | both | both | two drawn of ten |
| output layers' gain | - | 1e-2, actor's too | 1e-2 | sqrt(2) |
| std of the actor | - | scaled head, log-std in [-20, 2] | as O | a head, std in [1e-5, 10] |
| alpha, dual variable | - | exp, 1 and e | as O | softplus, 1 and 1 |
| dual's weight (mazes) | 5 | 5 | 5 | 1 |
| temperature's entropy | - | at s, of the actor's samples | as O | at s', samples of its own |
| online rows | - | half the dataset's | half | half |
| rewards of locomotion | - | raw (no Cal-QL there) | Cal-QL x0.1, CQL raw | raw |

On dense rewards Cal-QL learns nothing until Q has climbed to the returns (`calql/clamped` is near 1: they replace the
policy's values). On `o2o/hopper/medium` with raw rewards the return was 2, 2, 63, 267 and 1051 after 5, 10, 15, 20 and
25 thousand updates, with rewards x0.1 653 and 812 after 3 and 6 thousand (one seed each); the official code climbs as
late. So its locomotion presets scale the rewards, and a run says so on the screen where the share stays high. The small
preset had 177 and 52 after 3 and 6 thousand updates with x0.1 (one seed), plain CQL 1109 after 10 thousand.

Where we differ
- The dual variable steps with every critic step, from the gap of that very step; W redraws the gap, and at UTD > 1 it
  steps the dual once a call.
- The data term shares the TD part's forward pass; only the drawn members are evaluated on the 3N sampled actions.
- O keeps one optimiser per critic and sums their losses; ours averages them in one Adam: the same step up to epsilon.
  O's actor has one output layer of 2 dim(A), ours two heads.
- At UTD 1 actor and temperature step beside the critics, from the same parameters, as in both codes; at UTD > 1
  they follow the critics, on the rows of all minibatches (`joint_policy_step`).
- Online we collect step by step (as W; O by whole trajectories): a million steps on mazes and Adroit, pen 200,000 (O),
  elsewhere 500,000 (W). Cal-QL's first update waits for a finished episode (W: the longest one's length).
- Families without settings of O: Kitchen and locomotion take W's weights, steps and widths; "other" takes weight 5, no
  dual, importance sampling; "pointmaze" follows AntMaze with smaller critics.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np

from o2o.agents.registry import register_agent
from o2o.agents.sac import SAC, Positive, SACConfig, positive, positive_model, shrink
from o2o.errors import ConfigError, DatasetError
from o2o.nn.modules import Init, Model, sample_members, take_members
from o2o.rl import losses
from o2o.settings import AboveZero, Count, Interval, NotNegative, Range, Rate, Settings
from o2o.types import Array, Batch, Info, Needs, OnlineConfig, Params, Preset

CLAMPED_SHARE = 0.9
"""Share of policy samples whose value a return replaced above which Cal-QL gives advice."""
CLAMPED_AFTER = 2_000
"""Gradient steps before which it gives none: Q begins at 0 and has to climb."""


@dataclass(frozen=True)
class Conservative(Settings):
    """The conservative term of CQL and Cal-QL."""

    weight: NotNegative = 5.0
    """Weight of the gap; with `dual` it multiplies the dual variable."""
    dual: bool = False
    """Weight the gap by a dual variable that grows while the gap exceeds `target_gap`."""
    target_gap: NotNegative = 0.8
    """Gap that the dual variable aims at."""
    dual_param: Positive = "softplus"
    """How the dual variable is made from its free parameter."""
    dual_init: AboveZero = 1.0
    """Initial dual variable."""
    dual_lr: Rate = 3e-4
    """Adam's rate of the dual variable."""
    n_actions: Count = 10
    """Actions N per state from each of: uniform, policy at s, policy at s'."""
    importance_sampling: bool = True
    """Correct the 3N values by their log-densities; otherwise the logged action's value joins them, 3N + 1 in all."""
    subtract_log_count: bool = True
    """Without importance sampling subtract ln(3N + 1), so that the soft maximum is a soft mean (W; O does not)."""
    subset: Count | None = 2
    """Critics that the gap is taken of, drawn with replacement at every step; `None` for all."""
    gap_min: Annotated[float, Range(least=-float("inf"))] = -float("inf")
    """Lower clip of each row's gap (CORL's Cal-QL on AntMaze: -200)."""


@dataclass(frozen=True)
class CQLConfig(SACConfig):
    """Settings of CQL and Cal-QL; the defaults are the WSRL repository's ensemble variant."""

    online: OnlineConfig = OnlineConfig(replay="mixed", offline_ratio=0.5, min_rows=128)
    """Schedule of the online phase."""
    actor_layer_norm: bool = True
    """LayerNorm after each hidden layer of the actor."""
    critic_layer_norm: bool = True
    """LayerNorm after each hidden layer of the critics."""
    init_scheme: Init = "orthogonal"
    """Initialiser of every kernel."""
    last_gain: NotNegative | None = 1e-2
    """Orthogonal gain of the last hidden layer of actor and critics; `None` for sqrt(2)."""
    shared_output: bool = True
    """One output layer for all critics (WSRL's code) instead of one each."""
    log_std_range: Interval | None = None
    """Clip of the log-std; `None` clips the std itself to [1e-5, 10]."""
    num_critics: Count = 10
    """Members of the critic ensemble."""
    target_subset: Count | None = 2
    """Target members drawn for each minibatch, whose minimum is the target; `None` for all."""
    subset_replace: bool = True
    """Draw those members with replacement (WSRL's code)."""
    backup_entropy: bool = False
    """Subtract alpha * log pi(a'|s') in the target."""
    max_target_actions: Count | None = 10
    """Next actions of which the target takes the best; `None` for a single one."""
    temperature_param: Positive = "softplus"
    """How alpha is made from its free parameter."""
    temperature_objective: Literal["alpha", "log_alpha"] = "alpha"
    """Whether the temperature loss multiplies the entropy gap by alpha or by its logarithm (needs `exp`)."""
    next_entropy_samples: Count | None = 1
    """The temperature sees the entropy of this many samples at each next state; `None`: that of the actor's loss."""
    joint_policy_step: bool = True
    """True: actor and temperature step on the rows of all minibatches of a call, `utd * B`; in a call with one
    minibatch they are judged by the critics from before their step. False: on the last minibatch, by the new critics.
    """
    actor_lr: Rate = 1e-4
    """Adam's rate of the actor."""
    temperature_lr: Rate = 1e-4
    """Adam's rate of the temperature."""
    conservative: Conservative = Conservative()
    """The conservative term."""


@dataclass(frozen=True)
class CalQLConfig(CQLConfig):
    """Settings of Cal-QL: CQL's."""

    @property
    def needs(self) -> Needs:
        """What an agent with these settings needs of its data and its run."""
        return Needs(batch_keys=("mc_returns",))


@register_agent("cql")
class CQL(SAC):
    r"""Conservative Q-learning: lowers Q away from the data.

    Equations (method, and the settings that enter):
    - `targets` (`max_target_actions`, `target_subset`): $y = r + \gamma m \max_{a'} \min_{i \in S} Q^-_i(s', a')$
    - `conservative_gap` (`conservative.n_actions`, `conservative.importance_sampling`):
      $g_i = \log \sum_{\tilde a} \exp(Q_i(s, \tilde a) - \log \mu(\tilde a)) - Q_i(s, a)$
    - `critic_loss` (`conservative.weight`): $L_Q = \frac{1}{E} \sum_i (Q_i(s, a) - y)^2 + w\, g$
    - `dual_loss` (`conservative.dual`, `conservative.target_gap`):
      $w\, g \to w \lambda (g - g_0),\quad L_\lambda = -w \lambda (g - g_0)$
    """

    dual: Model | None = None
    calibrated: ClassVar[bool] = False

    @classmethod
    def create(cls, rng: Array, observations: Array, actions: Array, config: SACConfig = CQLConfig()) -> Self:
        """Initialise from a key and example observations `[B, D]` and actions `[B, A]`."""
        if not isinstance(config, CQLConfig):
            raise ConfigError(f"{cls.__name__} got a {type(config).__name__}; expected a CQLConfig")
        rng, dual_rng = jax.random.split(rng)
        agent, term = super().create(rng, observations, actions, config), config.conservative
        dual = positive_model(dual_rng, term.dual_init, term.dual_param, term.dual_lr) if term.dual else None
        return jax.tree.map(jnp.asarray, agent.replace(dual=dual))

    @property
    def term(self) -> Conservative:
        """Settings of the conservative term."""
        assert isinstance(self.config, CQLConfig)
        return self.config.conservative

    def conservative_gap(self, params: Params, batch: Batch, q: Array, rng: Array) -> tuple[Array, Array]:
        """Return the gap of every row and critic, and the share of policy samples that Cal-QL clamped, `[]`.

        The gap is a soft maximum of Q(s, a) over 3N sampled actions minus Q of the logged action (CQL, arXiv
        2006.04779, eq. 4). N actions each are uniform, from the policy at s and from the policy at s'; all are judged
        at s. Cal-QL replaces the policy samples' values by max(Q, G) (arXiv 2303.05479, eq. 5). `q [E, B]` are the
        critics' values of the logged actions with `params`; gaps are `[k, B]` for the k critics drawn.
        """
        term, count = self.term, self.term.n_actions
        member_rng, action_rng = jax.random.split(rng)
        uniform_rng, current_rng, next_rng = jax.random.split(action_rng, 3)

        current, current_log_prob = self.policy(batch).sample_and_log_prob(current_rng, (count,))
        following, next_log_prob = self.next_policy(batch).sample_and_log_prob(next_rng, (count,))
        uniform = jax.random.uniform(uniform_rng, current.shape, minval=-1.0, maxval=1.0)
        uniform_log_prob = jnp.full_like(current_log_prob, current.shape[-1] * np.log(0.5))
        actions = jax.lax.stop_gradient(jnp.concatenate([uniform, current, following]))  # [3N, B, A]
        log_prob = jax.lax.stop_gradient(jnp.concatenate([uniform_log_prob, current_log_prob, next_log_prob]))

        critic: Any = self.critic.module
        if term.subset is not None:
            members = sample_members(member_rng, critic.num, term.subset, replace=True)
            critic, params, q = critic.clone(num=term.subset), take_members(params, members), q[members]
        z = critic.apply(params, batch["observations"], actions)  # [k, 3N, B]
        bound = batch["mc_returns"] if self.calibrated else jnp.full_like(batch["rewards"], -jnp.inf)
        clamped = jnp.mean(z[:, count:] < bound)
        z = jnp.concatenate([z[:, :count], jnp.maximum(z[:, count:], bound)], axis=1)
        if term.importance_sampling:
            z = z - log_prob
        else:
            z = jnp.concatenate([z, q[:, None]], axis=1)
            z = z - np.log(z.shape[1]) if term.subtract_log_count else z
        return jnp.maximum(losses.conservative_gap(z, q), term.gap_min), clamped

    def critic_loss(self, params: Params, batch: Batch, targets: Array, rng: Array) -> tuple[Array, Info]:
        """Return TD loss plus weighted conservative gap `[]` on leaves `[B, ...]`, and metrics."""
        term = self.term
        q = self.critic(batch["observations"], batch["actions"], params=params)
        td_loss = losses.critic_loss(q, targets)
        gaps, clamped = self.conservative_gap(params, batch, q, rng)
        gap = jnp.mean(gaps)
        penalty = term.weight * gap
        if self.dual is not None:
            penalty = term.weight * positive(self.dual(), term.dual_param) * (gap - term.target_gap)
        loss = td_loss + penalty
        return loss, {
            "critic/loss": loss,
            "critic/q": jnp.mean(q),
            "critic/target": jnp.mean(targets),
            "critic/td_loss": td_loss,
            "cql/gap": gap,
            "cql/penalty": penalty,
            "calql/clamped": clamped,
        }

    def update_critic(self, batch: Batch, rng: Array) -> tuple[Self, Info]:
        """Step the critics and targets on one minibatch `[B, ...]`, and the dual variable by the gap just measured."""
        agent, info = super().update_critic(batch, rng)
        if self.dual is None:
            return agent, info
        loss, grads = jax.value_and_grad(self.dual_loss)(self.dual.params, info["cql/gap"])
        info = {**info, "cql/dual": positive(self.dual(), self.term.dual_param), "cql/dual_loss": loss}
        return agent.replace(dual=self.dual.apply_gradients(grads)), info

    def dual_loss(self, params: Params, gap: Array) -> Array:
        """Return -weight * dual * (gap - target) `[]`: the dual variable grows while the gap exceeds the target."""
        term = self.term
        assert self.dual is not None
        multiplier = positive(self.dual(params=params), term.dual_param)
        return -term.weight * multiplier * jax.lax.stop_gradient(gap - term.target_gap)

    @classmethod
    def preset(cls, family: str, size: Literal["paper", "small"] = "paper") -> Preset:
        """Return the settings for a task family.

        `paper`: the official repository's (`official`), on Kitchen and locomotion with the WSRL repository's weights,
        steps and, on Kitchen, widths. `small`: the WSRL repository's ensemble at laptop size. Cal-QL divides the dense
        rewards of locomotion by 10: until Q has climbed to the returns its term cannot tell actions apart.
        """
        networks, term, steps, reward = family_settings(family)
        config = (CalQLConfig if cls.calibrated else CQLConfig)(**networks, conservative=term)
        if cls.calibrated and family == "locomotion":
            reward = (0.1, 0.0)
        if size == "small":
            return Preset(shrink(shrink_term(config), utd_ratio=1, rate=1e-3), 10_000, 10_000, reward)
        online_steps = 1_000_000 if family in ("antmaze", "pointmaze", "adroit") else 500_000
        preset = Preset(official(config), steps, online_steps, reward, only_successes=family == "adroit")
        return replace(preset, tasks={"pen": replace(preset, online_steps=200_000)})


@register_agent("calql")
class CalQL(CQL):
    r"""Calibrated CQL: lowers Q no further than the returns in the data.

    Batches carry `mc_returns [utd, B]`.

    Equations (method, and the settings that enter):
    - `needs` (`discount`): $G = \sum_t \gamma^t r_t$
    - `conservative_gap` (`conservative.n_actions`):
      $g_i = \log \sum_{\tilde a} \exp(\max(Q_i(s, \tilde a), G) - \log \mu(\tilde a)) - Q_i(s, a),\; \tilde a
      \sim \pi$
    - `critic_loss` (`conservative.weight`, `conservative.dual`): $L_Q = \frac{1}{E} \sum_i (Q_i(s, a) - y)^2 + w\, g$
    """

    calibrated: ClassVar[bool] = True

    @classmethod
    def create(cls, rng: Array, observations: Array, actions: Array, config: SACConfig = CalQLConfig()) -> Self:
        """Initialise from a key and example observations `[B, D]` and actions `[B, A]`."""
        return super().create(rng, observations, actions, config)

    @property
    def needs(self) -> Needs:
        """Monte-Carlo returns, whatever the config's class."""
        return Needs(batch_keys=("mc_returns",))

    def advice(self, row: Mapping[str, Any]) -> str | None:
        """Return what to do where returns still replace nearly all values of policy actions after many updates."""
        share = row.get("calql/clamped", 0.0)
        if share < CLAMPED_SHARE or row["gradient_steps"] < CLAMPED_AFTER:
            return None
        return (
            f"calql/clamped is {share:.2f}: returns replace nearly all values of the policy's actions, so Cal-QL "
            "cannot tell actions apart before Q has climbed to the returns; scale the rewards down "
            "(task.reward_scale 0.1), train longer, or use cql"
        )

    def update(self, batch: Batch) -> tuple[Self, Info]:
        """Run `utd` critic steps and one actor and temperature step on leaves `[utd, B, ...]`."""
        if "mc_returns" not in batch:
            raise DatasetError("batch has no mc_returns, which Cal-QL needs; sample them from the dataset, or use CQL")
        return super().update(batch)


def official(config: CQLConfig = CQLConfig()) -> CQLConfig:
    """Return `config` turned into the official Cal-QL repository's variant (O above)."""
    term = replace(
        config.conservative,
        weight=5.0 if config.conservative.dual else config.conservative.weight,
        dual_param="exp",
        dual_init=float(np.e),
        subset=None,
        subtract_log_count=False,
    )
    return replace(
        config,
        actor_layer_norm=False,
        critic_layer_norm=False,
        last_gain=None,
        output_gain=1e-2,
        policy_output_gain=1e-2,
        shared_output=False,
        num_critics=2,
        target_subset=None,
        std_mode="scaled",
        log_std_range=(-20.0, 2.0),
        temperature_param="exp",
        temperature_objective="log_alpha",
        next_entropy_samples=None,
        conservative=term,
    )


def family_settings(family: str) -> tuple[dict[str, Any], Conservative, int, tuple[float, float] | None]:
    """Return network settings, conservative term, offline steps and reward (scale, bias) of a family."""
    wide = (512, 512, 512)
    maze = {"std_mode": "uniform", "next_entropy_samples": 10}
    dual = Conservative(weight=1.0, dual=True)
    if family == "antmaze":
        return {**maze, "critic_hidden_dims": (256, 256, 256, 256)}, dual, 1_000_000, (10.0, -5.0)
    if family == "pointmaze":
        return maze, dual, 1_000_000, (10.0, -5.0)
    if family == "adroit":
        networks = {"actor_hidden_dims": (512, 512), "critic_hidden_dims": wide}
        return networks, Conservative(weight=1.0), 20_000, (10.0, 5.0)
    if family == "kitchen":
        networks = {"actor_hidden_dims": wide, "critic_hidden_dims": wide, "last_gain": None}
        return networks, Conservative(weight=5.0, importance_sampling=False), 250_000, (1.0, -4.0)
    return {}, Conservative(weight=5.0), 250_000, None


def shrink_term(config: Any) -> Any:
    """Return `config` with 4 sampled actions in its conservative term."""
    return replace(config, conservative=replace(config.conservative, n_actions=4))
