"""TEON for JAX: Muon whose orthogonalization spans a stack of layers (arXiv 2601.23261)."""

from teon_optax import contrib, rules
from teon_optax._alignment import Alignment, alignment
from teon_optax._momentum import TeonState, scale_by_teon
from teon_optax._orthogonalize import orthogonalize
from teon_optax._plan.plan import Group, Plan
from teon_optax._planning import labels, plan
from teon_optax._polar.coefficients import polar_express
from teon_optax._polar.polar import mode_orthogonalize, polar
from teon_optax._reading.default import default_rules, explain
from teon_optax._rule import Rule
from teon_optax._teon import teon
from teon_optax._version import __version__

__all__ = [
    "Alignment",
    "Group",
    "Plan",
    "Rule",
    "TeonState",
    "__version__",
    "alignment",
    "contrib",
    "default_rules",
    "explain",
    "labels",
    "mode_orthogonalize",
    "orthogonalize",
    "plan",
    "polar",
    "polar_express",
    "rules",
    "scale_by_teon",
    "teon",
]
