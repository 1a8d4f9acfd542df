"""An ensemble of probabilistic dynamics models, for evaluating policies without the environment.

Each member is a Gaussian over (s' - s, r) given (s, a) in raw units. It is fitted by maximum likelihood to its own
bootstrap of the training rows. Roll-outs sample the elites, the members with the least hold-out error (PETS, arXiv
1805.12114). Form and constants are those of Uni-O4 (arXiv 2311.03351), which took them from MOBILE's code.
Where the task has no termination rule, a classifier of (s, a, s') learns one from the dataset.

Differences from that code
- Rows are drawn with replacement from a member's bootstrap list; the code goes through the list in epochs. The list is
  a hash of (member, position), so nothing is stored. Hold-out rows lie at equal distances in the dataset.
- Training has a fixed number of steps; the code stops early. Once `patience` validations in a row have improved no
  member, the best weights no longer change, so the result is that of stopping.
"""

from collections.abc import Sequence
from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from o2o.errors import DatasetError
from o2o.nn.modules import Adam, EnsembleDense, Model, Value, where_leading
from o2o.nn.terminations import RULES, Termination, check_size
from o2o.types import Array, Info, Params

DECAY = (2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4)
"""Weight decay of first, second, middle, last hidden and output layer."""
HOLDOUT_SHARE, HOLDOUT_ROWS, LEAST_ROWS = 0.2, 1000, 50
"""Hold-out rows are this share of the dataset, at most so many; fewer rows than the last are no dataset."""
BATCH_SIZE = 256
IMPROVEMENT = 0.01
"""Relative fall of a hold-out error that counts as an improvement."""


class DynamicsNet(nn.Module):
    """`num` swish MLPs: standardised (s, a) `[E, B, D + A]` to mean and log-variance `[E, B, D + 1]` of (s' - s, r)."""

    hidden_dims: Sequence[int]
    num: int
    outputs: int

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        """Return means and softly bounded log-variances."""
        for i, width in enumerate(self.hidden_dims):
            x = nn.swish(EnsembleDense(self.num, width, "truncated", name=f"dense_{i}")(x))
        x = EnsembleDense(self.num, 2 * self.outputs, "truncated", name="output")(x)
        mean, log_var = jnp.split(x, 2, axis=-1)
        upper = self.param("max_log_var", nn.initializers.constant(0.5), (self.outputs,))
        lower = self.param("min_log_var", nn.initializers.constant(-10.0), (self.outputs,))
        log_var = upper - nn.softplus(upper - log_var)
        return mean, lower + nn.softplus(log_var - lower)


def holdout_rows(size: int) -> int:
    """Return how many of `size` dataset rows are held out; raises `DatasetError` where there are too few."""
    if size < LEAST_ROWS:
        raise DatasetError(
            f"the dataset has {size} transitions; a dynamics ensemble needs at least {LEAST_ROWS} to hold some out: "
            "record more episodes"
        )
    return min(int(HOLDOUT_SHARE * size), HOLDOUT_ROWS)


def split_rows(size: int) -> tuple[np.ndarray, int]:
    """Return the held-out rows of `size`, at equal distances, and that distance."""
    count = holdout_rows(size)
    stride = size // count
    return np.arange(count) * stride + stride // 2, stride


def training_row(positions: Array, size: int) -> Array:
    """Return the dataset rows at `positions` of the training rows, which leave out `split_rows`."""
    held, stride = split_rows(size)
    block, offset = positions // (stride - 1), positions % (stride - 1)
    inside = block * stride + offset + (offset >= stride // 2)
    return jnp.where(block < len(held), inside, positions + len(held))


class Dynamics(struct.PyTreeNode):
    """The ensemble, its best weights so far, and its termination model."""

    model: Model
    best: Params
    best_error: Array
    """Least hold-out mean squared error of each member, `[E]`; the largest float before the first validation."""
    waited: Array
    """Validations since a member last improved, `[]`."""
    mean: Array
    std: Array
    """Standardisation of concat(s, a), `[D + A]`."""
    ender: Model | None
    """Logit of termination from standardised (s, a, s'), where it is learnt."""
    bootstrap: Array
    """Key of the members' bootstrap lists."""
    elites: int = struct.field(pytree_node=False)
    patience: int = struct.field(pytree_node=False)
    termination: Termination = struct.field(pytree_node=False)

    @classmethod
    def create(
        cls,
        rng: Array,
        observations: Array,
        actions: Array,
        *,
        hidden_dims: Sequence[int],
        num: int,
        elites: int,
        learning_rate: float,
        patience: int,
        termination: Termination,
    ) -> Self:
        """Initialise from a key and example observations `[B, D]` and actions `[B, A]`.

        Raises `ConfigError` for observations that are too short for the rule `termination`.
        """
        check_size(termination, observations.shape[-1])
        net_rng, end_rng, boot_rng = jax.random.split(rng, 3)
        size, width = observations.shape[-1], observations.shape[-1] + actions.shape[-1]
        net = DynamicsNet(tuple(hidden_dims), num, size + 1)
        model = Model.create(net_rng, net, Adam(learning_rate), jnp.zeros((num, 1, width)))
        ender = None
        if termination == "learned":
            ender = Model.create(end_rng, Value((64, 64)), Adam(1e-3), jnp.zeros((1, width + size)))
        return cls(
            model=model, best=jax.tree.map(jnp.copy, model.params),
            best_error=jnp.full((num,), np.finfo(np.float32).max, jnp.float32),
            waited=jnp.zeros((), jnp.int32), mean=jnp.zeros(width), std=jnp.ones(width), ender=ender,
            bootstrap=boot_rng, elites=elites, patience=patience, termination=termination,
        )  # fmt: skip

    def prepare(self, data: Any) -> Self:
        """Return the ensemble with the standardisation of a dataset; constant dimensions are only centred."""
        rows = np.concatenate([np.asarray(data.rows[key]) for key in ("observations", "actions")], axis=-1)
        held, _ = split_rows(len(rows))
        rows = np.delete(rows, held, axis=0).astype(np.float64)
        std = rows.std(axis=0)
        return self.replace(
            mean=jnp.asarray(rows.mean(axis=0), jnp.float32),
            std=jnp.asarray(np.where(std < 1e-8, 1.0, std), jnp.float32),
        )

    def _inputs(self, rows: dict[str, Array]) -> Array:
        return (jnp.concatenate([rows["observations"], rows["actions"]], axis=-1) - self.mean) / self.std

    @staticmethod
    def _targets(rows: dict[str, Array]) -> Array:
        return jnp.concatenate([rows["next_observations"] - rows["observations"], rows["rewards"][..., None]], axis=-1)

    def loss(self, params: Params, rows: dict[str, Array]) -> tuple[Array, Info]:
        """Return the members' summed Gaussian loss with its regularisers on rows `[E, B, ...]`, and metrics."""
        mean, log_var = self.model(self._inputs(rows), params=params)
        squared = jnp.square(mean - self._targets(rows))
        fit = jnp.sum(jnp.mean(squared * jnp.exp(-log_var), axis=(1, 2)) + jnp.mean(log_var, axis=(1, 2)))
        own = params["params"]
        bounds = 0.01 * (jnp.sum(own["max_log_var"]) - jnp.sum(own["min_log_var"]))
        layers = [own[name]["kernel"] for name in sorted(own) if name.startswith("dense")] + [own["output"]["kernel"]]
        scale = np.interp(np.linspace(0, len(DECAY) - 1, len(layers)), np.arange(len(DECAY)), DECAY)
        decay = sum(0.5 * c * jnp.sum(jnp.square(kernel)) for c, kernel in zip(scale, layers, strict=True))
        return fit + bounds + decay, {"dynamics/loss": fit, "dynamics/error": squared.mean()}

    def train_step(self, data: Any, rng: Array) -> tuple[Self, Info]:
        """Take one gradient step of all members, each on rows of its own bootstrap list."""
        size = data.rows["rewards"].shape[0]
        trained, members = size - holdout_rows(size), self.best_error.shape[0]
        position = jax.random.randint(rng, (members, BATCH_SIZE), 0, trained)

        def listed(member: Array, at: Array) -> Array:
            key = jax.random.fold_in(jax.random.fold_in(self.bootstrap, member), at)
            return jax.random.randint(key, (), 0, trained)

        drawn = jax.vmap(jax.vmap(listed, (None, 0)))(jnp.arange(members), position)
        rows = {key: leaf[training_row(drawn, size)] for key, leaf in data.rows.items()}
        grads, info = jax.grad(self.loss, has_aux=True)(self.model.params, rows)
        dynamics = self.replace(model=self.model.apply_gradients(grads))
        if self.ender is None:
            return dynamics, info
        rows = {key: leaf.reshape(-1, *leaf.shape[2:]) for key, leaf in rows.items()}

        def end_loss(params: Params) -> Array:
            logits = self._end_logits(rows["observations"], rows["actions"], rows["next_observations"], params)
            return jnp.mean(nn.softplus(logits) - (1.0 - rows["masks"]) * logits)

        loss, grads = jax.value_and_grad(end_loss)(self.ender.params)
        return dynamics.replace(ender=self.ender.apply_gradients(grads)), {**info, "dynamics/end_loss": loss}

    def _end_logits(self, states: Array, actions: Array, next_states: Array, params: Params | None = None) -> Array:
        size = states.shape[-1]
        following = (next_states - self.mean[:size]) / self.std[:size]
        inputs = (jnp.concatenate([states, actions], axis=-1) - self.mean) / self.std
        assert self.ender is not None
        return self.ender(jnp.concatenate([inputs, following], axis=-1), params=params)

    def holdout_error(self, data: Any, params: Params) -> Array:
        """Return each member's mean squared error of the mean on the hold-out rows, `[E]`."""
        held, _ = split_rows(data.rows["rewards"].shape[0])
        rows = {key: data.rows[key][held] for key in ("observations", "actions", "next_observations", "rewards")}
        inputs = jnp.broadcast_to(self._inputs(rows), (self.best_error.shape[0], len(held), self.mean.shape[0]))
        mean, _ = self.model(inputs, params=params)
        return jnp.mean(jnp.square(mean - self._targets(rows)), axis=(1, 2))

    def validate(self, data: Any) -> Self:
        """Keep each member's weights where its hold-out error fell by more than 1 %, until patience has run out."""
        error = self.holdout_error(data, self.model.params)
        better = (error < (1.0 - IMPROVEMENT) * self.best_error) & (self.waited < self.patience)

        def pick(path: Any, new: Array, old: Array) -> Array:
            if "log_var" in jax.tree_util.keystr(path):  # the bounds are shared by all members
                return jnp.where(better.any(), new, old)
            return where_leading(better, new, old)

        return self.replace(
            best=jax.tree_util.tree_map_with_path(pick, self.model.params, self.best),
            best_error=jnp.where(better, error, self.best_error),
            waited=jnp.where(better.any(), 0, self.waited + 1),
        )

    def step(self, rng: Array, states: Array, actions: Array) -> tuple[Array, Array, Array]:
        """Return sampled next states `[B, D]`, rewards `[B]` and ends `[B]` of raw states and actions.

        Every row takes the sample of one elite, drawn uniformly.
        """
        member_rng, noise_rng = jax.random.split(rng)
        elite = jnp.argsort(self.best_error)[: self.elites]
        params = self.best["params"]
        take = lambda part: jax.tree.map(lambda leaf: leaf[elite], part)  # noqa: E731
        params = {name: part if name.endswith("log_var") else take(part) for name, part in params.items()}
        inputs = self._inputs({"observations": states, "actions": actions})
        net = self.model.module.clone(num=self.elites)
        out: Any = net.apply({"params": params}, jnp.broadcast_to(inputs, (self.elites, *inputs.shape)))
        chosen = jax.random.randint(member_rng, (states.shape[0],), 0, self.elites)
        mean, log_var = (leaf[chosen, jnp.arange(states.shape[0])] for leaf in out)
        sample = mean + jnp.exp(0.5 * log_var) * jax.random.normal(noise_rng, mean.shape)
        following, rewards = states + sample[:, :-1], sample[:, -1]
        if self.ender is not None:
            return following, rewards, self._end_logits(states, actions, following) > 0.0
        return following, rewards, RULES[self.termination](following)
