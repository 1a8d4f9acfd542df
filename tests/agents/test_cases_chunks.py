"""FQL, ReBRAC, RLPD and EXPO over chunks: transitions of windows, targets and weights by hand, acting, FEdit's form."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o2o.agents import EXPO, FQL, RLPD, WSRL, EXPOConfig, FQLConfig, ReBRAC, ReBRACConfig, RLPDConfig, WSRLConfig
from o2o.agents.expo import on_the_fly
from o2o.errors import ConfigError
from o2o.nn.generative import Flow
from o2o.rl.windows import chunk_transitions
from o2o.types import Batch, ChunkedConfig
from tests.helpers.contract import QUICK
from tests.helpers.tiny import (
    ACTION_DIM,
    OBSERVATION_DIM,
    ROWS,
    constant_critic,
    create,
    largest_difference,
    make_batch,
    moved,
    set_config,
    steps,
    tiny,
)
from tests.helpers.toy_expo import TINY
from tests.helpers.toy_qc import windows

KEY = jax.random.key(4)
H = 3
SIZE = H * ACTION_DIM
CHUNKS: dict[str, Any] = {"chunk": H, "pad_terminal": False}
FEDIT = replace(
    TINY,
    **CHUNKS,
    base="flow",
    base_network="mlp",
    base_hidden_dims=(16, 16),
    base_ema=1.0,
    n_samples=1,
    n_edits=1,
    selection="edited",
    edit_on="samples",
    pretrain="all",
    activation="gelu",
    norm_last=True,
    pessimism=0.5,
)
CONFIGS: dict[str, tuple[Any, Any]] = {
    "fql": (FQL, tiny(FQLConfig(), **CHUNKS, pessimism=0.5)),
    "rebrac": (ReBRAC, tiny(ReBRACConfig(), **CHUNKS, pessimism=0.5, critic_penalty=0.0, target_noise=0.0)),
    "rlpd": (RLPD, tiny(RLPDConfig(), **CHUNKS, pessimism=0.5, target_subset=None, backup_entropy=False)),
    "expo": (EXPO, FEDIT),
}
update = jax.jit(lambda agent, batch: agent.update(batch), compiler_options=QUICK)
act = jax.jit(lambda agent, obs, carry, key: agent.sample_actions(obs, carry, key), compiler_options=QUICK)


def rows(seed: int = 0) -> Batch:
    """Return windows `[ROWS, H, ...]`; row 0 crosses a time limit, in row 1 a goal lies amid the episode."""
    ends, masks = np.zeros((ROWS, H)), np.ones((ROWS, H))
    ends[0, 0], masks[1, 1] = 1.0, 0.0
    return windows(np.random.default_rng(seed).normal(size=(ROWS, H)), ends, masks, seed)


def batch_of(raw: Batch) -> Batch:
    """Return windows as one minibatch `[1, ROWS, H, ...]`."""
    return jax.tree.map(lambda leaf: leaf[None], raw)


def with_targets(agent: Any) -> Any:
    """Return the agent whose target critics are constant: 1, 2, 3, ... and the others."""
    params = agent.target_critic
    for member in range(agent.config.num_critics):
        params = constant_critic(params, member + 1.0, member)
    return agent.replace(target_critic=params)


def test_transitions_by_hand() -> None:
    """R = sum of 0.99^j r, masks 0.99^4 m; five steps of -1 are -4.90099501, and the bootstrap has 0.95099005."""
    raw = windows(-np.ones((2, 5)), np.zeros((2, 5)), np.ones((2, 5)))
    raw["masks"] = raw["masks"].at[1, 2].set(0.0)
    found = chunk_transitions(raw, ChunkedConfig(chunk=5))
    np.testing.assert_allclose(found["rewards"], -4.90099501, rtol=1e-6)
    np.testing.assert_allclose(0.99 * found["masks"], [0.95099005, 0.0], rtol=1e-6)
    np.testing.assert_array_equal(found["actions"], raw["actions"].reshape(2, -1))
    np.testing.assert_array_equal(found["next_observations"], raw["next_observations"][:, -1])
    assert found["valid"].min() == 1.0, "a goal amid the episode cuts no window"


def test_single_actions_stay() -> None:
    """With one action rows are taken as they are, and every one of them counts."""
    batch = make_batch(2)
    found = chunk_transitions(batch, ChunkedConfig())
    assert all(found[key] is batch[key] for key in batch)
    assert found["valid"].min() == 1.0 and found["entries"].shape == batch["actions"].shape
    pictures = {"image": jnp.arange(2 * H * 4.0).reshape(2, H, 2, 2), "state": jnp.zeros((2, H, 3))}
    raw = windows(np.zeros((2, H)), np.zeros((2, H)), np.ones((2, H))) | {"observations": pictures}
    kept = chunk_transitions(raw | {"next_observations": pictures}, ChunkedConfig(chunk=H))
    np.testing.assert_array_equal(kept["observations"]["image"], pictures["image"][:, 0])
    np.testing.assert_array_equal(kept["next_observations"]["image"], pictures["image"][:, -1])


@pytest.mark.parametrize("name", CONFIGS)
def test_target_of_chunks(name: str) -> None:
    """y = R + 0.99^3 m (mean - 0.5 std) Q'; a window across a time limit counts nothing, whatever is in it."""
    kind, config = CONFIGS[name]
    agent = with_targets(create(kind, config).online())
    raw = rows()
    heads = np.arange(config.num_critics) + 1.0
    returns = np.asarray(raw["rewards"], np.float64) @ [1.0, 0.99, 0.99**2]
    masks = np.ones(ROWS)
    masks[1] = 0.0
    y = returns + 0.99**3 * masks * (heads.mean() - 0.5 * heads.std())
    chunks = np.asarray(raw["actions"]).reshape(ROWS, SIZE)
    q = np.asarray(agent.critic(raw["observations"][:, 0], chunks), np.float64)
    errors = (q - y) ** 2
    loss = errors[:, 1:].sum() / errors.size * (config.num_critics if name == "rebrac" else 1)
    stepped, info = update(agent, batch_of(raw))
    assert float(info["critic/loss"]) == pytest.approx(loss, rel=1e-4)
    spoilt = {**raw, "actions": raw["actions"].at[0, 1:].set(0.9), "rewards": raw["rewards"].at[0].set(9.0)}
    other, _ = update(agent, batch_of(spoilt))
    assert largest_difference(stepped.critic.params, other.critic.params) < 1e-6


@pytest.mark.parametrize("name", CONFIGS)
def test_chunks_played(name: str) -> None:
    """A chunk is played in order; a queue that is empty takes a new one, the others go on."""
    kind, config = CONFIGS[name]
    agent = create(kind, config).online()
    assert agent.needs.window == H
    observations = jnp.ones((2, OBSERVATION_DIM))
    played, carry = act(agent, observations, agent.initial_carry((2,)), KEY)
    assert played.shape == (2, ACTION_DIM) and carry.actions.shape == (2, H, ACTION_DIM)
    assert carry.left.tolist() == [H - 1, H - 1]
    second, carry = act(agent, 3.0 * observations, carry, jax.random.key(8))
    again, _ = act(agent, observations, agent.initial_carry((2,)), KEY)
    np.testing.assert_array_equal(played, again)
    rest = carry._replace(left=jnp.asarray([0, H - 2]))
    third, after = act(agent, observations, rest, KEY)
    np.testing.assert_allclose(third[0], played[0], atol=1e-6)
    np.testing.assert_array_equal(third[1], carry.actions[1, 0])
    assert after.left.tolist() == [H - 1, H - 3] and second.shape == played.shape
    single = create(kind, replace(config, chunk=1)).online()
    assert single.initial_carry((2,)) is None and single.needs.window == 1


@pytest.mark.parametrize("name", CONFIGS)
def test_all_networks_learn(name: str) -> None:
    """Every network steps on windows; metrics are finite."""
    kind, config = CONFIGS[name]
    agent = create(kind, replace(config, policy_delay=1) if name == "rebrac" else config).online()
    learnt, info = update(agent, batch_of(rows()))
    assert all(np.isfinite(value) for value in info.values())
    models = ("actor", "critic", "one_step", "temperature", "base", "edit")
    found = [getattr(learnt, network) for network in models if hasattr(learnt, network)]
    assert len(found) >= 2 and all(steps(model) == 1 for model in found)


def test_rlpd_actor_climbs_lower_bound() -> None:
    """With a pessimism the actor climbs mean - rho std of all critics, else their mean."""
    agent = create(RLPD, CONFIGS["rlpd"][1])
    batch = {"observations": make_batch()["observations"]}
    chunks = jnp.tanh(jax.random.normal(KEY, (ROWS, SIZE)))
    q = np.asarray(agent.critic(batch["observations"], chunks))
    expected = q.mean(axis=0) - 0.5 * q.std(axis=0)
    np.testing.assert_allclose(agent.policy_value(batch, chunks, agent.critic), expected, atol=1e-5)
    plain = set_config(agent, pessimism=None)
    np.testing.assert_allclose(plain.policy_value(batch, chunks, agent.critic), q.mean(axis=0), atol=1e-5)


def test_rebrac_actor_by_hand() -> None:
    """The actor's penalty sums over the chunk, and windows cut short have none."""
    agent = create(ReBRAC, CONFIGS["rebrac"][1])
    batch = chunk_transitions(rows(), agent.config)
    actions = np.asarray(agent.actor(batch["observations"]))
    q = np.asarray(agent.critic(batch["observations"], actions))
    q = q.mean(axis=0) - 0.5 * q.std(axis=0)
    distance = (np.asarray(batch["valid"]) * ((actions - np.asarray(batch["actions"])) ** 2).sum(axis=-1)).mean()
    loss, info = agent.actor_loss(agent.actor.params, batch, KEY)
    assert float(info["actor/distance"]) == pytest.approx(distance, rel=1e-4)
    assert float(loss) == pytest.approx(0.01 * distance - q.mean() / np.abs(q).mean(), rel=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ReBRACConfig(chunk=5), "critic_penalty"),
        (lambda: RLPDConfig(pessimism=0.5), "target_subset"),
        (lambda: EXPOConfig(selection="edited"), "selection"),
        (lambda: FQLConfig(chunk=0), "chunk"),
        (lambda: EXPOConfig(pessimism=-1.0), "pessimism"),
    ],
)
def test_settings_refused(make: Any, message: str) -> None:
    """Values that do not go together are refused by name."""
    with pytest.raises(ConfigError, match=message):
        make()


def test_wsrl_refuses_chunks() -> None:
    """WSRL cannot start from a policy over chunks."""
    with pytest.raises(ConfigError, match="chunk 1"):
        WSRL.from_agent(create(RLPD, CONFIGS["rlpd"][1]), WSRLConfig())


# ---------------------------------------------------------------- EXPO in FEdit's form


def test_edited_sample_acts() -> None:
    """The single sample with its edit acts, clipped, and no critic is asked."""

    def refuse(rng: Any, actions: Any) -> Any:
        raise AssertionError("must not be called")

    samples = jax.random.uniform(KEY, (1, ROWS, SIZE), minval=-1.0, maxval=1.0)
    up = lambda rng, actions: jnp.full_like(actions, 0.9)  # noqa: E731
    choice = on_the_fly(samples, up, refuse, KEY, n_edits=1, scale=0.5, selection="edited")
    np.testing.assert_allclose(choice.actions, np.clip(np.asarray(samples[0]) + 0.45, -1.0, 1.0), atol=1e-6)
    assert choice.place.min() == 1 and not choice.entropy.any()


def test_edited_policy_is_flow_and_edit() -> None:
    """What acts is clip(Flow(z) + beta e) of the online flow, e drawn by the edit policy."""
    agent = create(EXPO, FEDIT)
    observations = make_batch()["observations"]
    sample_rng, choice_rng = jax.random.split(KEY)
    noise = jax.random.normal(jax.random.split(sample_rng)[0], (1, ROWS, SIZE))
    flow = Flow(3).sample(lambda x, t: agent.base(observations, x, t), noise, KEY)
    edits = agent.edit_policy(observations, flow).sample(jax.random.split(choice_rng, 3)[0])
    expected = np.clip(np.asarray(flow + 0.3 * edits)[0], -1.0, 1.0)
    np.testing.assert_allclose(agent.choose(observations, agent.target_base, KEY).actions, expected, atol=1e-5)


@pytest.mark.parametrize("rows_of", ["samples", "data"])
def test_edit_learns_on(rows_of: Any) -> None:
    """On samples, the stored actions do not matter to the edit policy; on data they do."""
    agent = set_config(create(EXPO, FEDIT), edit_on=rows_of)
    batch = chunk_transitions(rows(), agent.config)
    other = {**batch, "actions": -batch["actions"]}
    one, two = (agent.edit_step(each, KEY)[0] for each in (batch, other))
    assert moved(one.edit.params, two.edit.params) == (rows_of == "data")
    assert moved(one.edit.params, agent.edit.params)


def test_edit_gradient_stops_at_the_box() -> None:
    """On samples edits are judged clipped: where all of them leave the box, only the entropy moves the edit policy."""
    agent = create(EXPO, FEDIT)
    agent = agent.replace(base=agent.base.replace(params=jax.tree.map(lambda x: 40.0 * x, agent.base.params)))
    agent = set_config(agent, edit_scale=1e-6, entropy_scale=0.0)
    batch = chunk_transitions(rows(), agent.config)
    samples = agent.base_samples(agent.base.params, batch["observations"], 1, jax.random.fold_in(KEY, 1))[0]
    share = float(jnp.mean(jnp.abs(samples) == 1.0))
    assert share > 0.5
    scaled = float(agent.edit_step(batch, KEY)[1]["edit/loss"])
    q = np.asarray(agent.critic(batch["observations"], samples)).mean()
    assert scaled == pytest.approx(-q, abs=1e-4)


@pytest.mark.parametrize("pretrain", ["all", "base"])
def test_pretraining(pretrain: Any) -> None:
    """`all` trains every network before the online phase, `base` the base alone."""
    agent = create(EXPO, replace(FEDIT, pretrain=pretrain))
    learnt, _ = update(agent, batch_of(rows()))
    assert steps(learnt.base) == 1
    assert {steps(model) for model in (learnt.critic, learnt.edit, learnt.temperature)} == {int(pretrain == "all")}


def test_base_loss_counts_entries() -> None:
    """Numbers of a chunk behind its episode's end count as zeros for the base; a row's loss is their sum."""
    agent = create(EXPO, FEDIT)
    batch = chunk_transitions(rows(), agent.config)
    assert float(batch["entries"].sum()) == ROWS * SIZE - 2 * ACTION_DIM
    loss_rng, _ = jax.random.split(KEY)
    errors = Flow(3).loss(lambda x, t: agent.base(batch["observations"], x, t), batch["actions"], loss_rng)
    expected = (np.asarray(errors) * np.asarray(batch["entries"])).sum(axis=-1).mean()
    assert float(agent.base_step(batch, KEY)[1]["base/loss"]) == pytest.approx(expected, rel=1e-5)
