"""What the command line sets up before JAX starts, and what importing o2o leaves alone."""

import os
import subprocess
import sys
from importlib.metadata import version

import pytest

from o2o import startup

NAMES = ("XLA_FLAGS", "OPENBLAS_NUM_THREADS", "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test begin without the variables."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_cli_sets_cache_and_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line keeps compiled programs and sets flags."""
    monkeypatch.setenv("O2O_CACHE", "somewhere")
    monkeypatch.setattr(startup, "KNOWN_TO", (version("jaxlib"),))
    startup.prepare_process()
    assert os.environ["XLA_FLAGS"] == startup.NO_YNN
    assert os.environ["JAX_COMPILATION_CACHE_DIR"].startswith(os.path.join("somewhere", "programs"))
    startup.prepare_process()
    assert os.environ["XLA_FLAGS"] == startup.NO_YNN  # once


def test_user_settings_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the user has set stays."""
    own = f"--xla_dump_to=x {startup.NO_YNN}1"
    monkeypatch.setenv("XLA_FLAGS", own)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "mine")
    startup.prepare_process()
    assert os.environ["XLA_FLAGS"] == own and os.environ["JAX_COMPILATION_CACHE_DIR"] == "mine"


def test_unknown_release_gets_no_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    """A release that may not know a flag does not get it."""
    monkeypatch.setattr(startup, "KNOWN_TO", ("0.0.",))
    startup.prepare_process()
    assert "XLA_FLAGS" not in os.environ


def test_agents_import_has_no_effects() -> None:
    """Importing the agents starts no back end and sets nothing."""
    code = (
        "import os; before = dict(os.environ); import o2o.agents, o2o; from jax._src import xla_bridge as bridge; "
        "assert not bridge._backends, bridge._backends; changed = {k for k in os.environ if os.environ[k] != "
        "before.get(k)}; assert not {k for k in changed if 'XLA' in k or 'JAX' in k or 'THREADS' in k}, changed"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
