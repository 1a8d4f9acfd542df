"""The overviews of the command line, what scripts read, and what Python and editors see of the package."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import o2o
from o2o import cli, startup
from o2o.agents import AGENTS
from o2o.data import datasets

ROOT = Path(__file__).parents[2]


def said(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main(args)
    assert not ended.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("args", [[], ["help"], ["--help"], ["-h"]])
def test_overview(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """`o2o` and `o2o help` have a line for each command, and examples."""
    text = said(capsys, *args)
    for command in cli.COMMANDS:
        assert sum(line.split()[:1] == [command] for line in text.splitlines()) == 1, command
    assert "o2o demo" in text and len(text.splitlines()) < 40  # one screen


@pytest.mark.parametrize("group", ["data", "bench"])
def test_group_overview(group: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`o2o data`, `o2o data --help` and `o2o help data` say the same."""
    texts = {said(capsys, *args) for args in ([group], [group, "--help"], ["help", group])}
    (text,) = texts
    assert "examples:" in text and all(f"  {name} " in text for name in cli.COMMANDS[group])


def test_train_help(capsys: pytest.CaptureFixture[str]) -> None:
    """`o2o train --help` has a line for each agent, the options that matter and examples."""
    text = said(capsys, "train", "--help")
    lines = [line.split() for line in text.splitlines()]
    for agent in AGENTS:
        assert any(line[:1] == [agent] and len(line) > 1 for line in lines), agent
    assert "--seeds" in text and "my_agents:Mine" in text
    assert said(capsys, "help", "train") == text


def test_agent_help_order(capsys: pytest.CaptureFixture[str]) -> None:
    """The few options that matter come first, under a heading of their own; the rest follow."""
    text = said(capsys, "train", "sac", "--help")
    first = text.index("config options")
    for option in ("--dataset", "--preset", "--seeds", "--name", "--offline-steps"):
        assert text.index(f"{option} ") < first
    for option in ("--weights", "--record", "--cameras", "--loop.log-every", "--config.tau"):
        assert text.index(f"{option} ") > first


def test_data_list_whole_ids(
    embedded_root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids are never cut, however narrow the terminal; `--json` gives a list of objects."""
    monkeypatch.setenv("COLUMNS", "20")
    (name,) = datasets.list_datasets(embedded_root)
    assert name in said(capsys, "data", "list", "--root", str(embedded_root))
    (row,) = json.loads(said(capsys, "data", "list", "--json", "--root", str(embedded_root)))
    assert row["dataset"] == name and row["episodes"] > 0 and row["steps"] > 0
    about = json.loads(said(capsys, "data", "describe", name, "--json", "--root", str(embedded_root)))
    assert about["episodes"] == row["episodes"]


def test_import_is_light() -> None:
    """`import o2o` and `dir(o2o)` load neither JAX nor MuJoCo; the names are there when asked for."""
    code = (
        "import sys, o2o; names = dir(o2o); assert not {'jax', 'mujoco', 'flax', 'matplotlib'} & set(sys.modules); "
        "assert {'preset_run', 'train_run', 'RunConfig', 'AGENTS', 'session'} <= set(names); "
        "assert o2o.RunConfig.__name__ == 'RunConfig' and 'jax' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    for name in o2o.__all__:
        assert getattr(o2o, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        o2o.trian  # noqa: B018


def test_renderer_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a display MuJoCo gets a back end before it is imported; what is set, or shown, stays."""

    def chosen(**variables: str) -> str | None:
        with monkeypatch.context() as patch:
            for name in ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL"):
                patch.delenv(name, raising=False)
            patch.delitem(sys.modules, "mujoco", raising=False)
            patch.setattr(sys, "platform", "linux")
            for name, value in variables.items():
                patch.setenv(name, value)
            startup.choose_renderer()
            return startup.os.environ.get("MUJOCO_GL")

    monkeypatch.setattr(startup, "_egl_starts", lambda: True)
    assert chosen() == "egl" and chosen(MUJOCO_GL="glfw") == "glfw" and chosen(DISPLAY=":0") is None
    monkeypatch.setattr(startup, "_egl_starts", lambda: False)
    monkeypatch.setattr(startup.ctypes.util, "find_library", lambda name: "libOSMesa.so.8")
    assert chosen() == "osmesa"
    monkeypatch.setattr(startup.ctypes.util, "find_library", lambda name: None)
    assert chosen() is None


def test_editable_install_is_a_path(tmp_path: Path) -> None:
    """`pip install -e .` writes a path, which pyright and editors follow; no import hook."""
    code = f"import setuptools.build_meta as b; print(b.build_editable({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=copy(tmp_path), check=False)
    assert done.returncode == 0, done.stderr
    import zipfile

    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (path,) = [name for name in names if name.endswith(".pth")]
        assert not any("finder" in name for name in names)
        where = Path(archive.read(path).decode().strip())
    assert (where / "o2o" / "agents" / "__init__.py").exists() and (where / "o2o" / "py.typed").exists()


def copy(folder: Path) -> Path:
    """Return a small copy of the project: building writes into its folder."""
    import shutil

    project = folder / "project"
    for name in ("o2o", "agents", "envs"):
        shutil.copytree(ROOT / name, project / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project / name)
    return project
