"""How leaves enter the exchange, and which device owns which groups."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from jax.sharding import PartitionSpec

from teon_optax._groups.layout import Layout

# Of a mesh: along fan_in and fan_out, or along d and N.
Axes = tuple[tuple[str, ...], tuple[str, ...]]
# Of a d x N group for one device, from d, N and the number of devices that share it.
CostFunction = Callable[[int, int, int], float]


class Entry(NamedTuple):
    """How a leaf enters: cut along every axis of the mesh.

    Attributes:
      spec: Of the leaf.
      layout: Of one device's shard.
      axes: Of the mesh, in its order, along fan_in and fan_out. Devices along others have groups of
        their own.
    """

    spec: PartitionSpec
    layout: Layout
    axes: Axes


class Block(NamedTuple):
    """What every device holds of some equal groups: an array [count, d / .., N / ..]."""

    count: int
    d: int
    N: int
    axes: Axes  # along d, along N


class Hand(NamedTuple):
    """Rows of a deal that are alike; a row has a slot for every device.

    With `share` = s, s devices in a row take one group, each of them N / s of its columns.
    """

    d: int
    width: int  # N of the widest group, and a little more where that does not divide evenly
    share: int
    rows: int
    members: tuple[tuple[int, int, int], ...]  # groups start to stop of a block, slot by slot


class Exchange(NamedTuple):
    """Who owns which groups."""

    sizes: tuple[tuple[str, int], ...]  # of the axes of the mesh that take part, in its order
    blocks: tuple[Block, ...]
    hands: tuple[Hand, ...]

    @property
    def axes(self) -> tuple[str, ...]:
        """Axes of the mesh that take part."""
        return tuple(name for name, _ in self.sizes)

    @property
    def devices(self) -> int:
        """How many devices take part."""
        return math.prod(size for _, size in self.sizes)

    def held(self, index: int) -> tuple[int, int]:
        """(d, N) of what one device holds of a block's group."""
        block, sizes = self.blocks[index], dict(self.sizes)
        return block.d // count(block.axes[0], sizes), block.N // count(block.axes[1], sizes)


def entry(
    layout: Layout, stack: int, given: Sequence[tuple[str, ...]], sizes: Mapping[str, int]
) -> Entry | None:
    """How a leaf enters, or None if it cannot.

    An axis of the mesh stays where it is if groups stay whole or are cut evenly. Others go where
    they can: first along layers and batch, where no group is cut.

    Args:
      layout: Of the whole leaf.
      stack: How many layers a group has.
      given: Along which axes of the mesh each axis of the leaf is cut.
      sizes: Of all axes of the mesh.
    """
    cut: list[tuple[str, ...]] = [()] * len(given)
    left = list(sizes)

    def take(name: str, axes: Sequence[int]) -> None:
        axis = next((a for a in axes if _divides((*cut[a], name), a, layout, stack, sizes)), None)
        if axis is not None:
            cut[axis] += (name,)
            left.remove(name)

    for axis, names in enumerate(given):
        for name in names:
            take(name, [axis])
    for name in tuple(left):
        take(name, (*layout.layer, *layout.batch, *layout.fan_in, *layout.fan_out))
    fan_in, fan_out = (
        tuple(name for name in sizes if any(name in cut[axis] for axis in axes))
        for axes in (layout.fan_in, layout.fan_out)
    )
    shape = tuple(
        length // count(names, sizes) for length, names in zip(layout.shape, cut, strict=True)
    )
    parts = layout.sizes if len(layout.sizes) > 1 else (shape[layout.fan_out[0]],)
    spec = PartitionSpec(*(names or None for names in cut))
    return (
        None if left else Entry(spec, layout._replace(shape=shape, sizes=parts), (fan_in, fan_out))
    )


def _divides(
    names: Sequence[str], axis: int, layout: Layout, stack: int, sizes: Mapping[str, int]
) -> bool:
    """Whether an axis of the leaf can be cut along these axes of the mesh."""
    if axis in layout.heads or (axis == layout.fan_out[0] and len(layout.sizes) > 1):
        return False  # groups need all heads, and the pieces would not be those of fused parts
    unit = stack if axis in layout.layer else 1
    return layout.shape[axis] % (count(names, sizes) * unit) == 0


def plan_exchange(
    blocks: Sequence[Block], sizes: Mapping[str, int], cost: CostFunction
) -> Exchange:
    """Deals groups, those of equal d by their width, so that a device has the least to do.

    Args:
      blocks: What there is to deal.
      sizes: Of the axes of the mesh; every block is cut along all of them.
      cost: What a group costs the device that gets it.
    """
    by_width = sorted(range(len(blocks)), key=lambda index: (blocks[index].d, -blocks[index].N))
    devices, hands = math.prod(sizes.values()), []
    for d, indices in itertools.groupby(by_width, key=lambda index: blocks[index].d):
        groups = [(index, place) for index in indices for place in range(blocks[index].count)]
        widths, start = [blocks[index].N for index, _ in groups], 0
        pieces = [count(blocks[index].axes[1], sizes) for index, _ in groups]
        for share, taken in _rows(widths, pieces, devices, partial(cost, d)):
            hands.append(_row(groups[start : start + taken], blocks, share, sizes))
            start += taken
    return Exchange(tuple(sizes.items()), tuple(blocks), tuple(_merged(hands)))


def _rows(
    widths: Sequence[int], pieces: Sequence[int], devices: int, cost: Callable[[int, int], float]
) -> list[tuple[int, int]]:
    """Rows of the cheapest deal of groups in this order: (devices that share each, groups).

    A row costs what its first, widest, group does. A shared one has groups of one width, padded so
    that each of a group's pieces, of which every device holds one, is cut evenly. Other rows are
    full but for the last: to leave less for the rows after is never worse.
    """
    divisors = [share for share in range(1, devices + 1) if devices % share == 0]
    alike = [0] * len(widths)  # groups from here on of the same width
    for start in reversed(range(len(widths))):
        goes_on = start + 1 < len(widths) and widths[start] == widths[start + 1]
        alike[start] = 1 + (alike[start + 1] if goes_on else 0)
    best: list[tuple[float, int, int]] = [(0.0, 0, 0)]  # of the last 0, 1, 2 .. groups
    for start in reversed(range(len(widths))):
        left, options = len(widths) - start, []
        for share in divisors:
            taken = min(devices // share, left if share == 1 else alike[start])
            width = _padded(widths[start], pieces[start] * share)
            options.append((cost(width, share) + best[left - taken][0], share, taken))
        best.append(min(options))
    rows, left = [], len(widths)
    while left > 0:
        _, share, taken = best[left]
        rows.append((share, taken))
        left -= taken
    return rows


def _row(
    groups: Sequence[tuple[int, int]], blocks: Sequence[Block], share: int, sizes: Mapping[str, int]
) -> Hand:
    """One row, from the (block, place) of its groups."""
    members = []
    for index, run in itertools.groupby(groups, key=lambda group: group[0]):
        places = [place for _, place in run]
        members.append((index, places[0], places[-1] + 1))
    pieces = (count(blocks[index].axes[1], sizes) for index, _, _ in members)
    unit, widest = share * math.lcm(*pieces), blocks[members[0][0]]
    return Hand(widest.d, _padded(widest.N, unit), share, 1, tuple(members))


def _padded(width: int, unit: int) -> int:
    """The next multiple of `unit`."""
    return -(-width // unit) * unit


def count(axes: Sequence[str], sizes: Mapping[str, int]) -> int:
    """How many devices lie along some axes of the mesh."""
    return math.prod(sizes[name] for name in axes)


def _merged(rows: Sequence[Hand]) -> list[Hand]:
    """Rows of one block and no other become one hand."""
    hands: list[Hand] = []
    for row in rows:
        last = hands[-1] if hands else None
        if last and [*map(_only_block, (last, row))] == [row.members[0][0]] * 2:
            (index, start, _), (_, _, stop) = last.members[0], row.members[0]
            hands[-1] = last._replace(rows=last.rows + 1, members=((index, start, stop),))
        else:
            hands.append(row)
    return hands


def _only_block(hand: Hand) -> int | None:
    return hand.members[0][0] if len(hand.members) == hand.share == 1 else None
