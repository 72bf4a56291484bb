"""What an update costs each of n devices, by formulas: docs/at_scale.md has them and their symbols.

    python -m benchmarks.cost_model

prints the table for a LLaMA of 70 billion parameters. Shares no code with the library, and is held
to compiled programs by a test.
"""

import functools
import math
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from benchmarks import results

# d -> joint lengths N of all groups whose Gram matrices are d x d
Groups = Mapping[int, Sequence[int]]


class Cost(NamedTuple):
    """Of one update, for one device.

    Attributes:
      bytes: Out of collectives.
      wire: Bytes sent, where collectives go round a ring.
      flops: Multiplications and additions of products.
    """

    bytes: float
    wire: float
    flops: float


class Row(NamedTuple):
    """One slot of every device: groups of length N, each shared by so many devices."""

    N: int
    share: int


def transformer(
    d: int, hidden: int, depth: int, K: int = 2, kv: int | None = None, gated: bool = True
) -> Groups:
    """Groups of a network whose queries, keys and values are taken in runs of K layers.

    Args:
      d: Width.
      hidden: Of the MLP.
      depth: Number of blocks; K divides it.
      K: Layers of a run.
      kv: fan_out of keys and values, if not d.
      gated: Whether the MLP has three matrices, or two.
    """
    runs, kv = depth // K, kv or d
    groups: dict[int, list[int]] = {}
    # Of M (fan_in, fan_out) mode 1 shares fan_out, so the joint matrix is fan_out x K fan_in.
    for count, short, long in (
        (runs, d, K * d),
        (2 * runs, min(kv, K * d), max(kv, K * d)),
        (depth, d, d),
        ((3 if gated else 2) * depth, d, hidden),
    ):
        groups.setdefault(short, []).extend([long] * count)
    return groups


def cost(groups: Groups, n: int, steps: int = 5, exact: bool = True, replicas: int = 1) -> Cost:
    """Computes the cost by the formulas of docs/at_scale.md.

    Args:
      groups: What is orthogonalized.
      n: Devices.
      steps: Of the polynomial, S.
      exact: Whether products are float32 (CPU), or one-pass (TPU, GPU), which takes more segments.
      replicas: Of each shard: 1, or how many devices have the same one.
    """
    exchanged = reduced = reduced_wire = flops = 0.0
    for d, lengths in groups.items():
        for row in deal(d, tuple(sorted(lengths, reverse=True)), n, steps, exact):
            exchanged += 2 * 4 * d * row.N / row.share if n > 1 else 0
            if row.share > 1:
                sums = segments(d, row.N / row.share, steps, exact) * 4 * d**2 / 2
                reduced += sums
                reduced_wire += 2 * (row.share - 1) / row.share * sums
            flops += products(d, row.N / row.share, steps, exact)
    parameters = sum(d * sum(lengths) for d, lengths in groups.items())
    gathered = 4 * parameters * replicas / n if replicas > 1 else 0
    wire = (n - 1) / n * exchanged + reduced_wire + (replicas - 1) / replicas * gathered
    return Cost(exchanged + reduced + gathered, wire, flops)


def segments(d: int, columns: float, steps: int, exact: bool) -> int:
    """Counts k, how often Gram matrices are formed."""
    if columns < 1.5 * d:
        return steps
    if exact:
        return math.ceil(steps / 5)
    return steps // 2 if joins_an_odd_step(d, columns) else math.ceil(steps / 2)


def joins_an_odd_step(d: int, columns: float) -> bool:
    """Tells where three of the last one-pass steps are one segment, at a product more."""
    return columns > 2 * d and d >= 64


def products(d: int, columns: float, steps: int, exact: bool) -> float:
    """FLOPs of a device that has so many columns of a group."""
    if columns < d:
        return 6 * steps * d**2 * columns
    # Of one-pass products, a last segment of three steps takes one product more.
    more = not exact and joins_an_odd_step(d, columns) and steps % 2 == 1
    return (
        2 * d**3 * (4 * steps + segments(d, columns, steps, exact) * (2 * columns / d - 3) + more)
    )


@functools.cache
def deal(d: int, lengths: tuple[int, ...], n: int, steps: int, exact: bool) -> list[Row]:
    """Deals groups, from the longest to the shortest, into the rows that have the fewest FLOPs."""
    best: list[tuple[float, list[Row]]] = [(0.0, [])]
    for left in range(1, len(lengths) + 1):  # the last `left` groups
        rest = lengths[len(lengths) - left :]
        options = []
        for share in (share for share in range(1, n + 1) if n % share == 0):
            taken = min(n // share, left if share == 1 else rest.count(rest[0]))
            flops, rows = best[left - taken]
            own = products(d, rest[0] / share, steps, exact)
            options.append((flops + own, [Row(rest[0], share), *rows]))
        best.append(min(options))
    return best[-1][1]


def main() -> None:
    """Prints the table of docs/at_scale.md."""
    groups = transformer(8192, 28672, 80, kv=1024)
    rows = []
    for n in (1, 64, 256, 1024, 4096):
        for replicas in (1, 16) if n >= 256 else (1,):
            found = cost(groups, n, exact=False, replicas=replicas)
            figures = (found.bytes / 1e9, found.wire / 1e9, found.flops / 1e12)
            rows.append([f"{n:,}", str(replicas), *(f"{figure:,.4g}" for figure in figures)])
    print(results.markdown(["devices", "replicas", "GB out", "wire GB", "TFLOPs"], rows))


if __name__ == "__main__":
    sys.exit(main())
