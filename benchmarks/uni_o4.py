"""Uni-O4 against its critic's own policy (IQL), PPO from scratch and PPO from behaviour cloning."""

from o2o.report.suite import BenchTask, Suite, Variant

SUITE = Suite(
    name="uni_o4",
    description=(
        "One on-policy objective in both phases. `uni_o4` pre-trains in four stages and goes online as PPO; `iql` is "
        "offline only; `ppo` starts from scratch; `ppo_bc` clones first, with the online settings of `uni_o4` in all "
        "three. Targets are the mean returns of the expert sets recorded beside these data (3680, 4614, 11506). The "
        "datasets are stand-ins, not the official ones of similar names. Before it goes online `uni_o4` lets its three "
        "policies play 20 episodes each and takes the best; these steps are not among the 40,000, and the others have "
        "none."
    ),
    tasks=(
        BenchTask("o2o/hopper/medium-v0", target=3679.5),
        BenchTask("o2o/embedded/pointmaze-umaze-v0"),
        BenchTask("o2o/walker2d/medium-v0", target=4613.8),
        BenchTask("o2o/halfcheetah/medium-v0", target=11505.9),
    ),
    variants=(
        Variant("uni_o4", "uni_o4"),
        Variant("iql", "iql", online_steps=0),
        Variant("ppo", "ppo", offline_steps=0),
        Variant("ppo_bc", "ppo", offline_steps=5_000),
    ),
    seeds=3,
    preset="small",
    offline_steps=10_000,
    online_steps=40_000,
    eval_every=8_000,
    eval_episodes=20,
    metrics=("return", "success"),
)
