"""EXPO's ablations (arXiv 2507.07986) on one task: no edits, a plain base sample in the backup, the number N."""

from o2o.report.suite import BenchTask, Suite, Variant

SUITE = Suite(
    name="expo_ablations",
    description=(
        "`no_edits` chooses among base samples only; `base_backup` bootstraps from a plain base sample instead of the "
        "on-the-fly policy's action; `n1` draws one base sample and has no critic in its hands (imitation that goes "
        "on), `n8` draws eight, where `expo` draws the small preset's 4; `wide_edits` may move an action by 0.5 "
        "instead of 0.05. The paper reports the first two to be worse, as curves, on robomimic and Adroit; the maze is "
        "where a small run shows more than noise."
    ),
    tasks=(BenchTask("o2o/embedded/pointmaze-umaze-v0"),),
    variants=(
        Variant("expo", "expo"),
        Variant("no_edits", "expo", (("n_edits", 0),)),
        Variant("base_backup", "expo", (("backup", "base"),)),
        Variant("n1", "expo", (("n_edits", 0), ("n_samples", 1))),
        Variant("n8", "expo", (("n_samples", 8), ("n_edits", 8))),
        Variant("wide_edits", "expo", (("edit_scale", 0.5),)),
    ),
    seeds=3,
    preset="small",
    offline_steps=10_000,
    online_steps=4_000,
    eval_every=1_000,
    eval_episodes=20,
    metrics=("success", "return"),
)
