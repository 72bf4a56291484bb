"""How alike layers are: what a stack of them may gain, in which mode."""

import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from teon_optax._matrices import to_matrices
from teon_optax._plan import Plan, plan
from teon_optax._rules import Rule
from teon_optax._table import columns, spans

# Of nuclear norms in float32.
_ROUNDING = 1e-5


class Alignment(NamedTuple):
    """How alike the layers of one group are, in the paper's terms: W = U S V^T, (fan_out, fan_in).

    Attributes:
      members: Path of each layer's matrix.
      layers: Their numbers.
      ratios: r of mode 1 and of mode 2, each in [1, sqrt(K)].
      overlaps: Of the left singular vectors (fan_out) and of the right ones (fan_in), in [0, 1].
    """

    members: tuple[str, ...]
    layers: tuple[Any, ...]
    ratios: tuple[float, float]
    overlaps: tuple[float, float]

    @property
    def favoured(self) -> int:
        """The mode with the smaller r; 1, the paper's choice, where rounding hides which it is."""
        first, second = self.ratios
        return 2 if second < first * (1 - _ROUNDING) else 1


class Alignments(tuple[Alignment, ...]):
    """Of every group. `print` shows them as a table."""

    def __str__(self) -> str:
        header = "group", "layers", "u overlap", "v overlap", "r mode 1", "r mode 2", "favours mode"
        rows = [
            (
                group.members[0],
                spans(group.layers),
                *(f"{number:.2f}" for number in (*group.overlaps, *group.ratios)),
                str(group.favoured),
            )
            for group in self
        ]
        return "\n".join(columns([header, *rows])[:-1])


def alignment(momentum: Any, rules: Iterable[Rule] | None = None, rank: int = 1) -> Alignments:
    r"""How alike the layers are that rules stack: which mode, and how many layers, they favour.

    Per group of K layers, in the paper's layout (fan_out, fan_in), kernel_k^T = W_k = U S V^T:

        left overlap  = mean over pairs i < j of |U_i^T U_j|_F^2 / rank, of the leading vectors
        right overlap = the same of V
        r of mode 1   = sum_k |W_k|_* / |[W_1|...|W_K]|_*, by nuclear norms
        r of mode 2   = the same of W_k^T

    r is 1 if the layers' left (mode 2: right) singular spaces are orthogonal, and sqrt(K) if all
    W_k W_k^T (W_k^T W_k) are equal. The smaller r, the better: a step is sure to lower the loss by
    |gradient|_*^2 / 2 L, and Muon's L is at most K times TEON's (arXiv 2601.23261), so that TEON's
    bound is up to K / r^2 times Muon's. Unrelated layers have overlaps near rank / fan_out and
    rank / fan_in.

    Args:
      momentum: Tree of momenta or gradients: `state.mu` of `scale_by_teon`; of `teon`,
        `optax.tree.get(state.inner_states["teon"], "mu")` with the rules of all params.
      rules: As for `plan`. Each run of K >= 2 layers is a group; to compare K, compare K / r^2.
      rank: How many leading singular vectors; at most as many as a layer has are taken.

    Returns:
      A tuple with an `Alignment` per group, in the plan's order. Of groups in a batch (experts),
      overlaps are averaged and nuclear norms summed. r is NaN where all layers are zero.

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
    planned = plan(momentum, rules)
    return Alignments(
        Alignment(group.members, group.layers, *jax.tree.map(float, _measure(stack, rank)))
        for group, stack in zip(planned.groups, _stacks(momentum, planned), strict=True)
        if len(stack) > 1
    )


def _stacks(momentum: Any, planned: Plan) -> Iterator[jax.Array]:
    """The layers of each group, wherever the leaves were: [K, batch, fan_in, fan_out]."""
    leaves = jax.tree.leaves(momentum)
    for kind in planned.types:
        whole = [jax.device_get(leaves[leaf]) for leaf in kind.leaves]
        layers = jnp.concatenate([to_matrices(leaf, kind.layout)[kind.part] for leaf in whole])
        for start in range(0, len(layers), kind.rule.stack):
            yield layers[start : start + kind.rule.stack]


@functools.partial(jax.jit, static_argnames="rank")
def _measure(stack: jax.Array, rank: int) -> tuple[tuple, tuple]:
    """r of modes 1 and 2, overlaps of left and right vectors, of [K, batch, fan_in, fan_out]."""
    stack = stack.astype(np.promote_types(stack.dtype, np.float32))
    # Of kernels: the paper's right vectors come first.
    right, singular_values, left = jnp.linalg.svd(stack, full_matrices=False)
    joint = [jnp.linalg.svd(_joined(stack, axis), compute_uv=False) for axis in (-2, -1)]
    ratios = tuple(jnp.sum(singular_values) / jnp.sum(values) for values in joint)
    return ratios, (_overlap(jnp.matrix_transpose(left), rank), _overlap(right, rank))


def _overlap(vectors: jax.Array, rank: int) -> jax.Array:
    """Mean over pairs of |A_i^T A_j|_F^2 / rank, of the first columns of [K, batch, d, vectors].

    With A = [A_1|...|A_K], the sum of s^4 over its singular values is |A^T A|_F^2: K times rank on
    the diagonal, and each pair twice.
    """
    leading = vectors[..., :rank]
    K, rank = len(leading), leading.shape[-1]
    singular_values = jnp.linalg.svd(_joined(leading, -1), compute_uv=False)
    total = jnp.mean(jnp.sum(singular_values**4, axis=-1))
    return jnp.clip((total / (K * rank) - 1) / (K - 1), 0, 1)


def _joined(stack: jax.Array, axis: int) -> jax.Array:
    return jnp.concatenate(list(stack), axis=axis)
