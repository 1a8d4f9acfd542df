"""Diagnose a pre-trained run before it goes online: how good the policy is, what its Q is worth, what to expect.

The policy plays, as it is and moved a little; its Q is held against the returns of the dataset and of its own episodes,
and is looked at around the policy's actions. `judge` reads a recommendation off these numbers. `o2o.report.diagnosis`
draws them.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from o2o.agents import WSRL
from o2o.closing import Closing
from o2o.data import datasets
from o2o.data.checks import summary
from o2o.data.normalizer import Normalizer, normalize
from o2o.errors import ConfigError, DivergenceError, O2OError
from o2o.report import diagnosis as report
from o2o.report.plots import judged_by
from o2o.runs.opened import Opened
from o2o.runs.presets import preset_run
from o2o.runs.session import check_seed_index, env_maker, open_agents, unchanged, without_environment
from o2o.settings import Amount, Count, Seed, checked
from o2o.train.acting import stack_of_one
from o2o.train.evaluation import Evaluator
from o2o.types import Agent, Array, Carry

ROWS = 2_000
"""Most rows of the dataset, or of roll-outs, whose Q is held against their returns; spread evenly."""
STATES = 256
"""Most states of the dataset at which actions around the policy's are judged."""
DIRECTIONS = 32
"""Random directions per state and radius, and draws of the policy per state."""
RADII = (0.02, 0.05, 0.1, 0.2, 0.5)
"""Distances from the policy's action: root mean square over its coordinates, which lie in [-1, 1]."""
CLIMB = 0.02
"""Length of a step up Q."""
CLIMB_STEPS = 25
NUDGE = 0.1
"""How far the policy is moved, up its Q or at random, when it is tried moved."""

MISLED = 0.25
"""Share of its score that the policy loses when it is moved up its Q, above which the critic misleads it."""
PROMISE = 0.5
"""Rise of Q above the data's actions, in standard deviations of the returns, above which nothing holds Q down."""
BIAS = 0.5
"""Error of Q on the policy's own episodes, in standard deviations of the returns, above which Q is off."""
CORRELATION = 0.3
"""Correlation of Q with the returns of the policy's own episodes below which Q does not tell them apart."""
EPISODES, LEAST, MOST = 20, 1_000, 20_000
"""Episodes that a warm-up should hold, and its bounds in steps; the papers take 5000."""


class Track(NamedTuple):
    """An episode of T steps as the agent met it."""

    observations: Any
    """Leaves `[T + 1, ...]`, raw; the last one is the true final one."""
    actions: np.ndarray
    """As executed, `[T, A]` in [-1, 1]."""
    rewards: np.ndarray
    """The task's, `[T]`."""
    terminated: bool


class Watched(gym.Wrapper):
    """Writes every finished episode into a list."""

    def __init__(self, env: gym.Env, tracks: list[Track]) -> None:
        """Watch `env`; its episodes join `tracks`."""
        super().__init__(env)
        self._tracks = tracks

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Begin an episode."""
        observation, info = self.env.reset(**kwargs)
        self._seen, self._played = [observation], []
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Play an action."""
        result = observation, reward, terminated, truncated, info = self.env.step(action)
        self._seen.append(observation)
        self._played.append((np.asarray(info.get("executed_action", action), np.float32), float(reward)))
        if terminated or truncated:
            actions, rewards = zip(*self._played, strict=True)
            seen = jax.tree.map(lambda *leaves: np.stack(leaves), *self._seen)
            self._tracks.append(Track(seen, np.stack(actions), np.asarray(rewards, np.float32), bool(terminated)))
        return result


class Moved(struct.PyTreeNode):
    """An agent whose actions are moved by `distance`: up its Q, or in a random direction."""

    agent: Any
    distance: Array
    upwards: bool = struct.field(pytree_node=False)

    def initial_carry(self, batch_shape: tuple[int, ...]) -> Carry:
        """Return the agent's carry of fresh episodes."""
        return self.agent.initial_carry(batch_shape)

    def sample_actions(
        self, observations: Any, carry: Carry, rng: Array, deterministic: bool = False
    ) -> tuple[Array, Carry]:
        """Return the agent's actions `[..., A]`, moved and clipped, and its next carry."""
        own_rng, move_rng = jax.random.split(rng)
        actions, carry = self.agent.sample_actions(observations, carry, own_rng, deterministic)
        if self.upwards:
            way = uphill(self.agent, observations, actions)
        else:
            way = unit(jax.random.normal(move_rng, actions.shape))
        return jnp.clip(actions + self.distance * way, -1.0, 1.0), carry


def unit(ways: Array) -> Array:
    """Return directions `[..., A]` with a root mean square of 1 over their coordinates; 0 stays 0."""
    return ways / jnp.maximum(jnp.sqrt(jnp.mean(jnp.square(ways), axis=-1, keepdims=True)), 1e-12)


def uphill(agent: Agent, observations: Any, actions: Array) -> Array:
    """Return the directions `[..., A]` in which the agent's Q rises fastest."""
    return unit(jax.grad(lambda actions: jnp.sum(agent.q_value(observations, actions)))(actions))  # pyright: ignore


@jax.jit
def q_of(agent: Any, normalizer: Normalizer | None, observations: Any, actions: Array) -> Array:
    """Return Q `[N]` of actions `[N, A]` at raw observations `[N, ...]`."""
    return agent.q_value(normalize(normalizer, observations), actions)


@jax.jit
def modes_of(agent: Any, normalizer: Normalizer | None, observations: Any) -> Array:
    """Return the policy's deterministic actions `[N, A]` at raw observations `[N, ...]`, as at an episode's start."""
    count = jax.tree.leaves(observations)[0].shape[0]
    seen = normalize(normalizer, observations)
    return agent.sample_actions(seen, agent.initial_carry((count,)), jax.random.key(0), True)[0]


@jax.jit
def draws_of(agent: Any, normalizer: Normalizer | None, observations: Any, key: Array) -> Array:
    """Return `DIRECTIONS` draws of the policy `[K, N, A]` at raw observations `[N, ...]`."""
    count = jax.tree.leaves(observations)[0].shape[0]
    seen, carry = normalize(normalizer, observations), agent.initial_carry((count,))
    return jax.vmap(lambda key: agent.sample_actions(seen, carry, key)[0])(jax.random.split(key, DIRECTIONS))


@jax.jit
def neighbours(
    agent: Any, normalizer: Normalizer | None, observations: Any, actions: Array, key: Array
) -> tuple[Array, Array]:
    """Return the gain of Q at `DIRECTIONS` neighbours of actions `[N, A]` at each of `RADII`, `[R, K, N]`.

    Beside it the gain of a walk up Q `[CLIMB_STEPS + 1, N]`, which begins at the actions.
    """
    seen = normalize(normalizer, observations)
    value: Any = partial(agent.q_value, seen)
    at = value(actions)

    def ring(key: Array, radius: Array) -> Array:
        ways = unit(jax.random.normal(key, (DIRECTIONS, *actions.shape)))
        return jax.lax.map(value, jnp.clip(actions + radius * ways, -1.0, 1.0)) - at

    def step(there: Array, _: None) -> tuple[Array, Array]:
        there = jnp.clip(there + CLIMB * uphill(agent, seen, there), -1.0, 1.0)
        return there, value(there) - at

    around = jax.lax.map(lambda each: ring(*each), (jax.random.split(key, len(RADII)), jnp.asarray(RADII)))
    walked = jax.lax.scan(step, actions, length=CLIMB_STEPS)[1]
    return around, jnp.concatenate([jnp.zeros((1, *at.shape)), walked])


@checked
def diagnose(
    path: str | Path, episodes: Count = 20, which: str | int = "latest", seed_index: Amount = 0, seed: Seed = 1
) -> dict[str, Any]:
    """Diagnose one seed of a pre-trained run before its online phase; write RUN/diagnosis and return what is in it.

    `episodes` are played with each form of the policy, with the reset seeds of `evaluate_run` at the same `seed`. The
    folder gets `README.md`, `diagnosis.png` and `diagnosis.json`. Raises `ConfigError` for a run that has no
    environment, was not pre-trained or is in its online phase; `CheckpointError` without a checkpoint;
    `DivergenceError` if Q is not finite.
    """
    path = Path(path).absolute()
    check_seed_index(path, seed_index)
    opened = open_agents(path, which)
    _check(path, opened)
    data, base = unchanged(path, opened.settings)
    agent = opened.agent_of(seed_index)
    tracks: list[Track] = []
    make = env_maker(opened.settings, opened.data, base)
    evaluator = Evaluator(
        lambda evaluation: Watched(make(evaluation), tracks), 1, episodes, seed + seed_index, opened.normalized
    )
    with Closing() as closing:
        closing.callback(evaluator.close)
        played, own = _play(evaluator, agent, opened.normalizer, tracks, has_q(agent, data))
    found: dict[str, Any] = {
        "run": path.name,
        "agent": opened.settings.agent,
        "dataset": list(opened.settings.dataset),
        "preset": opened.settings.preset,
        "starts_wsrl": _starts_wsrl(opened, agent),
        "checkpoint": opened.counters.point,
        "seed_index": seed_index,
        "seed": seed,
        "episodes": episodes,
        **_policy(played, data),
    }
    found |= _noise(agent, opened.normalizer, data)
    values, points = _q(agent, opened, data, own) if has_q(agent, data) else ({"q": None, "actions": None}, {})
    found |= values
    found |= judge(found, path)
    report.write(path / "diagnosis", found, points)
    return found


def _starts_wsrl(opened: Opened, agent: Agent) -> bool:
    """Whether the WSRL of the run's own preset can start from its agent: same networks, a squashed Gaussian."""
    run = opened.settings
    try:
        config: Any = preset_run("wsrl", run.dataset, run.preset, env=run.env, task=run.task).config
        WSRL.from_agent(agent, config)  # pyright: ignore[reportArgumentType]
    except O2OError:
        return False
    return True


def has_q(agent: Agent, data: datasets.Dataset) -> bool:
    """Whether an agent can judge single actions."""
    example = _take(data.arrays, np.zeros(1, int))
    return jax.eval_shape(agent.q_value, example["observations"], example["actions"]) is not None


def _check(path: Path, opened: Opened) -> None:
    """Raise `ConfigError` for a run that cannot be diagnosed."""
    settings, counters = opened.settings, opened.counters
    if without_environment(settings, opened.data.info):
        raise ConfigError(
            f"run {path} has no environment, and a diagnosis plays episodes: train it with `env` and without "
            "`offline_estimate`"
        )
    if counters.phase == "online":
        raise ConfigError(
            f"run {path} is online at step {counters.point}, and a diagnosis looks at what goes online: name a "
            "checkpoint of the pre-training, or pre-train with online_steps 0"
        )
    if counters.offline_steps == 0 and settings.init_from is None:
        raise ConfigError(f"run {path} was not pre-trained (0 gradient steps): there is nothing to diagnose yet")


def _play(
    evaluator: Evaluator, agent: Agent, normalizer: Normalizer | None, tracks: list[Track], with_q: bool
) -> tuple[dict[str, list[dict[str, Any]]], list[Track]]:
    """Play the episodes of every form of the policy; return their rows by form, and the tracks of its own samples.

    Hardware is not moved by a policy that nobody trained.
    """
    rows = {"mode": evaluator(stack_of_one(agent), normalizer, 0, True)}
    tracks.clear()
    rows["sample"] = evaluator(stack_of_one(agent), normalizer, 0, False)
    own = list(tracks)
    if not all(slot.replayable for slot in evaluator.envs):
        return rows, own
    for name, upwards in (("up", True), ("random", False)):
        if with_q or not upwards:
            form = Moved(agent, jnp.float32(NUDGE), upwards)
            rows[name] = evaluator(stack_of_one(form), normalizer, 0, True)
    return rows, own


def _policy(played: Mapping[str, Sequence[Mapping[str, Any]]], data: datasets.Dataset) -> dict[str, Any]:
    """Return mean return, success and score of every form of the policy and of the data, and what they are judged by.

    `error` is the standard error of the mean score.
    """
    metric = judged_by(played["mode"])
    found: dict[str, Any] = {}
    for name, rows in played.items():
        means = {key: _mean([row[key] for row in rows]) for key in ("return", "success", "normalized", "length")}
        scores = np.asarray([row[metric] for row in rows], float)
        found[name] = {**means, "score": float(scores.mean()), "error": float(scores.std() / math.sqrt(len(scores)))}
    known = summary(data)
    found["data"] = {**known, "score": known.get(metric)}
    return {"judged_by": metric, "policy": found}


def _mean(values: Sequence[Any]) -> float | None:
    known = [float(value) for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _take(entry: Any, rows: np.ndarray) -> Any:
    return {k: _take(v, rows) for k, v in entry.items()} if isinstance(entry, dict) else np.asarray(entry[rows])


def spread(count: int, most: int) -> np.ndarray:
    """Return at most `most` of `count` row numbers, spread evenly."""
    return np.unique(np.linspace(0, count - 1, most).astype(int))


def _noise(agent: Agent, normalizer: Normalizer | None, data: datasets.Dataset) -> dict[str, Any]:
    """Return how far the policy's draws spread, how far the data's actions do, and how far apart the two are.

    All are root mean squares over coordinates in [-1, 1]. `entropy` is that of a Gaussian with the draws' deviations;
    None for a policy that does not draw.
    """
    rows = _take({key: data.arrays[key] for key in ("observations", "actions")}, spread(data.size, STATES))
    seen = rows["observations"]
    draws = np.asarray(draws_of(agent, normalizer, seen, jax.random.key(0)), np.float64)
    stds = draws.std(axis=0)
    entropy = np.sum(np.log(np.maximum(stds, 1e-12)) + 0.5 * math.log(2 * math.pi * math.e), axis=-1).mean()
    mode = modes_of(agent, normalizer, seen)
    noise = {
        "policy_std": float(np.sqrt(np.mean(stds**2))),
        "entropy": float(entropy) if stds.min() > 1e-6 else None,
        "data_std": float(np.sqrt(np.mean(np.asarray(data.arrays["actions"]).var(axis=0)))),
        "distance_to_data": float(jnp.sqrt(jnp.mean(jnp.square(mode - rows["actions"])))),
    }
    return {"noise": noise}


def returns_of(agent: Agent, opened: Opened, rows: Mapping[str, Any], last: Any) -> np.ndarray:
    """Return Monte-Carlo returns `[N]` of `rewards`, `masks` and `ends` `[N]`.

    Where a time limit ended an episode, what Q says of its `last` observation (`[E, ...]`, one for each end) is added,
    discounted; sparse tasks count a failure as one for ever (`datasets.monte_carlo_returns`).
    """
    discount, failure = opened.config.discount, opened.data.task.failure_reward
    rewards, masks, ends = (np.asarray(rows[key]) for key in ("rewards", "masks", "ends"))
    if failure is None and ends.any():
        rewards, at = rewards.astype(np.float32).copy(), np.flatnonzero(ends)
        after = q_of(agent, opened.normalizer, last, modes_of(agent, opened.normalizer, last))
        rewards[at] += discount * masks[at] * np.asarray(after)
    return datasets.monte_carlo_returns(rewards, masks, ends, discount, failure)


def _q(
    agent: Agent, opened: Opened, data: datasets.Dataset, own: Sequence[Track]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return what Q is worth on the data and on the policy's `own` episodes, and how it looks around the policy."""
    ends = np.asarray(data.arrays["ends"], bool)
    last = _take(data.arrays["next_observations"], np.flatnonzero(ends))
    returns = returns_of(agent, opened, data.arrays, last)
    scale = max(float(returns.std()), 1e-6)
    rows = spread(data.size, ROWS)
    seen = _take({key: data.arrays[key] for key in ("observations", "actions")}, rows)
    on_data = np.asarray(q_of(agent, opened.normalizer, seen["observations"], seen["actions"]))

    lengths = [len(track.rewards) for track in own]
    flat: dict[str, Any] = {
        "observations": jax.tree.map(lambda *x: np.concatenate([e[:-1] for e in x]), *[t.observations for t in own]),
        "actions": np.concatenate([track.actions for track in own]),
        "rewards": np.concatenate([track.rewards for track in own]),
        "ends": np.zeros(sum(lengths), bool),
        "masks": np.ones(sum(lengths), np.float32),
    }
    at = np.cumsum(lengths) - 1
    flat["ends"][at] = True
    flat["masks"][at] = [not track.terminated for track in own]
    own_last = jax.tree.map(lambda *x: np.stack([e[-1] for e in x]), *[t.observations for t in own])
    own_returns = returns_of(agent, opened, flat, own_last)
    chosen = spread(len(own_returns), ROWS)
    own_seen = _take({key: flat[key] for key in ("observations", "actions")}, chosen)
    on_own = np.asarray(q_of(agent, opened.normalizer, own_seen["observations"], own_seen["actions"]))

    points = {"data_q": on_data, "data_g": returns[rows], "own_q": on_own, "own_g": own_returns[chosen]}
    if not all(np.isfinite(values).all() for values in points.values()):
        raise DivergenceError(
            f"Q of run {opened.settings.agent} at step {opened.counters.point} is not finite: the learner diverged; "
            "take an earlier checkpoint, or train again with a lower learning rate"
        )
    q = {
        "scale": scale,
        "highest_return": float(returns.max()),
        "data": held_against(on_data, returns[rows], scale),
        "rollouts": held_against(on_own, own_returns[chosen], scale),
    }
    return {"q": q, "actions": _around(agent, opened.normalizer, data, q)}, points


def held_against(q: np.ndarray, returns: np.ndarray, scale: float) -> dict[str, Any]:
    """Return bias, error and correlation of Q `[N]` against returns `[N]`; `relative_bias` is in units of `scale`.

    The correlation is None where one of the two does not vary.
    """
    q, returns = q.astype(np.float64), returns.astype(np.float64)
    varies = q.std() > 1e-9 and returns.std() > 1e-9
    bias = float(np.mean(q - returns))
    return {
        "rows": len(q),
        "q": float(q.mean()),
        "return": float(returns.mean()),
        "bias": bias,
        "relative_bias": bias / scale,
        "rmse": float(np.sqrt(np.mean((q - returns) ** 2))),
        "correlation": float(np.corrcoef(q, returns)[0, 1]) if varies else None,
    }


def _around(
    agent: Agent, normalizer: Normalizer | None, data: datasets.Dataset, q: Mapping[str, Any]
) -> dict[str, Any]:
    """Return how Q changes around the policy's actions at states of the data.

    Gains are in units of Q above that of the policy's action: the mean over states of the mean neighbour and of the
    best one at each radius, and of a walk up Q. `better` is the share of neighbours that Q prefers to the policy's own.
    """
    rows = _take({key: data.arrays[key] for key in ("observations", "actions")}, spread(data.size, STATES))
    seen = rows["observations"]
    mode = modes_of(agent, normalizer, seen)
    around, walk = (np.asarray(x, np.float64) for x in neighbours(agent, normalizer, seen, mode, jax.random.key(1)))
    at_policy, at_data = (np.asarray(q_of(agent, normalizer, seen, a), np.float64) for a in (mode, rows["actions"]))
    top = at_policy + walk[-1]
    return {
        "states": len(at_policy),
        "q_policy": float(at_policy.mean()),
        "q_data": float(at_data.mean()),
        "policy_above_data": float((at_policy - at_data).mean()),
        "radii": list(RADII),
        "mean_gain": around.mean(axis=(1, 2)).tolist(),
        "best_gain": around.max(axis=1).mean(axis=1).tolist(),
        "better": (around > 0).mean(axis=(1, 2)).tolist(),
        "walk": (np.arange(CLIMB_STEPS + 1) * CLIMB).tolist(),
        "walk_gain": walk.mean(axis=1).tolist(),
        "top_above_data": float((top - at_data).mean()),
        "above_any_return": float(np.mean(top > q["highest_return"])),
    }


# What the numbers say


def judge(found: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """Return the `signs` that the numbers of a diagnosis give, whether a `dip` is expected, and a `recommendation`.

    `dip` is None where that cannot be said, and `unsaid` says why: the agent has no Q, its policy has nothing to lose,
    or it lost what so few episodes do not tell from chance.
    """
    signs = {sign["name"]: sign for sign in _signs(found)}
    warns = {name for name, sign in signs.items() if sign["warns"]}
    lost = found["judged_by"] == "success" and found["policy"]["mode"]["score"] == 0.0
    dip, unsaid = None, ""
    if found["q"] is None:
        unsaid = "the agent has no Q."
    elif lost:
        unsaid = "the policy's mode never succeeds."
    else:
        dip = "misled" in warns or ("q_rises" in warns and bool(warns & {"brittle", "q_off", "q_blind"}))
        if not dip and "misled" in signs and signs["misled"]["value"] > MISLED:
            dip, unsaid = None, _too_few(found, signs["misled"]["value"])
    advice = _recommend(found, warns, dip, lost, path)
    return {"signs": list(signs.values()), "dip": dip, "unsaid": unsaid, "recommendation": advice}


def _too_few(found: Mapping[str, Any], lost: float) -> str:
    """Return why a loss of this share of the score counts for nothing yet, and how many episodes would tell."""
    mode, up, episodes = found["policy"]["mode"], found["policy"]["up"], found.get("episodes", EPISODES)
    errors = 2.0 * math.hypot(mode["error"], up["error"]) / (mode["score"] - up["score"])
    wanted = math.ceil(1.5 * episodes * errors**2 / 10) * 10
    return (
        f"moved up its Q the policy lost {100 * lost:.0f} % of its score, and {episodes} episodes do not tell that "
        f"from chance; diagnose it with {wanted} episodes."
    )


def _sign(name: str, value: float | None, limit: float, warns: bool, says: str) -> dict[str, Any]:
    return {"name": name, "value": value, "limit": limit, "warns": bool(warns), "says": says}


def _signs(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the signs, each with its value, its limit, whether it warns, and a sentence."""
    policy, q, actions, noise = (found[key] for key in ("policy", "q", "actions", "noise"))
    mode, data, metric = policy["mode"], policy["data"]["score"], found["judged_by"]
    signs = []

    def drop(name: str, form: str, what: str) -> None:
        if form not in policy:
            return
        other = policy[form]
        lost = (mode["score"] - other["score"]) / max(abs(mode["score"]), 1e-9)
        clear = mode["score"] - other["score"] > 2.0 * math.hypot(mode["error"], other["error"])
        says = f"{what}, its {metric} goes from {mode['score']:.3g} to {other['score']:.3g}."
        signs.append(_sign(name, lost, MISLED, lost > MISLED and clear, says))

    if data is not None:
        worse = data - mode["score"] > 2.0 * mode["error"]
        says = f"The policy's {metric} is {mode['score']:.3g}, the data's {data:.3g}."
        signs.append(_sign("below_data", mode["score"], data, worse, says))
    drop("noise_costs", "sample", "Sampled, as the warm-up plays it")
    drop("brittle", "random", f"Moved at random by {NUDGE:g}")
    drop("misled", "up", "Moved as far up its own Q")
    ratio = noise["policy_std"] / max(noise["distance_to_data"], 1e-9)
    says = f"Its noise ({noise['policy_std']:.2g}) is {ratio:.2g} times its distance to the data's actions."
    signs.append(_sign("noise", ratio, 2.0, ratio > 2.0, says))
    if q is None or actions is None:
        return signs
    rise, own = actions["top_above_data"] / q["scale"], q["rollouts"]
    says = f"Walking {CLIMB * CLIMB_STEPS:g} up, Q ends {rise:.2g} standard deviations of the returns above the data's."
    signs.append(_sign("q_rises", rise, PROMISE, rise > PROMISE, says))
    says = f"On the policy's own episodes Q is off by {own['relative_bias']:+.2g} standard deviations of the returns."
    signs.append(_sign("q_off", own["relative_bias"], BIAS, abs(own["relative_bias"]) > BIAS, says))
    correlation = own["correlation"]
    blind = correlation is not None and correlation < CORRELATION
    says = "There Q or the returns are all the same, so they do not correlate."
    if correlation is not None:
        says = f"There Q correlates with the returns by {correlation:.2f}."
    signs.append(_sign("q_blind", correlation, CORRELATION, blind, says))
    return signs


def _recommend(
    found: Mapping[str, Any], warns: set[str], dip: bool | None, lost: bool, path: str | Path
) -> dict[str, Any]:
    """Return what to do at the switch, the command to begin with, and the reasons."""
    sample, reasons = found["policy"]["sample"], []
    episodes = EPISODES
    if sample["success"]:
        episodes = max(EPISODES, math.ceil(10 / sample["success"]))
    warmup = min(max(round(episodes * (sample["length"] or 0) / 100) * 100, LEAST), MOST)
    reasons.append(f"A warm-up of {warmup} steps holds about {warmup / max(sample['length'] or 1, 1):.0f} episodes.")
    keep, alone, target = False, 0, "off"
    agent = "wsrl" if found["starts_wsrl"] else found["agent"].rpartition(":")[2]
    if lost:
        agent, keep = "rlpd", True
        reasons.append("The policy's mode never succeeds: there is little to lose, and the data are the better start.")
    elif "below_data" in warns:
        keep = True
        reasons.append("The data are better than the policy: keep them in the batches.")
    elif dip is False:
        reasons.append("The policy is as good as the data: it can do without them.")
    if found["q"] is None and not lost:
        agent, keep, alone, target = "residual", True, 5_000, "td"
        reasons.append("The agent has no Q: a new one must be learnt before the policy may move.")
    elif dip is not False and not lost:
        agent, keep, alone = "residual", True, 2_000
        target = "mc" if "q_off" in warns else "td"
        likely = "The critic misleads the policy: a dip is likely." if dip else "The critic may mislead the policy."
        reasons.append(f"{likely} A residual policy begins exactly at this one.")
    elif (
        not lost and found["starts_wsrl"] and warns & {"q_off", "q_blind"}
    ):  # a run that only goes on has no such phase
        alone, target = 2_000, "mc" if "q_off" in warns else "td"
        reasons.append("Q does not fit the policy's own episodes: let the critics learn alone first.")
    return {
        "keep_data": keep,
        "warmup_steps": warmup,
        "critic_only_updates": alone,
        "critic_warmup": target,
        "agent": agent,
        "command": _command(found, agent, keep, warmup, alone, target, Path(path)),
        "reasons": reasons,
    }


def _command(found: Mapping[str, Any], agent: str, keep: bool, warmup: int, alone: int, target: str, path: Path) -> str:
    """Return the command to begin with."""
    words = f"o2o train {agent} --dataset {' '.join(found['dataset'])}"
    words += " --preset small" if found["preset"] == "small" else ""
    if agent == "residual":
        return f"{words} --base {path}"
    if agent != "wsrl" or not found["starts_wsrl"]:
        return words if agent == "rlpd" else f"o2o resume {path} --online-steps {10 * warmup}"
    words += f" --init-from {path} --config.online.warmup-steps {warmup}"
    words += " --config.online.replay mixed" if keep else ""
    if alone:
        words += f" --config.online.initial-updates {alone} --config.finetune.critic-warmup {target}"
    return words
