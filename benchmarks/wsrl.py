"""WSRL after Cal-QL pre-training, against learning from scratch with the data and a switch without warm-up."""

from o2o.report.suite import BenchTask, Suite, Variant

BINARY = (("binary", True),)
NO_WARMUP = (("online.warmup_steps", 0), ("online.min_rows", 256))

SUITE = Suite(
    name="wsrl",
    description=(
        "Does warming up prevent the collapse after the switch, and is it faster than learning from scratch? `wsrl` "
        "pre-trains with Cal-QL and keeps no offline row; `rlpd` starts from scratch and draws half of each batch from "
        "the same dataset; `sac` is `wsrl` that updates as soon as one minibatch has been collected. Sparse -1/0 "
        "reward; the datasets are stand-ins, not the official ones of similar names."
    ),
    tasks=(BenchTask("hand_dapg/pen/noisy-v0", BINARY), BenchTask("o2o/embedded/pointmaze-umaze-v0")),
    variants=(
        Variant("wsrl", "wsrl", starts_from="offline/calql"),
        Variant("rlpd", "rlpd", offline_steps=0),
        Variant("sac", "wsrl", NO_WARMUP, starts_from="offline/calql"),
    ),
    seeds=3,
    preset="small",
    offline_steps=0,
    online_steps=8_000,
    eval_every=2_000,
    eval_episodes=20,
    metrics=("success", "return"),
)
