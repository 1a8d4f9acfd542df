"""The benchmark suites: which methods run on which datasets, with how many steps.

`o2o bench run NAME` runs what is missing, `o2o bench report NAME` writes `results/NAME/README.md`. All suites use the
`small` presets, three seeds and 20 evaluation episodes, the defaults of `Suite`. None of the datasets is the official
one of a similar name, so no published figure applies to the results.
"""

from o2o.report.suite import BenchTask, Suite, Variant

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
        f"The reward is sparse, -1/0. {STAND_INS}"
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
        f"from scratch and draws half of each batch from the dataset. {STAND_INS}"
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

ALL = (OFFLINE, WSRL, WSRL_DOOR, EXPRESSIVE, EXPO_ABLATIONS, RESIDUAL_ABLATIONS, BASELINES, UNI_O4, FAMO2O)
SUITES = {suite.name: suite for suite in ALL}
