"""Expressive policies and what improves them online: base alone, EXPO, residual RL, Q-chunking, WSRL and RLPD."""

from o2o.report.suite import BenchTask, Suite, Variant

BINARY = (("binary", True),)

SUITE = Suite(
    name="expressive",
    description=(
        "Few or imperfect demonstrations, sparse reward: what each method gains online over imitation. `base` is flow "
        "matching (`flow_bc`), and what `residual` corrects; every other method starts from the same dataset on "
        "its own. Each agent sees the reward shift of its own paper. The datasets are stand-ins recorded for this "
        "toolkit, not the official ones of similar names: no published figure applies to them."
    ),
    tasks=(
        BenchTask("hand_dapg/door/human-v0", BINARY),
        BenchTask("hand_dapg/pen/noisy-v0", BINARY),
        BenchTask("hand_dapg/door/noisy-v0", BINARY),
        BenchTask("hand_dapg/relocate/noisy-v0", BINARY),
    ),
    variants=(
        Variant("base", "flow_bc", online_steps=0),
        Variant("residual", "residual", offline_steps=0, base="base"),
        Variant("qc", "qc"),
        Variant("expo", "expo"),
        Variant("wsrl", "wsrl"),
        Variant("rlpd", "rlpd", offline_steps=0),
    ),
    seeds=3,
    preset="small",
    offline_steps=10_000,
    online_steps=10_000,
    eval_every=2_500,
    eval_episodes=20,
    metrics=("success", "return"),
)
