"""ResFiT's settings and their presets: the paper's numbers, otherwise choices that are said here.

The paper's tasks are robomimic's and DexMimicGen's; our families are not among them. "adroit" takes TwoArmBoxCleanup's
settings (hands; scale 0.2, actor rate 5e-6, 500k steps), the others those of Can and Square (300k steps). Rewards are
0/1 on mazes and Adroit, the task's own elsewhere. Kitchen and locomotion, whose episodes end at a time limit without
having failed, bootstrap there. `small`: 2 x 128, 4 critics, batch 128, warm-ups of 1000 steps and 5000 updates, and
rates that learn in 10k steps. With an actor rate of 3e-4 instead of 3e-5 the residual saturates within 500 steps, and
success dips (seen on hand_dapg/pen/noisy).
"""

from dataclasses import dataclass, replace
from typing import Literal

from o2o.errors import ConfigError
from o2o.nn.encoders import EncoderConfig
from o2o.types import AgentConfig, Needs, OnlineConfig, Preset


@dataclass(frozen=True)
class ResidualConfig(AgentConfig):
    """Settings of residual RL; the defaults are the paper's for robomimic Can and Square."""

    residual_scale: float = 0.1
    """Bound of the mean residual per coordinate, in units where the dataset's actions span about [-1, 1]."""
    n_step: int = 3
    """Rewards summed before the target bootstraps."""
    timeouts: Literal["terminal", "bootstrap"] = "terminal"
    """`terminal`: nothing is worth anything behind an episode's end, time limits included (the paper); `bootstrap`:
    only a true termination stops the target."""
    noise_std: float = 0.05
    """Standard deviation of the exploration noise on the residual, and of the noise on the target's residual."""
    noise_clip: float = 0.3
    """Bound of the target's noise."""
    warmup_noise: float = 0.2
    """Uniform noise on the base action in the random steps of the environment warm-up."""
    warmup_actions: Literal["base", "uniform"] = "base"
    """What the environment warm-up plays: the base with noise, or uniform actions (an ablation)."""
    online: OnlineConfig = OnlineConfig(
        utd_ratio=4, random_steps=10_000, replay="mixed", offline_ratio=0.5, initial_updates=10_000
    )
    """Schedule: `random_steps` is the environment warm-up, `initial_updates` the critic warm-up."""
    actor_hidden_dims: tuple[int, ...] = (1024, 1024)
    """Widths of the residual actor's hidden layers."""
    critic_hidden_dims: tuple[int, ...] = (1024, 1024)
    """Widths of every critic's hidden layers."""
    actor_layer_norm: bool = True
    """LayerNorm after each hidden layer of the actor."""
    critic_layer_norm: bool = True
    """LayerNorm after each hidden layer of the critics."""
    num_critics: int = 10
    """Members of the critic ensemble."""
    target_subset: int = 2
    """Target members drawn for each minibatch without replacement, whose minimum is the target."""
    critic_loss: Literal["mse", "squared_mean"] = "mse"
    """`mse`: squared error of every head; `squared_mean`: square of the heads' mean absolute error (the code)."""
    target_clip: tuple[float, float] | None = None
    """Bounds of the target, (0, 1) for 0/1 rewards against over-estimation; `None` for none."""
    residual_penalty: float = 0.0
    """Weight of the residual's squared length in the actor's loss."""
    actor_lr: float = 1e-6
    """AdamW's rate of the actor: tiny on purpose, it keeps early learning safe."""
    critic_lr: float = 1e-4
    """AdamW's rate of critics, trunk and encoder."""
    weight_decay: float = 1e-2
    """AdamW's weight decay, PyTorch's default."""
    clip_norm: float = 1.0
    """Largest norm of each network's gradient."""
    tau: float = 0.005
    """Weight of the new parameters in the targets' averages: critic's after every step, actor's after every of its."""
    encoder: EncoderConfig = EncoderConfig()
    """Image encoder per camera, if observations have images."""
    trunk_width: int = 1024
    """Width of the critics' trunk over image patches."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` for values that cannot be used."""
        if not 0.0 < self.residual_scale <= 1.0:
            raise ConfigError(f"ResidualConfig.residual_scale is {self.residual_scale}; expected above 0, at most 1")
        for name in ("noise_std", "noise_clip", "warmup_noise", "residual_penalty"):
            if getattr(self, name) < 0.0:
                raise ConfigError(f"ResidualConfig.{name} is {getattr(self, name)}; expected 0 or more")
        if self.n_step < 1:
            raise ConfigError(f"ResidualConfig.n_step is {self.n_step}; expected at least 1")
        if not 1 <= self.target_subset <= self.num_critics:
            raise ConfigError(
                f"ResidualConfig.target_subset is {self.target_subset}; expected 1 to num_critics={self.num_critics}"
            )
        choices = {"timeouts": ("terminal", "bootstrap"), "warmup_actions": ("base", "uniform")}
        for name, known in {**choices, "critic_loss": ("mse", "squared_mean")}.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"ResidualConfig.{name} is {getattr(self, name)!r}; expected {' or '.join(known)}")
        if self.target_clip is not None and not self.target_clip[0] < self.target_clip[1]:
            raise ConfigError(f"ResidualConfig.target_clip is {self.target_clip}; expected (low, high)")

    @property
    def needs(self) -> Needs:
        """A base policy, windows (two rows at least: only they say where an episode ended), room for a residual.

        The room lets a full residual fit on every action of the dataset.
        """
        return Needs(window=max(self.n_step, 2), base_policy=True, action_margin=self.residual_scale)


RUN = {"normalize": True, "std_floor": 0.1, "action_range": "data"}
"""What the method asks of its run: normalised states, and [-1, 1] for the range of the dataset's actions."""


def residual_preset(family: str, size: Literal["paper", "small"]) -> Preset:
    """Return the preset of a family of tasks."""
    config, steps, reward = ResidualConfig(), 300_000, None
    if family == "adroit":
        config, steps, reward = replace(config, residual_scale=0.2, actor_lr=5e-6), 500_000, (1.0, 1.0)
    elif family in ("antmaze", "pointmaze"):
        reward = (1.0, 0.0)
    elif family in ("kitchen", "locomotion"):
        config = replace(config, timeouts="bootstrap")
    if size == "small":
        return Preset(_small(config), 0, 10_000, reward, run=RUN)
    return Preset(config, 0, steps, reward, run=RUN)


def _small(config: ResidualConfig) -> ResidualConfig:
    """Return `config` at laptop size: 2 x 128 wide, 4 critics, batch 128, faster rates, warm-ups of 1000 and 5000."""
    online = replace(config.online, random_steps=1_000, initial_updates=5_000)
    return replace(
        config, online=online, batch_size=128, actor_hidden_dims=(128, 128), critic_hidden_dims=(128, 128),
        num_critics=4, actor_lr=3e-5, critic_lr=1e-3, trunk_width=128,
        encoder=replace(EncoderConfig.small(), latent_dim=0),
    )  # fmt: skip
