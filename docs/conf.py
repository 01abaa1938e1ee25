"""The documentation as pages: `make docs`. The texts are plain Markdown, readable as they lie; Sphinx only binds them.

The source folder is the repository, so that links between docs/ and the folders' own READMEs are the same everywhere.
"""

project = "depth-distill"
author = "the depth-distill authors"
extensions = ["myst_parser", "sphinx_copybutton"]
root_doc = "docs/contents"
include_patterns = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/**",
    "eval/README.md",
    "students/README.md",
    "recipes/README.md",
    "recipes/*/README.md",
]
exclude_patterns = ["docs/conf.py"]
html_theme = "furo"
html_title = "depth-distill"
html_copy_source = False
html_show_copyright = False
myst_heading_anchors = 4
copybutton_exclude = ".linenos, .gp, .go"
