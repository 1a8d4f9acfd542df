"""The small agents that papers compare with, next to IQL: AWAC, TD3+BC, PEX, JSRL, IBRL, and cloning alone."""

from o2o.report.suite import BenchTask, Suite, Variant

SUITE = Suite(
    name="baselines",
    description=(
        "Whether each small agent learns: what imitation (`bc`) alone reaches, and where the others stand before and "
        "after fine-tuning. `jsrl` and `pex` pre-train as `iql` does and differ online; `ibrl` clones offline. Each "
        "agent sees the reward shift of its own preset. The datasets are stand-ins, not the official ones of similar "
        "names."
    ),
    tasks=(BenchTask("o2o/embedded/pointmaze-umaze-v0"), BenchTask("o2o/hopper/medium-v0", target=3679.5)),
    variants=(
        Variant("bc", "bc", online_steps=0),
        Variant("iql", "iql"),
        Variant("awac", "awac"),
        Variant("td3bc", "td3bc"),
        Variant("pex", "pex"),
        Variant("jsrl", "jsrl"),
        Variant("ibrl", "ibrl"),
    ),
    seeds=3,
    preset="small",
    offline_steps=10_000,
    online_steps=10_000,
    eval_every=2_500,
    eval_episodes=20,
    metrics=("return", "success"),
)
