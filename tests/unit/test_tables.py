"""Tables on the screen: what is printed of rows whose numbers are known."""

import io

from rich.console import Console

from o2o.report.tables import print_rows


def printed(scores):
    """Return the cells of the return's line, from one list of episode returns per seed."""
    blank = dict.fromkeys(("success", "success_last", "normalized", "length"))
    rows = [{**blank, "seed": seed, "return": value} for seed, part in enumerate(scores) for value in part]
    console = Console(file=io.StringIO(), width=120)
    print_rows(rows, "run", console)
    line = next(line for line in console.file.getvalue().splitlines() if "return" in line)
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_spread_is_sample_deviation():
    """The spread is the sample deviation of the seeds."""
    # means 2, 4, 9: mean 5, squares 9 + 1 + 16 over n - 1 = 2, root of 13
    assert printed([[1.0, 3.0], [4.0, 4.0], [9.0, 9.0]]) == ["return", "5.000", "3.606 (n=3)", "6"]


def test_one_seed_has_no_spread():
    assert printed([[1.0, 3.0]]) == ["return", "2.000", "- (n=1)", "2"]
