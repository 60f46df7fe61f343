"""The comparison of all methods: `grid` says which cells, `cells` measures them, `report` and `page` tell them.

In: the settings of ``tvaprune compare``. Out: a file for each cell, and the report that is made of them. A further
column of the report is a key of `cells.Measurement.measure` and a line in `report`.
"""
