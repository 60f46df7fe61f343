"""Keep plan -> narrower model: `slice`, `fold`, `refit`, `reconstruct`, in this order by `narrow`.

Out of core `stream` does the same.
"""
