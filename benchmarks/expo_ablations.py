"""EXPO's ablations (arXiv 2507.07986) on one task: no edits, a plain base sample in the backup, the number N."""

from o2o.bench import BenchTask, Suite, Variant

SUITE = Suite(
    name="expo_ablations",
    description=(
        "`no_edits` chooses among base samples only; `base_backup` bootstraps from a plain base sample instead of the "
        "on-the-fly policy's action; `n1`, `n2`, `n8` draw that many base samples, where `expo` draws the small "
        "preset's 4. The paper reports the first two to be worse; its figures are curves on other data."
    ),
    tasks=(BenchTask("hand_dapg/pen/noisy-v0", (("binary", True),)),),
    variants=(
        Variant("expo", "expo"),
        Variant("no_edits", "expo", (("n_edits", 0),)),
        Variant("base_backup", "expo", (("backup", "base"),)),
        Variant("n1", "expo", (("n_edits", 0), ("n_samples", 1))),
        Variant("n2", "expo", (("n_edits", 2), ("n_samples", 2))),
        Variant("n8", "expo", (("n_samples", 8), ("n_edits", 8))),
    ),
    seeds=3,
    preset="small",
    offline_steps=10_000,
    online_steps=8_000,
    eval_every=2_000,
    eval_episodes=20,
    metrics=("success", "return"),
)
