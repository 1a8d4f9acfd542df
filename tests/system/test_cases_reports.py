"""Reports of real runs: the page at the end of a run, and the command on it, which makes the same run again."""

import html
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from o2o import cli
from o2o.report.tables import end
from o2o.runs import session


def test_page_at_the_end(tiny_run: Callable[..., session.RunConfig], tmp_path: Path) -> None:
    """A run ends with its page. Its command has exactly the settings that the run has, also after a longer resume."""
    fields = [("temperature_init", 0.5), ("log_std_range", (-4.0, 1.0))]
    config = tiny_run("rlpd", fields, seeds=2, online_steps=30, episode_limit=30, env_kwargs=("reset_target=false",))
    run = tmp_path / "my run"
    assert session.train(config, run)
    assert session.resume(run, online_steps=60)
    assert end(run, True, Console(quiet=True)) == 0
    page = (run / "report.html").read_text()
    (said,) = re.findall(r"<pre>(.*?)</pre>", page)
    words = shlex.split(html.unescape(said))
    assert words[:2] == ["o2o", "train"] and "--online-steps 60" in said and "--config.temperature-init 0.5" in said
    path, again = cli.parse_train(words[2], words[3:])
    assert path.name == "my run" and again == session.load_config(run)
    rows = [json.loads(line) for line in (run / "episodes.jsonl").read_text().splitlines()]
    last = [row["success"] for row in rows if row["phase"] == "online" and row["env_steps"] == 60]
    assert f"{sum(last) / len(last):.4g}" in page and "observation" in page
