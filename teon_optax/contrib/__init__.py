"""What goes beyond the paper: transforms along the stack, and what may follow the polar factor."""

from teon_optax.contrib.cautious import add_cautious_weight_decay
from teon_optax.contrib.normalize import normalize_matrices
from teon_optax.contrib.normuon import scale_by_normuon
from teon_optax.contrib.slices import orthogonalize_slices

__all__ = [
    "add_cautious_weight_decay",
    "normalize_matrices",
    "orthogonalize_slices",
    "scale_by_normuon",
]
