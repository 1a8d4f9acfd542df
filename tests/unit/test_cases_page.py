"""Pages of runs and suites: what they say is in the files, they load nothing, and names are shown as they are."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from o2o import cli
from o2o.errors import ConfigError
from o2o.report.charts import MOST
from o2o.report.page import EMBEDDED, write_page
from o2o.report.scores import keep
from o2o.report.stats import performance_profile
from o2o.report.suite import BenchTask, Suite, Variant
from o2o.report.suite_report import write_report

VOID = {"meta", "img", "br", "hr", "input"}
EVIL = '<img src=x onerror="alert(1)">&amp;'


class Page(HTMLParser):
    """A page's elements, its text, and what is open."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.charts: list[dict[str, str | None]] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.cells: list[list[str]] = []
        self.text = path.read_text()
        self.feed(self.text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        self.links += [str(found[name]) for name in ("src", "href") if name in found]
        assert not [name for name in found if name.startswith("on")], f"{tag} has a handler"
        if "data-points" in found:
            self.charts.append(found)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "td" in self.open or "th" in self.open:
            self.cells[-1][-1] += data

    def values(self, name: str) -> dict[float, str]:
        """Return step to text of the only line of the chart of a name."""
        (found,) = [chart for chart in self.charts if chart["aria-label"] == name]
        return {float(step): rows[0][1] for _, step, rows in json.loads(str(found["data-points"]))}


def write_run(folder: Path, agent: str = "iql", seeds: int = 2, logged: int = 3) -> Path:
    """Write a run folder with known numbers: success of seed s at evaluation e is (s + e) / 4 over four episodes."""
    folder.mkdir(parents=True)
    config: dict[str, Any] = {"format": 3, "agent": agent, "config": {"beta": 3.0, "online": {"utd_ratio": 1}}}
    config |= {"dataset": ["lab/pick-v0"], "env": None, "seed": 0, "seeds": seeds, "preset": "small"}
    (folder / "preset.json").write_text(json.dumps(config))
    config["config"] = {"beta": 5.0, "online": {"utd_ratio": 2}}
    about = {"dataset_summary": {"success": 0.3}, "versions": {"jax": "0.10.2"}, "fingerprint": "ab"}
    (folder / "config.json").write_text(json.dumps({**config, **about}))
    (folder / "status.json").write_text(json.dumps({"status": "finished"}))
    metrics = [
        {"phase": "offline", "env_steps": 0, "gradient_steps": 100 * i, "seed": s, "critic/q": i + 0.5 * s}
        for i in range(1, logged + 1)
        for s in range(seeds)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    places = [("offline", 0, 300), ("warmup", 50, 300), ("online", 100, 400)]
    episodes = [
        {"phase": phase, "env_steps": env, "gradient_steps": updates, "seed": s, "success": k < s + e, "return": 0.0}
        for e, (phase, env, updates) in enumerate(places)
        for s in range(seeds)
        for k in range(4)
    ]
    (folder / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in episodes))
    return folder


def test_page_has_the_numbers(tmp_path: Path) -> None:
    """Charts, table and tiles have the means over seeds of the files."""
    page = Page(write_page(write_run(tmp_path / "run")))
    online = page.values("Success rate, fine-tuning, online")
    assert online == {0: "0.125 [0, 0.25]", 50: "0.375 [0.25, 0.5]", 100: "0.625 [0.5, 0.75]"}
    assert page.values("critic/q") == {100: "1.25 [1, 1.5]", 200: "2.25 [2, 2.5]", 300: "3.25 [3, 3.5]"}
    rows = [row for row in page.cells if row[0] in ("offline", "warmup", "online")]
    assert [row[:5] for row in rows] == [
        ["offline", "0", "300", "8", "0.125 [0, 0.25]"],
        ["warmup", "50", "300", "8", "0.375 [0.25, 0.5]"],
        ["online", "100", "400", "8", "0.625 [0.5, 0.75]"],
    ]
    assert "<dd>0.3<small>mean over its episodes" in page.text and "warm-up ends" in page.text


def test_page_differences(tmp_path: Path) -> None:
    """Settings that differ from the preset stand with both values; the command repeats them."""
    page = Page(write_page(write_run(tmp_path / "my run")))
    assert ["config.beta", "3.0", "5.0"] in page.cells and ["config.online.utd_ratio", "1", "2"] in page.cells
    assert sum(len(row) == 3 and row[0].startswith("config.") for row in page.cells) == 2
    said = "o2o train iql --dataset lab/pick-v0 --preset small --seeds 2 --config.beta 5.0 --config.online.utd-ratio 2"
    assert f"{said} --name &#x27;my run&#x27;" in page.text


def test_page_loads_nothing(tmp_path: Path) -> None:
    """The page names no address and no file but a large video of its folder."""
    run = write_run(tmp_path / "run")
    (run / "small.gif").write_bytes(b"GIF89a")
    (run / "videos").mkdir()
    (run / "videos/a b.mp4").write_bytes(bytes(EMBEDDED + 1))
    page = Page(write_page(run))
    assert "http:" not in page.text and "https:" not in page.text and "url(" not in page.text
    assert sorted(page.links) == ["data:image/gif;base64,R0lGODlh", "videos/a%20b.mp4"]
    assert "link" not in page.tags and page.tags.count("script") == 1


def test_page_escapes_names(tmp_path: Path) -> None:
    """Names with markup are text: of agent, dataset, setting, metric, version and video."""
    run = write_run(tmp_path / "run", agent=EVIL)
    config = json.loads((run / "config.json").read_text())
    config |= {"dataset": [EVIL], "env": EVIL, EVIL: EVIL, "versions": {EVIL: EVIL}}
    (run / "config.json").write_text(json.dumps(config))
    row = {"phase": "offline", "env_steps": 0, "gradient_steps": 1, "seed": 0, f"{EVIL}</script>": 1.0}
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (run / "dataset.json").write_text(json.dumps({"dataset": {"task": {EVIL: EVIL}, "observation": [[[EVIL], [2]]]}}))
    (run / "<b>.gif").write_bytes(b"GIF89a")
    page = Page(write_page(run))
    assert page.tags.count("img") == 1 and "b" not in page.tags[page.tags.index("h1") + 3 :]
    assert sum(EVIL in cell for line in page.cells for cell in line) >= 6
    assert page.tags.count("script") == 1


def test_page_of_a_started_run(tmp_path: Path) -> None:
    """A folder with its settings alone has a page, which says what is not there yet."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"agent": "iql", "dataset": ["a"], "preset": "small"}))
    page = Page(write_page(run))
    assert "None yet" in page.text and "no preset.json" in page.text and not page.charts


def test_page_thins_long_lines(tmp_path: Path) -> None:
    """A line of thousands of rows has at most 200 points, its last one included."""
    page = Page(write_page(write_run(tmp_path / "run", logged=1003)))
    values = page.values("critic/q")
    assert MOST / 2 < len(values) <= MOST and values[100_300] == "1003 [1003, 1004]"


def test_report_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`o2o report` writes where it is told; a folder that is none, or an old-style file, is one line and code 2."""
    run = write_run(tmp_path / "run")
    for args, code in (([str(run), "--out", str(tmp_path / "new/page.html")], 0), ([str(tmp_path / "no")], 2)):
        with pytest.raises(SystemExit) as ended:
            cli.main(["report", *args])
        assert ended.value.code == code
    assert Page(tmp_path / "new/page.html").charts and "no config.json" in capsys.readouterr().err
    (run / "dataset.json").write_text('{"dataset": {"observation": 3}}')
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", str(run)])
    assert ended.value.code == 2 and "other entries than a run writes" in capsys.readouterr().err
    (run / "preset.json").write_text("{")
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", str(run)])
    assert ended.value.code == 2 and "preset.json is not valid JSON" in capsys.readouterr().err


def test_profile_values() -> None:
    """A profile is the share of seeds above each threshold, with an interval that spans what resampling can give."""
    band = performance_profile([[0.0, 1.0], [0.5, 1.0]], [0.0, 0.5, 0.9])
    np.testing.assert_allclose(band.centre, [0.75, 0.5, 0.5])
    assert band.low[0] == 0.5 and band.high[0] == 1.0 and list(band.steps) == [0.0, 0.5, 0.9]
    with pytest.raises(ConfigError, match="at least one score"):
        performance_profile([], [0.0])


def test_suite_page(tmp_path: Path) -> None:
    """A suite's page has its report's tables, the curves of each method in one colour, and the profiles."""
    variants = (Variant("a<b>", "iql"), Variant("two", "td3bc"), Variant("three", "bc"))
    suite = Suite(
        "tiny", f"Which is better? {EVIL}", (BenchTask("x/pen-v0"), BenchTask("x/door-v0")), variants, seeds=2
    )
    for number, cell in enumerate(suite.cells()):
        run = write_run(tmp_path / "runs/tiny" / cell.name)
        if number != 3:  # the first method lacks the second task
            keep(tmp_path / "tiny", cell, run)
    markdown = write_report(suite, tmp_path)
    page = Page(tmp_path / "tiny/report.html")
    tables = [line for line in markdown.read_text().splitlines() if line.startswith("| ")]
    shown = [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in tables]
    assert [row for row in shown if set("".join(row)) != {"-"}] == page.cells
    assert "http" not in page.text and page.tags.count("img") == 0 and page.text.count(EVIL) == 0
    labels = [str(chart["aria-label"]) for chart in page.charts]
    assert labels[0] == "performance profiles" and sum("x/door-v0" in label for label in labels) == 1
    door = page.text[page.text.index("Success rate on x/door-v0") :]
    assert re.findall(r'class="line (c\d)"', door) == ["c1", "c2"], "the colours of the second and third method"
    (profile,) = [json.loads(str(chart["data-points"])) for chart in page.charts if "profiles" in str(chart)]
    assert {row[0] for _, _, rows in profile for row in rows} == {"two", "three"}
    assert (profile[0][2][0][1], profile[-1][2][0][1]) == ("1 [1, 1]", "0 [0, 0]")
