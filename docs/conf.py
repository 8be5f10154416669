"""The site: `make docs` builds it from these pages, offline, with search."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import generate
from sphinx.application import Sphinx

from agft_ray import __version__

project, author, version = "agft_ray", "the agft_ray authors", __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 4
exclude_patterns = ["images"]
default_role = "code"
add_module_names = False
autodoc_typehints = "none"
autodoc_member_order = "bysource"
html_theme = "furo"
html_title = f"agft_ray {__version__}"


def setup(app: Sphinx) -> None:
    """Have the generated pages written, and links of the repository lead into the site."""
    app.connect("builder-inited", lambda app: generate.write(Path(app.srcdir)))
    app.connect("source-read", generate.point_links_into_the_site)
