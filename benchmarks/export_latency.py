"""How long an action takes: the agent's own call and its exported files, for policies that differ in kind.

    python benchmarks/export_latency.py            # into results/export/README.md, some minutes
    python benchmarks/export_latency.py bc pex     # these alone, to the screen

The networks are those of the `paper` presets for the embedded maze, hardly trained: latency does not depend on it.
"""

import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

from o2o import envs
from o2o.runs import session
from o2o.startup import prepare_process

ROOT = Path(__file__).resolve().parents[1]
KINDS = {
    "bc": "one network; also `awac`, `calql`, `cql`, `iql`, `ppo`, `rebrac`, `rlpd`, `sac`, `td3bc`, `uni_o4`, `wsrl`",
    "td7": "an encoder and one network",
    "famo2o": "a network, told by a second one how bold to be; `famo2o_cql` too",
    "pex": "one of two networks, by Q",
    "ibrl": "one of two networks, by Q",
    "jsrl": "a guide, then the learner",
    "fql": "one step from noise",
    "flow_bc": "a flow, ten steps of a network",
    "diffusion_bc": "a diffusion",
    "dsrl": "a flow, fed with noise that a network chooses",
    "ifql": "a flow, the best of several by Q",
    "qam": "a flow, ten steps of a network",
    "qc": "a flow over chunks of actions, the best of several by Q",
    "expo": "a flow, edits, the best of several by Q",
    "residual": "corrections of the `flow_bc` above",
}
"""What acts in each agent."""
ABOUT = """\
Milliseconds for one action, median and 99th percentile in parentheses, batch size 1. Networks of the `paper`
presets for the embedded maze. `own call`: the agent in o2o; `.onnx` and `.jax`: the exported files, loaded by o2o;
each the first action of 200 episodes, in which a chunk is planned where the policy plays chunks. `deploy.py`: the
ONNX file in a process without o2o and JAX, 1000 actions of one episode, most of which only play what is left of a
chunk where the policy plays chunks. Measured once by `python benchmarks/export_latency.py`. Other work on the same
cores shows in the 99th percentiles; `o2o export` prints what your machine takes."""


def loader(path: Path) -> tuple[str, str]:
    """Return p50 and p99 in ms of `examples/deploy.py`, a process of its own without o2o and JAX."""
    command = [sys.executable, str(ROOT / "examples/deploy.py"), str(path)]
    words = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return words[words.index("p50") + 1], words[words.index("p99") + 1]


def measure(agent: str, work: Path) -> list[str]:
    """Return the cells of one agent's row."""
    run, small = work / agent, {"offline_steps": 2, "online_steps": 0, "keep_checkpoints": 1}
    base = {"base": str(work / "flow_bc"), "base_timeout_s": None} if agent == "residual" else {}
    loop = {"eval_episodes": 1, "updates_per_dispatch": 1}
    session.train(
        session.preset_run(agent, envs.embedded_id(envs.DEMO_DATASET), "paper", **small, **base, loop=loop), run
    )
    cells = [f"`{agent}`", KINDS[agent]]
    for suffix in ("onnx", "jax"):
        own, exported = session.export_run(run, run.with_suffix(f".{suffix}")).values()
        cells += [f"{own.p50:.3f} ({own.p99:.3f})"] * (suffix == "onnx") + [f"{exported.p50:.3f} ({exported.p99:.3f})"]
    p50, p99 = loader(run.with_suffix(".onnx"))
    return [*cells, f"{p50} ({p99})"]


def main(agents: list[str], out: Path = ROOT / "benchmarks/results/export") -> None:
    """Measure all, and write the report; with `agents` measure those, and print their rows."""
    envs.make_embedded(envs.DEMO_DATASET)
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(agent, Path(folder)) for agent in agents or KINDS]
    if agents:
        print(*(" | ".join(row) for row in rows), sep="\n")
        return
    lines = [
        "# Latency of exported policies",
        "",
        ABOUT,
        "",
        "| agent | what acts | own call | `.onnx` | `.jax` | `deploy.py` |",
        "| --- | --- | --: | --: | --: | --: |",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        f"Machine: {platform.machine()} x {os.cpu_count()}, load average {os.getloadavg()[1]:.1f} at the end.",
        "",
    ]
    out.mkdir(parents=True, exist_ok=True)
    (out / "README.md").write_text("\n".join(lines))


if __name__ == "__main__":
    prepare_process()
    main(sys.argv[1:])
