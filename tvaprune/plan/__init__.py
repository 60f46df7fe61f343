"""Decide, and write the decision down.

In: masks. Out: `keep_plan.KeepPlan`, the indices that stay and their factors, under `widths.WidthRules`; the threshold
for an exact sparsity is `exact_cut.calibrate`. What a plan does to every weight is `edits.edits_of`.
"""
