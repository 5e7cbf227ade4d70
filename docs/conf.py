"""Sphinx settings: the pages are Markdown, read by MyST."""

import probe

project = "probe"
author = "The probe authors"
copyright = "2026, the probe authors"  # noqa: A001 (the name that Sphinx reads)
release = probe.__version__

extensions = ["myst_parser"]
exclude_patterns = ["_build", "examples"]
myst_heading_anchors = 3
html_theme = "alabaster"
html_theme_options = {"description": "See what goes in, what comes out and what it attends to, while the Trainer trains."}
