"""Measures of the model object they are given: perplexity, speed, zero-shot accuracy, memory; and what they ran on.

They know nothing of pruning.
"""
