"""What a method makes of singular values, for oracles to compare with."""

from collections.abc import Callable
from typing import Any

import numpy as np
import oracles

from teon_optax._polar.coefficients import Method, resolve


def function_of(method: Any) -> Callable[[Any], Any]:
    """The polynomial of singular values that a method is; that of "svd" is one."""
    resolved = resolve(method)
    if resolved is None:
        return np.ones_like
    assert isinstance(resolved, Method)
    return oracles.polynomial(*resolved)
