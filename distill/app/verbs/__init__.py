"""The verbs of the command line: one file each, found by its name.

A verb has `arguments(parser)` and `run(args) -> exit code`; the first line of its docstring is its help. Heavy imports
happen inside `run`, so that help is instant.
"""
