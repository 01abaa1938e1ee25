"""`python -m distill` and `accelerate launch -m distill`."""

import sys

from distill.cli import main

sys.exit(main())
