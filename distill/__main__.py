"""`python -m distill` and `accelerate launch -m distill`."""

from distill.app.cli import entry

entry()
