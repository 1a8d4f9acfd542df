"""What a newcomer reads on a terminal and on the first pages: errors, tables, published lines."""

import json
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from o2o import cli
from o2o.envs import bare
from o2o.errors import ConfigError
from o2o.report.page import curves
from o2o.report.plots import plot_curves
from o2o.report.stats import Band, Curve
from o2o.usage import complaint

RED = "\x1b[31m"
END = "\x1b[0m"


@pytest.mark.parametrize("border", ["│", f"{RED}│{END}"])
def test_coloured_error(border):
    """An error in colours, as on a terminal, says what one without colours says."""
    box = (
        f"{RED}╭─{END} {RED}Unrecognized{END} options ───╮\n{border} Unrecognized options: --tua, 3 {border}\n╰────╯\n"
    )
    assert complaint(box) == "Unrecognized options: --tua, 3"


def test_extra_word_named():
    """A word that is no option is called an argument."""
    assert complaint("╭─ Parsing ─╮\n│ Unrecognized options: runs/b │\n╰───╯") == "unexpected argument: runs/b"


def rows(successes: list[list[float]]) -> str:
    """Return the episodes of an offline and an online evaluation: one list for each seed."""
    place = {"offline": {"env_steps": 0, "gradient_steps": 100}, "online": {"env_steps": 50, "gradient_steps": 150}}
    found = [
        {"phase": phase, **place[phase], "seed": seed, "success": value, "return": value, "score": value}
        for seed, values in enumerate(successes)
        for phase, value in zip(place, values, strict=True)
    ]
    return "".join(json.dumps(row) + "\n" for row in found)


def test_plot_prints_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """`o2o plot` prints what each curve ends at, with an interval where there are several seeds."""
    for name, successes in (("one", [[0.25, 0.5]]), ("two", [[0.2, 0.6], [0.4, 0.8]])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"agent": name, "dataset": ["d"], "seeds": 2}))
        (tmp_path / name / "episodes.jsonl").write_text(rows(successes))
    with pytest.raises(SystemExit) as ended:
        cli.main(["plot", str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(tmp_path / "c.png")])
    assert not ended.value.code
    lines = [line.strip("│ ").split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in line] for line in lines] == [
        ["one", "1", "0.25", "0.5"],
        ["two", "2", "0.3 [0.2, 0.4]", "0.7 [0.6, 0.8]"],
    ]


def test_published_line_in_page():
    """A page's chart draws the published curve dashed, in the method's colour, and names it on hover and below."""
    none = Band(*(np.zeros(0),) * 4)
    ours = Band(np.array([0.0, 9.0]), *(np.array([0.1, 0.2]),) * 3)
    theirs = Band(np.array([0.0, 9.0]), np.array([0.5, 0.7]), np.array([0.4, 0.6]), np.array([0.6, 0.8]))
    shown = {"bc": Curve(none, ours, 2), "fql": Curve(none, ours, 2)}
    page = curves("Success", shown, "success", published={"fql": Curve(none, theirs, 12)})
    assert "fql, published (n=12)" in page and "bc, published" not in page
    assert page.count('class="line c1 published"') == 2 and 'class="band c1 published"' in page  # chart and legend
    assert "&quot;fql, published&quot;, &quot;0.7 [0.6, 0.8]&quot;" in page


@pytest.mark.parametrize(("ends", "panels"), [(["online"], 1), (["online", "offline"], 2), (["offline"], 1)])
def test_lone_evaluation_not_drawn_twice(ends: list[str], panels: int):
    """A lone evaluation before fine-tuning is drawn in its chart alone; one that nothing follows keeps its own."""
    none, once = Band(*(np.zeros(0),) * 4), Band(*(np.full(1, 0.5),) * 4)
    both = Band(np.array([0.0, 9.0]), *(np.array([0.5, 0.6]),) * 3)
    shown = {end: Curve(once, both if end == "online" else none, 2) for end in ends}
    assert curves("Success", shown, "success").count("<figure>") == panels
    assert len(plot_curves(shown, metric="success").axes) == panels


def test_function_without_render_mode():
    """An environment whose function takes no `render_mode` is refused with what to do about it."""
    gym.register("Unseen-v0", lambda: None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="Unseen-v0 cannot be made .* must take `render_mode`"):
        bare("Unseen-v0", {"render_mode": "rgb_array"})
