"""Pages that say what the code says: command line, settings, agents, results, and files of the repository as pages.

A Sphinx extension (`setup`) that writes `docs/generated/` before every build. Nothing there is written by hand.
"""

import ast
import base64
import dataclasses
import inspect
import json
import math
import os
import re
import shutil
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

import docstring_parser
from docutils.nodes import SkipNode
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.ext.napoleon.docstring import GoogleDocstring

from o2o import cli
from o2o.agents import AGENTS
from o2o.config import LoopConfig, RunConfig, TaskConfig
from o2o.data.task import Task
from o2o.report.suite import Suite
from o2o.settings import Settings
from o2o.types import OnlineConfig
from o2o.user_code import run_file

DOCS = Path(__file__).resolve().parent
ROOT, OUT = DOCS.parent, DOCS / "generated"
FAMILIES = ("antmaze", "adroit", "kitchen", "locomotion", "pointmaze", "other")
REPOSITORY = {
    "README.md": "index.md",
    "CHANGELOG.md": "generated/changelog.md",
    "CONTRIBUTING.md": "generated/contributing.md",
    "benchmarks/PERFORMANCE.md": "generated/performance.md",
}
"""Files of the repository that are pages here, and the pages. Reports of suites are added by `results`."""
FIGURE = re.compile(r"(?<![\w.])-?\d[\d.,]*(?: %)?(?: \[[-\d., %]+\])?")
"""A number with its unit and interval, which a table keeps on one line."""
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def write(path: Path, text: str) -> None:
    """Write a page, unless it says that already (Sphinx reads what is new). Tables keep an interval on one line."""
    text = re.sub(r"(?m)^\|.*$", lambda line: FIGURE.sub(lambda found: found[0].replace(" ", "\u00a0"), line[0]), text)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table; cells have no line breaks, and bars in them are escaped."""
    lines = [list(head), ["---"] * len(list(head)), *map(list, rows)]
    cells = lambda line: [" ".join(str(cell).split()).replace("|", "\\|") for cell in line]  # noqa: E731
    return "\n".join("| " + " | ".join(cells(line)) + " |" for line in lines) + "\n"


def code(value: Any) -> str:
    """Return a value as code, an empty text for a missing one."""
    return "" if value is inspect.Parameter.empty or value is dataclasses.MISSING else f"`{value!r}`"


# Files of the repository


def as_page(source: Path, page: Path) -> str:
    """Return a Markdown file with its links as seen from its page. What is no page here stays as text."""

    def link(match: re.Match[str]) -> str:
        image, label, target = match.groups()
        path, _, anchor = target.partition("#")
        if not path or ":" in target:
            return match.group()
        found = (source.parent / path).resolve()
        if image:
            page.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found, page.parent / found.name)
            return f"![{label}]({found.name})"
        name = found.relative_to(ROOT).as_posix()
        there = REPOSITORY.get(name) or (name.removeprefix("docs/") if name.startswith("docs/") else None)
        if there is None:
            return label if label.startswith("`") else f"{label} (`{name}`)"
        return f"[{label}]({os.path.relpath(DOCS / there, page.parent)}{'#' * bool(anchor)}{anchor})"

    return LINK.sub(link, source.read_text())


def results() -> list[Path]:
    """Write a page for each report below benchmarks/results, and an index; return the reports."""
    reports = sorted((ROOT / "benchmarks/results").glob("*/README.md"))
    for report in reports:
        REPOSITORY[report.relative_to(ROOT).as_posix()] = f"generated/results/{report.parent.name}.md"
    for report in reports:
        page = OUT / "results" / f"{report.parent.name}.md"
        text, interactive = as_page(report, page), report.with_name("report.html")
        if interactive.exists():
            shutil.copyfile(interactive, page.with_suffix(".report.html"))
            text += f"\n[The same in one file, with values on hover]({page.stem}.report.html).\n"
        write(page, text)
    lines = []
    for suites in (True, False):
        lines += ["## Suites\n" if suites else "## Measurements of speed and parts\n"]
        of_kind = [report for report in reports if (report.parent / "scores.csv").exists() == suites]
        lines += [
            table(
                ("report", "subject"),
                ((f"[{r.parent.name}]({r.parent.name}.md)", first_sentences(r.read_text())) for r in of_kind),
            )
        ]
    names = "\n".join(report.parent.name for report in reports)
    tree = f"```{{toctree}}\n:hidden:\n:maxdepth: 1\n\n{names}\n```\n"
    head = (
        "# Results\n\nThese pages are the reports in `benchmarks/results`. `o2o bench report SUITE` writes a report "
        "from the rows in `scores.csv` beside it.\n"
        "[How to measure a table again](../../results.md) says what is needed.\n"
    )
    write(OUT / "results" / "index.md", "\n".join([head, *lines, tree]))
    return reports


def first_sentences(text: str, most: int = 200) -> str:
    """Return the beginning of a report's first paragraph, whole sentences of at most `most` characters."""
    paragraph = " ".join(text.split("\n\n")[1].split())
    sentences = re.split(r"(?<=[.?])\s+(?=[A-Z`])", paragraph)
    said = sentences[0]
    for sentence in sentences[1:]:
        if len(said) + len(sentence) > most:
            break
        said += f" {sentence}"
    return LINK.sub(r"\2", said)


# Settings


def wanted(kind: Any, here: str = "") -> str:
    """Return the type and range of a setting in words, from its annotation alone. `here`: the way to the settings."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        inner, *rules = parts
        said = []
        for rule in rules:
            if hasattr(rule, "problem"):
                worst = (math.nan,) * len(get_args(inner)) if get_origin(inner) is tuple else math.nan
                said += [rule.problem(worst).removeprefix("a finite number, ").removeprefix("a finite number ")]
        return ", ".join([wanted(inner, here), *said])
    if origin is Literal:
        return " or ".join(f"`{option}`" for option in parts)
    if origin in (Union, types.UnionType):
        return " or ".join(wanted(part, here) for part in parts)
    if origin is tuple:
        return (
            f"list of {wanted(parts[0], here)}" if parts[1:] == (...,) else f"{len(parts)} x {wanted(parts[0], here)}"
        )
    if kind is type(None):
        return "None"
    if isinstance(kind, type) and issubclass(kind, Settings):
        return f"[{kind.__name__}]({here}#{kind.__name__.lower()})" if kind in SHARED else f"`{kind.__name__}`"
    name = getattr(kind, "__name__", str(kind))
    return {"str": "text", "Any": "any", "Path": "path"}.get(name, name)


SHARED: tuple[type, ...] = (RunConfig, LoopConfig, TaskConfig, OnlineConfig)


def docs_of(cls: type) -> dict[str, str]:
    """Return the docstring under each field of a dataclass, those of its bases included."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (body,) = ast.parse(inspect.cleandoc(inspect.getsource(base))).body
        assert isinstance(body, ast.ClassDef)
        for one, two in zip(body.body, body.body[1:], strict=False):
            if isinstance(one, ast.AnnAssign) and isinstance(two, ast.Expr) and isinstance(two.value, ast.Constant):
                assert isinstance(one.target, ast.Name)
                found[one.target.id] = str(two.value.value)
    return found


def fields_of(cls: type, default: Any = None, prefix: str = "", here: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Yield name, type and range, default and meaning of every field; those of nested settings by dotted name."""
    kinds, docs = typing.get_type_hints(cls, include_extras=True), docs_of(cls)
    for field in dataclasses.fields(cls):
        value = getattr(default, field.name, dataclasses.MISSING) if default is not None else field.default
        if value is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        nested = dataclasses.is_dataclass(value) and not isinstance(value, type)
        if nested and type(value) not in SHARED:
            yield f"`{prefix}{field.name}`", f"`{type(value).__name__}`", "", docs.get(field.name, "")
            yield from fields_of(type(value), value, f"{prefix}{field.name}.", here)
        else:
            shown = "" if nested else code(value)
            yield f"`{prefix}{field.name}`", wanted(kinds[field.name], here), shown, docs.get(field.name, "")


def settings() -> None:
    """Write the reference of all settings that are no agent's own."""
    parts = [
        "# Settings\n",
        "Every setting has its type and range where it is declared. Python, `config.json` and the command line read it "
        "there, so a wrong value is the same error at each of these doors. Generated from the code.\n",
        "An option is the setting's name with dashes: `--loop.eval-every 0`, `--task.reward-scale 10`. The settings of "
        "an agent, `--config.FIELD`, are on the agent's [page](agents/index.md).\n",
    ]
    for cls, place in ((RunConfig, ""), (LoopConfig, "loop."), (TaskConfig, "task."), (OnlineConfig, "config.online.")):
        parts += [f"## {cls.__name__}\n", f"{inspect.getdoc(cls)}\n"]
        rows = list(fields_of(cls))
        parts += [f"On the command line: `--{place.replace('_', '-')}NAME`.\n" * bool(place)]
        parts += [table(("setting", "type and range", "default", "meaning"), rows)]
    parts += ["## Task\n", f"{inspect.getdoc(Task)} No option: `o2o.envs.register` gives one to an environment.\n"]
    parts += [table(("setting", "type and range", "default", "meaning"), fields_of(Task))]
    write(OUT / "settings.md", "\n".join(parts))


# Command line


def commands(known: Mapping[str, Any] = cli.COMMANDS, before: str = "o2o") -> Iterator[tuple[str, Callable[..., int]]]:
    """Yield every command, such as `o2o data list`, and its function."""
    for name, item in known.items():
        if callable(item):
            yield f"{before} {name}", cast(Callable[..., int], item)
        else:
            yield from commands(item, f"{before} {name}")


def command_line() -> None:
    """Write the reference of the command line."""
    parts = ["# Command line\n", f"{cli.ABOUT} Generated from the code; `o2o COMMAND --help` says the same.\n"]
    listed = [(f"[`{name}`](#{name.replace(' ', '-')})", cli.first_line(function)) for name, function in commands()]
    parts += [table(("command", "what it does"), listed)]
    parts += [f"```text\n{cli.EXAMPLES['o2o'].strip()}\n```\n"]
    for name, function in commands():
        said = docstring_parser.parse(inspect.getdoc(function) or "")
        meaning = {param.arg_name: param.description or "" for param in said.params}
        kinds, rows = typing.get_type_hints(function, include_extras=True), []
        for param in inspect.signature(function).parameters.values():
            kind = kinds[param.name]
            if dataclasses.is_dataclass(param.default):
                group = fields_of(type(param.default))
                rows += [(f"`--{name.strip('`').replace('_', '-')}`", *rest) for name, *rest in group]
                continue
            positional = get_origin(kind) is Annotated and get_args(kind)[1] is get_args(cli.Name[int])[1]
            option = param.name.upper() if positional else f"--{param.name.replace('_', '-')}"
            rows.append((f"`{option}`", wanted(kind), code(param.default), meaning.get(param.name, "")))
        parts += [f"## {name}\n", f"{said.short_description}\n", f"{said.long_description or ''}\n"]
        parts += [table(("argument", "type and range", "default", "meaning"), rows)]
        if function is cli.train:
            parts += [f"```text\n{cli.TRAIN_HELP.strip()}\n```\n"]
            parts += ["All settings of a run are options: see [settings](settings.md) and [agents](agents/index.md).\n"]
    write(OUT / "cli.md", "\n".join(parts))


# Agents


def flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of a dataclass of settings by dotted name."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from flat(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value


def preset_values(kind: Any, family: str, size: str) -> dict[str, Any]:
    """Return all that a preset says, by name."""
    preset = kind.preset(family, size)
    values: dict[str, Any] = {f"config.{name}": value for name, value in flat(preset.config)}
    values |= {"offline_steps": preset.offline_steps, "online_steps": preset.online_steps}
    values |= {"reward scale, bias": preset.reward, "normalize_returns": preset.normalize_returns}
    values |= {"only_successes": preset.only_successes, "data_share": preset.data_share}
    return values | dict(preset.run)


def presets(kind: Any) -> str:
    """Return the table of what the presets of an agent set: families with equal settings share a column."""
    columns: dict[str, dict[str, Any]] = {}
    for size in ("paper", "small"):
        groups: list[tuple[list[str], dict[str, Any]]] = []
        for family in FAMILIES:
            values = preset_values(kind, family, size)
            same = next((names for names, others in groups if repr(others) == repr(values)), None)
            if same is None:
                groups.append(([family], values))
            else:
                same.append(family)
        columns |= {f"`{size}`: {', '.join(names)}": values for names, values in groups}
    defaults = {f"config.{name}": value for name, value in flat(type(kind.preset("other", "paper").config)())}
    names = list(dict.fromkeys(name for values in columns.values() for name in values))
    rows = []
    for name in names:
        found = [values.get(name) for values in columns.values()]
        same = len({repr(value) for value in found}) == 1
        if same and (repr(found[0]) == repr(defaults.get(name)) or not any(found)):
            continue
        rows.append((f"`{name}`", *("-" if value is None else code(value) for value in found)))
    return table(("setting", *columns), rows)


def methods(agents: Iterable[str]) -> dict[str, set[str]]:
    """Return for each committed suite the labels of its methods that are one of `agents`."""
    suites: Mapping[str, Suite] = run_file(ROOT / "benchmarks/suites.py").SUITES
    return {suite.name: {v.label for v in suite.variants if v.agent in agents} for suite in suites.values()}


def measured(agents: Iterable[str], reports: Iterable[Path]) -> str:
    """Return the rows of the committed reports that are of one of `agents`."""
    rows, known = [], methods(agents)
    for report in reports:
        labels = known.get(report.parent.name, set())
        metric, head = "", []
        for line in report.read_text().splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if line.startswith("## "):
                metric, head = line[3:], []
            elif line.startswith("| dataset | dataset's mean"):
                head = cells
            elif head and line.startswith("| `") and cells[2] in labels and "/" in cells[0]:
                found = dict(zip(head, cells, strict=False))
                if metric not in ("Success rate", "Return") or found["n"] == "0" or not found.get("offline", "-"):
                    continue
                link = f"[{report.parent.name}](../results/{report.parent.name}.md)"
                after = found.get("end", "-")
                rows.append((link, cells[0], metric, cells[2], found["n"], cells[1], found["offline"], after))
    success = {(row[0], row[1], row[3]) for row in rows if row[2] == "Success rate"}
    rows = [row for row in rows if row[2] == "Success rate" or (row[0], row[1], row[3]) not in success]
    if not rows:
        return "No committed result of this agent yet.\n"
    head = ("suite", "dataset", "metric", "method", "seeds", "dataset's mean", "offline", "end of the online phase")
    return (
        "Means over seeds with their 95 % bootstrap intervals, `small` presets. The name of a method is that of its "
        "suite, whose report says how it differs and on which data it was measured.\n\n" + table(head, rows)
    )


def linked(text: str) -> str:
    """Return text with papers as links."""
    text = re.sub(r"(?m)^((?:Where|Options|Offline)[^\n|]*)\n(?=- |1\. )", r"**\1**\n\n", text)
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


EQUATION = re.compile(r"(?m)^- `(\w+)`(?: \(([^)]*)\))?:\s+\$([^$]+)\$")
SYMBOLS = (
    "$s, a, r, s'$ are a row of the batch, $m$ its mask (1 - terminated), $\\gamma$ the `discount`. A raised minus "
    "marks a slow copy (`target_*`). $S$ are critics drawn from all $E$, $z$ and $\\epsilon$ noise. Losses are means "
    "over the batch.\n"
)


def equations(kind: Any) -> list[tuple[str, str, str]]:
    """Return the equations in a class's docstring: method, settings that enter, LaTeX."""
    found = EQUATION.findall(inspect.getdoc(kind) or "")
    return [(method, settings, " ".join(latex.split())) for method, settings, latex in found]


def equation_table(kind: Any, page: str) -> str:
    """Return the equations of an agent beside the names that they have in its code."""
    rows = [(f"${latex}$", f"`{method}`", settings) for method, settings, latex in equations(kind)]
    return f"{SYMBOLS}\n" + table(("equation", f"method in `agents/{page}.py`", "settings"), rows)


def agents(reports: list[Path]) -> None:
    """Write a page for each module of agents, and an index."""
    modules: dict[str, list[str]] = {}
    for name, kind in AGENTS.items():
        if kind.__module__.startswith("o2o.agents."):
            modules.setdefault(kind.__module__, []).append(name)
    listed = []
    for module, names in sorted(modules.items(), key=lambda entry: entry[1][0]):
        page = module.rpartition(".")[2]
        head, _, body = (inspect.getdoc(sys.modules[module]) or "").partition("\n")
        listed.append((", ".join(f"[`{name}`]({page}.md)" for name in names), head))
        text = [f"# {', '.join(names)}\n", f"**{linked(head)}**\n", f"{linked(body).strip()}\n"]
        for name in names:
            kind = AGENTS[name]
            own = f" of `{name}`"
            text += [f"## Equations{own}\n", equation_table(kind, page)]
            config = type(kind.preset("other", "small").config)
            text += [
                f"## Settings{own}\n",
                f"`o2o.agents.{config.__name__}`; as an option `--config.NAME`. Nested "
                "`online` is on the page of [settings](../settings.md#onlineconfig).\n",
            ]
            text += [
                table(
                    ("setting", "type and range", "default", "meaning"),
                    fields_of(config, config(), here="../settings.md"),
                )
            ]
            text += [
                f"## Presets{own}\n",
                "Families whose settings are equal share a column. Settings that are the "
                "default everywhere are left out.\n",
                presets(kind),
            ]
        text += ["## Results\n", measured(names, reports)]
        write(OUT / "agents" / f"{page}.md", "\n".join(text))
    names = "\n".join(module.rpartition(".")[2] for module in sorted(modules, key=lambda m: modules[m][0]))
    tree = f"```{{toctree}}\n:hidden:\n:maxdepth: 1\n\n{names}\n```\n"
    about = (
        "Each page is made from the agent's code: its module's docstring, its settings, its presets, and the committed "
        "results. [Which agent when](../../choose.md) helps to choose.\n"
    )
    write(OUT / "agents" / "index.md", "\n".join(["# Agents\n", about, table(("name", "idea"), listed), tree]))


def notebooks() -> None:
    """Write a page for each notebook, as it is committed with its outputs, and an index."""
    listed, folder = [], OUT / "notebooks"
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells, parts = json.loads(path.read_text())["cells"], []
        for number, cell in enumerate(cells):
            parts += [cell["source"] if cell["cell_type"] == "markdown" else f"```python\n{cell['source']}\n```"]
            for place, output in enumerate(cell.get("outputs", [])):
                data = output.get("data", {})
                if "image/png" in data:
                    name = f"{path.stem}-{number}-{place}.png"
                    folder.mkdir(parents=True, exist_ok=True)
                    (folder / name).write_bytes(base64.b64decode(data["image/png"]))
                    parts += [f"![what the cell above draws]({name})"]
                else:
                    parts += [f"```text\n{output.get('text', data.get('text/plain', '')).rstrip()}\n```"]
        parts.insert(1, f"The notebook is `notebooks/{path.name}`.")
        write(folder / f"{path.stem}.md", "\n\n".join(parts) + "\n")
        listed.append((f"[{parts[0].splitlines()[0].removeprefix('# ')}]({path.stem}.md)", f"`notebooks/{path.name}`"))
    names = "\n".join(path.stem for path in sorted((ROOT / "notebooks").glob("*.ipynb")))
    tree = f"```{{toctree}}\n:hidden:\n:maxdepth: 1\n\n{names}\n```\n" * bool(names)
    about = "Each runs in a minute or two on two CPU cores. `notebooks/build.py` makes them, outputs included.\n"
    write(folder / "index.md", "\n".join(["# Notebooks\n", about, table(("notebook", "file"), listed), tree]))


def generate() -> None:
    """Write all pages."""
    reports = results()
    notebooks()
    for name, page in REPOSITORY.items():
        if page.startswith("generated/") and "results" not in name:
            write(DOCS / page, as_page(ROOT / name, DOCS / page))
    settings()
    command_line()
    agents(reports)


def _whole(parser: Any) -> tuple[str, list[str]]:
    """Return a docstring under a field as no type and its text: it is prose, and a colon in it ends no type."""
    return "", parser._dedent(parser._consume_to_end())


def _plain(app: Any, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None) -> Any:
    """Return a signature with types where ranges of settings stand; the settings' own page has those."""
    if signature is None or "Annotated[" not in signature:
        return None
    return re.sub(r"[~.\w]*Annotated\[([~.\w]+), [~.\w]+\([^()]*\)\]", r"\1", signature), returns


def _mathml(as_block: bool) -> Callable[[Any, Any], None]:
    """Return what writes a formula as MathML, which browsers show by themselves: nothing is loaded from elsewhere."""

    def visit(translator: Any, node: Any) -> None:
        translator.body.append(tex2mathml(node.astext(), as_block=as_block))
        raise SkipNode

    return visit


def setup(app: Any) -> dict[str, bool]:
    """Connect to Sphinx."""
    setattr(GoogleDocstring, "_consume_inline_attribute", _whole)  # noqa: B010
    app.add_html_math_renderer("mathml", (_mathml(False), None), (_mathml(True), None))
    app.connect("autodoc-process-signature", _plain)
    app.connect("builder-inited", lambda _: generate())
    return {"parallel_read_safe": True}
