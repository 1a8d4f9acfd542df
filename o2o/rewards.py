"""Rewards that are learnt from what a camera or a sensor sees: a success classifier, and a model of progress.

    frames = success_frames("lab/my-arm-v0")
    judge = SuccessClassifier.fit(frames)         # print(judge.report): how often it is right on held-out episodes
    judge.save("success.model")
    env = ClassifierReward(env, SuccessClassifier.load("success.model"))

The classifier is that of HIL-SERL (arXiv 2410.21845, section 3.2): a binary network on single frames, whose yes is the
reward 1 and ends the episode. The progress model says how far two frames are apart on the way to the goal; its form,
`progress(observation, goal) -> (delta, done)`, is that of process rewards such as VLAC's (arXiv 2509.15937), which can
be put in its place.

Where we differ from HIL-SERL
- The encoder is learnt from scratch (`o2o.nn.encoders`); theirs is a frozen, pre-trained ResNet.
- The threshold is chosen on held-out episodes, so that false successes are rare; theirs is 0.5.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import flax.linen as nn
import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization

from o2o.data import files
from o2o.data.spaces import STATE, Leaf, ObservationSpec
from o2o.errors import ConfigError, DatasetError, EnvironmentMismatchError
from o2o.files import write_atomically
from o2o.nn.encoders import EncoderConfig, observation_encoder, shift_observations
from o2o.nn.modules import MLP, Adam, Model
from o2o.settings import Count, Dropout, NotNegative, Rate, Seed, Settings, Share, Widths, checked
from o2o.types import Array

MAGIC = "o2o frame model 1"
MOST_FALSE = 0.02
"""Share of the held-out failures that the threshold of a classifier lets pass as successes, where it can."""


@dataclass(frozen=True)
class FrameModelConfig(Settings):
    """How a network on single frames is trained."""

    hidden_dims: Widths = (128, 128)
    """Widths of the hidden layers, behind the encoder of the images."""
    dropout: Dropout = 0.1
    """Dropout in the hidden layers while it learns."""
    encoder: EncoderConfig = EncoderConfig.small()
    """How images become features; unused without images."""
    updates: Count = 2000
    """Gradient steps."""
    batch_size: Count = 128
    """Frames of a step; a classifier sees as many successes as failures."""
    learning_rate: Rate = 1e-3
    """Adam rate."""
    weight_decay: NotNegative = 1e-4
    """Decoupled weight decay."""
    holdout: Share = 0.2
    """Share of the episodes that are held out; the report and the threshold are of them."""
    seed: Seed = 0
    """Decides which episodes are held out, the first parameters and the minibatches."""


@dataclass(frozen=True, eq=False)
class Frames:
    """Single observations and what is known of them; F frames of E episodes."""

    spec: ObservationSpec
    observations: Any
    """Flat `[F, D]`, or a dict with uint8 images (`ObservationSpec.flatten`)."""
    success: np.ndarray
    """Whether the goal is reached in this frame, booleans `[F]`."""
    progress: np.ndarray
    """Share of the way to the episode's first success, 0 to 1, `[F]`; NaN in episodes without one."""
    episodes: np.ndarray
    """Number of its episode, `[F]`."""

    def __len__(self) -> int:
        """Return the number of frames F."""
        return len(self.success)


def success_frames(dataset: str | Path, root: str | Path | None = None, achieved_goal: bool = False) -> Frames:
    """Return the frames of a dataset, labelled by its success flags.

    A person gives them with the keys for success and failure (`o2o record`), a simulator in every step. Raises
    `DatasetError` if the dataset says nothing of success, or has no episode of either kind.
    """
    folder = files.locate(dataset, root)
    about = files.read_info(folder)
    spec = ObservationSpec.from_space(about.observation_space, achieved_goal)
    parts, flags, progress, numbers = [], [], [], []
    for i, raw in enumerate(files.read_episodes(files.open_storage(folder, about.metadata), about.name)):
        try:
            episode = files.tidy(raw)
        except ValueError as error:
            raise DatasetError(f"dataset {about.name}: episode {i}: {error}") from None
        if episode.success is None:
            raise DatasetError(f"dataset {about.name}: episode {i} has no infos/success: record who succeeds")
        reached = np.concatenate([[False], episode.success])
        first = int(reached.argmax())
        parts.append(spec.flatten(episode.observations))
        flags.append(reached)
        progress.append(np.minimum(np.arange(len(reached)) / first, 1.0) if first else np.full(len(reached), np.nan))
        numbers.append(np.full(len(reached), i))
    success = np.concatenate(flags)
    if success.all() or not success.any():
        raise DatasetError(
            f"dataset {about.name}: {int(success.sum())} of {len(success)} frames succeed; both are needed"
        )
    observations = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    return Frames(spec, observations, success, np.concatenate(progress), np.concatenate(numbers))


class _Head(nn.Module):
    """A number `[...]` for a frame."""

    config: FrameModelConfig
    encoder: nn.Module | None
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @nn.compact
    def __call__(self, observations: Any, training: bool = False) -> Array:
        if isinstance(observations, dict):
            if STATE in observations:
                observations = {**observations, STATE: self._normal(observations[STATE])}
            assert self.encoder is not None
            features = self.encoder(observations)
        else:
            features = self._normal(observations)
        hidden = MLP(self.config.hidden_dims, dropout=self.config.dropout)(features, training)
        return nn.Dense(1)(hidden)[..., 0]

    def _normal(self, state: Array) -> Array:
        return (state - jnp.asarray(self.mean)) / jnp.asarray(self.std)


@dataclass(eq=False)
class FrameModel:
    """A trained network on single frames."""

    spec: ObservationSpec
    model: Model
    threshold: float
    """From which output on a frame counts as a success."""
    report: dict[str, float]
    """What it does on held-out episodes."""

    kind: ClassVar[str] = ""

    @classmethod
    @checked
    def fit(cls, frames: Frames, config: FrameModelConfig | None = None) -> Self:
        """Train on frames. Raises `DatasetError` if there are too few episodes to hold some out."""
        config = config if config is not None else FrameModelConfig()
        rng = np.random.default_rng(config.seed)
        kept, held = _split(frames, config.holdout, rng, cls.usable(frames))
        seen = frames.observations
        state = np.asarray(seen.get(STATE, np.zeros((len(frames), 0))) if isinstance(seen, dict) else seen)[kept]
        mean, std = tuple(state.mean(axis=0).tolist()), tuple((state.std(axis=0) + 1e-3).tolist())
        example = jax.tree.map(lambda leaf: leaf[:1], frames.observations)
        module = _Head(config, observation_encoder(config.encoder, example), mean, std)
        adam = Adam(config.learning_rate, decay_steps=config.updates, weight_decay=config.weight_decay)
        key, init = jax.random.split(jax.random.key(config.seed))
        model = Model.create(init, module, adam, example)

        @jax.jit
        def update(model: Model, rows: Any, wanted: Array, key: Array) -> Model:
            shift, drop = jax.random.split(key)
            rows = shift_observations(shift, rows, config.encoder.shift_pad) if isinstance(rows, dict) else rows

            def loss(params: Any) -> Array:
                out = model(rows, training=True, params=params, rngs={"dropout": drop})
                return cls.loss(out, wanted)

            return model.apply_gradients(jax.grad(loss)(model.params))

        targets = cls.targets(frames)
        pools = cls.pools(frames, kept)
        for step in range(config.updates):
            rows = np.concatenate([rng.choice(pool, -(-config.batch_size // len(pools))) for pool in pools])
            picked = jax.tree.map(lambda leaf, rows=rows: leaf[rows], frames.observations)
            model = update(model, picked, jnp.asarray(targets[rows], jnp.float32), jax.random.fold_in(key, step))
        found = cls(frames.spec, model, 0.0, {})
        threshold, report = cls.judged(found.outputs(_rows(frames, held)), frames, held)
        return dataclasses.replace(found, threshold=threshold, report=report)

    @classmethod
    def usable(cls, frames: Frames) -> np.ndarray:
        """Return which frames are trained on, booleans `[F]`."""
        return np.ones(len(frames), bool)

    @classmethod
    def targets(cls, frames: Frames) -> np.ndarray:
        """Return what is to be predicted, `[F]`."""
        raise NotImplementedError

    @classmethod
    def pools(cls, frames: Frames, kept: np.ndarray) -> list[np.ndarray]:
        """Return groups of rows of which a minibatch has as many each."""
        return [kept]

    @classmethod
    def loss(cls, out: Array, wanted: Array) -> Array:
        """Return the loss of outputs `[B]`."""
        raise NotImplementedError

    @classmethod
    def judged(cls, out: np.ndarray, frames: Frames, held: np.ndarray) -> tuple[float, dict[str, float]]:
        """Return the threshold and the report of the outputs on the held-out rows."""
        raise NotImplementedError

    def outputs(self, observations: Any, batch_size: int = 512) -> np.ndarray:
        """Return the network's numbers `[F]` of flat observations, leaves `[F, ...]`."""
        size = len(jax.tree.leaves(observations)[0])
        parts = [
            np.asarray(_apply(self.model, jax.tree.map(lambda leaf, at=at: leaf[at : at + batch_size], observations)))
            for at in range(0, size, batch_size)
        ]
        return np.concatenate(parts)

    def of(self, observation: Any) -> float:
        """Return the network's number of one observation of the environment."""
        flat = self.spec.flatten(observation)
        return float(_apply(self.model, jax.tree.map(lambda leaf: np.asarray(leaf)[None], flat))[0])

    def check(self, space: gym.Space) -> None:
        """Raise `EnvironmentMismatchError` unless it was trained on observations of this space."""
        for keep_goal in (False, True):
            if ObservationSpec.from_space(space, keep_goal) == self.spec:
                return
        raise EnvironmentMismatchError(
            f"the {self.kind} sees observations {self.spec.shape}, the environment gives "
            f"{ObservationSpec.from_space(space, True).shape}: train it on frames of this environment"
        )

    def save(self, path: str | Path) -> None:
        """Write one file, whole or not at all."""
        module = self.model.module
        assert isinstance(module, _Head)
        about = {
            "magic": MAGIC, "kind": self.kind, "threshold": self.threshold, "report": self.report,
            "leaves": [[list(leaf.path), list(leaf.shape), leaf.image] for leaf in self.spec.leaves],
            "config": dataclasses.asdict(module.config), "mean": list(module.mean), "std": list(module.std),
        }  # fmt: skip
        blob = serialization.msgpack_serialize(
            {"about": json.dumps(about), "params": jax.tree.map(np.asarray, self.model.params)}
        )
        write_atomically(Path(path), blob)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file that `save` wrote. Raises `ConfigError` if it is none, or of another kind."""
        try:
            held: Any = serialization.msgpack_restore(Path(path).read_bytes())
            about = json.loads(held["about"])
            assert about["magic"] == MAGIC and about["kind"] == cls.kind
            encoder = EncoderConfig(**{k: _tuples(v) for k, v in about["config"].pop("encoder").items()})
            config = FrameModelConfig(**{k: _tuples(v) for k, v in about["config"].items()}, encoder=encoder)
            spec = ObservationSpec(tuple(Leaf(tuple(at), tuple(shape), image) for at, shape, image in about["leaves"]))
            example = jax.tree.map(lambda leaf: np.asarray(leaf)[None], _blank(spec))
            module = _Head(config, observation_encoder(encoder, example), tuple(about["mean"]), tuple(about["std"]))
            model = Model.create(jax.random.key(0), module, Adam(), example)
            params = serialization.from_state_dict(model.params, held["params"])
            jax.tree.map(lambda ours, theirs: np.broadcast_to(theirs, ours.shape), model.params, params)
            return cls(spec, model.replace(params=params), about["threshold"], about["report"])
        except OSError as error:
            raise ConfigError(f"{path} cannot be read ({error.strerror})") from error
        except Exception as error:
            raise ConfigError(
                f"{path} is no file of a {cls.kind} ({type(error).__name__}): save one with `save`"
            ) from error


class SuccessClassifier(FrameModel):
    """Says whether a frame shows success."""

    kind = "success classifier"

    @classmethod
    def targets(cls, frames: Frames) -> np.ndarray:
        """Return the flags."""
        return frames.success

    @classmethod
    def pools(cls, frames: Frames, kept: np.ndarray) -> list[np.ndarray]:
        """Return successes and failures."""
        return [kept[frames.success[kept]], kept[~frames.success[kept]]]

    @classmethod
    def loss(cls, out: Array, wanted: Array) -> Array:
        """Return the cross entropy of logits `[B]`."""
        return jnp.mean(jnp.logaddexp(0.0, out) - wanted * out)

    @classmethod
    def judged(cls, out: np.ndarray, frames: Frames, held: np.ndarray) -> tuple[float, dict[str, float]]:
        """Return the logit that lets few failures pass: the best balanced accuracy among those."""
        yes = frames.success[held]
        places = np.unique(np.concatenate([out, [0.0]]))
        places = np.concatenate([0.5 * (places[1:] + places[:-1]), places[-1:] + 1e-3, [0.0]])
        hits = np.asarray([(out[yes] >= place).mean() for place in places])
        false = np.asarray([(out[~yes] >= place).mean() for place in places])
        allowed = false <= max(MOST_FALSE, false.min())
        best = np.flatnonzero(allowed)[(hits - false)[allowed].argmax()]
        said = out >= places[best]
        return float(places[best]), {
            "frames": float(len(held)), "accuracy": float((said == yes).mean()),
            "missed": float(1 - hits[best]), "false": float(false[best]),
        }  # fmt: skip

    def __call__(self, observation: Any) -> bool:
        """Whether one observation of the environment shows success."""
        return self.of(observation) >= self.threshold


class RewardModel(Protocol):
    """What says, step by step, how much nearer to the goal the robot is."""

    def reset(self, observation: Any) -> None:
        """Begin an episode."""
        ...

    def progress(self, observation: Any, goal: Any) -> tuple[float, bool]:
        """Return the progress since the observation before, and whether the goal is reached."""
        ...


class ProgressModel(FrameModel):
    """A small `RewardModel`: the share of the way that lies behind a frame, learnt from episodes that succeeded.

    It has learnt one goal, that of its data; `goal` is not looked at.
    """

    kind = "progress model"

    @classmethod
    def usable(cls, frames: Frames) -> np.ndarray:
        """Return the frames of episodes that succeed, up to their first success."""
        return np.isfinite(frames.progress)

    @classmethod
    def targets(cls, frames: Frames) -> np.ndarray:
        """Return the share of the way."""
        return frames.progress

    @classmethod
    def loss(cls, out: Array, wanted: Array) -> Array:
        """Return the squared error."""
        return jnp.mean(jnp.square(out - wanted))

    @classmethod
    def judged(cls, out: np.ndarray, frames: Frames, held: np.ndarray) -> tuple[float, dict[str, float]]:
        """Return the lowest output that few frames before their success reach, the mean error and the order.

        `order`: how often, of two frames of one episode, the later one is said to be further.
        """
        wanted, yes = frames.progress[held], frames.success[held]
        threshold = float(np.quantile(out[~yes], 1 - MOST_FALSE))
        rng = np.random.default_rng(0)
        right = []
        for episode in np.unique(frames.episodes[held]):
            rows = np.flatnonzero((frames.episodes[held] == episode) & (wanted < 1))
            if len(rows) > 1:
                pairs = np.sort(rng.choice(rows, (64, 2)), axis=1)
                pairs = pairs[pairs[:, 0] < pairs[:, 1]]
                right += (out[pairs[:, 0]] < out[pairs[:, 1]]).tolist()
        error = float(np.abs(out - wanted).mean())
        return threshold, {"frames": float(len(held)), "error": error, "order": float(np.mean(right or [np.nan]))}

    def reset(self, observation: Any) -> None:
        """Begin an episode."""
        self._last = self.of(observation)

    def progress(self, observation: Any, goal: Any = None) -> tuple[float, bool]:
        """Return the progress since the observation before, and whether the goal is reached."""
        now = self.of(observation)
        delta, self._last = now - self._last, now
        return delta, now >= self.threshold


class ClassifierReward(gym.Wrapper):
    """Reward 1 and success when the classifier says so in `hold` frames one after the other; 0 else.

    It goes around the bare environment. Success ends the episode unless `terminate` is false.
    """

    def __init__(self, env: gym.Env, judge: SuccessClassifier, hold: int = 1, terminate: bool = True) -> None:
        """Judge the frames of `env`. Raises `EnvironmentMismatchError` for other observations than it has learnt."""
        super().__init__(env)
        judge.check(env.observation_space)
        if hold < 1:
            raise ConfigError(f"ClassifierReward: hold is {hold}, expected at least 1")
        self.judge, self.hold, self.terminate, self._row = judge, hold, terminate, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset."""
        self._row = 0
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step; `info["classifier"]` is the network's logit above its threshold."""
        observation, _, terminated, truncated, info = self.env.step(action)
        margin = self.judge.of(observation) - self.judge.threshold
        self._row = self._row + 1 if margin >= 0 else 0
        success = self._row >= self.hold
        info = {**info, "classifier": margin, "success": success}
        return observation, float(success), terminated or (self.terminate and success), truncated, info


class ProgressReward(gym.Wrapper):
    """The reward of a `RewardModel`: its progress in each step, and `bonus` at the goal, which ends the episode."""

    def __init__(self, env: gym.Env, model: RewardModel, goal: Any = None, bonus: float = 1.0) -> None:
        """Ask `model` about the frames of `env`; `goal` is handed to it as it is."""
        super().__init__(env)
        if isinstance(model, FrameModel):
            model.check(env.observation_space)
        self.model, self.goal, self.bonus = model, goal, bonus

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset environment and model."""
        observation, info = self.env.reset(seed=seed, options=options)
        self.model.reset(observation)
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step."""
        observation, _, terminated, truncated, info = self.env.step(action)
        delta, done = self.model.progress(observation, self.goal)
        reward = float(delta) + (self.bonus if done else 0.0)
        return observation, reward, terminated or bool(done), truncated, {**info, "success": bool(done)}


@jax.jit
def _apply(model: Model, observations: Any) -> Array:
    return model(observations)


def _rows(frames: Frames, rows: np.ndarray) -> Any:
    return jax.tree.map(lambda leaf: leaf[rows], frames.observations)


def _split(frames: Frames, share: float, rng: np.random.Generator, usable: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows to train on and those held out, by episodes; both have episodes with and without a success."""
    kept: list[int] = []
    held: list[int] = []
    numbers = np.unique(frames.episodes[usable])
    succeeds = np.asarray([frames.success[frames.episodes == number].any() for number in numbers])
    for group in (numbers[succeeds], numbers[~succeeds]):
        group = rng.permutation(group)
        out = min(max(round(share * len(group)), 1), len(group) - 1) if len(group) > 1 else 0
        held += group[:out].tolist()
        kept += group[out:].tolist()
    if not held or not frames.success[np.isin(frames.episodes, held)].any():
        raise DatasetError(
            f"{len(numbers)} episodes, {int(succeeds.sum())} of which succeed, are too few to hold some out"
        )
    both: Sequence[list[int]] = (kept, held)
    rows = [np.flatnonzero(usable & np.isin(frames.episodes, group)) for group in both]
    return rows[0], rows[1]


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _blank(spec: ObservationSpec) -> Any:
    """Return a flat observation of zeros."""
    shape = spec.shape
    if not isinstance(shape, dict):
        return np.zeros(shape, np.float32)
    return {key: np.zeros(size, np.uint8 if len(size) == 3 else np.float32) for key, size in shape.items()}
