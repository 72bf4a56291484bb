"""How alike layers are: what a stack of them may gain, in which mode."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from teon_optax._memory import widened
from teon_optax._plan.batches import pieces_of
from teon_optax._plan.layout import to_matrices
from teon_optax._plan.plan import Plan
from teon_optax._plan.report import anonymous, columns, spans
from teon_optax._planning import plan, rules_of
from teon_optax._rule import Rule

# Relative rounding error of nuclear norms in float32.
_ROUNDING = 1e-5


class Alignment(NamedTuple):
    """Says how alike a group's layers are, in the paper's terms: W = U S V^T, (fan_out, fan_in).

    Attributes:
      members: Path of each layer's matrix.
      layers: Their numbers.
      ratios: r of mode 1 and of mode 2, each in [1, sqrt(K)].
      overlaps: How much the left singular vectors (fan_out) and the right ones (fan_in) of layers
        agree, each in [0, 1].
    """

    members: tuple[str, ...]
    layers: tuple[Any, ...]
    ratios: tuple[float, float]
    overlaps: tuple[float, float]

    @property
    def favoured(self) -> int:
        """Gives the mode of the smaller r, or the paper's, 1, where rounding hides which it is."""
        first, second = self.ratios
        return 2 if second < first * (1 - _ROUNDING) else 1

    @property
    def hurdles(self) -> tuple[float, float]:
        """Computes (r^2 - 1) / (K - 1) of mode 1 and of mode 2, each in [0, 1]; see `alignment`."""
        first, second = ((r * r - 1) / (len(self.members) - 1) for r in self.ratios)
        return first, second


class Alignments(tuple[Alignment, ...]):
    """Holds the alignment of every group. `print` shows them as a table."""

    @property
    def favoured(self) -> dict[str, tuple[int, int]]:
        """Finds mode and K of each series' lowest hurdle, in the mean over its runs of K layers.

        Mode 1 and the larger K, where rounding hides which it is.
        """
        hurdles: dict[str, dict[tuple[int, int], list[float]]] = {}
        for group in self:
            of_series = hurdles.setdefault(anonymous(group.members[0]), {})
            for mode, hurdle in enumerate(group.hurdles, 1):
                of_series.setdefault((mode, len(group.members)), []).append(hurdle)

        def order(item: tuple[tuple[int, int], list[float]]) -> tuple[float, int, int]:
            (mode, K), found = item
            return round(float(np.nan_to_num(np.mean(found), nan=1.0)), 4), mode, -K

        return {series: min(found.items(), key=order)[0] for series, found in hurdles.items()}

    def __str__(self) -> str:
        header = "group", "layers", "u overlap", "v overlap", "r mode 1", "r mode 2", "favours mode"
        rows: list[tuple[str, ...]] = [header]
        for group in self:
            numbers = (f"{number:.2f}" for number in (*group.overlaps, *group.ratios))
            rows.append((group.members[0], spans(group.layers), *numbers, str(group.favoured)))
        lines = columns(rows)
        if len({len(group.members) for group in self}) > 1:
            favoured = [(series, str(mode), str(K)) for series, (mode, K) in self.favoured.items()]
            lines += columns([("series", "favours mode", "K"), *favoured])
        return "\n".join(lines[:-1])


def alignment(
    momentum: Any,
    rules: Iterable[Rule] | None = None,
    rank: int = 1,
    stacks: Iterable[int] | None = None,
) -> Alignments:
    r"""Measures how alike stacked layers are: which mode, and how many layers, they favour.

    Per group of K layers, in the paper's layout (fan_out, fan_in), kernel_k^T = W_k = U S V^T:

        left overlap  = mean over pairs i < j of |U_i^T U_j|_F^2 / rank, of the leading vectors
        right overlap = the same of V
        r of mode 1   = sum_k |W_k|_* / |[W_1|...|W_K]|_*, by nuclear norms
        r of mode 2   = the same of W_k^T

    r is 1 if the layers' left (mode 2: right) singular spaces are orthogonal, and sqrt(K) if all
    W_k W_k^T (W_k^T W_k) are equal. The smaller r, the better. A step is sure to lower the loss by
    |gradient|_*^2 / 2 L in the norm that it is steepest in: TEON's dual norm is Muon's over r, and
    Muon's L is 1 to K times TEON's (arXiv 2601.23261), so TEON's bound is 1 / r^2 to K / r^2 times
    Muon's: never worse at r = 1, never better at r = sqrt(K). It is the better one where the L
    differ by more than r^2; the hurdle (r^2 - 1) / (K - 1) is the share of their range below that,
    and can be compared between modes and between K. Unrelated layers have overlaps near
    rank / fan_out and rank / fan_in.

    Args:
      momentum: Tree of momenta or gradients: `state.mu` of `scale_by_teon`; of `teon`,
        `optax.tree.get(state.inner_states["teon"], "mu")` with the rules of all params.
      rules: The first rule whose pattern is found in a leaf's path takes it; None means
        `default_rules(momentum)`. Each run of K >= 2 layers is a group.
      rank: How many leading singular vectors; at most as many as a layer has are taken.
      stacks: Several K to measure instead of that of each rule with K >= 2; None is the rules' own.

    Returns:
      A tuple with an `Alignment` per group, in the plan's order; its `favoured` has the mode and K
      of each series. Of groups in a batch (experts), overlaps are averaged and nuclear norms
      summed. r is NaN where all layers are zero.

    Raises:
      ValueError: If `rank` is not a positive integer, or rules do not fit the tree.

    Examples:
      >>> import jax.numpy as jnp
      >>> from teon_optax import Rule, alignment
      >>> outputs = jnp.eye(2)  # each layer: the same input (v), an output (u) of its own
      >>> kernels = [jnp.outer(jnp.ones(3), u) for u in outputs]
      >>> momentum = {f"block_{i}": {"query": kernel} for i, kernel in enumerate(kernels)}
      >>> print(alignment(momentum, [Rule(r"block_(?P<layer>\d+)/query", stack=2)]))
      group          layers  u overlap  v overlap  r mode 1  r mode 2  favours mode
      block_0/query     0-1       0.00       1.00      1.00      1.41             1
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"`alignment(rank={rank!r})`: rank should be a positive integer.")
    every_K = [None] if stacks is None else _checked_stacks(stacks)
    rules = rules_of(momentum, rules)
    plans = [plan(momentum, [_at(K, rule) for rule in rules]) for K in every_K]
    return Alignments(
        Alignment(group.members, group.layers, *jax.tree.map(float, _measure(stack, rank)))
        for planned in plans
        for group, stack in zip(planned.groups, _stacks(momentum, planned), strict=True)
        if len(stack) > 1
    )


def _checked_stacks(stacks: Any) -> tuple[int, ...]:
    """Makes a tuple of the K that are asked about, or raises if one is no positive integer."""
    listed = tuple(stacks) if isinstance(stacks, Iterable) else ()
    if not listed or any(isinstance(K, bool) or not isinstance(K, int) or K < 1 for K in listed):
        raise ValueError(
            f"`alignment(stacks={stacks!r})`: stacks should be positive integers, such as (2, 4)."
        )
    return listed


def _at(K: int | None, rule: Rule) -> Rule:
    """Gives a rule another K, if it stacks layers and another is given."""
    return rule if K is None or rule.stack < 2 else dataclasses.replace(rule, stack=K)


def _stacks(momentum: Any, planned: Plan) -> Iterator[np.ndarray]:
    """Collects the layers of each group, wherever the leaves were: [K, batch, fan_in, fan_out]."""
    leaves = jax.tree.leaves(momentum)
    for series in planned.series:
        held = {i: to_matrices(jax.device_get(leaves[i]), series.layout) for i in series.leaves}
        every = pieces_of(series, 0, series.depth)
        matrices = np.concatenate([held[p.leaf][p.part][p.start : p.stop] for p in every])
        K = series.rule.stack * series.coupled
        # Parts that are not coupled come first among what is alone; the plan has groups for each.
        for part in np.split(matrices, series.alone // series.experts, axis=1):
            for start in range(0, len(part), K):
                yield _of_size_one(part[start : start + K])


def _of_size_one(stack: np.ndarray) -> np.ndarray:
    """Divides a stack by its largest magnitude: the measures do not depend on it.

    Devices would flush numbers of 1e-38 to zero, and squares of 1e20 are not finite.
    """
    wide = widened(stack)
    return wide / (np.max(np.abs(wide)) or 1)


@functools.partial(jax.jit, static_argnames="rank")
def _measure(
    stack: np.ndarray, rank: int
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, jax.Array]]:
    """Measures stacks of layers [K, batch, fan_in, fan_out].

    Returns r of modes 1 and 2, and the overlaps of left and of right vectors.
    """
    # Of kernels: the paper's right vectors come first.
    right, singular_values, left = jnp.linalg.svd(stack, full_matrices=False)
    joint = [jnp.linalg.svd(jnp.concatenate(stack, axis), compute_uv=False) for axis in (-2, -1)]
    ratios = tuple(jnp.sum(singular_values) / jnp.sum(values) for values in joint)
    return ratios, (_overlap(jnp.matrix_transpose(left), rank), _overlap(right, rank))


def _overlap(vectors: jax.Array, rank: int) -> jax.Array:
    """Averages |A_i^T A_j|_F^2 / rank over pairs, of the first columns of [K, batch, d, vectors].

    With A = [A_1|...|A_K], the sum of s^4 over its singular values is |A^T A|_F^2: K times rank on
    the diagonal, and each pair twice.
    """
    leading = vectors[..., :rank]
    K, rank = len(leading), leading.shape[-1]
    singular_values = jnp.linalg.svd(jnp.concatenate(leading, axis=-1), compute_uv=False)
    total = jnp.mean(jnp.sum(singular_values**4, axis=-1))
    return jnp.clip((total / (K * rank) - 1) / (K - 1), 0, 1)
