"""What the command line sets up before JAX starts, and what importing o2o leaves alone."""

import os
import subprocess
import sys

import pytest

from o2o import startup

NAMES = ("XLA_FLAGS", "OPENBLAS_NUM_THREADS", "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test begin without the variables."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_cli_sets_cache_and_no_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line keeps compiled programs, and gives XLA no flag that another release might refuse."""
    monkeypatch.setenv("O2O_CACHE", "somewhere")
    startup.prepare_process()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"].startswith(os.path.join("somewhere", "programs"))
    assert "XLA_FLAGS" not in os.environ


def test_user_settings_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the user has set stays."""
    own = {"XLA_FLAGS": "--xla_dump_to=x", "JAX_COMPILATION_CACHE_DIR": "mine", "OPENBLAS_NUM_THREADS": "3"}
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    startup.prepare_process()
    assert {name: os.environ[name] for name in own} == own


def test_agents_import_has_no_effects() -> None:
    """Importing the agents starts no back end and sets nothing."""
    code = (
        "import os; before = dict(os.environ); import o2o.agents, o2o; from jax._src import xla_bridge as bridge; "
        "assert not bridge._backends, bridge._backends; changed = {k for k in os.environ if os.environ[k] != "
        "before.get(k)}; assert not {k for k in changed if 'XLA' in k or 'JAX' in k or 'THREADS' in k}, changed"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
