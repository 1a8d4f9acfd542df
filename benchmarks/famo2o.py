"""FamO2O over IQL and over CQL, against the very methods it stands on."""

from o2o.report.suite import BenchTask, Suite, Variant

SUITE = Suite(
    name="famo2o",
    description=(
        "Does a coefficient per state beat one for all? `famo2o` is `iql` with a family of policies and a balance "
        "model and shares all else with it; `famo2o_cql` has the networks, temperature and replay of its own published "
        "code besides, so that its difference from `cql` is not the coefficient's alone. "
        "Targets are the mean returns of the expert sets recorded beside these data (3680, 4614, 11506). The datasets "
        "are stand-ins, not the official ones of similar names."
    ),
    tasks=(
        BenchTask("o2o/embedded/pointmaze-umaze-v0"),
        BenchTask("o2o/hopper/medium-v0", target=3679.5),
        BenchTask("o2o/walker2d/medium-v0", target=4613.8),
        BenchTask("o2o/halfcheetah/medium-v0", target=11505.9),
    ),
    variants=(
        Variant("famo2o", "famo2o"),
        Variant("iql", "iql"),
        Variant("famo2o_cql", "famo2o_cql"),
        Variant("cql", "cql"),
    ),
    seeds=3,
    preset="small",
    offline_steps=10_000,
    online_steps=10_000,
    eval_every=2_500,
    eval_episodes=20,
    metrics=("return", "success"),
)
