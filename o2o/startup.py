"""Settings of the command line's own process, made before JAX starts. Importing o2o sets none of them."""

import hashlib
import os
import platform
from importlib.metadata import version
from pathlib import Path

from o2o.files import cache_dir

NO_YNN = "--xla_cpu_experimental_ynn_fusion_type="
"""Turns off a fusion of XLA's CPU back end that makes small matrix products slower (`benchmarks/PERFORMANCE.md`)."""
KNOWN_TO = ("0.10.",)
"""Releases of jaxlib that know the flag. Others might refuse to start with it."""


def processor() -> str:
    """Return a text that differs between processors for which XLA compiles different programs."""
    info = Path("/proc/cpuinfo")
    flags = [line for line in info.read_text().splitlines() if line.startswith("flags")] if info.exists() else []
    return flags[0] if flags else platform.machine()


def prepare_process() -> None:
    """Set environment variables for JAX and BLAS; variables that the user has set stay.

    Compiled programs are cached on disk, per kind of processor and release of jaxlib. The second start of the same run
    then compiles nothing. JAX_ENABLE_COMPILATION_CACHE=0 turns this off.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its idle threads spin, and initialisers' QR then crawls
    jaxlib, flags = version("jaxlib"), os.environ.get("XLA_FLAGS", "")
    if jaxlib.startswith(KNOWN_TO) and NO_YNN.rstrip("=") not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {NO_YNN}".strip()
    place = hashlib.sha256(f"{jaxlib} {processor()}".encode()).hexdigest()[:16]
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_dir() / "programs" / place))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
