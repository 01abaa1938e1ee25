"""`python -m distill.contracts my_teacher.py`: whether a plug-in keeps the promises that the rest relies on."""

import sys

from distill.app.contracts import CONTRACTS, Contract, Subject, main

__all__ = ["CONTRACTS", "Contract", "Subject", "main"]

if __name__ == "__main__":
    sys.exit(main())
