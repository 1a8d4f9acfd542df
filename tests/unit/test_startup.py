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


def test_the_command_line_keeps_compiled_programs_and_sets_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("O2O_CACHE", "somewhere")
    monkeypatch.setattr(startup, "KNOWN_TO", (version("jaxlib"),))
    startup.prepare_process()
    assert os.environ["XLA_FLAGS"] == startup.NO_YNN
    assert os.environ["JAX_COMPILATION_CACHE_DIR"].startswith(os.path.join("somewhere", "programs"))
    startup.prepare_process()
    assert os.environ["XLA_FLAGS"] == startup.NO_YNN  # once


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    own = f"--xla_dump_to=x {startup.NO_YNN}1"
    monkeypatch.setenv("XLA_FLAGS", own)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "mine")
    startup.prepare_process()
    assert os.environ["XLA_FLAGS"] == own and os.environ["JAX_COMPILATION_CACHE_DIR"] == "mine"


def test_a_release_that_may_not_know_a_flag_does_not_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "KNOWN_TO", ("0.0.",))
    startup.prepare_process()
    assert "XLA_FLAGS" not in os.environ


def test_importing_the_agents_starts_no_back_end_and_sets_nothing() -> None:
    code = (
        "import os; before = dict(os.environ); import o2o.agents, o2o; from jax._src import xla_bridge as bridge; "
        "assert not bridge._backends, bridge._backends; changed = {k for k in os.environ if os.environ[k] != "
        "before.get(k)}; assert not {k for k in changed if 'XLA' in k or 'JAX' in k or 'THREADS' in k}, changed"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
