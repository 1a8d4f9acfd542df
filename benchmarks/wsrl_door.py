"""WSRL on door under the paper's data rule, with ten critics and more environment steps than the suite `wsrl`."""

from o2o.report.suite import BenchTask, Suite, Variant

TEN = (("num_critics", 10),)
TEN_OF_BOTH = (("cql.num_critics", 10), ("finetune.num_critics", 10))
NO_WARMUP = (("online.warmup_steps", 0), ("online.min_rows", 256))

SUITE = Suite(
    name="wsrl_door",
    description=(
        "Door with the WSRL paper's data rule (only episodes that succeed, each cut after its last success) and ten "
        "critics instead of the small preset's four. `calql` is the pre-training that `wsrl` and `sac` start from; "
        "`sac` is `wsrl` that updates as soon as one minibatch has been collected; `rlpd` starts from scratch and "
        "draws half of each batch from the same dataset. The dataset is a stand-in, not the official one."
    ),
    tasks=(BenchTask("hand_dapg/door/noisy-v0", (("binary", True), ("only_successes", True))),),
    variants=(
        Variant("calql", "calql", TEN, offline_steps=10_000, online_steps=0),
        Variant("wsrl", "wsrl", TEN_OF_BOTH, starts_from="calql"),
        Variant("rlpd", "rlpd", TEN),
        Variant("sac", "wsrl", (*TEN_OF_BOTH, *NO_WARMUP), starts_from="calql"),
    ),
    seeds=3,
    preset="small",
    offline_steps=0,
    online_steps=15_000,
    eval_every=2_500,
    eval_episodes=20,
    metrics=("success", "return"),
)
