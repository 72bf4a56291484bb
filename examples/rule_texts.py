"""Rules as texts, `REGEX:stack=K[,mode=M][,split=N]`: what can be wrong with one by itself.

`teon_optax.Rule` would refuse it too, but needs JAX, which takes seconds to load.
"""

import re
from typing import NamedTuple

from examples.errors import UserError

FORM = "REGEX:stack=K[,mode=M][,split=N]"
# Up to 6 digits: no model has as many layers or parts.
SETTINGS = r"stack=[0-9]{1,6}(,(mode|split)=[0-9]{1,6})*"
MODES = (1, 2, 3)


class RuleText(NamedTuple):
    """What `teon_optax.Rule` is to be called with."""

    pattern: str
    stack: int
    mode: int = 1
    split: int = 1


def read(text: str) -> RuleText:
    """Reads one rule; raises UserError for anything else."""
    pattern, _, settings = text.rpartition(":")
    if not re.fullmatch(SETTINGS, settings) or not pattern:
        raise UserError(f"--rules {text!r} is not {FORM}")
    pairs = re.findall(r"(\w+)=(\d+)", settings)
    numbers = {name: int(value) for name, value in pairs}
    if len(numbers) < len(pairs):
        raise UserError(f"--rules {text!r} says {settings}: write each of stack, mode, split once")
    try:
        groups = re.compile(pattern).groupindex
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"--rules {text!r}: no regular expression: {error}") from error
    rule = RuleText(pattern, **numbers)
    if rule.stack >= 2 and "layer" not in groups:
        raise UserError(
            rf"--rules {text!r} cannot tell which layer a parameter belongs to: put (?P<layer>\d+) "
            r"where its path has the number, as in 'block_(?P<layer>\d+)/attn/query:stack=2'"
        )
    if rule.mode not in MODES:
        raise UserError(f"--rules {text!r}: mode is 1, 2 or 3")
    if rule.split < 1:
        raise UserError(f"--rules {text!r}: split is a number of parts, from 1")
    return rule
