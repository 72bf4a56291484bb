"""What every leaf is, read from the program that uses it: an oracle that knows no names.

`read_program(apply, params, *inputs)` traces a forward pass or a loss and follows every number of
every leaf through the jaxpr, operation by operation, in NumPy. What a product sums over is fan_in,
what it leaves is fan_out, what is looked up by an index is a table. The columns of each result are
followed as well, up to where they meet others: in scores, in what scores weigh, in a gate.

Limits: what enters a kernel that cannot be looked into is unknown, as is a product of leaves alone;
scores that are a multiplication and a sum are not seen.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from listings import Found, Reading, spelled

from teon_optax._paths import leaf_paths

NOTHING = -1
# Scans are unrolled: layers, or steps of a recurrent cell.
LONGEST_SCAN = 64


@dataclasses.dataclass(frozen=True)
class Value:
    """What is known of an array of the program.

    `known` is its value, where neither parameters nor inputs reach it. `numbers` says for each
    entry which number of a leaf it is, `columns` which column of which product, or NOTHING.
    """

    shape: tuple[int, ...]
    known: np.ndarray | None = None
    numbers: np.ndarray | None = None
    columns: np.ndarray | None = None
    is_raw: bool = False  # made of parameters and constants alone
    past: frozenset[int] = frozenset()  # all uses of leaves that it depends on
    last: frozenset[int] = frozenset()  # those that no other use lies behind
    scores: frozenset[int] = frozenset()  # products of activations that it is made of
    is_plain: bool = False  # the result of a product, moved at most


@dataclasses.dataclass
class Use:
    """One product, look-up or convolution of leaves with what depends on inputs."""

    kind: str  # "product", "table" or "convolution"
    leaves: frozenset[int]
    past: frozenset[int]
    reads: frozenset[int] = frozenset()
    first_column: int = 0
    columns: int = 0


@dataclasses.dataclass
class Leaf:
    """What a program does with a leaf.

    `role` is input, head, table, convolution, vector, router, projection (Q, K or V), hidden or
    unknown. The arrays say of each number in which matrix, row (fan_in), column (fan_out) and part
    of the columns it stands.
    """

    path: str
    shape: tuple[int, ...]
    role: str
    matrix: np.ndarray | None = None
    row: np.ndarray | None = None
    column: np.ndarray | None = None
    part: np.ndarray | None = None
    # A projection of what another product makes, and nothing else, as in latent attention.
    is_latent: bool = False
    # Finer parts of columns and rows: one number scales each, as the gate of an expert.
    scaled: np.ndarray | None = None


class Reader:
    """Follows the leaves through a jaxpr."""

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        self.starts = np.cumsum([0, *(math.prod(shape) for shape in shapes)])
        self.uses: list[Use] = []
        # Of each number of a leaf: matrix, row and column, the first use's column, and a conflict.
        self.places = np.full((3, self.starts[-1]), NOTHING)
        self.conflicts: set[int] = set()
        self.other_uses: dict[int, set[str]] = defaultdict(set)
        self.column_of: list[np.ndarray] = []  # by use: the column of each of its leaves' numbers
        self.columns = 0
        self.met: list[tuple[tuple[Any, ...], set[int]]] = []  # (what, columns that meet there)
        self.dots = 0
        self.weighing: set[int] = set()  # products of activations whose results weigh values
        self.partners: dict[int, set[int]] = defaultdict(set)  # columns that go on together
        self.linear: set[int] = set()  # uses with nothing but a product between them
        self.rows: dict[int, np.ndarray] = {}  # by use: the columns that its rows meet

    # Programs -------------------------------------------------------------------------------------

    def run(self, jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Value]) -> list[Value]:
        values = dict(zip(jaxpr.invars, arguments, strict=True))
        for variable, const in zip(jaxpr.constvars, consts, strict=True):
            is_known = not isinstance(const, Value)
            values[variable] = _constant(const, variable.aval.shape) if is_known else const

        def value_of(atom: Any) -> Value:
            return _constant(atom.val, np.shape(atom.val)) if hasattr(atom, "val") else values[atom]

        for equation in jaxpr.eqns:
            results = self.equation(equation, [value_of(atom) for atom in equation.invars])
            values.update(zip(equation.outvars, results, strict=True))
        return [value_of(atom) for atom in jaxpr.outvars]

    def equation(self, equation: Any, values: list[Value]) -> list[Value]:
        name, parameters = equation.primitive.name, equation.params
        shapes = [tuple(variable.aval.shape) for variable in equation.outvars]
        if name == "scan":
            return self.scan(equation, values)
        if name == "while":
            return self.loop(parameters, values)
        if name == "cond":
            branches = [self.run(b.jaxpr, b.consts, values[1:]) for b in parameters["branches"]]
            return [_either(each) for each in zip(*branches, strict=True)]
        inner, consts = (None, ()) if name in OPAQUE else _inner(equation)
        if inner is not None:
            return self.run(inner, consts, values)
        if (found := _evaluated(equation, values)) is not None:
            return found
        if name in PRODUCTS:
            return [PRODUCTS[name](self, parameters, values, shapes[0])]
        if name in MOVES:
            return MOVES[name](self, parameters, values, shapes)
        if name in CHOICES:
            self.meet(("route",), values[0])
        elif name not in OPAQUE and all(_fits(v.shape, shape) for v in values for shape in shapes):
            return [self.elementwise(name, values, shape) for shape in shapes]
        return self.lost(name, values, shapes)

    def lost(self, name: str, values: Sequence[Value], shapes: Sequence[Any]) -> list[Value]:
        """A result of which nothing is known but what it depends on."""
        if name not in REDUCTIONS | CHOICES:
            for value in values:
                for leaf in self.leaves_in(value):
                    self.other_uses[leaf].add("lost")
                self.meet(("lost", name), value)
        return [_mixed(values, shape) for shape in shapes]

    def scan(self, equation: Any, values: list[Value]) -> list[Value]:
        parameters, inner = equation.params, equation.params["jaxpr"]
        # What is scanned along has one axis more outside than inside.
        along = _longer(equation.invars, inner.jaxpr.invars)
        carried = len(equation.outvars) - _longer(equation.outvars, inner.jaxpr.outvars)
        places = len(values) - along - carried, len(values) - along
        head, carry, along = values[: places[0]], values[slice(*places)], values[places[1] :]
        length, rows = min(parameters["length"], LONGEST_SCAN), []
        # Zeros, as a cell starts from, are an activation all the same; a counter is not.
        carry = [Value(v.shape) if v.known is not None and v.shape else v for v in carry]
        steps = range(length)
        for step in reversed(steps) if parameters["reverse"] else steps:
            now = [_moved(value, lambda a, step=step: a[step]) for value in along]
            out = self.run(inner.jaxpr, inner.consts, [*head, *carry, *now])
            carry = out[:carried]
            rows.append(out[carried:])
        rows = rows[::-1] if parameters["reverse"] else rows
        more = parameters["length"] - length
        rows += [rows[-1]] * more
        stacked = [_joined(each, np.stack) for each in zip(*rows, strict=True)]
        return [*carry, *stacked]

    def loop(self, parameters: Any, values: list[Value]) -> list[Value]:
        tests, consts = parameters["cond_nconsts"], parameters["body_nconsts"]
        head, carry = values[tests:][:consts], values[tests + consts :]
        carry = [dataclasses.replace(value, known=None) for value in carry]
        body = parameters["body_jaxpr"]
        for _ in range(2):
            out = self.run(body.jaxpr, body.consts, [*head, *carry])
            carry = [_either(pair) for pair in zip(carry, out, strict=True)]
        return carry

    # Operations -----------------------------------------------------------------------------------

    def leaves_in(self, value: Value) -> set[int]:
        if value.numbers is None:
            return set()
        numbers = value.numbers[value.numbers != NOTHING]
        return set(np.unique(np.searchsorted(self.starts, numbers, side="right") - 1).tolist())

    def meet(self, what: tuple[Any, ...], value: Value) -> None:
        """Notes that the columns in a value meet something there."""
        if value.columns is not None:
            self.note(what, value.columns)

    def note(self, what: tuple[Any, ...], columns: np.ndarray) -> None:
        found = set(np.unique(columns[columns != NOTHING]).tolist())
        self.met.append((what, found.union(*(self.partners[column] for column in found))))

    def use(self, kind: str, value: Value, past: frozenset[int]) -> int:
        leaves = frozenset(self.leaves_in(value))
        self.uses.append(Use(kind, leaves, past, first_column=self.columns))
        return len(self.uses) - 1

    def activation(self, value: Value) -> Value:
        """A value as what depends on inputs; leaves in it are vectors, such as positions."""
        if value.numbers is not None:
            for leaf in self.leaves_in(value):
                self.other_uses[leaf].add("vector")
        return dataclasses.replace(value, numbers=None)

    def elementwise(self, name: str, values: list[Value], shape: tuple[int, ...]) -> Value:
        mixed = _mixed(values, shape)
        if mixed.is_raw:
            held = [v.numbers for v in values if v.numbers is not None and v.shape == shape]
            same = held and all(np.array_equal(held[0], other) for other in held)
            return dataclasses.replace(mixed, numbers=held[0] if same else None)
        values = [_moved(self.activation(v), lambda a: np.broadcast_to(a, shape)) for v in values]
        first, *others = sorted(values, key=lambda value: value.columns is None)
        if first.columns is None:
            return mixed
        for other in others:
            if other.is_raw or other.last <= first.last and name != "mul":
                continue
            if other.columns is not None and name == "mul":
                self.gate(first, other)
            elif other.columns is not None and name in SUMS:
                # Products that are added, as a kernel's and that of its low-rank factors.
                self.pair(first, other)
            elif other.last and name in SUMS:
                # A residual connection: the sum is nobody's column.
                return mixed
        return dataclasses.replace(mixed, columns=first.columns)

    def gate(self, a: Value, b: Value) -> None:
        """Notes columns that multiply each other: two halves, two products, or one for many."""
        assert a.columns is not None and b.columns is not None
        if a.last == b.last:
            if not np.array_equal(a.columns, b.columns):
                self.dots += 1
                self.meet(("gate", self.dots, 0), a)
                self.meet(("gate", self.dots, 1), b)
            return
        pairs, few = self.pair(a, b)
        for value, fewer, more in ((a, *few), (b, *few[::-1])):
            if fewer < more == pairs.shape[1]:
                self.meet(("scale",), value)
                self.dots += 1
                gate, each = pairs if value is a else pairs[::-1]
                for index, one in enumerate(np.unique(gate)):
                    self.note(("scaled", self.dots, index), each[gate == one])

    def pair(self, a: Value, b: Value) -> tuple[np.ndarray, list[int]]:
        """Notes columns that go on together one by one: what one of them meets both meet."""
        assert a.columns is not None and b.columns is not None
        pairs = np.unique(np.stack([a.columns.ravel(), b.columns.ravel()]), axis=1)
        few = [len(np.unique(side)) for side in pairs]
        if few[0] == few[1] == pairs.shape[1]:
            for one, other in pairs.T.tolist():
                self.partners[one].add(other)
        return pairs, few

    def dot(self, parameters: Any, values: list[Value], shape: tuple[int, ...]) -> Value:
        a, b = values[:2]
        (contract_a, contract_b), (batch_a, batch_b) = parameters["dimension_numbers"]
        sides = [_Side(a, contract_a, batch_a), _Side(b, contract_b, batch_b)]
        mixed = dataclasses.replace(_mixed([a, b], shape), scores=frozenset())
        if mixed.is_raw:
            for leaf in self.leaves_in(a) | self.leaves_in(b):
                self.other_uses[leaf].add("lost")
            return mixed
        weights = [side for side in sides if side.value.is_raw and side.value.numbers is not None]
        if not weights and (a.is_raw or b.is_raw):
            # Constants, as a mask of heads: scores are still scores.
            return dataclasses.replace(mixed, scores=a.scores | b.scores)
        if not weights:
            return self.meeting(sides, mixed)
        (weight,) = weights
        other = sides[1 - sides.index(weight)]
        number = self.use("product", weight.value, other.value.past)
        labels = self.place(number, weight.matrices())
        if other.value.columns is not None:
            self.read_by(number, other, weight)
        labels = labels.reshape(*weight.batch_shape, *weight.free_shape)
        # The result: batch, free axes of a, free axes of b.
        rank = len(weight.batch_shape)
        new = (1,) * len(other.free_shape)
        place = rank + (len(sides[0].free_shape) if weight is sides[1] else 0)
        labels = labels.reshape(*labels.shape[:rank], *(
            (*new, *weight.free_shape) if place > rank else (*weight.free_shape, *new)
        ))  # fmt: skip
        used = frozenset([number])
        return dataclasses.replace(
            mixed,
            columns=np.broadcast_to(labels, shape),
            past=mixed.past | used,
            last=used,
            is_plain=True,
        )

    def place(self, number: int, matrices: np.ndarray) -> np.ndarray:
        """Notes matrices (batch, fan_in, fan_out) of numbers of leaves; labels of the columns."""
        flat = matrices.ravel()
        held = np.flatnonzero(flat != NOTHING)
        found = np.stack(np.unravel_index(held, matrices.shape))
        # Matrices of two uses are two, unless one leaf is used again.
        found[0] += number << 32
        for leaf in self.uses[number].leaves:
            own = (flat[held] >= self.starts[leaf]) & (flat[held] < self.starts[leaf + 1])
            where, new = flat[held][own], found[:, own]
            before = self.places[:, where]
            if (before == NOTHING).all():
                self.places[:, where] = new
            elif (before[1:] != new[1:]).any():
                self.conflicts.add(leaf)
        batch, _, columns = matrices.shape
        labels = self.columns + np.arange(batch * columns)
        self.uses[number].columns = labels.size
        self.columns += labels.size
        return labels.reshape(batch, columns)

    def read_by(self, number: int, other: "_Side", weight: "_Side") -> None:
        """Notes which columns a product reads; apart, those that batches of its leaf read."""
        self.meet(("product", number), other.value)
        self.uses[number].reads = other.value.last
        if other.value.is_plain:
            self.linear |= {number, *other.value.last}
        columns = other.matrices(other.value.columns)
        if columns.shape[0] > 1:
            for batch, some in enumerate(columns):
                self.note(("apart", number, batch), some)
        self.rows[number] = columns[0, :, 0]

    def meeting(self, sides: "list[_Side]", mixed: Value) -> Value:
        """A product of two activations: scores, or what scores weigh."""
        sides = [_Side(self.activation(s.value), s.contract, s.batch) for s in sides]
        for side, other in (sides, sides[::-1]):
            if side.value.scores and not other.value.scores and other.value.columns is not None:
                self.weighing |= side.value.scores
                self.meet(("value",), other.value)
                return mixed
        for gates, each in (sides, sides[::-1]):
            if self.routed(gates, each):
                columns = None if each.contract else each.matrices(each.value.columns)
                columns = None if columns is None else columns.reshape(mixed.shape)
                return dataclasses.replace(mixed, columns=columns, last=each.value.last)
        self.dots += 1
        for place, side in enumerate(sides):
            self.meet(("score", self.dots, place), side.value)
        return dataclasses.replace(mixed, scores=frozenset([self.dots]))

    def routed(self, gates: "_Side", each: "_Side") -> bool:
        """Whether a number multiplies many columns, as that of a router does an expert's."""
        if gates.value.columns is None or each.value.columns is None:
            return False
        if math.prod(gates.free_shape) > 1:  # the other tokens, in scores
            return False
        batch, contract, free = each.varies(each.value.columns)
        if not (free and (batch or contract)):
            return False
        self.meet(("route",), gates.value)
        self.dots += 1
        columns = each.matrices(each.value.columns)
        for index, some in enumerate(np.unique(columns.reshape(-1, columns.shape[2]), axis=0)):
            self.note(("apart", self.dots, index), some)
        return True

    def ragged_dot(self, parameters: Any, values: list[Value], shape: tuple[int, ...]) -> Value:
        numbers = parameters["ragged_dot_dimension_numbers"]
        (contract, batch), groups = numbers.dot_dimension_numbers, numbers.rhs_group_dimensions
        if not (values[1].is_raw and values[1].numbers is not None and len(groups) == 1):
            return self.lost("ragged_dot", values, [shape])[0]
        weight = _Side(values[1], contract[1], (*groups, *batch[1]))
        number = self.use("product", values[1], values[0].past)
        labels = self.place(number, weight.matrices())[0]
        self.meet(("product", number), values[0])
        used = frozenset([number])
        mixed, labels = _mixed(values, shape), labels.reshape(-1)[-shape[-1] :]
        return dataclasses.replace(
            mixed, columns=np.broadcast_to(labels, shape), past=mixed.past | used, last=used
        )

    def convolution(self, parameters: Any, values: list[Value], shape: tuple[int, ...]) -> Value:
        data, kernel = values
        mixed = _mixed([self.activation(data), dataclasses.replace(kernel, numbers=None)], shape)
        if mixed.is_raw:
            return self.lost("convolution", values, [shape])[0]
        number = self.use("convolution", kernel, data.past)
        self.meet(("product", number), data)
        used = frozenset([number])
        return dataclasses.replace(mixed, past=mixed.past | used, last=used)

    def gather(self, parameters: Any, values: list[Value], shapes: Sequence[Any]) -> list[Value]:
        """Looks up by known indices what is followed; by unknown ones, in a table or a batch."""
        value, index = values[:2]
        if index.known is not None:
            return [_moved(value, functools.partial(_gathered, parameters, index.known))]
        dims = parameters["dimension_numbers"]
        kept = [size for axis, size in enumerate(parameters["slice_sizes"])
                if axis not in dims.collapsed_slice_dims and size > 1]  # fmt: skip
        if value.is_raw and value.numbers is not None and len(kept) < 2:
            number = self.use("table", value, index.past)
            used = frozenset([number])
            return [Value(shapes[0], past=value.past | index.past | used, last=used)]
        # One of some experts: they are read alike, so the first stands for all of them.
        value = dataclasses.replace(value, known=None)
        zeros = np.zeros(index.shape, np.int32)
        first = _moved(value, functools.partial(_gathered, parameters, zeros))
        return [dataclasses.replace(first, past=first.past | index.past)]

    def dynamic_slice(self, parameters: Any, values: list[Value], shapes: Any) -> list[Value]:
        value, starts = values[0], [v.known for v in values[1:]]
        if any(start is None for start in starts):
            value, starts = dataclasses.replace(value, known=None), [np.zeros(())] * len(starts)
        sizes = parameters["slice_sizes"]
        slices = []
        for start, full, size in zip(starts, value.shape, sizes, strict=True):
            at = int(np.clip(np.asarray(start), 0, full - size))
            slices.append(slice(at, at + size))
        return [_moved(value, lambda array: array[tuple(slices)])]


class _Side:
    """One operand of a product, as (batch, contracted axes, free axes)."""

    def __init__(self, value: Value, contract: Sequence[int], batch: Sequence[int]) -> None:
        self.value, self.contract, self.batch = value, tuple(contract), tuple(batch)
        free = [a for a in range(len(value.shape)) if a not in {*contract, *batch}]
        self.groups = self.batch, self.contract, tuple(free)
        self.batch_shape = tuple(value.shape[axis] for axis in batch)
        self.free_shape = tuple(value.shape[axis] for axis in free)

    def matrices(self, array: Any = None) -> np.ndarray:
        array = self.value.numbers if array is None else array
        sizes = [math.prod(self.value.shape[axis] for axis in group) for group in self.groups]
        return np.transpose(array, list(itertools.chain(*self.groups))).reshape(sizes)

    def varies(self, array: Any) -> list[bool]:
        """Whether an array differs along the axes of each kind."""
        matrices = self.matrices(array)
        return [bool((matrices != matrices.take([0], axis)).any()) for axis in range(3)]


# Values -----------------------------------------------------------------------------------------


def _constant(value: Any, shape: Sequence[int]) -> Value:
    is_key = hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    return Value(tuple(shape), None if is_key else np.asarray(value), is_raw=True)


def _mixed(values: Sequence[Value], shape: Sequence[int]) -> Value:
    """What depends on all of these."""

    def union(name: str) -> frozenset[int]:
        return frozenset().union(*(getattr(value, name) for value in values))

    return Value(
        tuple(shape),
        is_raw=all(value.is_raw for value in values),
        past=union("past"),
        last=union("last"),
        scores=union("scores"),
    )


def _either(values: Sequence[Value]) -> Value:
    """What is one of these: what they agree in."""
    first, *others = values
    mixed = _mixed(values, first.shape)
    for name in ("numbers", "columns"):
        held = [getattr(value, name) for value in values]
        if all(each is not None and np.array_equal(each, held[0]) for each in held):
            mixed = dataclasses.replace(mixed, **{name: held[0]})
    return mixed


def _moved(value: Value, move: Callable[[np.ndarray], np.ndarray]) -> Value:
    """The value after its entries were moved, repeated or left out."""
    held = {n: getattr(value, n) for n in ("known", "numbers", "columns")}
    held = {name: move(array) for name, array in held.items() if array is not None}
    shape = next(iter(held.values())).shape if held else move(np.empty(value.shape, np.int8)).shape
    return dataclasses.replace(value, shape=shape, **held)


def _joined(values: Sequence[Value], join: Callable[[Sequence[np.ndarray]], np.ndarray]) -> Value:
    """One value of several, side by side."""
    shape = join([np.empty(value.shape, np.int8) for value in values]).shape
    mixed, held = _mixed(values, shape), {}
    for name in ("numbers", "columns"):
        arrays = [getattr(value, name) for value in values]
        if any(array is not None for array in arrays):
            pairs = zip(arrays, values, strict=True)
            held[name] = join([np.full(v.shape, NOTHING) if a is None else a for a, v in pairs])
    if not mixed.is_raw:
        held.pop("numbers", None)
    known = [value.known for value in values if value.known is not None]
    if len(known) == len(values):
        held["known"] = join(known)
    return dataclasses.replace(mixed, **held)


def _evaluated(equation: Any, values: Sequence[Value]) -> list[Value] | None:
    """What an operation on known values gives, or None for random numbers and such."""
    if equation.primitive.name.startswith("random") or any(v.known is None for v in values):
        return None
    sizes = [math.prod(variable.aval.shape) for variable in equation.outvars]
    if max(sizes, default=0) > 1 << 20:
        return None
    found = equation.primitive.bind(
        *(np.asarray(v.known, a.aval.dtype) for v, a in zip(values, equation.invars, strict=True)),
        **equation.params,
    )
    found = found if equation.primitive.multiple_results else [found]
    return [_constant(np.asarray(array), np.shape(array)) for array in found]


def _gathered(parameters: Any, index: np.ndarray, array: np.ndarray) -> np.ndarray:
    numbers = {name: parameters[name] for name in ("dimension_numbers", "slice_sizes")}
    mode = parameters.get("mode")
    return np.asarray(jax.lax.gather(array.astype(np.int32), index, mode=mode, **numbers), np.int64)


def _inner(equation: Any) -> tuple[Any, Sequence[Any]]:
    """The jaxpr of a call that takes what its equation takes, and its constants."""
    for held in equation.params.values():
        jaxpr = getattr(held, "jaxpr", held)
        if hasattr(jaxpr, "eqns") and len(jaxpr.invars) == len(equation.invars):
            if len(jaxpr.outvars) == len(equation.outvars):
                return jaxpr, getattr(held, "consts", ())
    return None, ()


def _longer(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    """How many of the last variables have an axis more outside than inside."""
    ranks = zip(reversed(outside), reversed(inside), strict=True)
    is_longer = (len(a.aval.shape) > len(b.aval.shape) for a, b in ranks)
    return sum(1 for _ in itertools.takewhile(bool, is_longer))


def _fits(shape: Sequence[int], out: Sequence[int]) -> bool:
    """Whether a shape is that of the result, or of one number along some axes or all."""
    pairs = zip(shape, out, strict=False)
    return not shape or len(shape) == len(out) and all(a in (1, b) for a, b in pairs)


def _simple(move: Callable[..., np.ndarray]) -> Callable[..., list[Value]]:
    """An operation that moves the entries of its first operand."""

    def moved(_: Reader, parameters: Any, values: list[Value], shapes: Any) -> list[Value]:
        return [_moved(values[0], lambda array: move(array, parameters, shapes[0]))]

    return moved


def _broadcast(array: np.ndarray, parameters: Any, shape: Sequence[int]) -> np.ndarray:
    places = parameters["broadcast_dimensions"]
    new = [1] * len(shape)
    for axis, place in enumerate(places):
        new[place] = array.shape[axis]
    return np.broadcast_to(array.reshape(new), shape)


def _slice(array: np.ndarray, parameters: Any, _: Any) -> np.ndarray:
    steps = parameters["strides"] or (1,) * array.ndim
    bounds = zip(parameters["start_indices"], parameters["limit_indices"], steps, strict=True)
    return array[tuple(slice(*each) for each in bounds)]


def _concatenated(_: Reader, parameters: Any, values: list[Value], shapes: Any) -> list[Value]:
    return [_joined(values, functools.partial(np.concatenate, axis=parameters["dimension"]))]


def _split(_: Reader, parameters: Any, values: list[Value], shapes: Any) -> list[Value]:
    ends, axis = np.cumsum(parameters["sizes"])[:-1], parameters["axis"]
    return [_moved(values[0], lambda array, i=i: np.split(array, ends, axis)[i])
            for i in range(len(shapes))]  # fmt: skip


def _stacked(_: Reader, parameters: Any, values: list[Value], shapes: Any) -> list[Value]:
    return [_joined(values, functools.partial(np.stack, axis=parameters["axis"]))]


def _unstacked(_: Reader, parameters: Any, values: list[Value], shapes: Any) -> list[Value]:
    axis = parameters["axis"]
    return [_moved(values[0], lambda a, i=i: a.take(i, axis)) for i in range(len(shapes))]


def _padded(self: Reader, parameters: Any, values: list[Value], shapes: Any) -> list[Value]:
    config = parameters["padding_config"]
    if values[0].is_raw or any(low < 0 or high < 0 or inner for low, high, inner in config):
        return self.lost("pad", values, shapes)
    widths = [(low, high) for low, high, _ in config]
    moved = _moved(values[0], lambda array: np.pad(array, widths, constant_values=NOTHING))
    return [dataclasses.replace(moved, known=None)]


def _updated(self: Reader, parameters: Any, values: list[Value], shapes: Any) -> list[Value]:
    """A part written into a buffer, as into a cache of keys."""
    new = _mixed([self.activation(values[0]), self.activation(values[1])], shapes[0])
    columns = values[1].columns
    same = columns is not None and values[1].shape == shapes[0]
    return [dataclasses.replace(new, columns=columns if same else None)]


OPAQUE = {"pallas_call", "ffi_call", "custom_call", "tpu_custom_call", "pure_callback"}
CHOICES = {"top_k", "approx_top_k", "argmax", "argmin", "sort"}
REDUCTIONS = {
    *("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or"),
    *("cumsum", "cumprod", "cummax", "reduce_window_sum", "reduce_window_max", "fft"),
    *("scatter", "scatter-add", "scatter_add", "scatter_mul"),
}
SUMS = {"add", "sub", "add_any", "select_n", "max", "min"}
PRODUCTS: dict[str, Callable[..., Value]] = {
    "dot_general": Reader.dot,
    "ragged_dot_general": Reader.ragged_dot,
    "conv_general_dilated": Reader.convolution,
}
MOVES: dict[str, Callable[..., list[Value]]] = {
    "reshape": _simple(lambda array, _, shape: array.reshape(shape)),
    "squeeze": _simple(lambda array, _, shape: array.reshape(shape)),
    "expand_dims": _simple(lambda array, _, shape: array.reshape(shape)),
    "transpose": _simple(lambda array, held, _: array.transpose(held["permutation"])),
    "rev": _simple(lambda array, held, _: np.flip(array, held["dimensions"])),
    "broadcast_in_dim": _simple(_broadcast),
    "slice": _simple(_slice),
    "split": _split,
    "concatenate": _concatenated,
    "stack": _stacked,  # with `unstack`, of JAX 0.12
    "unstack": _unstacked,
    "pad": _padded,
    "gather": Reader.gather,
    "dynamic_slice": Reader.dynamic_slice,
    "dynamic_update_slice": _updated,
}


# Leaves -----------------------------------------------------------------------------------------


def read_program(apply: Callable[..., Any], params: Any, *inputs: Any) -> dict[str, Leaf]:
    """What a forward pass, or a loss, does with every leaf, by path."""
    flat, structure = jax.tree.flatten(params)
    paths = [path for path, _ in leaf_paths(params)]
    shapes = [tuple(np.shape(leaf)) for leaf in flat]

    def call(leaves: Sequence[Any], *inputs: Any) -> Any:
        return apply(structure.unflatten(leaves), *inputs)

    closed = jax.make_jaxpr(call)(flat, *inputs)
    reader = Reader(shapes)
    arguments = []
    for start, shape in zip(reader.starts, shapes, strict=False):
        numbers = start + np.arange(math.prod(shape)).reshape(shape)
        arguments.append(Value(shape, numbers=numbers, is_raw=True))
    others = closed.jaxpr.invars[len(flat) :]
    arguments += [Value(tuple(variable.aval.shape)) for variable in others]
    # What a loss closes over, such as a batch, is an input too.
    consts = [Value(tuple(np.shape(const))) for const in closed.consts]
    reader.run(closed.jaxpr, consts, arguments)
    return {path: _leaf(reader, index, path, shapes[index]) for index, path in enumerate(paths)}


def _leaf(reader: Reader, index: int, path: str, shape: tuple[int, ...]) -> Leaf:
    own = [number for number, use in enumerate(reader.uses) if index in use.leaves]
    kinds = {reader.uses[number].kind for number in own}
    if "lost" in reader.other_uses[index]:
        return Leaf(path, shape, "unknown")
    for kind in ("table", "convolution"):
        if kind in kinds:
            return Leaf(path, shape, kind)
    if not own:
        return Leaf(path, shape, "vector" if reader.other_uses[index] else "unknown")
    places = reader.places[:, reader.starts[index] : reader.starts[index + 1]]
    if index in reader.conflicts or (places == NOTHING).any():
        return Leaf(path, shape, "unknown")
    matrix, row, column = places.reshape(3, *shape)
    uses = [reader.uses[number] for number in own]
    labels = [use.first_column + np.arange(use.columns) for use in uses]
    met = _met(reader, np.concatenate(labels))
    role = _role(reader, own, met)
    part, scaled = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for number in own:
        use = reader.uses[number]
        inside = (matrix >> 32) == number
        wide = max(use.columns // max(1, len(np.unique(matrix[inside]))), 1)
        where = (matrix[inside] & 0xFFFFFFFF) * wide + column[inside]
        part[inside] = _parts(use, met)[where]
        columns, rows = _scaled(reader, number)
        scaled[inside] = columns[where] * (rows.max() + 1) + rows[row[inside]]
    reads = [reader.uses[n] for use in uses for n in use.reads]
    is_latent = role == "projection" and len(reads) == len(uses)
    is_latent = is_latent and all(use.kind == "product" for use in reads)
    return Leaf(path, shape, role, matrix, row, column, part, is_latent, scaled)


def _scaled(reader: Reader, number: int) -> tuple[np.ndarray, np.ndarray]:
    """For each column and each row of a use, which single number scales it."""
    use = reader.uses[number]
    columns = np.arange(use.first_column, use.first_column + use.columns)
    rows = reader.rows.get(number, np.zeros(1 << 16, np.int64))
    groups: dict[int, int] = {}
    for index, (what, some) in enumerate(reader.met):
        if what[0] in ("scaled", "apart"):
            groups |= dict.fromkeys(some, 1 + index)
    by_column, by_row = (
        np.array([groups.get(label, 0) for label in labels.tolist()]) for labels in (columns, rows)
    )
    return by_column, by_row


def _met(reader: Reader, labels: np.ndarray) -> dict[int, set[tuple[Any, ...]]]:
    """What each of these columns meets."""
    found: dict[int, set[tuple[Any, ...]]] = {label: set() for label in labels.tolist()}
    for what, columns in reader.met:
        if what[0] == "score" and what[1] not in reader.weighing:
            continue
        for label in columns:
            if label in found:
                found[label].add(what)
    return found


def _role(reader: Reader, own: Sequence[int], met: dict[int, set[tuple[Any, ...]]]) -> str:
    words = [{what[0] for what in each} for each in met.values()]
    together = set().union(*words)
    follows = any(set(own) & use.past for n, use in enumerate(reader.uses) if n not in own)
    if "lost" in together or "scale" in together or reader.linear & set(own):
        return "unknown"
    if "route" in together:
        return "router"
    if all(each & {"score", "value"} and "product" not in each for each in words):
        return "projection"
    if all(not (reader.uses[number].past - set(own)) for number in own):
        return "input"
    return "hidden" if follows else "head"


def _parts(use: Use, met: dict[int, set[tuple[Any, ...]]]) -> np.ndarray:
    """A number for each column of a use: which part of the columns it belongs to."""
    labels = range(use.first_column, use.first_column + use.columns)
    kept = [frozenset(w for w in met[n] if w[0] in ("score", "value", "apart")) for n in labels]
    if not any(kept):
        gates = [frozenset(w for w in met[n] if w[0] == "gate") for n in labels]
        # Recurrent cells have more, which are one matrix.
        if len(set(gates)) == 2 and all(gates):
            kept = gates
    numbers = {each: number for number, each in enumerate(dict.fromkeys(kept))}
    return np.array([numbers[each] for each in kept])


# Comparing --------------------------------------------------------------------------------------


def contradictions(leaves: Mapping[str, Leaf], found: Mapping[str, Found]) -> dict[str, str]:
    """Path -> what a program does otherwise than a leaf is read, if nothing was asked about it."""
    # The first of many layers may read the input itself, as the last may make the result.
    inside = {_kind(leaf) for leaf in leaves.values() if leaf.role in ("hidden", "projection")}
    wrong = {}
    for path, leaf in leaves.items():
        if leaf.role in ("input", "head") and _kind(leaf) in inside:
            leaf = dataclasses.replace(leaf, role="hidden")
        said = "" if found[path].is_asked else contradiction(leaf, found[path].reading)
        if said:
            wrong[path] = f"{spelled(leaf.shape)}, {found[path]}: {said}"
    return wrong


def _kind(leaf: Leaf) -> tuple[str, tuple[int, ...]]:
    return re.sub(r"\d+", "*", leaf.path), leaf.shape


def contradiction(leaf: Leaf, reading: Reading) -> str:
    """What a program does with a leaf otherwise than a reading says; nothing if they agree."""
    if leaf.role == "unknown" or len(leaf.shape) < 2:
        return ""
    if leaf.role in ("table", "convolution", "vector", "router", "input", "head"):
        return "" if reading.kind == "F" else f"is orthogonalized, but is a {leaf.role}"
    if reading.kind == "F":
        return f"goes to the fallback, but is a matrix ({leaf.role})"
    if reading.kind == "T" and leaf.role != "projection":
        return "is stacked, but is no query, key or value"
    matrices = matrices_of(reading, leaf.shape)
    square = matrices.shape[1] == matrices.shape[2] and reading.kind == "M"
    if _agree(leaf, matrices) or square and _agree(leaf, matrices.transpose(0, 2, 1)):
        return ""
    if _agree(leaf, matrices.transpose(0, 2, 1)):
        return "has fan_in and fan_out exchanged"
    return "is cut into other matrices"


def matrices_of(reading: Reading, shape: Sequence[int]) -> np.ndarray:
    """The matrices (all, fan_in, fan_out) of flat positions; parts of unlike sizes end in -1."""
    seen = reading.view or tuple(shape)
    axes = [[a for a, x in enumerate(reading.axes) if x in letters] for letters in ("lb", "i")]
    cut = [a for a, x in enumerate(reading.axes) if x == "O"]
    rest = [a for a, x in enumerate(reading.axes) if x == "o"]
    index = np.arange(math.prod(shape)).reshape(seen).transpose(*axes[0], *axes[1], *cut, *rest)
    sizes = [math.prod(seen[a] for a in group) for group in (*axes, cut)]
    index = index.reshape(*sizes, -1)
    ends = np.cumsum(reading.cut(shape))[:-1]
    parts = [p.reshape(*p.shape[:2], -1) for p in np.split(index, ends, axis=2)]
    widest = max(p.shape[2] for p in parts)
    pads = [((0, 0), (0, 0), (0, widest - p.shape[2])) for p in parts]
    both = zip(parts, pads, strict=True)
    return np.concatenate([np.pad(p, pad, constant_values=NOTHING) for p, pad in both])


def _agree(leaf: Leaf, matrices: np.ndarray) -> bool:
    """Whether the matrices of a reading are the program's, part by part of its columns."""
    assert leaf.matrix is not None and leaf.part is not None and leaf.scaled is not None
    matrix, part, scaled = leaf.matrix.ravel(), leaf.part.ravel(), leaf.scaled.ravel()
    # The whole of keys and values that are made of a latent is a matrix too.
    allowed = [[matrix, part], [matrix, part, scaled], *([[matrix]] if leaf.is_latent else [])]
    return any(_same(leaf, matrices, owners) for owners in allowed)


def _same(leaf: Leaf, matrices: np.ndarray, owners: Sequence[np.ndarray]) -> bool:
    """Whether each matrix is all that belongs to one owner, with its rows and columns."""
    assert leaf.row is not None and leaf.column is not None
    owner = np.unique(np.stack(owners), axis=1, return_inverse=True)[1].ravel()
    sizes, seen = np.bincount(owner), set()
    for matrix in matrices:
        held = matrix != NOTHING
        matrix = matrix[held.any(1)][:, held.any(0)]
        rows, columns, whose = leaf.row.ravel()[matrix], leaf.column.ravel()[matrix], owner[matrix]
        first = int(whose[0, 0])
        if (whose != first).any() or sizes[first] != matrix.size or first in seen:
            return False
        if (rows != rows[:, :1]).any() or (columns != columns[:1]).any():
            return False
        seen.add(first)
    return True
