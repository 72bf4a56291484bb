"""What goes beyond the paper: transforms along the stack, and what may follow the polar factor."""

from teon_optax.contrib._cautious import add_cautious_weight_decay
from teon_optax.contrib._normalize import normalize_matrices
from teon_optax.contrib._normuon import scale_by_normuon
from teon_optax.contrib._slices import orthogonalize_slices

__all__ = [
    "add_cautious_weight_decay",
    "normalize_matrices",
    "orthogonalize_slices",
    "scale_by_normuon",
]
