"""Sphinx: MyST pages, the API by autodoc, and pages that `generate.py` makes from the code before every build."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # the extension in generate.py
sys.path.insert(0, str(Path(__file__).parents[1]))

import o2o

project = "o2o"
author = "The authors of o2o"
version = release = o2o.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "generate"]
exclude_patterns = ["generated/**/scores.csv"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
nitpicky = False

# MyST
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
html_math_renderer = "mathml"  # of generate.py

# autodoc: docstrings are Google style; `name` in single backquotes is code
default_role = "code"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
add_module_names = False

# theme
html_theme = "furo"
html_title = f"o2o {version}"
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False
html_theme_options: dict[str, Any] = {"navigation_with_keys": True}
html_static_path = ["static"]
html_css_files = ["tables.css"]
