"""The pages as a site: `make docs`. The source is the whole clone, so that links between README, CONTRIBUTING and docs/
are the same here as where the files are read one by one. Warnings are errors: a link, an anchor or a reference that
leads nowhere ends the build.
"""

import importlib.metadata
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # the extension from_code.py

project = "oasis_jax"
author = "the authors of oasis_jax"
release = version = importlib.metadata.version("oasis_jax")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "from_code"]
root_doc = "docs/index"
include_patterns = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/*.md",
    "docs/*.ipynb",
    "docs/results/*/results.md",
]
html_theme = "furo"
html_title = f"oasis_jax {release}"
html_extra_path = ["root"]  # the site's own index.html, which leads to docs/index.html

# Markdown
myst_heading_anchors = 3
# The notebook is stored without outputs and runs as the site is built.
nb_execution_mode = "force"
nb_execution_timeout = 600  # seconds a cell
nb_execution_raise_on_error = True

# Docstrings are Google's; what stands in backticks is a name or a piece of code.
default_role = "py:obj"
napoleon_numpy_docstring, napoleon_use_ivar = False, True
autodoc_typehints_format = "short"
autodoc_default_options = {"special-members": "__call__"}
python_maximum_signature_line_length = 100
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # those of Flax
autodoc_preserve_defaults = True
