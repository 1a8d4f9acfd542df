"""Measure the memory and the time of imports of large inputs: `python benchmarks/import_memory.py [--gigabytes 2]`.

For each format a file is generated and imported in a process of its own. Its peak resident memory stands beside that of
an import of a tenth of the size. Nothing is kept. It is not part of `make test`.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np

STEPS, DIM, ACTIONS = 1_000, 250, 6
EPISODE_BYTES = STEPS * DIM * 4

IMPORT = """
import resource, sys
from pathlib import Path
from o2o.data.importers.write import import_dataset
done = import_dataset(Path(sys.argv[1]), "lab/large-v0", root=Path(sys.argv[2]))
print(done.episodes, done.steps, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def write_d4rl(path: Path, episodes: int) -> None:
    """Write a D4RL file of `episodes` episodes, each ended by a timeout."""
    rng, rows = np.random.default_rng(0), episodes * STEPS
    with h5py.File(path, "w") as file:
        seen = file.create_dataset("observations", (rows, DIM), np.float32, chunks=(STEPS, DIM))
        acted = file.create_dataset("actions", (rows, ACTIONS), np.float32, chunks=(STEPS, ACTIONS))
        for start in range(0, rows, STEPS):
            seen[start : start + STEPS] = rng.normal(size=(STEPS, DIM))
            acted[start : start + STEPS] = rng.uniform(-1, 1, (STEPS, ACTIONS))
        file["rewards"] = np.zeros(rows, np.float32)
        file["terminals"] = np.zeros(rows, bool)
        file["timeouts"] = np.arange(rows) % STEPS == STEPS - 1


def write_robomimic(path: Path, episodes: int) -> None:
    """Write a robomimic file of `episodes` demonstrations."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for number in range(episodes):
            demo = file.create_group(f"data/demo_{number}")
            demo["obs/state"] = rng.normal(size=(STEPS, DIM)).astype(np.float32)
            demo["actions"] = rng.uniform(-1, 1, (STEPS, ACTIONS)).astype(np.float32)
            demo["rewards"] = np.zeros(STEPS)


def write_ogbench(path: Path, episodes: int) -> None:
    """Write a compressed npz of `episodes` trajectories, member by member."""
    import zipfile

    rng, rows = np.random.default_rng(0), episodes * STEPS
    shapes = {"observations": (DIM,), "actions": (ACTIONS,), "terminals": (), "qpos": (7,)}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, shape in shapes.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                header = {"descr": "<f4", "fortran_order": False, "shape": (rows, *shape)}
                np.lib.format.write_array_header_2_0(member, header)
                for _ in range(episodes):
                    block = rng.uniform(-1, 1, (STEPS, *shape)).astype(np.float32)
                    last = (np.arange(STEPS) == STEPS - 1).astype(np.float32)
                    member.write((last if name == "terminals" else block).tobytes())


def main() -> None:
    """Print one line per format and size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--formats", nargs="+", default=["d4rl", "robomimic", "ogbench"])
    asked = parser.parse_args()
    writers = {"d4rl": write_d4rl, "robomimic": write_robomimic, "ogbench": write_ogbench}
    for form in asked.formats:
        for gigabytes in (asked.gigabytes / 10, asked.gigabytes):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / ("large.npz" if form == "ogbench" else "large.hdf5")
                writers[form](path, max(int(gigabytes * 1e9 / EPISODE_BYTES), 2))
                began = time.perf_counter()
                command = [sys.executable, "-c", IMPORT, str(path), folder]
                out = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
                seconds = time.perf_counter() - began
                size = path.stat().st_size / 1e9
                print(f"{form}: {size:.2f} GB, {out[0]} episodes, peak {out[2]} MB, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
