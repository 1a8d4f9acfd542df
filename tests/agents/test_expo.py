"""EXPO: which parameters serve where, the three losses, the temperature, the schedule of a call, settings."""

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from o2o.agents import EXPO, EXPOConfig
from o2o.errors import ConfigError
from o2o.nn.modules import Adam
from tests.helpers.tiny import ACTION_DIM, ROWS, constant_critic, largest_difference, make_batch, moved, steps
from tests.helpers.toy_expo import (
    EDITS,
    KEY,
    MEMBERS,
    TINY,
    N,
    act,
    base_step,
    changed,
    choose,
    critic_step,
    distort,
    edit_step,
    expo,
    fresh,
    members,
    next_values,
    quick,
    update,
)

# Which parameters serve where ---------------------------------------------------------------------------------------


def test_acting_networks() -> None:
    """Acting uses the averaged base, the edit policy and the target critic."""
    agent, observations = expo(), make_batch(rows=32)["observations"]
    before = act(agent, observations, KEY)
    for unused in ("base", "critic"):
        model = getattr(agent, unused)
        np.testing.assert_array_equal(
            act(agent.replace(**{unused: model.replace(params=distort(model.params))}), observations, KEY), before
        )
    edited = agent.edit.replace(params=distort(agent.edit.params))
    assert moved(act(agent.replace(edit=edited), observations, KEY), before)
    assert moved(act(agent.replace(target_base=distort(agent.target_base)), observations, KEY), before)
    flipped = jax.tree.map(jnp.negative, agent.target_critic)
    assert moved(act(agent.replace(target_critic=flipped), observations, KEY), before)


def test_target_networks() -> None:
    """The target uses the online base, the edit policy and the target critic."""
    agent, observations = expo(), make_batch(rows=32)["next_observations"]
    before = next_values(agent, observations, KEY)[0]
    critic = agent.critic.replace(params=distort(agent.critic.params))
    same = agent.replace(target_base=distort(agent.target_base), critic=critic)
    np.testing.assert_array_equal(next_values(same, observations, KEY)[0], before)
    for used in ("base", "edit"):
        model = getattr(agent, used)
        other = agent.replace(**{used: model.replace(params=distort(model.params))})
        assert moved(next_values(other, observations, KEY)[0], before)
    assert moved(next_values(agent.replace(target_critic=distort(agent.target_critic)), observations, KEY)[0], before)


def test_target_is_highest_minimum() -> None:
    """With all members, the target is the highest minimum over the candidates."""
    agent, batch = expo(target_subset=MEMBERS), make_batch()
    action_rng, _ = jax.random.split(KEY)
    choice = choose(agent, batch["next_observations"], agent.base.params, action_rng)
    lowest = np.min(members(agent, batch["next_observations"], choice.candidates), axis=0)
    np.testing.assert_allclose(choice.scores, lowest, atol=1e-5)
    values, _ = next_values(agent, batch["next_observations"], KEY)
    np.testing.assert_allclose(values, lowest.max(axis=0), atol=1e-5)
    _, info = critic_step(agent, batch, KEY)
    targets = np.asarray(batch["rewards"]) + 0.99 * np.asarray(batch["masks"]) * lowest.max(axis=0)
    assert float(info["critic/target"]) == pytest.approx(float(targets.mean()), rel=1e-4)
    q = np.asarray(agent.critic(batch["observations"], batch["actions"]))
    assert float(info["critic/loss"]) == pytest.approx(float(np.square(q - targets).mean()), rel=1e-4)
    assert float(info["edit/win_share"]) == pytest.approx(np.mean(np.asarray(choice.place) >= N))


def test_subsets_drawn_independently() -> None:
    """Selection and value draw their subsets independently.

    With members constant at 0, 1, 2, 3 and subsets of one, scores and values name the member drawn.
    """
    agent, observations = expo(target_subset=1), make_batch(rows=2)["next_observations"]
    params = agent.target_critic
    for member in range(MEMBERS):
        params = constant_critic(params, float(member), member)
    agent = agent.replace(target_critic=params)

    def drawn(rng: Any) -> tuple[Any, Any]:
        choice = agent.choose(observations, agent.base.params, jax.random.split(rng)[0])
        return choice.scores, agent.next_values(observations, rng)[0]

    scores, values = quick(jax.vmap(drawn))(jax.random.split(KEY, 128))
    scores, values = np.asarray(scores).reshape(128, -1), np.asarray(values)
    assert np.ptp(scores, axis=1).max() == 0.0 and np.ptp(values, axis=1).max() == 0.0  # one draw for the whole call
    pairs = {(int(one), int(two)) for one, two in zip(scores[:, 0], values[:, 0], strict=True)}
    assert pairs == {(one, two) for one in range(MEMBERS) for two in range(MEMBERS)}


def test_no_bootstrap_at_terminals() -> None:
    """Terminal rows do not bootstrap."""
    agent, batch = expo(), {**make_batch(), "rewards": jnp.zeros(ROWS)}
    agent = agent.replace(target_critic=constant_critic(agent.target_critic, 3.0))
    assert float(critic_step(agent, batch, KEY)[1]["critic/target"]) == pytest.approx(0.99 * 3.0 * 7 / 8, rel=1e-5)


def test_soft_backup_entropy() -> None:
    """Soft selection adds the closed-form entropy to the backup.

    With constant critics the draw is uniform: its entropy is ln(N + n_e), worth ln(N + n_e) / kappa.
    """
    agent = expo(selection="soft", inverse_temperature=4.0)
    agent = agent.replace(target_critic=constant_critic(agent.target_critic, 3.0))
    values, info = next_values(agent, make_batch(rows=256)["next_observations"], KEY)
    np.testing.assert_allclose(values, 3.0 + math.log(N + EDITS) / 4.0, rtol=1e-5)
    assert float(info["edit/win_share"]) == pytest.approx(EDITS / (N + EDITS), abs=0.1)


def test_ablated_backup() -> None:
    """The ablated backup is a plain sample of the online base."""
    agent, batch = expo(backup="base", target_subset=MEMBERS), make_batch(1)
    observations = batch["next_observations"][0]
    actions = agent.base_samples(agent.base.params, observations, 1, jax.random.split(KEY)[0])[0]
    values, _ = next_values(agent, observations, KEY)
    np.testing.assert_allclose(values, np.min(members(agent, observations, actions), axis=0), atol=1e-5)
    otf, _ = next_values(expo(target_subset=MEMBERS), observations, KEY)
    assert moved(values, otf)
    _, info = update(agent, batch)
    assert 0.0 <= float(info["edit/win_share"]) <= 1.0


# The losses ---------------------------------------------------------------------------------------------------------


def test_base_only_imitates() -> None:
    """The base only imitates.

    Other critics and another edit policy leave its step, bit for bit, as it was; good or bad rewards too.
    """
    agent, batch = expo(), make_batch(2)
    after, _ = update(agent, batch)
    critic = agent.critic.replace(params=distort(agent.critic.params))
    edit = agent.edit.replace(params=distort(agent.edit.params))
    other, _ = update(agent.replace(critic=critic, edit=edit), {**batch, "rewards": -9.0 * batch["rewards"]})
    assert moved(other.critic.params, after.critic.params) and moved(other.edit.params, after.edit.params)
    for part in ("base", "target_base"):
        assert largest_difference(*(jax.tree.leaves(getattr(one, part)) for one in (other, after))) == 0.0
    assert moved(after.base.params, agent.base.params)


def test_losses_move_own_networks() -> None:
    """Every loss moves its own networks only."""
    agent, batch = expo(), make_batch()
    assert changed(agent, base_step(agent, batch, KEY)[0]) == {"base", "target_base"}
    assert changed(agent, edit_step(agent, batch, KEY)[0]) == {"edit", "temperature"}
    assert changed(agent, critic_step(agent, batch, KEY)[0]) == {"critic", "target_critic"}


def test_base_loss_and_average() -> None:
    """The base loss is the sum over dimensions, and its average follows slowly."""
    agent, batch = expo(), make_batch()
    loss_rng, _ = jax.random.split(KEY)
    observations, actions = batch["observations"], batch["actions"]
    errors = agent.config.diffusion.loss(lambda x, t: agent.base(observations, x, t), actions, loss_rng)
    after, info = base_step(agent, batch, KEY)
    assert errors.shape == (ROWS, ACTION_DIM)
    assert float(info["base/loss"]) == pytest.approx(ACTION_DIM * float(errors.mean()), rel=1e-4)
    expected = optax.incremental_update(after.base.params, agent.target_base, 0.001)
    assert largest_difference(after.target_base, expected) < 1e-7
    rates = [after.base.optimizer, after.edit.optimizer]
    assert rates == [Adam(3e-4, 3_000_000, weight_decay=1e-4), Adam(3e-4, 3_000_000)]


def test_edit_loss_by_hand() -> None:
    """The edit loss is that of the scaled edit of stored actions."""
    agent, batch = expo(entropy_scale=0.5), make_batch()
    scale, (sample_rng, _) = agent.config.edit_scale, jax.random.split(KEY)
    pair = jnp.concatenate([batch["observations"], batch["actions"]], axis=-1)
    edits, log_prob = agent.edit(pair).sample_and_log_prob(sample_rng)
    log_prob = log_prob - ACTION_DIM * math.log(scale)
    q = np.mean(agent.critic(batch["observations"], batch["actions"] + scale * edits), axis=0)
    _, info = edit_step(agent, batch, KEY)
    assert float(info["edit/loss"]) == pytest.approx(float(jnp.mean(0.5 * log_prob - q)), rel=1e-4)
    assert float(info["edit/entropy"]) == pytest.approx(-float(log_prob.mean()), rel=1e-4)
    assert float(info["edit/size"]) == pytest.approx(float(jnp.abs(edits).mean()), rel=1e-4)


@pytest.mark.parametrize(("kind", "shift"), [("reachable", ACTION_DIM * math.log(0.3)), ("released", 0.0)])
def test_temperature_loss(kind: Any, shift: float) -> None:
    """The temperature loss measures the gap to the named target."""
    _, info = edit_step(expo(entropy_target=kind), make_batch(), KEY)
    gap = float(info["edit/entropy"]) - (-ACTION_DIM / 2 + shift)
    assert float(info["temperature/loss"]) == pytest.approx(gap, rel=1e-4)


def temperature_path(kind: Any, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return alpha and the scaled edit's entropy while both learn on one batch, with critics steep in the action."""
    config = replace(TINY, edit_scale=0.05, entropy_target=kind, edit_lr=1e-2, temperature_lr=3e-2, decay_steps=None)
    agent, batch = fresh(config).online(), make_batch(rows=32)
    tree = dict(agent.critic.params["params"])
    tree["output"] = jax.tree.map(lambda leaf: 30.0 * leaf, tree["output"])
    agent = agent.replace(critic=agent.critic.replace(params={"params": tree}))

    def step(agent: Any, key: Any) -> tuple[Any, Any]:
        agent, info = agent.edit_step(batch, key)
        return agent, (agent.alpha(), info["edit/entropy"])

    scan = quick(lambda agent, keys: jax.lax.scan(step, agent, keys)[1])
    alpha, entropy = scan(agent, jax.random.split(KEY, count))
    return np.asarray(alpha), np.asarray(entropy)


def test_released_entropy_target() -> None:
    """The released target is out of reach for small edits, and alpha only grows.

    The scaled edit's entropy is at most d ln(2 scale) = -4.6, the released target is -1.
    """
    alpha, entropy = temperature_path("released", 200)
    assert entropy[-100:].mean() == pytest.approx(ACTION_DIM * math.log(2 * 0.05), abs=0.1)
    assert np.all(np.diff(alpha) > 0) and alpha[-1] > 1e3


def test_reachable_entropy_target() -> None:
    """The reachable target is met, and alpha settles."""
    alpha, entropy = temperature_path("reachable", 600)
    target = -ACTION_DIM / 2 + ACTION_DIM * math.log(0.05)
    assert abs(entropy[-200:].mean() - target) < 0.2
    assert alpha[-200:].max() < 1.0 and alpha[-200:].max() < 3.0 * alpha[-200:].min()


# The schedule of a call ---------------------------------------------------------------------------------------------


def test_steps_per_call() -> None:
    """A call takes G critic steps and one of the others, on the last block."""
    agent, batch = expo(), make_batch(5)
    agent = agent.replace(critic=agent.critic.replace(optimizer=Adam(0.0)))
    after, info = update(agent, batch)
    assert [steps(getattr(after, n)) for n in ("critic", "base", "edit", "temperature")] == [5, 1, 1, 1]
    assert {"temperature/alpha", "edit/size", "edit/win_share"} <= set(info)
    earlier, last = (
        update(agent, jax.tree.map(lambda leaf, where=where: leaf.at[where].multiply(0.5), batch))[0]
        for where in (slice(0, 4), 4)
    )
    for part in ("base", "edit", "temperature"):
        params = [getattr(one, part).params for one in (after, earlier, last)]
        assert not moved(params[0], params[1]) and moved(params[0], params[2]), part


def test_offline_trains_base_only() -> None:
    """Only the base learns before the online phase."""
    agent, batch = fresh(), make_batch(5)
    after, info = update(agent, batch)
    assert changed(agent, after) == {"base", "target_base"} and set(info) == {"base/loss"}
    assert (steps(after.base), steps(after.critic), steps(after.edit)) == (1, 0, 0)
    online = after.online()
    assert changed(after, online) == set() and (after.phase, online.phase) == ("offline", "online")
    assert online.online() == online.replace() and jax.tree.structure(online) != jax.tree.structure(after)
    observations = batch["observations"][0]
    np.testing.assert_array_equal(act(online, observations, KEY), act(after, observations, KEY))
    assert changed(online, update(online, batch)[0]) >= {"critic", "edit", "temperature", "base"}


@pytest.mark.parametrize("changes", [{"n_edits": 0}, {"n_samples": 1, "n_edits": 1}], ids=["no edits", "one sample"])
def test_edit_policy_without_edits(changes: Any) -> None:
    """The edit policy is never touched without edits."""
    agent, batch = expo(**changes), make_batch(2)
    after, info = update(agent, batch)
    assert changed(agent, after) == {"base", "target_base", "critic", "target_critic"}
    assert float(info["edit/win_share"]) == 0.0 == float(info["edit/size"])
    distorted = agent.replace(edit=agent.edit.replace(params=distort(agent.edit.params)))
    observations = batch["observations"][0]
    np.testing.assert_array_equal(act(agent, observations, KEY), act(distorted, observations, KEY))


def test_one_sample_acts_as_base() -> None:
    """One sample acts as the averaged base."""
    agent, observations = expo(n_samples=1, n_edits=0), make_batch()["observations"]
    sample_rng, _ = jax.random.split(KEY)
    expected = agent.base_samples(agent.target_base, observations, 1, sample_rng)[0]
    np.testing.assert_allclose(act(agent, observations, KEY), expected, atol=1e-5)


def test_actions_clipped() -> None:
    """Actions are clipped even with edits beyond the box."""
    agent, observations = expo(edit_scale=2.0), make_batch(rows=64)["observations"]
    choice = choose(agent, observations, agent.target_base, KEY)
    assert float(jnp.abs(choice.candidates).max()) == 1.0
    assert float(jnp.abs(act(agent, observations, KEY)).max()) == 1.0


def test_random_keys() -> None:
    """Base and edit policy start from different keys, and every call draws anew."""
    agent, batch = expo(), make_batch(2)
    first = agent.base.params["params"]["Dense_0"]["kernel"]
    second = agent.edit.params["params"]["MLP_0"]["Dense_0"]["kernel"]
    assert not np.allclose(np.ravel(first)[:16], np.ravel(second)[:16])
    once, _ = update(agent, batch)
    assert moved(update(agent.replace(rng=once.rng), batch)[0].base.params, once.base.params)


# Settings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"edit_scale": 0.0}, "edit_scale is 0.0; expected above 0"),
        ({"edit_scale": -0.1}, "edit_scale is -0.1"),
        ({"edit_scale": math.nan}, "edit_scale is nan"),
        ({"n_edits": 9}, "n_edits is 9; expected 0 to n_samples=8"),
        ({"n_samples": 0, "n_edits": 0}, "n_samples is 0"),
        ({"target_subset": 11}, "target_subset is 11; expected 1 to num_critics=10"),
        ({"inverse_temperature": 0.0}, "inverse_temperature is 0.0"),
        ({"temperature_init": 0.0}, "temperature_init is 0.0"),
        ({"edit_dropout": 1.0}, "edit_dropout is 1.0"),
        ({"base": "gan"}, "base is 'gan'; expected diffusion or flow"),
        ({"backup": "edit"}, "backup is 'edit'; expected otf or base"),
    ],
)
def test_wrong_settings_refused(changes: Any, words: str) -> None:
    """Settings that cannot be used are refused."""
    with pytest.raises(ConfigError, match=words):
        EXPOConfig(**changes)


def test_paper_presets() -> None:
    config = EXPOConfig()
    assert (config.n_samples, config.n_edits, config.diffusion.steps) == (8, 8, 10)
    assert (config.base_blocks, config.base_width) == (3, 256)
    assert (config.num_critics, config.target_subset, config.online.utd_ratio, config.batch_size) == (10, 2, 20, 256)
    assert (config.online.replay, config.online.offline_ratio, config.online.first_update()) == ("mixed", 0.5, 5000)
    maze, adroit = EXPO.preset("antmaze"), EXPO.preset("adroit")
    assert (maze.offline_steps, maze.online_steps, maze.reward) == (500_000, 300_000, (1.0, -1.0))
    assert (maze.config.edit_scale, maze.config.target_subset, maze.config.edit_dropout) == (0.05, 1, 0.0)
    assert (adroit.offline_steps, adroit.online_steps, adroit.reward) == (0, 1_000_000, (1.0, 0.0))
    assert (adroit.config.edit_scale, adroit.config.target_subset, adroit.config.edit_dropout) == (0.7, 2, 0.1)
    assert maze.config.online.first_update() == 1 == adroit.config.online.first_update()
