"""Measures of the model object they are given: perplexity, speed, zero-shot accuracy, memory; and what they ran on.

What measures a model knows nothing of pruning; what a run will take, `work`, `update_cost` and `cost` say without one.
"""
