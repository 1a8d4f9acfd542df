"""Which form of IQL learns best on dense rewards: the suite of one question, run by its path.

`o2o bench run benchmarks/iql_form.py` makes 8 runs of three seeds and 60,000 updates each, an hour or two on two cores.
It asks why a peer's IQL had 2909 on `o2o/hopper/medium-v0` after 60,000 updates where ours had 2290 (one seed each).
"""

from o2o.report.suite import BenchTask, Suite, Variant

DECAY = (("actor_decay_steps", 60_000),)
CONSTANT = (("actor_decay_steps", None),)
SUITE = Suite(
    name="iql_form",
    description=(
        "Pre-training by IQL's `paper` preset in four forms. `decay` lets the actor's rate fall to 0 along a cosine "
        "over the run, `constant` does not. `value_norm` decays and has LayerNorm in V. `linear_mean` decays "
        "and has no tanh on the policy's mean."
    ),
    tasks=(BenchTask("o2o/hopper/medium-v0"), BenchTask("o2o/walker2d/medium-v0")),
    variants=(
        Variant("decay", "iql", DECAY),
        Variant("constant", "iql", CONSTANT),
        Variant("value_norm", "iql", (*DECAY, ("value_layer_norm", True))),
        Variant("linear_mean", "iql", (*DECAY, ("tanh_mean", False))),
    ),
    preset="paper",
    offline_steps=60_000,
    metrics=("return", "normalized"),
)
