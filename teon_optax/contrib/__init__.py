"""What goes beyond the paper: transforms along the stack, and what may stand around the factor."""

from teon_optax.contrib._cautious import add_cautious_weight_decay
from teon_optax.contrib._hyperball import project_to_sphere, scale_to_param_norm
from teon_optax.contrib._lookahead import LookaheadState, add_lookahead
from teon_optax.contrib._normalize import normalize_matrices
from teon_optax.contrib._normuon import scale_by_normuon
from teon_optax.contrib._qk_clip import clip_qk
from teon_optax.contrib._slices import orthogonalize_slices

__all__ = [
    "LookaheadState",
    "add_cautious_weight_decay",
    "add_lookahead",
    "clip_qk",
    "normalize_matrices",
    "orthogonalize_slices",
    "project_to_sphere",
    "scale_by_normuon",
    "scale_to_param_norm",
]
