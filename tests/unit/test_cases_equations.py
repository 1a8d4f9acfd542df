"""Equations in the docstrings of agents: each names a method and settings that exist, and becomes MathML."""

import sys
from pathlib import Path
from typing import Any

import pytest

from o2o.agents import AGENTS

sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))
try:
    generate: Any = pytest.importorskip("sphinx") and pytest.importorskip("generate")
finally:
    sys.path.pop(0)


@pytest.mark.parametrize("name", sorted(AGENTS))
def test_equations_name_the_code(name: str) -> None:
    """Every method and setting beside an equation is one of the agent's; a formula reads as TeX."""
    kind = AGENTS[name]
    if not kind.__module__.startswith("o2o.agents."):
        pytest.skip("another test's agent")
    config = kind.preset("other", "small").config
    known = {field.strip("`") for field, *_ in generate.fields_of(type(config), config)}
    known |= {field for field, _ in generate.flat(config)}
    found = generate.equations(kind)
    assert len(found) >= 2
    for method, settings, latex in found:
        assert hasattr(kind, method), method
        named = {word for word in settings.replace("`", "").split(", ") if word}
        assert named <= known, named - known
        assert generate.tex2mathml(latex).startswith("<math") and "|" not in latex, latex


def test_equations_on_the_page() -> None:
    """A page's table has the formula beside the method's name and the settings."""
    text = generate.equation_table(AGENTS["iql"], "iql")
    row = next(line for line in text.splitlines() if "`actor_loss`" in line)
    assert (
        row.startswith("| $L_\\pi = -\\min(e^{\\beta u}, w) \\log \\pi(a \\mid s)$ |") and "`beta`, `weight_cap`" in row
    )
