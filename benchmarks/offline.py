"""Offline agents on Adroit roll-outs and human demonstrations, on Hopper and PointMaze: what pre-training gives."""

from o2o.report.suite import BenchTask, Suite, Variant

BINARY = (("binary", True),)

SUITE = Suite(
    name="offline",
    description=(
        "Pre-training only. Adroit tasks with the sparse -1/0 reward. The datasets are stand-ins recorded for this "
        "toolkit, not the official ones of similar names: no published figure applies to them."
    ),
    tasks=(
        BenchTask("hand_dapg/pen/noisy-v0", BINARY),
        BenchTask("hand_dapg/door/noisy-v0", BINARY),
        BenchTask("hand_dapg/door/human-v0", BINARY),
        BenchTask("o2o/hopper/medium-v0"),
        BenchTask("o2o/embedded/pointmaze-umaze-v0"),
    ),
    variants=(Variant("bc", "bc"), Variant("iql", "iql"), Variant("calql", "calql")),
    seeds=3,
    preset="small",
    offline_steps=6_000,
    offline_eval_every=3_000,
    eval_episodes=20,
    metrics=("success", "return", "normalized"),
)
