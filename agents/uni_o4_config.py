"""Settings of Uni-O4 (`o2o.agents.uni_o4`) and its presets."""

from dataclasses import dataclass, replace
from typing import Literal, get_args

from o2o.agents.ppo import PPOConfig
from o2o.errors import ConfigError
from o2o.nn.terminations import Termination
from o2o.types import Needs, OnlineConfig, Preset

Diversity = Literal["none", "code_heuristic", "analytic_kl", "sampled_kl"]


@dataclass(frozen=True)
class UniO4Config(PPOConfig):
    """Settings of Uni-O4; those of `PPOConfig` are its online phase's."""

    value_hidden_dims: tuple[int, ...] = (512, 512, 512)
    """Widths of V's hidden layers, offline and online."""
    critic_hidden_dims: tuple[int, ...] = (1024, 1024)
    """Widths of the two Q-functions' hidden layers."""
    normalize_states: bool = True
    """Standardise states by the dataset's mean and std, which then stay with the agent."""
    num_policies: int = 4
    """Members of the policy ensemble."""
    offline_batch_size: int = 512
    """Rows per minibatch offline."""
    expectile: float = 0.7
    """Weight of positive errors in V's loss, in (0, 1)."""
    tau: float = 0.005
    """Weight of the new parameters in the target critics' average, on every second step."""
    timeouts_bootstrap: bool = True
    """Bootstrap at the dataset's time limits; False treats them as terminals (the release)."""
    diversity: Diversity = "sampled_kl"
    """Term that keeps the clones apart: `sampled_kl` as the paper means it, `code_heuristic` as released (which has no
    effect on the direction of the gradient), `analytic_kl`, or `none`."""
    diversity_coef: float = 0.1
    """Weight alpha of that term."""
    diversity_cap: float = 10.0
    """The divergence, which has no upper bound, counts only up to this per state."""
    dynamics_hidden_dims: tuple[int, ...] = (200, 200, 200, 200)
    """Widths of the dynamics models' hidden layers."""
    dynamics_members: int = 7
    """Dynamics models."""
    dynamics_elites: int = 5
    """Dynamics models, those with the least hold-out error, that roll-outs sample."""
    dynamics_lr: float = 1e-3
    """Adam's rate of the dynamics models."""
    dynamics_patience: int = 5
    """Validations in a row without an improvement after which the dynamics models stay as they are."""
    validate_every: int = 1000
    """Gradient steps from one validation of the dynamics models to the next."""
    termination: Termination | Literal["auto"] = "auto"
    """Rule that ends a roll-out; `auto`: a preset puts in the task's where there is one; otherwise `learned`."""
    improve_lr: float = 1e-4
    """Adam's rate of the policies' improvement, falling linearly to 0 over it."""
    improve_clip: float = 0.25
    """Clip of the probability ratio in the improvement, falling linearly to 0 over it."""
    freeze_clip_at: float | None = None
    """Share of the improvement after which its clip stays as it is (0.02: the release,
    200 of 10,000 steps); None: never."""
    improve_grad_norm: float = 0.5
    """Gradients of a policy's improvement are scaled down to this norm."""
    judge_every: int = 100
    """Gradient steps of the improvement from one off-line evaluation to the next."""
    horizon: int = 1000
    """Steps H of a roll-out in the model."""
    judge_rows: int = 512
    """Roll-outs of one off-line evaluation."""
    judge_sum: bool = False
    """Score a roll-out by the sum of its Q-values over the horizon (the paper) instead of the mean of all values of
    roll-outs still alive (the release)."""
    common_noise: bool = True
    """Judge all policies, every time, on the same start states and noise; False draws new ones (the release)."""
    candidates: int = 3
    """Policies with the best scores that are tried in the environment before the online phase; 1 trusts the scores."""
    critic_steps: int = 2_000_000
    """Gradient steps of V and Q."""
    dynamics_steps: int = 200_000
    """Gradient steps of the dynamics models."""
    clone_steps: int = 400_000
    """Gradient steps of cloning."""
    improve_steps: int = 10_000
    """Gradient steps of improvement. A run with more or fewer offline steps than these four together stretches all."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` for values that cannot be used."""
        super().__post_init__()
        if not 0.0 < self.expectile < 1.0:
            raise ConfigError(f"UniO4Config.expectile is {self.expectile}; expected a number in (0, 1), such as 0.7")
        if not 1 <= self.dynamics_elites <= self.dynamics_members:
            raise ConfigError(
                f"dynamics_elites is {self.dynamics_elites} of {self.dynamics_members} dynamics_members; expected 1 "
                "to as many as there are members"
            )
        if not 1 <= self.candidates <= self.num_policies:
            raise ConfigError(f"candidates is {self.candidates}; expected 1 to num_policies ({self.num_policies})")
        counts = ("horizon", "judge_rows", "judge_every", "validate_every", "dynamics_patience", "offline_batch_size")
        for name in counts:
            if getattr(self, name) < 1:
                raise ConfigError(f"UniO4Config.{name} is {getattr(self, name)}; expected at least 1")
        for name, known in (("diversity", get_args(Diversity)), ("termination", ("auto", *get_args(Termination)))):
            if getattr(self, name) not in known:
                raise ConfigError(f"UniO4Config.{name} is {getattr(self, name)!r}; expected {' or '.join(known)}")

    @property
    def needs(self) -> Needs:
        """What an agent with these settings needs of its data and its run."""
        return Needs(raw_observations=True)


def preset(family: str, size: Literal["paper", "small"]) -> Preset:
    """Return the settings for a family of tasks (the tables of Lei-Kun/Uni-O4's scripts).

    `paper`: one setting per family where the scripts have one per task, and of what they sweep one value: width 256,
    ReLU; states normalised in locomotion and Kitchen, not in Adroit and mazes; 10,000 steps of improvement (Kitchen
    1,000); H 1000, Adroit 50, Kitchen 6, mazes 150; dynamics patience 5, Adroit 10, Kitchen 20, counted in validations
    every 1,000 steps, not epochs. "other" has locomotion's settings, "pointmaze" AntMaze's. Online: rewards x0.1 and
    20 epochs in all of locomotion, Adroit 10 epochs of 256 rows at 8e-6; mazes and Kitchen, which have no script,
    2e-5. `small`: 2x128 networks (Adroit 2x256), 10k gradient steps in all, roll-outs of at most 100 steps from 128
    states, judged every 50 steps by the sum of Q (`judge_sum`: with a critic of so few steps the mean prefers policies
    that fall at once in states of high Q; Hopper went from 1300 to 20), improvement at 3e-5 at most, three policies;
    online as PPO's small preset but with the paper's caution (clip 0.1, the actor's rate 1e-4).
    """
    adroit, maze = family == "adroit", family in ("antmaze", "pointmaze")
    config = UniO4Config(actor_lr=2e-5, epochs=20)
    if family == "locomotion":
        config = replace(config, reward_scale=0.1)
    elif adroit:
        config = replace(
            config, normalize_states=False, improve_lr=1e-5, horizon=50, actor_lr=8e-6, epochs=10, batch_size=256,
            dynamics_hidden_dims=(400,) * 4, dynamics_lr=3e-4, dynamics_patience=10,
        )  # fmt: skip
    elif family == "kitchen":
        config = replace(
            config, improve_lr=1e-5, horizon=6, dynamics_hidden_dims=(400,) * 4, dynamics_lr=3e-4,
            dynamics_patience=20, critic_steps=1_000_000, clone_steps=200_000, improve_steps=1_000, epochs=10,
        )  # fmt: skip
    elif maze:
        config = replace(
            config, normalize_states=False, expectile=0.9, improve_lr=3e-5, horizon=150,
            value_hidden_dims=(256,) * 3, critic_hidden_dims=(256,) * 3, dynamics_hidden_dims=(400,) * 4,
            dynamics_lr=3e-4,
        )  # fmt: skip
    reward = {"antmaze": (10.0, -5.0), "pointmaze": (10.0, -5.0)}.get(family)
    if size == "small":
        width = (256, 256) if adroit else (128, 128)
        config = replace(
            config, actor_hidden_dims=width, value_hidden_dims=width, critic_hidden_dims=width,
            dynamics_hidden_dims=(128, 128), dynamics_members=4, dynamics_elites=3, dynamics_lr=1e-3, num_policies=3,
            offline_batch_size=128, improve_lr=min(config.improve_lr, 3e-5), pretrain_lr=1e-3, tau=0.01,
            horizon=min(config.horizon, 100), judge_sum=True, judge_rows=128, judge_every=50, validate_every=500,
            critic_steps=6_000, dynamics_steps=2_000, clone_steps=1_400, improve_steps=600, candidates=3,
            actor_lr=1e-4, value_lr=1e-3, decay_steps=None, clip=0.1, value_clip=None, entropy_coef=0.0, batch_size=128,
            epochs=10, online=OnlineConfig(replay="rollout", num_envs=4, rollout_steps=1024),
        )  # fmt: skip
    steps = config.critic_steps + config.dynamics_steps + config.clone_steps + config.improve_steps
    return Preset(config, offline_steps=steps, online_steps=30_000 if size == "small" else 1_000_000, reward=reward)
