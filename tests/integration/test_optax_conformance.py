"""The suites that Optax runs over its own optimizers, run over ours.

They are test files of the installed Optax, private by name and free to change; if one does, this
file says so. Copies of them are made here, in which our optimizers stand in place of Optax's own.
"""

import ast
import importlib.resources
import os
import types
import warnings
from unittest import mock

import jax
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

from teon_optax import Rule, orthogonalize, scale_by_teon, teon


def suite(file, **ours):
    """A copy of a test module of Optax whose test classes see `ours` in place of its own names."""
    path = importlib.resources.files("optax").joinpath(file)
    statements = ast.parse(path.read_text("utf-8")).body
    classes = [isinstance(statement, ast.ClassDef) for statement in statements].index(True)
    module = types.ModuleType(path.name.removesuffix(".py"))

    def run(part):
        exec(compile(ast.Module(part, []), str(path), "exec"), vars(module))

    # It uses what is deprecated, and sets XLA_FLAGS, which scripts that tests start would inherit.
    with mock.patch.dict(os.environ), warnings.catch_warnings(action="ignore"):
        run(statements[:classes])
        missing = ours.keys() - vars(module).keys()
        assert not missing, f"{path} no longer has {missing}"
        vars(module).update(ours)
        run(statements[classes:])
    return module


# Their trees are lists of arrays, of which default rules ask what they are.
MATRICES = (Rule("", dims=MuonDimensionNumbers(-2, -1)),)
SCANNED = (Rule("", stack=2, layer_axis=0),)


def under_test(wrapper_name=None, wrapper_kwargs=None, **opt_kwargs):
    return {
        "opt_name": "teon",
        "opt_kwargs": {"learning_rate": 1e-2} | opt_kwargs,
        "wrapper_name": wrapper_name,
        "wrapper_kwargs": wrapper_kwargs,
    }


def contributed_tests(*optimizers):
    return suite(
        "contrib/_common_test.py",
        _get_opt_factory={"teon": teon}.__getitem__,
        _MAIN_OPTIMIZERS_UNDER_TEST=optimizers,
        _ALL_OPTIMIZERS_UNDER_TEST=optimizers,
    ).ContribTest


ContribTest = contributed_tests(
    under_test(rules=MATRICES),
    under_test(rules=MATRICES, method="schatten", scale=0.2, nesterov=False),
)
WrappedContribTest = pytest.mark.slow(
    contributed_tests(
        under_test("mechanize", {"weight_decay": 0.0}, learning_rate=1e-1, rules=MATRICES),
        under_test("schedule_free", {"learning_rate": 1e-2}, rules=MATRICES),
    )
)

ShardingTest = suite(
    "_src/sharding_test.py",
    # It compares versions as strings, by which 0.10 is less than 0.7.2, and would skip most tests.
    jax=types.SimpleNamespace(**vars(jax) | {"__version__": "1"}),
    OPTIMIZERS={
        "teon": teon(1.0, MATRICES),
        "teon_of_scanned_layers": teon(1.0, SCANNED),
        "scale_by_teon": scale_by_teon(SCANNED),
        "orthogonalize": optax.chain(optax.trace(0.95), orthogonalize(SCANNED)),
    },
).ShardingTest
for name in [name for name in dir(ShardingTest) if name.startswith("test_microbatch")]:
    delattr(ShardingTest, name)  # of no optimizer
