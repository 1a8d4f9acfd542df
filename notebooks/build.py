"""Run the notebooks' sources, and write them with their outputs as .ipynb.

    python notebooks/build.py                        # all of them
    python notebooks/build.py notebooks/1_fine_tune.py

A source is Python with `# %%` before every cell and `# %% [markdown]` before text. Its first code cell has the
settings. Cells run in a new folder, where they may write. No kernel is needed, so the outputs are those of
plain Python: what is printed, the last value, and figures as PNG.
"""

import ast
import base64
import contextlib
import importlib.util
import io
import json
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DPI = 72


def cells_of(source: str) -> Iterator[tuple[str, str]]:
    """Yield kind (`markdown` or `code`) and text of every cell of a source."""
    for part in re.split(r"(?m)^# %%", source)[1:]:
        head, _, text = part.partition("\n")
        if "[markdown]" in head:
            yield "markdown", "\n".join(line.removeprefix("#").removeprefix(" ") for line in text.strip().splitlines())
        else:
            yield "code", text.strip()


def picture(figure: Any) -> dict[str, Any]:
    """Return a Matplotlib figure as an output."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI, bbox_inches="tight")
    png = base64.b64encode(stream.getvalue()).decode()
    return {"output_type": "display_data", "data": {"image/png": png, "text/plain": "<Figure>"}, "metadata": {}}


def run_cell(text: str, scope: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Run one cell and return its outputs, as Jupyter would show them."""
    from matplotlib import pyplot
    from matplotlib.figure import Figure

    tree = ast.parse(text)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "<cell>", "exec"), scope)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), scope)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs += [{"output_type": "stream", "name": "stdout", "text": printed.getvalue()}]
    if isinstance(value, Figure):
        outputs += [picture(value)]
    elif value is not None:
        shown = {"text/plain": value if isinstance(value, str) else repr(value)}
        outputs += [{"output_type": "execute_result", "execution_count": count, "data": shown, "metadata": {}}]
    for number in pyplot.get_fignums():
        outputs += [picture(pyplot.figure(number))]
    pyplot.close("all")
    return outputs


def run(source: str, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Run a source from top to bottom and return the notebook. `settings` replace those of its first code cell.

    A warning is an error.
    """
    import matplotlib

    matplotlib.use("Agg")
    notebook: list[dict[str, Any]] = []
    scope: dict[str, Any] = {"__name__": "__main__"}
    count = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module="gymnasium|gymnasium_robotics|minari|google|jax2onnx|onnx")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        for kind, text in cells_of(source):
            cell: dict[str, Any] = {"cell_type": kind, "id": f"cell-{len(notebook)}", "metadata": {}, "source": text}
            if kind == "code":
                count += 1
                cell |= {"execution_count": count, "outputs": run_cell(text, scope, count)}
                if count == 1:
                    scope.update(settings or {})
            notebook.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": notebook, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def main() -> None:
    """Run the named sources, or all, and write their notebooks."""
    names = [Path(name).resolve() for name in sys.argv[1:]]
    for path in names or sorted(HERE.glob("[0-9]_*.py")):
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            notebook = run(path.read_text())
        out = path.with_suffix(".ipynb")
        out.write_text(json.dumps(notebook, indent=1) + "\n")
        print(f"wrote {os.path.relpath(out)}: {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    if importlib.util.find_spec("o2o") is None:
        sys.path.insert(0, str(HERE.parent))
    main()
