"""Which leaves are orthogonalized, and how: rules, and what a parameter tree shows."""
