"""The house: one name for each package, pins, nothing of one machine in the files, and a wheel that works elsewhere."""

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from o2o.agents import AGENTS

ROOT = Path(__file__).resolve().parents[2]
CODE = ("o2o", "agents", "envs")
GENERATED = {".git", ".venv", ".ruff_cache", ".pytest_cache", ".hypothesis", "__pycache__", "dist"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def files(*folders):
    """Return the Python files of the folders, links not followed."""
    found = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return sorted(
        p for p in found if "__pycache__" not in p.parts and p.resolve().relative_to(ROOT).parts[0] in folders
    )


def real_files(*folders):
    """Return each file once, under its real name."""
    return sorted({path.resolve() for path in files(*folders)})


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def imports(path):
    """Return every dotted name that a file imports, wherever in it: `from a import b` gives a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def within(module, name):
    return module == name or module.startswith(name + ".")


def test_agents_and_envs_single_name():
    """The agents and envs packages have one name each, that within `o2o`; no import is relative."""
    for path in real_files(*CODE, "tests", "benchmarks"):
        bare = {module for module in imports(path) if within(module, "agents") or within(module, "envs")}
        assert not bare, f"{name_of(path)} imports {sorted(bare)}; say o2o.agents or o2o.envs: it loads twice otherwise"


def test_links_lead_to_folders():
    """The links in `o2o` lead to the folders."""
    for name in ("agents", "envs"):
        assert (ROOT / "o2o" / name / "__init__.py").resolve() == (ROOT / name / "__init__.py").resolve()


def committed():
    """Return the files that git knows or would add; without git, all but what is generated."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listing.returncode == 0:
        paths = [ROOT / name for name in listing.stdout.split("\0") if name]
    else:
        paths = [p for p in ROOT.rglob("*") if not GENERATED & set(p.relative_to(ROOT).parts)]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def test_no_machine_paths():
    """No path of one machine is in any file."""
    pattern = re.compile(r"(?<![\w.:/~}$)-])/(?:home|root|Users|work|mnt|media|tmp|private|var/folders|content)/[\w.-]")
    found = []
    for path in committed():
        try:
            lines = path.read_text().splitlines()
        except UnicodeDecodeError:
            continue
        found += [f"{name_of(path)}:{number}" for number, line in enumerate(lines, 1) if pattern.search(line)]
    assert not found, f"absolute paths in {found[:10]}"


def run_python(code, home, cwd, **env):
    """Run code in a fresh interpreter in the folder `cwd` with nothing of this environment but what `env` names."""
    keep = {"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "HOME": str(home), **env}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=keep, capture_output=True, text=True, timeout=300)


def test_import_starts_no_backend(tmp_path):
    """Importing the package starts no JAX back end."""
    code = (
        "import jax\n"
        "import o2o.agents, o2o.envs, o2o.cli, o2o.train.trainer, o2o.report.suite, o2o.report.suite_report\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends, list(xla_bridge._backends)\n"
        "jax.devices()\n"
        "assert xla_bridge._backends, 'the check itself no longer works with this jax'\n"
    )
    result = run_python(code, tmp_path, ROOT)
    assert result.returncode == 0, result.stderr


def distribution(requirement):
    """Return the normalised name of a requirement or pin."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match is not None, requirement
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def test_constraints_pin_every_dependency():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", pin) for pin in pins), "name==version lines only"
    project = PROJECT["project"]
    wanted = {distribution(r) for r in [*project["dependencies"], *project["optional-dependencies"]["dev"]]}
    missing = wanted - {distribution(pin) for pin in pins}
    assert not missing, f"constraints.txt does not pin {sorted(missing)}"
    mentions = (ROOT / "constraints.txt").read_text() + (ROOT / "pyproject.toml").read_text()
    assert "index-url" not in mentions and "find-links" not in mentions


def test_version_matches_project():
    """The package's version is the one that `pyproject.toml` says."""
    import o2o

    assert o2o.__version__ == PROJECT["project"]["version"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Build sdist and wheel from a copy of the tree, without network."""
    if importlib.util.find_spec("build") is None or importlib.util.find_spec("setuptools") is None:
        pytest.skip("build and setuptools are not installed; pip install -e .[dev]")
    work = tmp_path_factory.mktemp("build")
    for path in committed():
        if "results" not in path.parts:
            (work / "tree" / name_of(path)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, work / "tree" / name_of(path))
    for name in ("agents", "envs"):
        (work / "tree" / "o2o" / name).symlink_to(f"../{name}")
    if not (work / "tree/README.md").exists():
        pytest.fail("README.md is missing: pyproject.toml names it")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(work / "dist"), str(work / "tree")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return work / "dist"


def test_wheel_contents(built):
    """The wheel holds the package and nothing else."""
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"o2o"}
    wanted = {"o2o/py.typed"}
    wanted |= {name_of(path) for path in (ROOT / "o2o").rglob("*.py")}
    wanted |= {f"o2o/{folder}/{path.name}" for folder in ("agents", "envs") for path in (ROOT / folder).glob("*.py")}
    assert wanted <= names, sorted(wanted - names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_sdist_contents(built):
    """The sdist holds what a builder needs."""
    (sdist,) = built.glob("*.tar.gz")
    names = {name.split("/", 1)[1] for name in tarfile.open(sdist).getnames() if "/" in name}
    wanted = {
        "LICENSE",
        "README.md",
        "constraints.txt",
        "pyproject.toml",
        "o2o/agents/__init__.py",
        "o2o/envs/__init__.py",
    }
    wanted |= {name_of(path) for path in (ROOT / "benchmarks").glob("*.py")}
    assert wanted <= names, sorted(wanted - names)


def test_wheel_imports_elsewhere(built, tmp_path):
    """The wheel imports in another folder."""
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    code = (
        "import importlib.util as u, o2o, o2o.agents, o2o.envs, o2o.cli\n"
        "print(o2o.__file__, o2o.agents.__file__, o2o.envs.__file__, sep='\\n')\n"
        "print(len(o2o.agents.AGENTS), o2o.agents.WSRL.__module__)\n"
    )
    result = run_python(code, tmp_path, elsewhere, PYTHONPATH=str(tmp_path / "site"))
    assert result.returncode == 0, result.stderr
    *places, last = result.stdout.splitlines()
    assert all(place.startswith(str(tmp_path / "site" / "o2o")) for place in places), places
    assert last == f"{len(AGENTS)} o2o.agents.wsrl"
