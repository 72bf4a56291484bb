"""The notation of parameter trees, and of how each leaf is read: the files in tests/trees/.

A file holds one tree or several. A tree begins with one line or three after `#`: its title, then
the library with its version and how the tree was made there. Then comes a line for every kind of
leaf, path, shape and how it is read:

    # Keras, two layers of a GPT
    # keras 3.15.1
    # `keras.layers.MultiHeadAttention`, by `variable.path`
    token_embedding/embeddings: 64x32 F
    block_{0..11}/attention/query/kernel: 32x4x8 T ioo
    block_{0..11}/attention/query/bias: 4x8 F
    block_{0..11}/mlp/up/kernel: 32x128 M io

Braces are those of a shell: `{0..2}` is 0, 1, 2, and Haiku's first layer has no number, `{,_1,_2}`.
A path that ends in `/<0>` is that of an array in a box without keys, as haliax's.

A reading is `F`, the fallback; `M`, orthogonalized alone; or `T`, stacked: the layers are what a
path's numbers in braces count, or an axis. A letter says what each axis is: `i` fan_in, `o`
fan_out, `l` layers, `b` batch. `/3` cuts the axis with the capital `O` into three equal parts,
`/16+8+8` into parts of these sizes. `as 64x4x3x16` is the shape that the leaf is seen in first:

    attn/qkv/kernel: 64x192 T iO/3                          # Q, K, V one after another
    attn/qkv/kernel: 64x192 T iobo as 64x4x3x16             # the same by heads

`?` is a leaf that an error or a warning names; what follows it should be offered. Where several
answers are right, ` | ` stands between them, as in `T io | ? T oi`. Leaves below two axes, which
the fallback always takes, need none.
"""

import functools
import itertools
import math
import pathlib
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from optax.contrib import MuonDimensionNumbers

from teon_optax import Rule, default_rules, plan
from teon_optax._paths import leaf_paths
from teon_optax._rule import fan_axes

FOLDER = pathlib.Path(__file__).parent / "trees"
_LINE = re.compile(r"(?P<path>\S*): (?P<shape>\(\)|\d+(?:x\d+)*)(?: (?P<answer>[^#]*?))? *(?:#.*)?")
_READING = re.compile(
    r"(?P<kind>[TM]) (?P<axes>[iolbO]+)(?:/(?P<parts>\d+(?:\+\d+)*))?"
    r"(?: as (?P<view>\d+(?:x\d+)*))?"
)
_RULE = re.compile(r"Rule\(r?(?P<quote>[\"']).*?(?P=quote)(?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)")


class Reading(NamedTuple):
    """How a leaf is read: kind, a letter for each axis, parts along the axis `O`, shape seen first.

    `parts` is the number of equal parts or their sizes; no `view` is the shape of the leaf.
    """

    kind: str
    axes: str = ""
    parts: int | tuple[int, ...] = 1
    view: tuple[int, ...] = ()

    def __str__(self) -> str:
        if self.kind == "F":
            return "F"
        sizes = [self.parts] if isinstance(self.parts, int) else self.parts
        parts = "" if self.parts == 1 else "/" + "+".join(map(str, sizes))
        view = f" as {spelled(self.view)}" if self.view else ""
        return f"{self.kind} {self.axes}{parts}{view}"

    @property
    def stack(self) -> int:
        """K of the default rules: 0, 1 or 2."""
        return "FMT".index(self.kind)

    def cut(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The sizes of the parts."""
        if not isinstance(self.parts, int):
            return self.parts
        if self.parts == 1:
            return ()
        whole = (self.view or shape)[self.axes.index("O")]
        return (whole // self.parts,) * self.parts

    def matrix(self, shape: Sequence[int]) -> tuple[int, int]:
        """Fan_in and fan_out, where parts differ that of the first."""
        sizes = {"i": 1, "o": 1}
        for letter, size in zip(self.axes.lower(), self.view or shape, strict=True):
            sizes[letter] = sizes.get(letter, 1) * size
        if parts := self.cut(shape):
            sizes["o"] = sizes["o"] * parts[0] // sum(parts)
        return sizes["i"], sizes["o"]


FALLBACK = Reading("F")


class Answer(NamedTuple):
    """What is right for a leaf: one of the readings, or that it is asked and these are offered."""

    readings: tuple[Reading, ...] = (FALLBACK,)
    is_asked: bool = False
    offered: tuple[Reading, ...] = ()


class Line(NamedTuple):
    """A kind of leaf: its paths, which differ in what stands in braces, shape and right answer."""

    pattern: str
    paths: tuple[str, ...]
    shape: tuple[int, ...]
    answer: Answer


class Tree(NamedTuple):
    """A tree of a listing. A library and how it made the tree are those of recorded trees."""

    name: str
    title: str
    library: str
    how: str
    lines: tuple[Line, ...]

    @property
    def lines_by_path(self) -> dict[str, Line]:
        """The line of every leaf, by the path that rules are searched in."""
        return {unboxed(path): line for line in self.lines for path in line.paths}

    @property
    def answers(self) -> dict[str, Answer]:
        """What is right for every leaf, by the path that rules are searched in."""
        return {path: line.answer for path, line in self.lines_by_path.items()}

    @property
    def params(self) -> Any:
        """The tree, in dicts, of types of arrays."""
        shapes = {path: line.shape for line in self.lines for path in line.paths}
        return nested({path: array(*shape) for path, shape in shapes.items()})


class Found(NamedTuple):
    """What the default rules make of a leaf: a reading, or that it is asked and these offered."""

    reading: Reading
    is_asked: bool = False
    offered: tuple[Reading, ...] = ()

    def __str__(self) -> str:
        if not self.is_asked:
            return str(self.reading)
        return f"? {', '.join(map(str, self.offered))}".rstrip()


class Box:
    """An array in a class that gives `jax.tree_util` no keys, as haliax's NamedArray."""

    def __init__(self, array: Any) -> None:
        self.array = array


jax.tree_util.register_pytree_node(Box, lambda b: ((b.array,), None), lambda _, a: Box(*a))


def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    """The type of an array of this shape."""
    return jax.ShapeDtypeStruct(shape, dtype)


def nested(leaves: Mapping[str, Any]) -> Any:
    """Makes nested dicts of leaves by path; flat keys with slashes would have the same paths."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        boxed = path.endswith("/<0>")
        *above, last = unboxed(path).split("/")
        node = tree
        for key in above:
            node = node.setdefault(key, {})
        node[last] = Box(leaf) if boxed else leaf
    return tree


def unboxed(path: str) -> str:
    """The path that rules are searched in."""
    return path.removesuffix("/<0>")


def spelled(shape: Sequence[int]) -> str:
    """A shape as `64x4x16`."""
    return "x".join(map(str, shape)) or "()"


# Files ------------------------------------------------------------------------------------------


@functools.cache
def trees(pattern: str = "**/*") -> dict[str, Tree]:
    """All trees of the files that fit a pattern, by name: the file's, and the title among several.

    Raises:
      ValueError: If two trees of a file have one title, or a line cannot be read.
    """
    found: dict[str, Tree] = {}
    for file in sorted(FOLDER.glob(f"{pattern}.txt")):
        several = parsed(file.read_text("utf-8"), file.stem)
        for tree in several:
            name = f"{file.stem}: {tree.title}" if len(several) > 1 else file.stem
            if name in found:
                raise ValueError(f"{file}: two trees are called {name!r}.")
            found[name] = tree._replace(name=name)
    return found


def parsed(text: str, where: str = "text") -> list[Tree]:
    """The trees of a listing."""
    made: list[Tree] = []
    heads: list[str] = []
    lines: list[Line] = []

    def finish() -> None:
        if lines:
            if len(heads) not in (1, 3):
                raise ValueError(f"{where}: {heads} should be a title, or title, library and how.")
            title, library, how = (*heads, "", "")[:3]
            paths = [path for line in lines for path in line.paths]
            twice = {path for path in paths if paths.count(path) > 1}
            if twice:
                raise ValueError(f"{where}, {title}: {sorted(twice)} stand there twice.")
            made.append(Tree(title, title, library, how, tuple(lines)))
            heads.clear()
            lines.clear()

    for written in text.splitlines():
        if written.startswith("#"):
            finish()
            heads.append(written.removeprefix("#").strip())
        elif written.strip():
            lines.append(_line(written, where))
    finish()
    return made


def _line(written: str, where: str) -> Line:
    row = _LINE.fullmatch(written.rstrip())
    if row is None:
        raise ValueError(
            f"{where}: {written!r} should be `path: shape reading`, as `a/w: 4x8 M io`."
        )
    shape = () if row["shape"] == "()" else tuple(map(int, row["shape"].split("x")))
    if not row["answer"] and len(shape) > 1:
        raise ValueError(f"{where}: {written!r} should say how the leaf is read: F, M, T or ?.")
    try:
        answer = _answer(row["answer"] or "F", shape)
    except ValueError as error:
        raise ValueError(f"{where}: {written!r}: {error}") from None
    paths = tuple(expanded(row["path"]))
    counted = sum(map(_counts, _parts(row["path"])))
    by_number = any(r.kind == "T" and "l" not in r.axes for r in answer.readings + answer.offered)
    if by_number and counted > 1:
        raise ValueError(
            f"{where}: {written!r} has numbers in braces twice, so which of them count its layers? "
            "Write a line for each of the others."
        )
    return Line(row["path"], paths, shape, answer)


def _answer(text: str, shape: tuple[int, ...]) -> Answer:
    readings, offered, is_asked = [], [], False
    for each in text.split(" | "):
        if each == "?":
            is_asked = True
        elif each.startswith("? "):
            is_asked = True
            offered.append(reading(each[2:], shape))
        else:
            readings.append(reading(each, shape))
    return Answer(tuple(readings), is_asked, tuple(offered))


def reading(text: str, shape: Sequence[int]) -> Reading:
    """The reading that is written so, for a leaf of this shape.

    Raises:
      ValueError: If it does not fit the shape.
    """
    if text == "F":
        return FALLBACK
    row = _READING.fullmatch(text)
    if row is None:
        raise ValueError(f"{text!r} is no reading: write F, or as T ioo, M io, T iO/3.")
    numbers = [int(size) for size in (row["parts"] or "1").split("+")]
    view = tuple(map(int, row["view"].split("x"))) if row["view"] else ()
    made = Reading(
        row["kind"], row["axes"], numbers[0] if len(numbers) == 1 else tuple(numbers), view
    )
    seen = view or tuple(shape)
    if len(made.axes) != len(seen) or math.prod(seen) != math.prod(shape):
        raise ValueError(f"{text!r} does not fit the shape {spelled(shape)}.")
    if not {"i", "o"} <= set(made.axes.lower()) or made.axes.count("l") > 1:
        raise ValueError(f"{text!r} should have `i`, `o`, and `l` once at most.")
    if made.axes.count("O") != (made.parts != 1):
        raise ValueError(f"{text!r} should have one `O`, the axis that is cut, where it has parts.")
    if "O" in made.axes and sum(made.cut(shape)) != seen[made.axes.index("O")]:
        raise ValueError(f"{text!r} has parts that are not as long as the axis `O` together.")
    return made


def expanded(path: str, numbers: bool = True) -> list[str]:
    """Every path that braces stand for; without `numbers`, those that count stay in braces."""

    def choices(part: str) -> list[str]:
        if not part.startswith("{") or (_counts(part) and not numbers):
            return [part]
        if bounds := re.fullmatch(r"\{(\d+)\.\.(\d+)\}", part):
            return [str(number) for number in range(int(bounds[1]), int(bounds[2]) + 1)]
        return part[1:-1].split(",")

    return ["".join(chosen) for chosen in itertools.product(*map(choices, _parts(path)))]


def _parts(path: str) -> list[str]:
    """A path as what stands in braces, with them, and what stands between."""
    return re.split(r"(\{.*?\})", path)


def _counts(part: str) -> bool:
    """Whether braces hold numbers, or Haiku's nothing, _1, _2."""
    return bool(re.fullmatch(r"\{(\d+\.\.\d+|(_?\d*,)*_?\d*)\}", part))


# Comparing --------------------------------------------------------------------------------------


def canonical(reading: Reading, shape: Sequence[int]) -> tuple[Any, ...]:
    """What all readings that give the same updates have in common.

    Neighbouring axes of one letter are one axis, equal parts are a batch, and a matrix that is
    orthogonalized alone is as good transposed if it is square.
    """
    if reading.kind == "F":
        return ("F",)
    factors: list[tuple[str, Any]] = []
    for letter, size in zip(reading.axes, reading.view or shape, strict=True):
        if letter == "O":
            sizes = reading.cut(shape)
            equal = len(set(sizes)) == 1
            factors += [("b", len(sizes)), ("o", sizes[0])] if equal else [("O", sizes)]
        else:
            factors.append(("b" if reading.kind == "M" and letter == "l" else letter, size))
    joined: list[tuple[str, Any]] = []
    for letter, size in factors:
        if size == 1:
            continue
        if joined and joined[-1][0] == letter and letter in "iob":
            joined[-1] = letter, joined[-1][1] * size
        else:
            joined.append((letter, size))
    fan_in, fan_out = reading.matrix(shape)
    if reading.kind == "M" and fan_in == fan_out and "O" not in dict(joined):
        turned = [({"i": "o", "o": "i"}.get(letter, letter), size) for letter, size in joined]
        joined = min(joined, turned)
    return (reading.kind, *joined)


def same(one: Reading, other: Reading, shape: Sequence[int]) -> bool:
    """Whether two readings of a leaf of this shape give the same updates."""
    return canonical(one, shape) == canonical(other, shape)


def is_right(found: Found, line: Line) -> bool:
    """Whether what the rules make of a leaf is one of the right answers."""
    answer = line.answer
    if found.is_asked:
        offered = {canonical(reading, line.shape) for reading in found.offered}
        wanted = {canonical(reading, line.shape) for reading in answer.offered}
        return answer.is_asked and wanted <= offered
    return any(same(found.reading, right, line.shape) for right in answer.readings)


def wrong(tree: Tree, found: Mapping[str, Found]) -> dict[str, tuple[str, Answer]]:
    """Path -> (what was found, what is right), where these differ."""
    return {
        path: (str(found[path]), line.answer)
        for path, line in tree.lines_by_path.items()
        if not is_right(found[path], line)
    }


def stacked(tree: Tree, found: Mapping[str, Found]) -> set[tuple[str, ...]]:
    """The leaves that should be stacked: pairs of layers, which the braces of a line count."""
    runs: set[tuple[str, ...]] = set()
    for line in tree.lines:
        for kind in expanded(line.pattern, numbers=False):
            series = [unboxed(path) for path in expanded(kind)]
            what = found[series[0]]
            if not what.is_asked and what.reading.kind == "T" and "l" not in what.reading.axes:
                runs |= {tuple(series[start : start + 2]) for start in range(0, len(series), 2)}
    return runs


# Reading ----------------------------------------------------------------------------------------


def reading_of(rule: Rule, shape: Sequence[int]) -> Reading:
    """What a rule says of a leaf of this shape, in the notation."""
    if not rule.stack:
        return FALLBACK
    kind = "T" if rule.stack > 1 else "M"
    layer = None if rule.layer_axis is None else rule.layer_axis % len(shape)
    view: tuple[int, ...] = rule.view or ()
    # `dims` numbers the axes of the whole leaf, or those of the view of one layer.
    rank = len(view or shape)
    places = [axis for axis in range(rank) if view or axis != layer]
    fans = (places[:1], places[1:])
    if rule.dims is not None:
        fans = tuple([axis % rank for axis in axes] for axes in fan_axes(rule.dims))
    letters = dict.fromkeys(fans[0], "i") | dict.fromkeys(fans[1], "o")
    if rule.split != 1:
        letters[fans[1][0]] = "O"
    axes = [letters.get(place, "b") for place in places]
    if layer is not None:
        place = layer
        if view:
            before = math.prod(shape[:layer])
            places = [n for n in range(len(view) + 1) if math.prod(view[:n]) == before]
            if not places:
                raise ValueError(f"{rule} has layers within an axis of {spelled(shape)}.")
            place = places[0]
            view = (*view[:place], shape[layer], *view[place:])
        axes.insert(place, "l")
    return Reading(kind, "".join(axes), rule.split, view)


def written(params: Any, found: Mapping[str, Found]) -> list[str]:
    """Lines that say how matrices are read, by kind: what differs in one number is in braces."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for path, leaf in leaf_paths(params):
        if np.ndim(leaf) < 2:
            continue
        before, number, after = re.fullmatch(r"(\D*)(\d*)(.*)", path).groups()  # pyright: ignore
        mark = "{}" if number else ""
        what = f"{spelled(np.shape(leaf))} {found[path]}"
        kinds.setdefault((f"{before}{mark}{after}", what), []).append(number)
    lines = []
    for (pattern, what), numbers in kinds.items():
        numbers = sorted(numbers, key=lambda number: int(number or 0))
        held = "{" + ",".join(numbers) + "}" if len(numbers) > 1 else numbers[0]
        range_of_all = f"{{{numbers[0]}..{numbers[-1]}}}"
        if len(numbers) > 2 and expanded(range_of_all) == numbers:
            held = range_of_all
        lines.append(f"{pattern.replace('{}', held)}: {what}")
    return lines


def rules_in(text: str) -> list[Rule]:
    """The rules that a message offers, in its order."""
    names = {"Rule": Rule, "MuonDimensionNumbers": MuonDimensionNumbers}
    return [eval(found[0], names) for found in _RULE.finditer(text)]


def leaf_of(member: str) -> str:
    """A member's leaf: `path:0` is a part of it and `path[3]` a slice."""
    return re.sub(r"(:\d+)?(\[\d+\])?(#\d+)?$", "", member)


def read(
    params: Any,
    lines: Mapping[str, Line] | None = None,
    read_rules: Callable[..., Sequence[Rule]] = default_rules,
) -> dict[str, Found]:
    """What the default rules make of every leaf.

    What an error names is answered by an offered rule that is right by its line, or else by the
    fallback, and the others are read again.
    """
    shapes = {path: np.shape(leaf) for path, leaf in leaf_paths(params)}
    first: list[Rule] = []
    offers: dict[str, tuple[Reading, ...]] = {}

    def note(message: str) -> list[Rule]:
        """Notes what a message asks, and answers."""
        offered, answers = rules_in(message), []
        for path in _named(message, shapes):
            if path in offers:
                continue
            fit = [rule for rule in offered if rule.search(path)]
            offers[path] = tuple(dict.fromkeys(reading_of(rule, shapes[path]) for rule in fit))
            wanted = lines[path].answer.offered if lines else ()
            right = [
                rule
                for rule in fit
                for reading in wanted
                if same(reading_of(rule, shapes[path]), reading, shapes[path])
            ]
            answers += right[:1] or [Rule(f"^{re.escape(path)}$", stack=0)]
        return answers

    while True:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                rules = read_rules(params, first)
                break
            except ValueError as error:
                answers = note(str(error))
                if not answers:
                    raise
                first = list(dict.fromkeys(first + answers))
    for warning in caught:
        note(str(warning.message))
    found = readings(params, rules)
    return {path: Found(found[path], path in offers, offers.get(path, ())) for path in shapes}


def _named(message: str, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The leaves that a message names, with those of "(and 5 more with other numbers)"."""
    quoted = {path for path in shapes if f'"{path}"' in message}
    kinds = {(re.sub(r"\d+", "*", path), shapes[path]) for path in quoted}
    return [p for p, shape in shapes.items() if (re.sub(r"\d+", "*", p), shape) in kinds]


def readings(params: Any, rules: Sequence[Rule] | None = None) -> dict[str, Reading]:
    """How the plan of some rules reads every leaf; a leaf that it reads in two ways fails."""
    shapes = {path: np.shape(leaf) for path, leaf in leaf_paths(params)}
    made = plan(params, rules)
    found = {path: FALLBACK for path in made.fallback}
    assert len(found) == len(made.fallback)
    for group in made.groups:
        assert group.rule.mode == 1
        for path in map(leaf_of, group.members):
            what = reading_of(group.rule, shapes[path])
            assert found.setdefault(path, what) == what
            parts, sizes = set(what.cut(shapes[path])), what.matrix(shapes[path])
            assert len(parts) > 1 or sizes == (group.fan_in, group.fan_out), (path, what)
    assert found.keys() == shapes.keys()
    return found
