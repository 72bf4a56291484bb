"""Which number of a path counts layers."""

from collections import Counter

from teon_optax._reading.leaves import Leaf
from teon_optax._reading.names import says
from teon_optax._reading.network import Network


def layer_columns(leaf: Leaf, net: Network) -> tuple[int | None, ...]:
    """Finds the segments of a path whose number may count layers; several where that is open.

    None among them means that a scanned axis counts, or that nothing does.
    """
    numbered = [c for c, number in enumerate(leaf.numbers) if number is not None]
    called = [depth - 1 for depth in leaf.layer_depths if depth - 1 in numbered]
    varying = net.varying[leaf.names]
    if leaf.layer_axis is not None:  # a number too where the scan is over a pattern of blocks
        scans = [c for c in called if not says("scanned", leaf.keys[c]) or c in varying]
        return (None, *scans)
    modules = [c for c in numbered if c < leaf.depth or leaf.is_bare and c == leaf.depth]
    modules = [c for c in modules if not _is_apart(leaf, c, net)]
    # A block alone in each of several modules is a part of a layer.
    is_part = called and modules[:1] and modules[0] < called[0] and varying.isdisjoint(called)
    if called and not (is_part and modules[0] in varying):
        candidates = dict.fromkeys([called[0], *(c for c in called if c in varying)])
        # Stages of other widths are no series: only the layers inside of each are.
        repeating = net.repeating[leaf.names, leaf.array_shape]
        alike = [c for c in candidates if c not in varying or c in repeating]
        return tuple(alike or candidates)
    if modules and modules[0] not in varying:
        return tuple(dict.fromkeys([modules[0], *(c for c in modules if c in varying)]))
    if not modules and all(key.isdecimal() for key in leaf.keys[:2]) and len(leaf.keys) > 1:
        return (0,)  # a list of (weight, bias)
    if not modules:
        return ()
    # Two in a list may be two networks, and two attentions may be those of one block.
    are_two = modules[0] == 0 and leaf.keys[0].isdecimal() and len(net.repeats(leaf, 0)) == 2
    is_open = are_two or _beside_two(leaf, modules[0], net)
    return (modules[0], None) if is_open else (modules[0],)


def _beside_two(leaf: Leaf, column: int, net: Network) -> list[Leaf]:
    """Lists the matrices beside two modules that hold an attention each and nothing else.

    One feed forward of two or three matrices shows one block with two attentions. Where there are
    two matrices of every shape, they are one in each of two layers.
    """
    modules = net.repeats(leaf, column)
    above, module = leaf.places[column : column + 2]
    if len(modules) != 2 or leaf.home != module or len(net.matrices.get(module, [])) > 4:
        return []
    beside = [
        other
        for home, held in net.matrices.items()
        for other in held
        if f"{home}/".startswith(f"{above}/".lstrip("/"))
        and not other.is_end
        and not any(f"{home}/".startswith(f"{two}/") for two in modules)
    ]
    shapes = Counter(other.shape for other in beside)
    return [] if all(count % 2 == 0 for count in shapes.values()) else beside


def _is_apart(leaf: Leaf, column: int, net: Network) -> bool:
    """Tells whether modules that differ in a number are no layers.

    They may be experts, members of an ensemble, whole networks, heads whose results a matrix beside
    them reads side by side, or two attentions of one block.
    """
    above, module = leaf.places[column : column + 2]
    is_module = column + 1 < len(leaf.keys)
    if (
        is_module
        and says("members", leaf.noun(column + 1))
        or above in net.mixtures
        or module in net.networks
    ):
        return True
    count, held = len(net.repeats(leaf, column)), net.matrices.get(leaf.home, [])
    if leaf.home == module and all(m.shape[-1] == leaf.shape[-1] for m in held):
        # One matrix reads the heads of a layer; as many as there are modules follow these.
        width = count * leaf.shape[-1]
        if 0 < sum(width in m.shape for m in net.matrices.get(above, [])) < count:
            return True
    return 0 < len(_beside_two(leaf, column, net)) < 4
