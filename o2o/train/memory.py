"""What a run will need of memory, estimated before it is taken: what cannot fit is refused, not tried."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from o2o.errors import ConfigError
from o2o.types import Batch

CLOSE = 64
"""An update is compiled to learn its memory only if the rough estimate is above this part of what is free."""

CONTAINERS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file "),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "),
)
"""Folder, limit, use and files that can be dropped, of control groups of versions 2 and 1."""


def tree_bytes(tree: Any) -> int:
    """Return the bytes of arrays, or of their shapes and types."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if not jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    return sum(int(np.prod(leaf.shape, dtype=np.int64)) * leaf.dtype.itemsize for leaf in leaves)


def free_bytes() -> int | None:
    """Return the bytes that the first device can still give; None if nobody knows."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None
    return free_on_host()


def free_on_host() -> int | None:
    """Return the bytes of main memory that this process can still take; None if nobody knows."""
    found = [_of_machine(), *(_of_container(Path(folder), *names) for folder, *names in CONTAINERS)]
    return min((size for size in found if size is not None), default=None)


def of_process() -> int:
    """Return the bytes of main memory that this process has now; 0 if nobody knows."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def _of_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        if "SC_AVPHYS_PAGES" in os.sysconf_names:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return None


def _of_container(folder: Path, limit: str, used: str, cache: str) -> int | None:
    """Return what a control group can still take. Files that the system keeps in memory count as used there."""
    try:
        free = int((folder / limit).read_text()) - int((folder / used).read_text())
        kept = [line.split()[1] for line in (folder / "memory.stat").read_text().splitlines() if line.startswith(cache)]
        return max(free + sum(map(int, kept)), 0)
    except (OSError, ValueError, IndexError):  # there is none, or its limit is "max"
        return None


def update_bytes(agent: Any, batch: Batch, free: int) -> int:
    """Estimate the memory of one update of one agent (shapes will do) on a batch `[utd, B, ...]`, results left out.

    A rough estimate counts the outputs of all layers. Where that may matter beside `free` bytes, XLA's own count.
    """
    rows = int(np.prod(batch["rewards"].shape))
    utd = batch["rewards"].shape[0]
    widths = [int(np.prod(leaf.shape[:-2]) * leaf.shape[-1]) for leaf in jax.tree.leaves(agent) if len(leaf.shape) >= 2]
    rough = tree_bytes(batch) + 4 * rows // utd * sum(widths)
    if rough < free // CLOSE:
        return rough
    step = jax.jit(lambda agent, batch: agent.update(batch), donate_argnums=0)
    found = step.lower(agent, batch).compile().memory_analysis()
    return tree_bytes(batch) + (rough if found is None else found.temp_size_in_bytes)


ON_DEVICE = (
    "lower config.batch_size, seeds, network widths or loop.replay_capacity, or set loop.device_bytes, so that "
    "observations go to the disk"
)


def refuse(needed: Mapping[str, int], free: int | None, where: str = "", remedy: str = ON_DEVICE) -> None:
    """Raise `ConfigError` with a `remedy` if what is `needed`, bytes by name, is more than what is free.

    `where` names the memory; empty: the device's.
    """
    total = sum(needed.values())
    if free is None or total <= free:
        return
    parts = ", ".join(f"{name} {size_of(size)}" for name, size in needed.items())
    raise ConfigError(
        f"the run needs about {size_of(total)} more memory ({parts}), and {size_of(free)} are free on "
        f"{where or jax.devices()[0].platform}: {remedy}"
    )


def size_of(size: int) -> str:
    """Return a number of bytes for people."""
    if size < 2**20:
        return "under 1 MiB"
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
