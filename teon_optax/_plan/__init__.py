"""Which matrices are orthogonalized together: plans, groups and batches."""
