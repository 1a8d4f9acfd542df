"""A suite of your own: which methods run on which datasets. Run it, then write its report.

o2o bench run examples/my_suite.py --out my_results
o2o bench report examples/my_suite.py --out my_results
"""

from o2o.report.suite import BenchTask, Suite, Variant

SUITE = Suite(
    name="my_suite",
    description="Does a larger beta help IQL in the embedded maze, and is either better than cloning?",
    tasks=(BenchTask("o2o/embedded/pointmaze-umaze-v0"),),
    variants=(
        Variant("bc", "bc", online_steps=0),
        Variant("iql", "iql"),
        Variant("iql_30", "iql", (("beta", 30.0),)),
    ),
    offline_steps=6_000,
    online_steps=4_000,
    eval_every=2_000,
)
