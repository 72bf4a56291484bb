"""What the test of every family asserts: the whole plan, the orientation, a loss that falls.

A family says for each path what every axis is, a letter each: `i` fan_in, `o` fan_out, `l` layers,
`b` batch. In paths `*` is a number and `@` Haiku's (nothing, _1, _2). The oracle reads nothing
else.
"""

import os
import pathlib
import re
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from jax.tree_util import FlattenedIndexKey, GetAttrKey
from optax.contrib import MuonDimensionNumbers

from teon_optax import Rule, default_rules, orthogonalize, plan, teon

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "families.md"
FALLBACK: str = "fallback"
# Programs this small compile for longer than they run.
QUICKLY: dict = {"xla_llvm_disable_expensive_passes": True}
if jax.__version_info__ < (0, 11):
    QUICKLY["xla_cpu_use_fusion_emitters"] = False


class As(NamedTuple):
    """How a leaf is read: K, a letter for each axis, equal parts along the first `o`."""

    stack: int
    axes: str
    parts: int = 1


class Run(NamedTuple):
    """A joint matrix: what the plan calls its layers, and where their entries are."""

    members: tuple[str, ...]
    row: str
    places: list[tuple[int, np.ndarray]]  # leaf, flat positions (batch, fan_in, fan_out)

    @property
    def size(self):
        """(fan_in, fan_out, batch)."""
        batch, fan_in, fan_out = self.places[0][1].shape
        return fan_in, fan_out, batch


def teon_of(axes, parts=1):
    return As(2, axes, parts)


def muon_of(axes, parts=1):
    return As(1, axes, parts)


def under(prefix, rows, suffix=""):
    return {f"{prefix}{path}{suffix}": row for path, row in rows.items()}


def library(name):
    """A library outside the `test` extra, or a skipped file; what it deprecates is its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


def filled(shapes):
    """Parameters of these shapes: eager initializers compile for longer than the test runs."""
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        name = jax.tree_util.keystr(path)
        offset = 1.0 if "scale" in name or "weight" in name and leaf.ndim == 1 else 0.0
        return jnp.asarray(offset + 0.2 * rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree.map_with_path(fill, shapes)


def paths_of(params):
    """Every leaf's path, without the boxes around the array: keys that have no siblings."""
    flat = [keys for keys, _ in jax.tree_util.tree_flatten_with_path(params)[0]]

    def is_box(keys):
        names = isinstance(keys[-1], GetAttrKey) and keys[-1].name in ("value", "data_array")
        alone = sum(other[: len(keys) - 1] == keys[:-1] for other in flat) == 1
        return alone and (names or isinstance(keys[-1], FlattenedIndexKey))

    def unboxed(keys):
        return unboxed(keys[:-1]) if is_box(keys) else keys

    return [jax.tree_util.keystr(unboxed(keys), simple=True, separator="/") for keys in flat]


def rows_of(params, expected):
    """The leaves of every row of `expected`, by number; each leaf is in one row."""
    paths = paths_of(params)
    rows = {}
    for row in expected:
        regex = re.escape(row).replace(r"\*", r"(\d+)").replace("@", r"(?:_(\d+))?")
        found = [(re.fullmatch(regex, path), leaf) for leaf, path in enumerate(paths)]
        # The first number counts layers; the others tell types apart.
        numbers = [
            (int(match.groups("0")[0]) if match.groups() else 0, leaf)
            for match, leaf in found
            if match
        ]
        rows[row] = [leaf for _, leaf in sorted(numbers)]
    leaves = sorted(sum(rows.values(), []))
    unread = {paths[leaf] for leaf in set(range(len(paths))) - set(leaves)}
    assert leaves == list(range(len(paths))), unread
    assert all(rows.values()), [row for row, leaves in rows.items() if not leaves]
    return paths, rows


def positions(shape, how):
    """Flat positions of a leaf's entries: parts of (layers, batch, fan_in, fan_out)."""
    assert len(shape) == len(how.axes), (shape, how)
    axes = {letter: [a for a, x in enumerate(how.axes) if x == letter] for letter in "lbio"}
    index = np.arange(np.prod(shape)).reshape(shape).transpose(sum(axes.values(), []))
    sizes = {letter: int(np.prod([shape[a] for a in axes[letter]])) for letter in "lbi"}
    flat = index.reshape(*sizes.values(), shape[axes["o"][0]], -1)
    return [part.reshape(*part.shape[:3], -1) for part in np.split(flat, how.parts, axis=3)]


def runs(params, expected):
    """Every joint matrix that `expected` asks for."""
    shapes = [leaf.shape for leaf in jax.tree.leaves(params)]
    paths, rows = rows_of(params, expected)
    for row, leaves in rows.items():
        how = expected[row]
        for part in range(0 if how == FALLBACK else how.parts):
            suffix = f":{part}" if how.parts > 1 else ""
            layers = []
            for leaf in leaves:
                for layer, entries in enumerate(positions(shapes[leaf], how)[part]):
                    index = f"[{layer}]" if "l" in how.axes else ""
                    layers.append((f"{paths[leaf]}{suffix}{index}", (leaf, entries)))
            for start in range(0, len(layers), how.stack):
                members, places = zip(*layers[start : start + how.stack], strict=True)
                yield Run(members, row, list(places))


def misfits(updates, gradients, params, expected):
    """Row -> how far its updates are from the paper's, in units of what rounding allows."""
    found, wanted = (
        [np.asarray(x).ravel() for x in jax.tree.leaves(t)] for t in (updates, gradients)
    )
    worst: dict[str, float] = {}
    for run in runs(params, expected):
        fan_in, fan_out, batch = run.size
        scale = np.sqrt(fan_out / fan_in)
        for b in range(batch):
            kernels = [wanted[leaf][entries[b]] for leaf, entries in run.places]
            stretch = np.linalg.svd(oracles.unfolding(kernels, 1), compute_uv=False)
            allowed = scale * oracles.rounding(stretch, squared=False)
            for (leaf, entries), Q in zip(run.places, oracles.joint(kernels, 1), strict=True):
                error = oracles.distance(found[leaf][entries[b]], scale * Q)
                worst[run.row] = max(worst.get(run.row, 0), error / allowed)
    return worst


def transposed(how):
    """The reading with fan_in and fan_out exchanged; a part of another length is no part."""
    return how if how == FALLBACK else As(how.stack, how.axes.translate(str.maketrans("io", "oi")))


def assert_plan(params, expected, rules):
    made = plan(params, rules)
    paths, rows = rows_of(params, expected)
    apart = {
        paths[leaf] for row, leaves in rows.items() if expected[row] == FALLBACK for leaf in leaves
    }
    assert set(made.fallback) == apart
    assert {g.members: (g.fan_in, g.fan_out, g.batch) for g in made.groups} == {
        run.members: run.size for run in runs(params, expected)
    }
    assert all(group.rule.mode == 1 for group in made.groups)


def assert_orientation(params, expected, rules):
    """The update is the paper's, and is not that of the transposed matrices."""
    rng = np.random.default_rng(0)
    gradients = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)
    optimizer = orthogonalize(rules, method="svd")
    update = jax.jit(lambda g: optimizer.update(g, optimizer.init(g))[0], compiler_options=QUICKLY)
    updates = update(gradients)
    fit = misfits(updates, gradients, params, expected)
    assert max(fit.values()) <= 1, fit
    # A square matrix alone has the same polar factor and scale either way.
    square = {run.row for run in runs(params, expected) if run.size[0] == run.size[1]}
    alone = {row for row in square if expected[row].stack == 1}
    wrong = {row: transposed(how) for row, how in expected.items()}
    misfit = misfits(updates, gradients, params, wrong)
    assert all(misfit[row] > 100 for row in fit.keys() - alone), misfit


def assert_trains(params, loss, rules=None, learning_rate=0.02, steps=21):
    """The loss after 20 steps is lower."""
    optimizer = teon(learning_rate, rules)

    def step(carry, _):
        params, state = carry
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), value

    def losses(params):
        start = params, optimizer.init(params)
        return jax.lax.scan(step, start, length=steps)[1]

    before, *_, after = jax.jit(losses, compiler_options=QUICKLY)(params)
    assert after < 0.9 * before, (before, after)


def summary(expected, is_asked):
    """What the table of the page says of a family: each matrix by the last names of its path."""

    def called(stack):
        paths = [path for path, how in expected.items() if how != FALLBACK and how.stack == stack]
        names = (re.sub(r"/(kernel|weight|w)$", "", path) for path in paths)
        return ", ".join(dict.fromkeys(f"`{name.rpartition('/')[2]}`" for name in names))

    parts = [f"{word}: {called(stack)}" for stack, word in ((2, "K = 2"), (1, "Muon"))]
    said = "; ".join(part for part in parts if not part.endswith(": "))
    return f"error; with the offered rules {said}" if is_asked else said


def assert_on_page(params, rules, name, said):
    """docs/families.md has this row and plan under this name; WRITE_OUTPUT=1 writes them there."""
    page, made = PAGE.read_text("utf-8"), str(plan(params, rules))
    start = f"<!-- plan: {name} -->\n\n```text\n"
    row = re.compile(rf"^(\| \[[^|]*\]\(#{name}\) \| [^|]* \| )([^|]*)( \| [^|]* \|)$", re.M)
    assert start in page and row.search(page)
    before, _, after = row.sub(lambda found: found[1] + said + found[3], page).partition(start)
    _, end, rest = after.partition("\n```\n")
    written = "".join([before, start, made, end, rest])
    if os.environ.get("WRITE_OUTPUT"):
        PAGE.write_text(written, "utf-8")
    else:
        assert page == written


def check(name, params, loss, expected, first=(), **training):
    """The plan, the orientation and the training of a model whose rules are the default ones."""
    rules = default_rules(params, first)
    assert_plan(params, expected, rules)
    assert_orientation(params, expected, rules)
    assert_trains(params, loss, rules if first else None, **training)
    assert_on_page(params, rules, name, summary(expected, bool(first)))


def offers(params):
    """The refused leaves with the rules that the error offers for each."""
    with pytest.raises(ValueError, match="cannot tell how to read some leaves") as error:
        default_rules(params)
    names = {"Rule": Rule, "MuonDimensionNumbers": MuonDimensionNumbers}
    for entry in re.split(r"\n(?=\")", str(error.value))[1:]:
        paths = re.findall(r'"([^"(^]+)"(?=, )', entry.splitlines()[0])
        lines = re.findall(r"^    (Rule\(.*\))  # (.*)$", entry, re.M)
        # Where two read the axes alike, the first.
        yield paths, {axes: eval(line, names) for line, axes in reversed(lines)}


def answered(params, readings):
    """The offered rules, as pasted: the axes to choose are in `readings`, by patterns of paths."""

    def choice(path):
        return next(axes for pattern, axes in readings.items() if re.search(pattern, path))

    return [rules[choice(paths[0])] for paths, rules in offers(params)]
