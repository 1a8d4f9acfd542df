"""The benchmark suites: which methods run on which datasets, with how many steps.

`o2o bench run NAME` runs what is missing, `o2o bench report NAME` writes `results/NAME/README.md`. The suites use the
`small` presets, three seeds and 20 evaluation episodes, the defaults of `Suite`. None of their datasets is the official
one of a similar name, so no published figure applies to the results. The exception is `ogbench`: its data are made by
the authors' generator, so its settings are the published ones, and published figures stand beside its own. So it is
with `ogbench_100k` and so on, but not with `ogbench_part` and so on, whose set is smaller.
"""

from dataclasses import replace
from pathlib import Path

from o2o.report.suite import BenchTask, Published, Suite, Variant

BINARY = (("binary", True),)
NO_WARMUP = (("online.warmup_steps", 0), ("online.min_rows", 256))
TEN_CRITICS = (("num_critics", 10),)
TEN_OF_BOTH = (("cql.num_critics", 10), ("finetune.num_critics", 10))

PEN = BenchTask("hand_dapg/pen/noisy-v0", BINARY)
DOOR = BenchTask("hand_dapg/door/noisy-v0", BINARY)
DOOR_HUMAN = BenchTask("hand_dapg/door/human-v0", BINARY)
DOOR_SUCCESSES = BenchTask("hand_dapg/door/noisy-v0", (*BINARY, ("only_successes", True)))
RELOCATE = BenchTask("hand_dapg/relocate/noisy-v0", BINARY)
MAZE = BenchTask("o2o/embedded/pointmaze-umaze-v0")
HOPPER = BenchTask("o2o/hopper/medium-v0")
# Targets are the mean returns of the expert sets recorded beside these data.
HOPPER_TARGET = BenchTask("o2o/hopper/medium-v0", target=3679.5)
WALKER_TARGET = BenchTask("o2o/walker2d/medium-v0", target=4613.8)
CHEETAH_TARGET = BenchTask("o2o/halfcheetah/medium-v0", target=11505.9)

DIP = (
    "A dip right after the first updates is the method's: at equal settings the official code (zhouzypaul/wsrl "
    "891ee35) fell from 38 % success to 0 after 1000 updates on data like Adroit's hammer, ours from 45 % to 0, and "
    "from our networks on door from 40 % to 0, with 35 % after 6000 steps (one seed and 40 episodes each). "
)
STAND_INS = "The datasets are stand-ins, not the official ones of similar names."

OFFLINE = Suite(
    name="offline",
    description=f"Pre-training only. The Adroit tasks have the sparse -1/0 reward. {STAND_INS}",
    tasks=(PEN, DOOR, DOOR_HUMAN, HOPPER, MAZE),
    variants=(Variant("bc", "bc"), Variant("iql", "iql"), Variant("calql", "calql")),
    offline_steps=6_000,
    offline_eval_every=3_000,
    metrics=("success", "return", "normalized"),
)

WSRL = Suite(
    name="wsrl",
    description=(
        "Does warming up prevent the collapse after the switch? Is it faster than learning from scratch? `wsrl` "
        "starts from the suite `offline`'s Cal-QL and keeps no offline row. `rlpd` starts from scratch and draws half "
        "of each batch from the dataset. `sac` is `wsrl` that updates as soon as one minibatch has been collected. "
        f"The reward is sparse, -1/0. {DIP}{STAND_INS}"
    ),
    tasks=(PEN, MAZE),
    variants=(
        Variant("wsrl", "wsrl", starts_from="offline/calql"),
        Variant("rlpd", "rlpd", offline_steps=0),
        Variant("sac", "wsrl", NO_WARMUP, starts_from="offline/calql"),
    ),
    offline_steps=0,
    online_steps=8_000,
    eval_every=2_000,
)

WSRL_DOOR = Suite(
    name="wsrl_door",
    description=(
        "Door with the WSRL paper's data rule: only episodes that succeed, each cut after its last success. All "
        "methods have ten critics instead of the small preset's four. `calql` is the pre-training that `wsrl` and "
        "`sac` start from. `sac` is `wsrl` that updates as soon as one minibatch has been collected. `rlpd` starts "
        f"from scratch and draws half of each batch from the dataset. {DIP}{STAND_INS}"
    ),
    tasks=(DOOR_SUCCESSES,),
    variants=(
        Variant("calql", "calql", TEN_CRITICS, offline_steps=10_000, online_steps=0),
        Variant("wsrl", "wsrl", TEN_OF_BOTH, starts_from="calql"),
        Variant("rlpd", "rlpd", TEN_CRITICS),
        Variant("sac", "wsrl", (*TEN_OF_BOTH, *NO_WARMUP), starts_from="calql"),
    ),
    offline_steps=0,
    online_steps=15_000,
    eval_every=2_500,
)

EXPRESSIVE = Suite(
    name="expressive",
    description=(
        "What each method gains online over imitation, from few or imperfect demonstrations and a sparse reward. "
        "`base` is flow matching (`flow_bc`), which `residual` corrects. Every other method starts from the same "
        f"dataset on its own. Each agent sees the reward shift of its own paper. {STAND_INS}"
    ),
    tasks=(DOOR_HUMAN, PEN, DOOR, RELOCATE),
    variants=(
        Variant("base", "flow_bc", online_steps=0),
        Variant("residual", "residual", offline_steps=0, base="base"),
        Variant("qc", "qc"),
        Variant("expo", "expo"),
        Variant("wsrl", "wsrl"),
        Variant("rlpd", "rlpd", offline_steps=0),
    ),
    offline_steps=10_000,
    online_steps=10_000,
    eval_every=2_500,
)

EXPO_ABLATIONS = Suite(
    name="expo_ablations",
    description=(
        "EXPO's ablations (arXiv 2507.07986). `no_edits` chooses among base samples only. `base_backup` bootstraps "
        "from a plain base sample instead of the on-the-fly policy's action. `n1` draws one base sample, so the critic "
        "chooses nothing and imitation goes on; `n8` draws eight where `expo` draws the small preset's four. "
        "`wide_edits` may move an action by 0.5 instead of 0.05. The paper reports the first two to be worse, as "
        "curves, on robomimic and Adroit. A small run shows more than noise in the maze only."
    ),
    tasks=(MAZE,),
    variants=(
        Variant("expo", "expo"),
        Variant("no_edits", "expo", (("n_edits", 0),)),
        Variant("base_backup", "expo", (("backup", "base"),)),
        Variant("n1", "expo", (("n_edits", 0), ("n_samples", 1))),
        Variant("n8", "expo", (("n_samples", 8), ("n_edits", 8))),
        Variant("wide_edits", "expo", (("edit_scale", 0.5),)),
    ),
    offline_steps=10_000,
    online_steps=4_000,
    eval_every=1_000,
)

RESIDUAL_ABLATIONS = Suite(
    name="residual_ablations",
    description=(
        "Residual RL's ablations (arXiv 2509.19301). All correct `base`, flow matching (`flow_bc`). `no_env_warmup` "
        "leaves out the noisy roll-outs of the base before the first update, `no_critic_warmup` the critic-only "
        "updates, `no_layer_norm` the critics' layer norm; `n1` bootstraps after one step instead of three. The "
        "paper's figures are curves on other data. A small run shows more than noise in the maze only."
    ),
    tasks=(MAZE,),
    variants=(
        Variant("base", "flow_bc", offline_steps=10_000, online_steps=0),
        Variant("residual", "residual", base="base"),
        Variant("no_env_warmup", "residual", (("online.random_steps", 0),), base="base"),
        Variant("no_critic_warmup", "residual", (("online.initial_updates", 0),), base="base"),
        Variant("no_layer_norm", "residual", (("critic_layer_norm", False),), base="base"),
        Variant("n1", "residual", (("n_step", 1),), base="base"),
    ),
    offline_steps=0,
    online_steps=6_000,
    eval_every=1_000,
)

BASELINES = Suite(
    name="baselines",
    description=(
        "Whether each small agent learns: what imitation alone (`bc`) reaches, and where the others stand before and "
        "after fine-tuning. `jsrl` and `pex` pre-train as `iql` does and differ online; `ibrl` clones offline. Each "
        f"agent sees the reward shift of its own preset. {STAND_INS}"
    ),
    tasks=(MAZE, HOPPER_TARGET),
    variants=(
        Variant("bc", "bc", online_steps=0),
        Variant("iql", "iql"),
        Variant("awac", "awac"),
        Variant("td3bc", "td3bc"),
        Variant("td7", "td7"),
        Variant("pex", "pex"),
        Variant("jsrl", "jsrl"),
        Variant("ibrl", "ibrl"),
        Variant("rebrac", "rebrac"),
        Variant("fql", "fql"),
    ),
    offline_steps=10_000,
    online_steps=10_000,
    eval_every=2_500,
    metrics=("return", "success"),
)

UNI_O4 = Suite(
    name="uni_o4",
    description=(
        "One on-policy objective in both phases. `uni_o4` pre-trains in four stages and goes online as PPO. `iql` is "
        "offline only, `ppo` starts from scratch, `ppo_bc` clones first; all three PPOs have `uni_o4`'s online "
        "settings. Targets are the mean returns of the expert sets recorded beside these data (3680, 4614, 11506). "
        "Before it goes online `uni_o4` lets its three policies play 20 episodes each and takes the best. These steps "
        f"are not among the 40,000, and the others have none. {STAND_INS}"
    ),
    tasks=(HOPPER_TARGET, MAZE, WALKER_TARGET, CHEETAH_TARGET),
    variants=(
        Variant("uni_o4", "uni_o4"),
        Variant("iql", "iql", online_steps=0),
        Variant("ppo", "ppo", offline_steps=0),
        Variant("ppo_bc", "ppo", offline_steps=5_000),
    ),
    offline_steps=10_000,
    online_steps=40_000,
    eval_every=8_000,
    metrics=("return", "success"),
)

FAMO2O = Suite(
    name="famo2o",
    description=(
        "Does a coefficient per state beat one for all? `famo2o` is `iql` with a family of policies and a balance "
        "model, and equals it otherwise. `famo2o_cql` also has the networks, temperature and replay of its own "
        "published code, so it differs from `cql` in more than the coefficient. Targets are the mean returns of the "
        f"expert sets recorded beside these data (3680, 4614, 11506). {STAND_INS}"
    ),
    tasks=(MAZE, HOPPER_TARGET, WALKER_TARGET, CHEETAH_TARGET),
    variants=(
        Variant("famo2o", "famo2o"),
        Variant("iql", "iql"),
        Variant("famo2o_cql", "famo2o_cql"),
        Variant("cql", "cql"),
    ),
    offline_steps=10_000,
    online_steps=10_000,
    eval_every=2_500,
    metrics=("return", "success"),
)

OGBENCH_METHODS = (
    Variant("ifql", "ifql"),
    Variant("fql", "fql"),
    Variant("rebrac", "rebrac"),
    Variant("expo", "expo"),
    Variant("qam", "qam"),
    Variant("dsrl", "dsrl"),
    Variant("qc", "qc"),
    Variant("rlpd", "rlpd", offline_steps=0, online_steps=50_000),
)
"""Their `paper` presets for OGBench are the published settings. `expo` is the published FEdit."""


def _ogbench(name: str, tasks: tuple[str, ...], methods: tuple[Variant, ...], about: str, updates: int) -> Suite:
    return Suite(
        name=name,
        description=(
            f"{about} Data: `o2o data make ogbench/scene-play` and so on, 1M transitions, another draw of the authors' "
            "generator. scene and puzzle have the sparse reward -1/0. Rewards and success are judged on s, as in the "
            "data. Chunks of 5 and ten critics with rho 0.5; `qc` has its own paper's two. Online steps count from 0. "
            "Published: QAM (arXiv 2601.14234) and, for `qc`, QC (arXiv 2507.07969)."
        ),
        tasks=tuple(BenchTask(f"ogbench/{task}-v0") for task in tasks),
        variants=methods,
        seeds=1,
        preset="paper",
        offline_steps=updates,
        eval_every=50_000,
        offline_eval_every=50_000,
        eval_episodes=50,
        published=Published(Path(__file__).parent / "published/ogbench.csv", same_data=True),
    )


OGBENCH = _ogbench(
    "ogbench",
    (
        "scene-play-singletask-task1-sparse",
        "scene-play-singletask-task4-sparse",
        "scene-play-singletask-task5-sparse",
        "puzzle-3x3-play-singletask-task1-sparse",
        "puzzle-3x3-play-singletask-task5-sparse",
        "cube-double-play-singletask-task1",
    ),
    OGBENCH_METHODS,
    "Do our methods reach the published success rates? These are the cells that separate methods best, to 50,000 "
    "updates. `rlpd` learns online only.",
    50_000,
)

OGBENCH_K2 = _ogbench(
    "ogbench_k2",
    ("scene-play-singletask-task2-sparse",),
    (Variant("qam_e_k2", "qam", (("num_critics", 2),)),),
    "QAM with two critics, which a CPU can afford. It is the published QAM-E (K=2), whose edits have scale 0 on scene.",
    50_000,
)


def ogbench_to(updates: int) -> Suite:
    """Return the suite `ogbench` of scene's tasks 1 and 4 to more updates, evaluated every 50,000 as published.

    `benchmarks/gpu.sh` runs it as far as its time goes.
    """
    return _ogbench(
        f"ogbench_{updates // 1000}k",
        tuple(f"scene-play-singletask-task{number}-sparse" for number in (1, 4)),
        tuple(method for method in OGBENCH_METHODS if method.offline_steps is None and method.label != "qc"),
        f"Scene's tasks 1 and 4 to {updates:,} updates.",
        updates,
    )


def part_of(suite: Suite) -> Suite:
    """Return a suite of OGBench on a smaller set than published (`--steps`): no published figure stands beside it."""
    about = (
        f"The cells of `{suite.name}` on a SMALLER SET of the same generator than the published one: fewer of its "
        "1,000 episodes, as many as `data.json` beside the results says. No published figure applies."
    )
    return replace(suite, name=f"{suite.name}_part", description=about, published=None)


LONGER = tuple(ogbench_to(updates) for updates in (100_000, 200_000, 500_000, 1_000_000))

ALL = (
    OFFLINE, WSRL, WSRL_DOOR, EXPRESSIVE, EXPO_ABLATIONS, RESIDUAL_ABLATIONS, BASELINES, UNI_O4, FAMO2O,
    OGBENCH, OGBENCH_K2, *LONGER, *map(part_of, (OGBENCH, *LONGER)),
)  # fmt: skip
SUITES = {suite.name: suite for suite in ALL}
