"""Residual RL's ablations (arXiv 2509.19301) on one task: no warm-ups, no layer norm, one-step returns."""

from o2o.bench import BenchTask, Suite, Variant

SUITE = Suite(
    name="residual_ablations",
    description=(
        "All correct the suite `expressive`'s base. `no_env_warmup` leaves out the noisy roll-outs of the base before "
        "the first update, `no_critic_warmup` the critic-only updates, `no_layer_norm` the critics' layer norm, and "
        "`n1` bootstraps after one step instead of three. The paper's figures are curves on other data."
    ),
    tasks=(BenchTask("hand_dapg/pen/noisy-v0", (("binary", True),)),),
    variants=(
        Variant("residual", "residual", base="expressive/base"),
        Variant("no_env_warmup", "residual", (("online.random_steps", 0),), base="expressive/base"),
        Variant("no_critic_warmup", "residual", (("online.initial_updates", 0),), base="expressive/base"),
        Variant("no_layer_norm", "residual", (("critic_layer_norm", False),), base="expressive/base"),
        Variant("n1", "residual", (("n_step", 1),), base="expressive/base"),
    ),
    seeds=3,
    preset="small",
    offline_steps=0,
    online_steps=10_000,
    eval_every=2_500,
    eval_episodes=20,
    metrics=("success", "return"),
)
