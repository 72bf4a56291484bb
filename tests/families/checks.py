"""What the test of every family asserts: the whole plan, the orientation, a loss that falls.

What is right stands in tests/trees/models, in a file of the family's name: every leaf with its
shape, and how it is read. The oracle reads nothing else.
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
from listings import (
    Reading,
    expanded,
    leaf_of,
    read,
    reading_of,
    rules_in,
    same,
    trees,
    unboxed,
)
from program import contradictions, read_program

from teon_optax import Rule, default_rules, orthogonalize, plan, teon

# A table of all, and a page of plans for each library.
PAGE = pathlib.Path(__file__).parents[2] / "docs" / "families.md"
PLANS = PAGE.parent / "families"
# What the default rules read otherwise than the program uses it, by model. A leaf that is read
# rightly again fails its test, and goes from here.
MISREAD: dict[str, set[str]] = {}
# Programs this small compile for longer than they run.
QUICKLY: dict = {"xla_llvm_disable_expensive_passes": True}
if jax.__version_info__ < (0, 11):
    QUICKLY["xla_cpu_use_fusion_emitters"] = False


class Run(NamedTuple):
    """A joint matrix: what the plan calls its layers, and where their entries are."""

    members: tuple[str, ...]
    reading: Reading
    places: list[tuple[int, np.ndarray]]  # leaf, flat positions (batch, fan_in, fan_out)

    @property
    def size(self):
        """(fan_in, fan_out, batch)."""
        batch, fan_in, fan_out = self.places[0][1].shape
        return fan_in, fan_out, batch


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


def positions(shape, reading):
    """Flat positions of a leaf's entries: parts of (layers, batch, fan_in, fan_out)."""
    seen = reading.view or shape
    axes = {letter: [a for a, x in enumerate(reading.axes) if x == letter] for letter in "lbiOo"}
    index = np.arange(np.prod(shape)).reshape(seen).transpose(sum(axes.values(), []))
    sizes = {letter: int(np.prod([seen[a] for a in axes[letter]])) for letter in "lbiO"}
    flat = index.reshape(*sizes.values(), -1)
    ends = np.cumsum(reading.cut(shape))[:-1]
    return [part.reshape(*part.shape[:3], -1) for part in np.split(flat, ends, axis=3)]


def runs(params, tree, turn=lambda reading: reading):
    """Every joint matrix that a listing asks for."""
    places = {path: leaf for leaf, path in enumerate(paths_of(params))}
    for line in tree.lines:
        reading = turn(right(line))
        for kind in expanded(line.pattern, numbers=False) if reading.stack else ():
            series = [unboxed(path) for path in expanded(kind)]
            is_series = reading.kind == "T" and "l" not in reading.axes
            for paths in [series] if is_series else [[path] for path in series]:
                yield from _joint(paths, places, line.shape, reading)


def _joint(paths, places, shape, reading):
    count = len(positions(shape, reading))
    for part in range(count):
        suffix = f":{part}" if count > 1 else ""
        layers = []
        for path in paths:
            for layer, entries in enumerate(positions(shape, reading)[part]):
                index = f"[{layer}]" if "l" in reading.axes else ""
                layers.append((f"{path}{suffix}{index}", (places[path], entries)))
        for start in range(0, len(layers), reading.stack):
            members, where = zip(*layers[start : start + reading.stack], strict=True)
            yield Run(members, reading, list(where))


def right(line):
    """How a leaf should be read, which is what an error should offer if it is asked about."""
    (reading,) = line.answer.offered if line.answer.is_asked else line.answer.readings
    return reading


def misfits(updates, gradients, runs):
    """Members -> how far their updates are from the paper's, in units of what rounding allows."""
    found, wanted = (
        [np.asarray(x).ravel() for x in jax.tree.leaves(t)] for t in (updates, gradients)
    )
    worst: dict[tuple[str, ...], float] = {}
    for run in runs:
        fan_in, fan_out, batch = run.size
        scale = np.sqrt(fan_out / fan_in)
        for b in range(batch):
            kernels = [wanted[leaf][entries[b]] for leaf, entries in run.places]
            stretch = np.linalg.svd(oracles.unfolding(kernels, 1), compute_uv=False)
            allowed = scale * oracles.rounding(stretch, squared=False)
            for (leaf, entries), Q in zip(run.places, oracles.joint(kernels, 1), strict=True):
                error = oracles.distance(found[leaf][entries[b]], scale * Q)
                worst[run.members] = max(worst.get(run.members, 0), error / allowed)
    return worst


def transposed(reading):
    """The reading with fan_in and fan_out exchanged; a part of another length is no part."""
    axes = reading.axes.lower().translate(str.maketrans("io", "oi"))
    return reading._replace(axes=axes, parts=1)


def assert_plan(params, tree, rules):
    made = plan(params, rules)
    shapes = dict(zip(paths_of(params), map(jnp.shape, jax.tree.leaves(params)), strict=True))
    assert shapes == {path: line.shape for path, line in tree.lines_by_path.items()}
    assert set(made.fallback) == {
        path for path, line in tree.lines_by_path.items() if not right(line).stack
    }
    assert {g.members: (g.fan_in, g.fan_out, g.batch) for g in made.groups} == {
        run.members: run.size for run in runs(params, tree)
    }
    assert all(group.rule.mode == 1 for group in made.groups)


def assert_orientation(params, tree, rules):
    """The update is the paper's, and is not that of the transposed matrices."""
    rng = np.random.default_rng(0)
    gradients = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)
    optimizer = orthogonalize(rules, method="svd")
    update = jax.jit(lambda g: optimizer.update(g, optimizer.init(g))[0], compiler_options=QUICKLY)
    updates = update(gradients)
    wanted = list(runs(params, tree))
    fit = misfits(updates, gradients, wanted)
    assert max(fit.values()) <= 1, fit
    # A square matrix alone has the same polar factor and scale either way.
    square = {run.members for run in wanted if run.size[0] == run.size[1]}
    alone = {run.members for run in wanted if run.reading.stack == 1} & square
    turned: dict[str, float] = {}
    for members, far in misfits(updates, gradients, runs(params, tree, transposed)).items():
        for path in map(leaf_of, members):
            turned[path] = min(far, turned.get(path, far))
    paths = {leaf_of(member) for members in fit.keys() - alone for member in members}
    assert all(turned[path] > 100 for path in paths), turned


def assert_program(name, params, loss, tree):
    """No leaf is read otherwise than the program uses it, unless it is asked about."""
    found = contradictions(read_program(loss, params), read(params, tree.lines_by_path))
    assert found.keys() == MISREAD.get(name, set()), found


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


def summary(tree, is_asked):
    """What the table of the page says of a family: each matrix by the last names of its path."""

    def called(stack):
        paths = [path for path, line in tree.lines_by_path.items() if right(line).stack == stack]
        names = (re.sub(r"/(kernel|weight|w)$", "", path) for path in paths)
        return ", ".join(dict.fromkeys(f"`{name.rpartition('/')[2]}`" for name in names))

    parts = [f"{word}: {called(stack)}" for stack, word in ((2, "K = 2"), (1, "Muon"))]
    said = "; ".join(part for part in parts if not part.endswith(": "))
    return f"error; with the offered rules {said}" if is_asked else said


def assert_on_page(params, rules, name, said):
    """Compares the row of docs/families.md and the plan that it links to; WRITE_OUTPUT=1 writes."""
    table = PAGE.read_text("utf-8")
    row = re.compile(
        rf"^(\| \[[^|]*\]\(families/(\w+\.md)#{name}\) \| [^|]* \| )([^|]*)( \| [^|]* \|)$", re.M
    )
    found, *_ = row.finditer(table)  # Two tests may show one plan.
    page = PLANS / found[2]
    shown, start = page.read_text("utf-8"), f"<!-- plan: {name} -->\n\n```text\n"
    assert start in shown
    before, _, after = shown.partition(start)
    _, end, rest = after.partition("\n```\n")
    written = {
        PAGE: row.sub(lambda found: found[1] + said + found[4], table),
        page: "".join([before, start, str(plan(params, rules)), end, rest]),
    }
    for path, text in written.items():
        if os.environ.get("WRITE_OUTPUT"):
            path.write_text(text, "utf-8")
        else:
            assert path.read_text("utf-8") == text


def check(name, params, loss, first=(), **training):
    """The plan, the orientation and the training of a model are as its listing and program say.

    What the default rules ask about is answered by the rules that they offer.
    """
    tree = trees(f"models/{name}")[name]
    assert_program(name, params, loss, tree)
    is_asked = any(line.answer.is_asked for line in tree.lines)
    first = [*first, *answered(params, tree)] if is_asked else first
    rules = default_rules(params, first)
    assert_plan(params, tree, rules)
    assert_orientation(params, tree, rules)
    assert_trains(params, loss, rules if first else None, **training)
    assert_on_page(params, rules, name, summary(tree, is_asked))


def answered(params, tree):
    """Of the rules that are offered, those that read the leaves as the listing says."""
    asked = [(p, line) for p, line in tree.lines_by_path.items() if line.answer.is_asked]
    rules: list[Rule] = []
    for path, line in asked:
        if not any(rule.search(path) for rule in rules):
            offered = [rule for rule in rules_in(told(params, rules)) if rule.search(path)]
            fit = [r for r in offered if same(reading_of(r, line.shape), right(line), line.shape)]
            assert fit, (path, offered)
            rules.append(fit[0])
    return rules


def told(params, first):
    """What the default rules say, as an error or a warning, of what they cannot read."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            default_rules(params, first)
        except ValueError as error:
            return str(error)
    return "\n".join(str(warning.message) for warning in caught)
