"""The site: ``make docs`` builds it from the pages in this folder and the docstrings, into ``build/site``."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import fisher_kernels  # noqa: E402

project = "fisher_kernels"
author = "the fisher_kernels authors"
copyright = "the fisher_kernels authors, BSD-3-Clause"
version = release = fisher_kernels.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "_site.mathml",
    "_site.public_names",
]
exclude_patterns = ["results/*/compare.md", "results/study/*.md"]  # included by results.md

# Pages. Anchors are those that GitHub makes of headings, so that links work in both places.
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 4
suppress_warnings = ["myst.header"]  # CHANGELOG.md and CONTRIBUTING.md are included below a heading of their own

# Docstrings.
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_use_rtype = False  # what is returned begins with a shape, which is no type to link to
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
nitpicky = True
nitpick_ignore_regex = [
    # Types of other projects, whose pages are not fetched.
    (r"py:.*", r"(torch|nn|dist|collections|typing|Any|Iterable|Sequence|Callable|Iterator)\b.*"),
    (r"py:.*", r"(Tensor|Parameter|optional|callable)"),
    (r"py:.*", r"fisher_kernels\.optim\.(base|layerwise)\..*"),
]

# How it looks.
html_theme = "furo"
html_title = "fisher_kernels"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_math_renderer = "mathml"
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b5f8a", "color-brand-content": "#0b5f8a"},
    "dark_css_variables": {"color-brand-primary": "#6cc3ee", "color-brand-content": "#6cc3ee"},
    "top_of_page_buttons": [],
}
pygments_style = "friendly"
pygments_dark_style = "github-dark"
copybutton_exclude = ".linenos, .gp, .go"
