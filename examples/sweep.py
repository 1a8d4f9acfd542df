"""A sweep: values of two settings, three seeds each. It is trained here, or on a cluster, and prints a sorted table.

o2o sweep examples/sweep.py
o2o sweep examples/sweep.py --where ray
"""

from o2o.report.sweep import Between, Sweep

SWEEP = Sweep(
    agents=("iql",),
    datasets=("o2o/embedded/pointmaze-umaze-v0",),
    settings={
        "config.beta": [1.0, 3.0, 10.0],
        "config.expectile": Between(0.6, 0.95),
    },
    fixed={"loop.checkpoint_every": 2_000},
    samples=6,
    seeds=3,
    offline_steps=6_000,
    online_steps=4_000,
    eval_every=2_000,
)
