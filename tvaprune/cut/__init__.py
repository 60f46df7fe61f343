"""Keep plan -> narrower model: `slice`, `fold`, `refit`, in this order by `narrow`."""
