"""Residual RL's ablations (arXiv 2509.19301) on one task: no warm-ups, no layer norm, one-step returns."""

from o2o.report.suite import BenchTask, Suite, Variant

SUITE = Suite(
    name="residual_ablations",
    description=(
        "All correct `base`, flow matching (`flow_bc`). `no_env_warmup` leaves out the noisy roll-outs of the base "
        "before the first update, `no_critic_warmup` the critic-only updates, `no_layer_norm` the critics' layer norm, "
        "and `n1` bootstraps after one step instead of three. The paper's figures are curves on other data; the maze "
        "is where a small run shows more than noise."
    ),
    tasks=(BenchTask("o2o/embedded/pointmaze-umaze-v0"),),
    variants=(
        Variant("base", "flow_bc", offline_steps=10_000, online_steps=0),
        Variant("residual", "residual", base="base"),
        Variant("no_env_warmup", "residual", (("online.random_steps", 0),), base="base"),
        Variant("no_critic_warmup", "residual", (("online.initial_updates", 0),), base="base"),
        Variant("no_layer_norm", "residual", (("critic_layer_norm", False),), base="base"),
        Variant("n1", "residual", (("n_step", 1),), base="base"),
    ),
    seeds=3,
    preset="small",
    offline_steps=0,
    online_steps=6_000,
    eval_every=1_000,
    eval_episodes=20,
    metrics=("success", "return"),
)
