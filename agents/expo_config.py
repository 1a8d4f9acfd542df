"""EXPO's settings and their presets: the paper's where it has them, otherwise choices that are said below.

Published (arXiv 2507.07986, the scripts of its repository): AntMaze and Adroit. `paper` takes the offline-to-online
commands where there are some (AntMaze), else those with prior data (Adroit's pen). Ours: "pointmaze" follows AntMaze;
Kitchen follows MimicGen threading, manipulation with the same arm (scale 0.05, 500k steps of pre-training); locomotion
follows RLPD's schedule with scale 0.5, as its data leave much to explore; "other" follows robomimic square (scale 0.1,
200k steps). Mazes see r - 1, Adroit -1/0. `small` always pre-trains: 10k steps of imitation replace a random phase.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

from o2o.agents.expo_policy import Selection
from o2o.errors import ConfigError
from o2o.nn.encoders import EncoderConfig
from o2o.nn.generative import Diffusion, Flow
from o2o.types import AgentConfig, OnlineConfig, Preset

PAPER_DECAY = 3_000_000
CHOICES = {
    "base": ("diffusion", "flow"),
    "selection": ("max", "soft"),
    "backup": ("otf", "base"),
    "entropy_target": ("reachable", "released"),
}


@dataclass(frozen=True)
class EXPOConfig(AgentConfig):
    """Settings of EXPO; the defaults are the paper's for manipulation, online with prior data."""

    online: OnlineConfig = OnlineConfig(utd_ratio=20, random_steps=5000, replay="mixed", offline_ratio=0.5)
    """Schedule of the online phase; after pre-training the paper has no random steps."""
    base: Literal["diffusion", "flow"] = "diffusion"
    """Kind of the base policy."""
    diffusion: Diffusion = Diffusion()
    """Settings of a diffusion base."""
    flow: Flow = Flow()
    """Settings of a flow base."""
    base_width: int = 256
    """Width of the base's residual network; its blocks are four times as wide inside."""
    base_blocks: int = 3
    """Residual blocks of the base's network."""
    base_dropout: float = 0.0
    """Dropout at the start of every block of the base, active in its loss only."""
    base_lr: float = 3e-4
    """AdamW's first rate of the base."""
    base_weight_decay: float = 1e-4
    """Weight decay of the base."""
    base_ema: float = 0.001
    """Weight of the new parameters in the average of the base that acts, after every base step."""
    decay_steps: int | None = PAPER_DECAY
    """Cosine decay to 0 of the rates of base and edit policy over so many of each one's steps; `None`: constant."""
    n_samples: int = 8
    """Base samples N of the on-the-fly policy; a single one is neither edited nor scored."""
    n_edits: int = 8
    """How many of them are edited, the first ones; 0 for the best of N (no edit policy is trained)."""
    edit_scale: float = 0.05
    """Bound beta of an edit per action dimension: 0.05 to 0.1 for precision, 0.5 to 0.7 where exploring pays."""
    clip_edits: bool = True
    """Clip edited candidates to [-1, 1] before they are scored; False scores them as they are (the released code)."""
    selection: Selection = "max"
    """`max`: the best candidate; `soft`: a draw by exp(Q), with the draw's entropy in the backup, for narrow data."""
    inverse_temperature: float = 1.0
    """Of the soft selection: weights exp(inverse_temperature * Q), entropy bonus H / inverse_temperature."""
    backup: Literal["otf", "base"] = "otf"
    """Next action of the target: the on-the-fly policy's, or a plain sample of the base (an ablation)."""
    edit_hidden_dims: tuple[int, ...] = (256, 256, 256)
    """Widths of the edit policy's hidden layers."""
    edit_dropout: float = 0.0
    """Dropout in the edit policy, active in its loss only."""
    edit_lr: float = 3e-4
    """Adam's first rate of the edit policy."""
    entropy_scale: float = 1.0
    """Factor on the entropy term of the edit policy's loss."""
    entropy_target: Literal["reachable", "released"] = "reachable"
    """`reachable`: d ln(edit_scale) is added to the target entropy; `released`: it is not (alpha grows without end)."""
    target_entropy: float = 0.5
    """Entropy target as a multiple of -dim(A)."""
    temperature_init: float = 1.0
    """Initial alpha."""
    temperature_lr: float = 3e-4
    """Adam's rate of the temperature."""
    critic_hidden_dims: tuple[int, ...] = (256, 256, 256)
    """Widths of every critic's hidden layers."""
    critic_layer_norm: bool = True
    """LayerNorm after each hidden layer of the critics."""
    num_critics: int = 10
    """Members of the critic ensemble."""
    target_subset: int = 2
    """Target members drawn, twice independently: their minimum scores candidates, and is the target's value."""
    critic_lr: float = 3e-4
    """Adam's rate of the critics."""
    encoder: EncoderConfig = EncoderConfig(kind="conv", latent_dim=50)
    """How images become features, where observations have some; flat observations have no encoder."""
    encoder_lr: float = 3e-4
    """Adam's rate of the encoder: it learns from the critics, and from imitation before there are any."""
    tau: float = 0.005
    """Weight of the new parameters in the target critics' average, after every critic step."""

    def __post_init__(self) -> None:
        """Raise ConfigError for settings that cannot be used."""
        if not self.edit_scale > 0:
            raise ConfigError(f"edit_scale is {self.edit_scale}; expected a positive number (no edits: n_edits=0)")
        if self.n_samples < 1:
            raise ConfigError(f"n_samples is {self.n_samples}; expected at least 1")
        if not 0 <= self.n_edits <= self.n_samples:
            raise ConfigError(
                f"n_edits is {self.n_edits}; expected 0 to n_samples={self.n_samples}: lower it or raise n_samples"
            )
        if not 1 <= self.target_subset <= self.num_critics:
            raise ConfigError(f"target_subset is {self.target_subset}; expected 1 to num_critics={self.num_critics}")
        for name in ("temperature_init", "inverse_temperature"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected a positive number, such as 1.0")
        for name in ("base_dropout", "edit_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected 0 to below 1, such as 0.1")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected {' or '.join(known)}")

    @property
    def generator(self) -> Diffusion | Flow:
        """The base policy's equations."""
        return self.diffusion if self.base == "diffusion" else self.flow

    @property
    def edits(self) -> int:
        """Edits made in fact: a single sample is not edited."""
        return self.n_edits if self.n_samples > 1 else 0


def expo_preset(family: str, size: Literal["paper", "small"] = "paper") -> Preset:
    """Return EXPO's settings for a task family; `small` for a laptop."""
    pretrained = replace(EXPOConfig().online, random_steps=0)
    changes: dict[str, Any] = {"online": pretrained}
    offline, steps, reward = 500_000, 1_000_000, None
    if family in ("antmaze", "pointmaze"):
        changes, steps, reward = {**changes, "target_subset": 1}, 300_000, (1.0, -1.0)
    elif family == "adroit":
        changes, offline, reward = {**changes, "edit_scale": 0.7, "edit_dropout": 0.1}, 0, (1.0, 0.0)
    elif family == "locomotion":
        changes, offline, steps = {"edit_scale": 0.5}, 0, 250_000
    elif family != "kitchen":
        changes, offline = {**changes, "edit_scale": 0.1}, 200_000
    config = replace(EXPOConfig(), **changes)
    if size == "paper":
        return Preset(config, offline, steps, reward)
    config = replace(
        config, batch_size=128, online=replace(pretrained, utd_ratio=4), diffusion=Diffusion(steps=5),
        flow=Flow(steps=5), base_width=64, base_blocks=2, base_lr=1e-3, base_ema=0.005, n_samples=4, n_edits=4,
        edit_hidden_dims=(128, 128), critic_hidden_dims=(128, 128), num_critics=4, encoder=EncoderConfig.small(),
    )  # fmt: skip
    return Preset(config, 10_000, 8_000, reward)
