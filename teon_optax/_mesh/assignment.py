"""Decides how leaves enter the exchange, and which device is assigned which groups."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from jax.sharding import PartitionSpec

from teon_optax._plan.batches import MeshAxes
from teon_optax._plan.layout import Layout

# What a d x N group costs each of its devices, from d, N and how many devices share the group.
CostFunction = Callable[[int, int, int], float]


class Cut(NamedTuple):
    """Says how a leaf is cut in the exchange: along every axis of the mesh.

    Attributes:
      spec: How the leaf is cut.
      layout: Layout of the shard that one device holds.
      axes: Axes of the mesh, in its order, that cut fan_in and that cut fan_out. Devices along the
        other axes hold different groups.
    """

    spec: PartitionSpec
    layout: Layout
    axes: MeshAxes


class Slab(NamedTuple):
    """Groups of one shape d x N, d <= N, of which every device holds equal pieces.

    The pieces on one device are an array [count, d / .., N / ..]. `axes` are the axes of the mesh
    that cut d, and those that cut N.
    """

    count: int
    d: int
    N: int
    axes: MeshAxes


class Round(NamedTuple):
    """Says what every device is assigned at once: some whole matrices, or its columns of one.

    Attributes:
      d: The d of every group in the round.
      width: N of its widest group, rounded up so that every group's columns divide evenly.
      devices_per_group: How many devices share a group; each has `width` over this many columns.
      matrices_per_device: How many matrices a device gets; more than one only of a single slab.
      members: (slab, start, stop): groups start to stop of the slab, in the order of devices.
    """

    d: int
    width: int
    devices_per_group: int
    matrices_per_device: int
    members: tuple[tuple[int, int, int], ...]


class ExchangePlan(NamedTuple):
    """Says which device is assigned which groups.

    Attributes:
      sizes: Names and sizes of the axes of the mesh that take part, in the mesh's order.
      slabs: What the devices hold.
      rounds: What the devices are assigned.
    """

    sizes: tuple[tuple[str, int], ...]
    slabs: tuple[Slab, ...]
    rounds: tuple[Round, ...]

    @property
    def axes(self) -> tuple[str, ...]:
        """Lists the axes of the mesh that take part."""
        return tuple(name for name, _ in self.sizes)

    @property
    def devices(self) -> int:
        """Counts the devices that take part."""
        return math.prod(size for _, size in self.sizes)

    def held(self, index: int) -> tuple[int, int]:
        """Gives (d, N) of what one device holds of a group of this slab."""
        slab, sizes = self.slabs[index], dict(self.sizes)
        return slab.d // devices_along(slab.axes[0], sizes), slab.N // devices_along(
            slab.axes[1], sizes
        )


def devices_along(axes: Sequence[str], sizes: Mapping[str, int]) -> int:
    """Counts the devices that lie along these axes of the mesh."""
    return math.prod(sizes[name] for name in axes)


def cut_along_mesh(
    layout: Layout, stack: int, given: Sequence[tuple[str, ...]], sizes: Mapping[str, int]
) -> Cut | None:
    """Cuts a leaf along every axis of the mesh, as it enters the exchange; None if that cannot be.

    An axis of the mesh stays on the leaf's axis that it cuts now, if groups stay whole there or
    are cut evenly. Every other axis of the mesh cuts the first axis of the leaf that it divides:
    layers and batch before fan_in and fan_out, since that cuts no group.

    Args:
      layout: Layout of the whole leaf.
      stack: How many layers a group has.
      given: The axes of the mesh that cut each axis of the leaf.
      sizes: Sizes of all axes of the mesh.
    """
    cuts: list[tuple[str, ...]] = [()] * len(given)
    unplaced = list(sizes)

    def place(name: str, axes: Sequence[int]) -> None:
        fitting = (a for a in axes if _divides((*cuts[a], name), a, layout, stack, sizes))
        axis = next(fitting, None)
        if axis is not None:
            cuts[axis] += (name,)
            unplaced.remove(name)

    for axis, names in enumerate(given):
        for name in names:
            place(name, [axis])
    for name in tuple(unplaced):
        place(name, (*layout.layer, *layout.batch, *layout.fan_in, *layout.fan_out))
    if unplaced:
        return None
    fan_in, fan_out = (
        tuple(name for name in sizes if any(name in cuts[axis] for axis in axes))
        for axes in (layout.fan_in, layout.fan_out)
    )
    shape = tuple(
        length // devices_along(names, sizes)
        for length, names in zip(layout.shape, cuts, strict=True)
    )
    parts = layout.sizes if len(layout.sizes) > 1 else (shape[layout.fan_out[0]],)
    spec = PartitionSpec(*(names or None for names in cuts))
    of_shard = dataclasses.replace(layout, shape=shape, sizes=parts, stored=None)
    return Cut(spec, of_shard, (fan_in, fan_out))


def _divides(
    names: Sequence[str], axis: int, layout: Layout, stack: int, sizes: Mapping[str, int]
) -> bool:
    """Tells whether these axes of the mesh can cut this axis of the leaf."""
    if axis in layout.heads or (axis == layout.fan_out[0] and len(layout.sizes) > 1):
        return False  # Groups need all heads, and a shard would not hold whole fused parts.
    unit = stack if axis in layout.layer else 1
    return layout.shape[axis] % (devices_along(names, sizes) * unit) == 0


def plan_exchange(
    slabs: Sequence[Slab], sizes: Mapping[str, int], cost: CostFunction
) -> ExchangePlan:
    """Assigns groups to devices in rounds, those of equal d by their width, at the least cost.

    Args:
      slabs: What the devices hold.
      sizes: Sizes of the axes of the mesh; every slab is cut along all of them.
      cost: What a group costs each of its devices.
    """
    by_width = sorted(range(len(slabs)), key=lambda index: (slabs[index].d, -slabs[index].N))
    devices, rounds = math.prod(sizes.values()), []
    for d, indices in itertools.groupby(by_width, key=lambda index: slabs[index].d):
        groups = [(index, number) for index in indices for number in range(slabs[index].count)]
        widths, start = [slabs[index].N for index, _ in groups], 0
        pieces = [devices_along(slabs[index].axes[1], sizes) for index, _ in groups]
        for devices_per_group, taken in _cheapest(widths, pieces, devices, partial(cost, d)):
            assigned = groups[start : start + taken]
            rounds.append(_round(assigned, slabs, devices_per_group, sizes))
            start += taken
    return ExchangePlan(tuple(sizes.items()), tuple(slabs), tuple(_merged(rounds)))


def _cheapest(
    widths: Sequence[int], pieces: Sequence[int], devices: int, cost: Callable[[int, int], float]
) -> list[tuple[int, int]]:
    """Finds the cheapest rounds of groups in this order: (devices per group, groups) of each.

    A round costs what its first and widest group costs. Groups that several devices share have
    one width, padded so that each of the group's pieces, of which every device holds one, can be
    cut evenly. A round of whole groups takes as many as there are devices: leaving more groups to
    later rounds is never better. The best rounds of the last n groups follow from those of fewer.

    Args:
      widths: N of each group, the widest first.
      pieces: Into how many pieces the mesh cuts N of each group.
      devices: How many devices there are.
      cost: What a group costs each of its devices, from its width and their number.
    """
    divisors = [count for count in range(1, devices + 1) if devices % count == 0]
    alike = [0] * len(widths)  # How many groups from here on have the same width.
    for start in reversed(range(len(widths))):
        goes_on = start + 1 < len(widths) and widths[start] == widths[start + 1]
        alike[start] = 1 + (alike[start + 1] if goes_on else 0)
    best: list[tuple[float, int, int]] = [(0.0, 0, 0)]  # Of the last 0, 1, 2 .. groups.
    for start in reversed(range(len(widths))):
        left, options = len(widths) - start, []
        for devices_per_group in divisors:
            available = left if devices_per_group == 1 else alike[start]
            taken = min(devices // devices_per_group, available)
            width = _rounded_up(widths[start], pieces[start] * devices_per_group)
            total = cost(width, devices_per_group) + best[left - taken][0]
            options.append((total, devices_per_group, taken))
        best.append(min(options))
    rounds, left = [], len(widths)
    while left > 0:
        _, devices_per_group, taken = best[left]
        rounds.append((devices_per_group, taken))
        left -= taken
    return rounds


def _round(
    groups: Sequence[tuple[int, int]],
    slabs: Sequence[Slab],
    devices_per_group: int,
    sizes: Mapping[str, int],
) -> Round:
    """Makes one round of groups, each given by its slab and its number in the slab."""
    members = []
    for index, run in itertools.groupby(groups, key=lambda group: group[0]):
        numbers = [number for _, number in run]
        members.append((index, numbers[0], numbers[-1] + 1))
    pieces = (devices_along(slabs[index].axes[1], sizes) for index, _, _ in members)
    unit, widest = devices_per_group * math.lcm(*pieces), slabs[members[0][0]]
    width = _rounded_up(widest.N, unit)
    return Round(widest.d, width, devices_per_group, 1, tuple(members))


def _rounded_up(width: int, unit: int) -> int:
    """Rounds a width up to the next multiple of `unit`."""
    return -(-width // unit) * unit


def _merged(rounds: Sequence[Round]) -> list[Round]:
    """Merges consecutive rounds of whole groups of the same single slab into one."""
    merged: list[Round] = []
    for later in rounds:
        earlier = merged[-1] if merged else None
        if earlier and _only_slab(earlier) == _only_slab(later) is not None:
            (index, start, _), (_, _, stop) = earlier.members[0], later.members[0]
            merged[-1] = earlier._replace(
                matrices_per_device=earlier.matrices_per_device + 1,
                members=((index, start, stop),),
            )
        else:
            merged.append(later)
    return merged


def _only_slab(assigned: Round) -> int | None:
    """Finds the slab of a round of whole groups of one slab; None for other rounds."""
    is_single = len(assigned.members) == assigned.devices_per_group == 1
    return assigned.members[0][0] if is_single else None
