"""The suite that Optax runs over its contributed optimizers, run over ours.

It is a test file of the installed Optax, private by name and free to change; if it does, this file
says so. A copy of it is made here, in which our optimizers stand in place of Optax's own.
"""

import ast
import importlib.resources
import types

import pytest
from optax.contrib import MuonDimensionNumbers

from teon_optax import Rule, teon

# Their 3-D leaves have no names that tell what they are.
pytestmark = pytest.mark.filterwarnings("ignore:No name tells what these leaves above 2-D are")


def suite(file, **ours):
    """A copy of a test module of Optax whose test classes see `ours` in place of its own names."""
    path = importlib.resources.files("optax").joinpath(file)
    statements = ast.parse(path.read_text("utf-8")).body
    classes = [isinstance(statement, ast.ClassDef) for statement in statements].index(True)
    module = types.ModuleType(path.name.removesuffix(".py"))

    def run(part):
        exec(compile(ast.Module(part, []), str(path), "exec"), vars(module))

    run(statements[:classes])
    missing = ours.keys() - vars(module).keys()
    assert not missing, f"{path} no longer has {missing}"
    vars(module).update(ours)
    run(statements[classes:])
    return module


MATRICES = (Rule("", dims=MuonDimensionNumbers(-2, -1)),)


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
    under_test(),
    under_test(rules=MATRICES, method="schatten", scale=0.2, nesterov=False),
)
WrappedContribTest = pytest.mark.slow(
    contributed_tests(
        under_test("mechanize", {"weight_decay": 0.0}, learning_rate=1e-1),
        under_test("schedule_free", {"learning_rate": 1e-2}),
    )
)
