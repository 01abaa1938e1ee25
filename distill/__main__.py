"""`python -m distill` and `accelerate launch -m distill`."""

import sys

from distill.app.cli import main

sys.exit(main())
