"""Which units stay.

In: a model, training text. Out: a mask file for every target, by gates (`trainer`) or by a one-shot score (`scores`).
A new score is a function in `scores`, an entry of its table, and a value of ``--prune_method``.
"""
