"""Settings of the process: for JAX, before it starts (the command line only), and for MuJoCo, before it is imported."""

import ctypes
import ctypes.util
import hashlib
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from o2o.files import cache_dir

EGL_PLATFORM_DEVICE = 0x313F
"""EGL_PLATFORM_DEVICE_EXT of the Khronos registry."""


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
    place = hashlib.sha256(f"{version('jaxlib')} {processor()}".encode()).hexdigest()[:16]
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_dir() / "programs" / place))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


def choose_renderer() -> None:
    """Choose the back end that MuJoCo draws with where there is no display: EGL if it starts, else OSMesa.

    MuJoCo reads the choice when it is imported. What the user has set stays.
    """
    shown = not sys.platform.startswith("linux") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if shown or "MUJOCO_GL" in os.environ or "mujoco" in sys.modules:
        return
    if _egl_starts():
        os.environ["MUJOCO_GL"] = "egl"
    elif ctypes.util.find_library("OSMesa"):
        os.environ["MUJOCO_GL"] = "osmesa"


def _egl_starts() -> bool:
    """Whether EGL has a device that can be initialised; its library alone does not say so."""
    name, pointer, count = ctypes.util.find_library("EGL"), ctypes.c_void_p, ctypes.c_int()
    try:
        egl = ctypes.CDLL(name) if name else None
        find = egl and _typed(egl.eglGetProcAddress, pointer, ctypes.c_char_p)
        query, display = (find(b"eglQueryDevicesEXT"), find(b"eglGetPlatformDisplayEXT")) if find else (None, None)
    except (OSError, AttributeError):
        return False
    if egl is None or not query or not display:
        return False
    devices = (pointer * 16)()
    ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, pointer, pointer)(query)(16, devices, ctypes.addressof(count))
    open_display = ctypes.CFUNCTYPE(pointer, ctypes.c_uint, pointer, pointer)(display)
    start = _typed(egl.eglInitialize, ctypes.c_uint, pointer, pointer, pointer)
    stop = _typed(egl.eglTerminate, ctypes.c_uint, pointer)
    for device in devices[: count.value]:
        shown = open_display(EGL_PLATFORM_DEVICE, device, None)
        if shown and start(shown, None, None):
            stop(shown)
            return True
    return False


def _typed(function: Any, result: Any, *arguments: Any) -> Any:
    """Return a C function with its types declared."""
    function.restype, function.argtypes = result, arguments
    return function
