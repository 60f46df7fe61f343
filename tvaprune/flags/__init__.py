"""Every flag, and nothing else: typed, with its help and its checks.

In: a command line. Out: `arguments.Arguments`, the flags by the stage they belong to. A new flag is a field of a class
in `settings` and a row in ``tests/flags``.
"""
