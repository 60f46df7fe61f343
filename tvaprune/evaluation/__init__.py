"""Measures of the model object they are given; they know nothing of pruning."""
