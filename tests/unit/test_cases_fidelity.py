"""Paper presets give the algorithms behind the papers' numbers: what each turns on, with numbers worked by hand."""

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from rich.console import Console

from o2o.agents import EXPO, IQL, PPO, QC, RLPD, WSRL, CalQL, FamO2O, FamO2OConfig, FamO2OCQL, Residual, UniO4
from o2o.agents.residual import critic_loss
from o2o.agents.sac import zero_step
from o2o.config import LoopConfig
from o2o.data import datasets
from o2o.data.datasets import Episode
from o2o.nn.distributions import Normal
from o2o.nn.generative import Denoiser
from o2o.nn.modules import Adam, BoundedGaussianActor, Model, Scalar, Value
from o2o.runs import session
from o2o.runs.loggers import Screen
from o2o.types import Preset
from tests.helpers.tiny import constant_critic, create, make_batch, set_config, tiny
from tests.helpers.toy_expo import edit_step, expo
from tests.helpers.toy_qc import BASE, KEY, flow_chunks, propose, quick

SIZES = ("paper", "small")


# ---------------------------------------------------------------- WSRL


def test_zero_gradient_steps_move() -> None:
    """After one gradient of 1 a step without gradient moves by lr (0.09 / 0.19) / sqrt(0.000999 / 0.001999)."""
    model = Model.create(KEY, Scalar(0.0), Adam(0.1))
    stepped = model.apply_gradients(jax.tree.map(jnp.ones_like, model.params))
    assert float(stepped()) == pytest.approx(-0.1, rel=1e-5)
    idle = zero_step(stepped)
    assert float(idle() - stepped()) == pytest.approx(-0.1 * (0.09 / 0.19) / math.sqrt(0.000999 / 0.001999), rel=1e-4)


def test_zero_gradient_steps_cover_root_five() -> None:
    """With four idle steps to one of a steady gradient, a cycle moves sqrt(5) times the rate."""

    def cycle(model: Any, _: Any) -> tuple[Any, jax.Array]:
        for _ in range(4):
            model = zero_step(model)
        model = model.apply_gradients(jax.tree.map(jnp.ones_like, model.params))
        return model, model()

    _, path = jax.lax.scan(cycle, Model.create(KEY, Scalar(0.0), Adam(1e-3)), None, length=3000)
    assert float(path[-101] - path[-1]) / 100 == pytest.approx(1e-3 * math.sqrt(5.0), rel=0.02)


def test_wsrl_paper_steps_as_its_code() -> None:
    """Zero-gradient steps online and ten entropy samples offline, in the paper's preset only."""
    for family in ("antmaze", "adroit", "kitchen", "locomotion", "other"):
        paper, small = (WSRL.preset(family, size).config for size in SIZES)  # type: ignore[arg-type]
        assert paper.finetune.zero_grad_steps and not small.finetune.zero_grad_steps
        assert paper.cql.next_entropy_samples == 10
        assert (paper.cql.num_critics, paper.cql.critic_layer_norm, paper.cql.shared_output) == (10, True, True)


# ---------------------------------------------------------------- Cal-QL


def test_calql_paper_is_official() -> None:
    """Two plain critics with output layers of their own, output gains 1e-2, log-temperature, dual weight 5 from e."""
    config = CalQL.preset("antmaze").config
    assert (config.num_critics, config.target_subset, config.max_target_actions) == (2, None, 10)
    assert not (config.actor_layer_norm or config.critic_layer_norm or config.shared_output)
    term = config.conservative
    assert (term.weight, term.dual_param, term.dual_init, term.subset) == (5.0, "exp", math.e, None)
    tree = create(CalQL, tiny(config)).actor.params["params"]
    assert np.linalg.norm(tree["mean"]["kernel"], axis=0) == pytest.approx([0.01, 0.01], rel=1e-4)
    assert np.linalg.norm(tree["MLP_0"]["Dense_0"]["kernel"], 2) == pytest.approx(math.sqrt(2.0), rel=1e-4)
    small = CalQL.preset("antmaze", "small").config
    assert (small.num_critics, small.critic_layer_norm, small.policy_output_gain) == (4, True, math.sqrt(2.0))


def test_calql_online_steps_are_the_tasks() -> None:
    """A million, on pen 200,000; the words of a dataset's id decide."""
    adroit = CalQL.preset("adroit")
    assert (adroit.of_task("D4RL/door/human-v2").online_steps, CalQL.preset("antmaze").online_steps) == (10**6,) * 2
    pen = adroit.of_task("D4RL/pen/human-v2")
    assert (pen.online_steps, pen.offline_steps, pen.only_successes) == (200_000, 20_000, True)
    assert adroit.of_task("lab/open-drawer-v0") is adroit


def test_calql_divides_dense_rewards() -> None:
    """Locomotion in both sizes; CQL leaves them."""
    assert [CalQL.preset("locomotion", size).reward for size in SIZES] == [(0.1, 0.0)] * 2  # type: ignore[arg-type]
    assert CalQL.__base__.preset("locomotion").reward is None  # type: ignore[union-attr]


@pytest.mark.parametrize(("steps", "share", "said"), [(2_000, 0.93, True), (1_999, 0.99, False), (20_000, 0.06, False)])
def test_clamped_values_give_advice(steps: int, share: float, said: bool) -> None:
    """The remedy is named once on the screen while returns replace nearly all values after 2000 updates."""
    agent = create(CalQL, tiny(CalQL.preset("locomotion", "small").config))
    row = {"calql/clamped": share, "gradient_steps": steps}
    advice = agent.advice(row)
    assert (advice is not None) == said and agent.advice({"gradient_steps": steps, "train/return": 1.0}) is None
    page = io.StringIO()
    screen = Screen(Console(file=page, width=400))
    for _ in range(2 * said):
        screen.advice(str(advice))
    text = page.getvalue()
    assert text.count("--task.reward-scale 0.1") == said and ("calql/clamped is 0.93" in text) == said
    assert WSRL.create(KEY, jnp.zeros((1, 3)), jnp.zeros((1, 2)), small_wsrl()).advice(row) == advice


def small_wsrl() -> Any:
    """Return WSRL's settings with tiny networks and Cal-QL as pre-trainer."""
    config = WSRL.preset("other", "small").config
    parts = {name: tiny(getattr(config, name), batch_size=256) for name in ("cql", "finetune")}
    return replace(config, **parts, pretrain="calql", batch_size=256)


# ---------------------------------------------------------------- FamO2O, QC, EXPO, ResFiT, flows


def test_famo2o_released_weights() -> None:
    """Advantages 0.5 and -1 at betas 1 and 3: a row's weight is the mean over both betas, not the one at its own."""
    config = FamO2OConfig(actor_hidden_dims=(16,), critic_hidden_dims=(16,), value_hidden_dims=(16,), batch_size=2)
    agent, batch = create(FamO2O, config), make_batch(rows=2)
    agent = agent.replace(target_critic=constant_critic(agent.target_critic, 4.0))
    value: Any = lambda _: jnp.asarray([3.5, 5.0])  # noqa: E731
    policy, beta = Normal(jnp.zeros((2, 2)), jnp.ones((2, 2))), jnp.asarray([1.0, 3.0])
    log_prob = np.asarray(policy.log_prob(batch["actions"]))
    for betas, weights in (
        (beta, [math.exp(0.5), math.exp(-3.0)]),
        (beta[:, None], [(math.exp(0.5) + math.exp(1.5)) / 2, (math.exp(-1.0) + math.exp(-3.0)) / 2]),
    ):
        loss, _ = agent.weighted_cloning(policy, betas, batch, value)
        assert float(loss) == pytest.approx(-float(np.mean(weights * log_prob)), rel=1e-5)
    gentle = set_config(agent, balance_range=(0.1, 1.0)).replace(
        target_critic=constant_critic(agent.target_critic, 0.5)
    )
    loss_of = quick(lambda agent, rows: agent.actor_loss(agent.actor.params, rows, agent.value, KEY)[0])
    losses = [
        float(loss_of(set_config(gentle, released_weights=released), make_batch(rows=8))) for released in (False, True)
    ]
    assert losses[0] != losses[1]
    for family in ("antmaze", "locomotion"):
        paper, small = (FamO2O.preset(family, size).config for size in SIZES)  # type: ignore[arg-type]
        assert (paper.released_weights, small.released_weights) == (True, False)


def test_famo2o_cql_paper_is_released() -> None:
    """Coefficients from (2 lo - hi, hi), here (-0.5, 1.5), and the present state's coefficient in the target."""
    paper, small = (FamO2OCQL.preset("locomotion", size).config for size in SIZES)  # type: ignore[arg-type]
    assert (paper.released_range, paper.target_beta, paper.reach) == (True, "current", (-0.5, 1.5))
    assert (small.released_range, small.target_beta, small.reach) == (False, "next", (0.5, 1.5))


@pytest.mark.parametrize("aggregate", ["mean", "min"])
def test_qc_ranks_by_the_aggregate(aggregate: Any) -> None:
    """The chunk played is the best of the candidates by the mean or by the minimum over critics; they differ."""
    agent = create(QC, replace(BASE, aggregate=aggregate))
    observations = make_batch(rows=64)["observations"]
    size = BASE.chunk * 2
    noise = jax.random.normal(KEY, (BASE.num_samples, 64, size))
    candidates = flow_chunks(agent, observations, noise)
    q = np.asarray(agent.critic(observations, candidates))
    best = {"mean": q.mean(axis=0).argmax(axis=0), "min": q.min(axis=0).argmax(axis=0)}
    assert (best["mean"] != best["min"]).any()
    expected = np.asarray(candidates)[best[aggregate], np.arange(64)]
    np.testing.assert_allclose(propose(agent, observations, KEY, False), expected, atol=1e-5)
    assert [QC.preset("adroit", size).config.pad_terminal for size in SIZES] == [False, True]  # type: ignore[arg-type]


def test_expo_target_entropy() -> None:
    """Two coordinates, scale 0.3: the target is -1 + 2 ln 0.3 = -3.408, as released -1; above 2 ln 0.6 = -1.022."""
    for kind, target in (("reachable", -1.0 + 2.0 * math.log(0.3)), ("released", -1.0)):
        agent = expo(entropy_target=kind)
        _, info = edit_step(agent, make_batch(), KEY)
        assert float(info["temperature/loss"] - info["edit/entropy"]) == pytest.approx(-target, rel=1e-4)
        assert (target < 2.0 * math.log(0.6)) == (kind == "reachable")
    assert {EXPO.preset(family).config.entropy_target for family in ("antmaze", "adroit", "other")} == {"reachable"}


def test_residual_squared_mean() -> None:
    """Heads off by 1 and 3: mean of squares 5, square of the mean 4, which the paper's preset takes."""
    q, y = jnp.asarray([[1.0], [3.0]]), jnp.zeros(1)
    assert (float(critic_loss(q, y, "mse")), float(critic_loss(q, y, "squared_mean"))) == (5.0, 4.0)
    losses = [Residual.preset("adroit", size).config.critic_loss for size in SIZES]  # type: ignore[arg-type]
    assert losses == ["squared_mean", "mse"]


def test_flow_networks_start_uniform() -> None:
    """Every kernel is uniform within sqrt(6 / (in + out)), standard deviation sqrt(2 / (in + out)); biases are 0."""
    shapes = jnp.zeros((1, 9)), jnp.zeros((1, 6)), jnp.zeros(1)
    tree = Denoiser("mlp", (128, 64)).init(KEY, *shapes)["params"]
    kernels = [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim == 2]
    assert [kernel.shape for kernel in kernels] == [(128, 64), (64, 6), (16, 128)]
    for kernel in kernels:
        limit = math.sqrt(6.0 / sum(kernel.shape))
        assert 0.97 * limit < float(jnp.abs(kernel).max()) <= limit
        assert float(kernel.std()) == pytest.approx(limit / math.sqrt(3.0), rel=0.1)
    assert not any(leaf.any() for leaf in jax.tree.leaves(tree) if leaf.ndim == 1)


# ---------------------------------------------------------------- IQL


def test_iql_locomotion_decays() -> None:
    """A million updates; the actor's rate is half of it in the middle and 0 at their end."""
    preset = IQL.preset("locomotion")
    assert (preset.offline_steps, preset.config.actor_decay_steps) == (10**6, 10**6)
    model, sizes = Model.create(KEY, Scalar(0.0), Adam(preset.config.actor_lr, 10)), []
    for _ in range(11):
        stepped = model.apply_gradients(jax.tree.map(jnp.ones_like, model.params))
        sizes.append(float(model() - stepped()))
        model = stepped
    assert [sizes[0], sizes[5], sizes[10]] == pytest.approx([3e-4, 1.5e-4, 0.0], rel=1e-2, abs=1e-7)
    assert [IQL.preset(family).config.actor_decay_steps for family in ("antmaze", "adroit", "kitchen")] == [None] * 3
    assert IQL.preset("locomotion", "small").config.actor_decay_steps is None


# ---------------------------------------------------------------- Uni-O4


def test_uni_o4_paper_is_released() -> None:
    """The release's term, terminals, clip and noise; the sound ones are the defaults and the small preset's."""
    names = ("diversity", "timeouts_bootstrap", "freeze_clip_at", "common_noise", "double_squash")
    own = ("sampled_kl", True, None, True, False)
    for family in ("antmaze", "adroit", "kitchen", "locomotion", "other"):
        paper, small = (UniO4.preset(family, size).config for size in SIZES)  # type: ignore[arg-type]
        frozen = 0.2 if family == "kitchen" else 0.02  # 200 of 1000 or 10,000 steps
        assert tuple(getattr(paper, name) for name in names) == ("code_heuristic", False, frozen, False, True)
        assert tuple(getattr(small, name) for name in names) == own
        assert paper.value_relu == (family == "locomotion") and not small.value_relu


@pytest.mark.parametrize(
    ("family", "name", "steps", "more"),
    [
        ("kitchen", "D4RL/kitchen/complete-v2", (500_000, 100_000, 1_000), {"normalize_states": False, "horizon": 10}),
        ("kitchen", "D4RL/kitchen/partial-v2", (1_000_000, 200_000, 1_000), {"normalize_states": True, "horizon": 6}),
        ("kitchen", "D4RL/kitchen/mixed-v2", (1_000_000, 200_000, 1_000), {"diversity_coef": 0.0}),
        ("adroit", "D4RL/pen/human-v2", (1_000_000, 200_000, 10_000), {"actor_lr": 3e-6, "epochs": 8}),
        ("adroit", "D4RL/pen/cloned-v2", (2_000_000, 400_000, 10_000), {"dynamics_patience": 10}),
        ("adroit", "D4RL/door/human-v2", (2_000_000, 400_000, 5_000), {"dynamics_patience": 20}),
        ("adroit", "D4RL/hammer/cloned-v2", (2_000_000, 400_000, 10_000), {"activation": "tanh"}),
        ("locomotion", "lab/walker2d-medium-replay-v2", (500_000, 400_000, 10_000), {"reward_scale": 1.0}),
        ("locomotion", "mujoco/walker2d/medium-v0", (2_000_000, 400_000, 10_000), {"value_relu": False}),
        ("locomotion", "mujoco/hopper/medium-v0", (2_000_000, 400_000, 10_000), {"reward_scale": 0.1, "epochs": 10}),
        ("locomotion", "mujoco/halfcheetah/medium-v0", (2_000_000, 400_000, 10_000), {"activation": "tanh"}),
    ],
)
def test_uni_o4_scripts(family: str, name: str, steps: tuple[int, int, int], more: dict[str, Any]) -> None:
    """A dataset's id chooses the release's script; the run's steps are the sum of the four phases."""
    preset: Preset = UniO4.preset(family).of_task(name)
    config = preset.config
    assert (config.critic_steps, config.clone_steps, config.improve_steps) == steps
    assert preset.offline_steps == sum(steps) + 200_000
    assert {key: getattr(config, key) for key in more} == more


def test_released_online_networks() -> None:
    """Squashed twice, log-stds of weights that saturate are -5 + 2.5 (1 -+ tanh 1); V is cut at 0; means stay."""
    shape, actions = jnp.zeros((1, 3)), 2
    once, twice = (BoundedGaussianActor((4,), actions, double_squash=flag) for flag in (False, True))
    params: Any = once.init(KEY, shape)
    head = params["params"]["Dense_0"]
    far = {**head, "kernel": jnp.zeros_like(head["kernel"]), "bias": jnp.asarray([0.3, 0.3, 50.0, -50.0])}
    far = {"params": {**params["params"], "Dense_0": far}}
    single: Any = once.apply(far, shape)
    double: Any = twice.apply(far, shape)
    assert np.log(single.std)[0].tolist() == pytest.approx([0.0, -5.0], abs=1e-5)
    assert np.log(double.std)[0].tolist() == pytest.approx([-0.59601, -4.40399], abs=1e-4)
    np.testing.assert_array_equal(single.mean, double.mean)
    plain, cut = (Value((16,), relu_output=flag) for flag in (False, True))
    states, weights = make_batch(rows=64)["observations"], plain.init(KEY, shape)
    v = np.asarray(plain.apply(weights, states))
    assert v.min() < 0 < v.max()
    np.testing.assert_array_equal(cut.apply(weights, states), np.maximum(v, 0.0))


@pytest.mark.parametrize("released", [False, True])
def test_released_networks_come_at_the_switch(released: bool) -> None:
    """Both options change what the same weights mean online, not offline."""
    config = replace(PPO.preset("other", "small").config, actor_hidden_dims=(8,), value_hidden_dims=(8,))
    before = create(PPO, replace(config, double_squash=released, value_relu=released))
    after, states = before.online(), make_batch(rows=64)["observations"]
    np.testing.assert_array_equal(before.actor(states).mean, after.actor(states).mean)
    free = (jnp.log(before.actor(states).std) + 5.0) / 2.5 - 1.0
    expected = -5.0 + 2.5 * ((jnp.tanh(free) if released else free) + 1.0)
    np.testing.assert_allclose(jnp.log(after.actor(states).std), expected, atol=1e-4)
    v = np.asarray(before.value(states))
    np.testing.assert_array_equal(after.value(states), np.maximum(v, 0.0) if released else v)


# ---------------------------------------------------------------- data and rewards of the presets


def put(root: Path, name: str, env: str, count: int) -> str:
    """Write `count` episodes of three steps whose second step succeeds, and return the id."""
    rng = np.random.default_rng(0)
    episodes = [
        Episode(
            observations=rng.normal(size=(4, 3)),
            actions=rng.uniform(-1, 1, (3, 2)).astype(np.float32),
            rewards=rng.normal(size=3),
            terminations=np.zeros(3, bool),
            truncations=np.arange(3) == 2,
            success=np.asarray([False, True, False]),
            seed=index,
        )
        for index in range(count)
    ]
    state, action = spaces.Box(-np.inf, np.inf, (3,), np.float64), spaces.Box(-1.0, 1.0, (2,), np.float32)
    datasets.write(name, episodes, observation_space=state, action_space=action, spec=EnvSpec(env), root=root)
    return name


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a root of datasets of its own."""
    monkeypatch.setenv("O2O_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("agent", ["rlpd", "expo"])
def test_rlpd_data_on_adroit(agent: str, root: Path) -> None:
    """Nine of ten episodes, whole, without terminals; the small preset ends at success and takes all ten."""
    name = put(root, "test/door-v0", "AdroitHandDoor-v1", 10)
    paper, small = (session.load_data(session.preset_run(agent, name, size)) for size in SIZES)
    assert paper.size == 27 and paper.arrays["masks"].all() and not paper.task.terminate_on_success
    assert paper.arrays["rewards"].tolist() == [-1.0, 0.0, -1.0] * 9
    assert paper.arrays["ends"].tolist() == [False, False, True] * 9
    assert small.size == 20 and small.arrays["masks"].tolist() == [1.0, 0.0] * 10
    assert RLPD.preset("antmaze").data_share is None


def test_dense_rewards_are_scaled_for_calql(root: Path) -> None:
    """Times 0.1 on locomotion, in data and environment; what the user says wins, and CQL sees raw rewards."""
    name = put(root, "test/hopper-v0", "Hopper-v5", 2)
    for size in SIZES:
        run = session.preset_run("calql", name, size)
        assert (run.task.reward_scale, session.task_of(run).reward_scale) == (0.1, 0.1)
        assert session.preset_run("cql", name, size).task.reward_scale is None
    own = session.preset_run("calql", name, "small", task=session.TaskConfig(reward_scale=2.0))
    assert own.task.reward_scale == 2.0


def test_runs_take_the_tasks_script(root: Path) -> None:
    """`preset_run` looks at the dataset's id."""
    run = session.preset_run("uni_o4", put(root, "test/pen/human-v0", "AdroitHandPen-v1", 2))
    assert (run.config.critic_steps, run.offline_steps) == (1_000_000, 1_410_000)
    assert session.preset_run("calql", "test/pen/human-v0").online_steps == 200_000


# ---------------------------------------------------------------- evaluation


@pytest.mark.parametrize("fresh", [False, True])
def test_evaluations_share_their_starts(fresh: bool, tiny_run: Any) -> None:
    """Every evaluation of a run resets with the same seeds, others for each of its seeds; `fresh_eval_starts` not."""
    loop = LoopConfig(eval_episodes=2, eval_every=0, fresh_eval_starts=fresh)
    trainer = session.build(tiny_run("bc", seeds=2, loop=loop))
    resets: list[list[int]] = []
    evaluator = trainer.evaluator
    evaluator._make_envs()
    for slot in evaluator.envs:
        begin = slot.begin
        slot.begin = lambda episode=None, begin=begin: (resets[-1].append(seed := begin(episode)), seed)[1]  # type: ignore[method-assign]
    for point in (0, 100):
        resets.append([])
        evaluator(trainer.agent, trainer.normalizer, point)
    assert len(set(resets[0])) == len(resets[0]) == 4
    assert (sorted(resets[0]) == sorted(resets[1])) != fresh
    trainer.close()
