"""What a method makes of singular values, for oracles to compare with."""

from collections.abc import Callable
from typing import Any

import numpy as np
import oracles

from teon_optax._polar.coefficients import resolve


def function_of(method: Any) -> Callable[[Any], Any]:
    """The polynomial of singular values that a method is; that of "svd" is one."""
    resolved = resolve(method)
    return np.ones_like if resolved is None else oracles.polynomial(*resolved)
