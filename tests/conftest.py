"""Where and how every test runs: eight CPU devices, strict arithmetic, reproducible properties."""

import contextlib
import os

# Read when JAX and Matplotlib are imported, also by the scripts that tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["MPLBACKEND"] = "Agg"
# Compilation is most of the time of these tests, and no claim of theirs. CI also runs without it.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# NumPy's factorizations of small matrices take three times as long where threads share two cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

# Not in XLA_FLAGS: the scripts that tests start would inherit the eight devices.
jax.config.update("jax_num_cpu_devices", 8)

hypothesis.settings.register_profile(
    "reproducible", derandomize=True, deadline=None, max_examples=50
)
hypothesis.settings.load_profile("reproducible")


# `--doctest-modules` would import the files of two folders as one module.
collect_ignore_glob = ["*/conftest.py"]


def pytest_collection_modifyitems(items):
    """Programs and whole models take minutes in all: the quick tests leave them out."""
    for item in items:
        if item.path.parent.name in ("integration", "families"):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module")
def quick_compilation():
    """For a whole module: numbers and collectives are the same, in half the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module", autouse=True)
def strict_arithmetic(request):
    """No operation changes a dtype or broadcasts a rank unless the code says so.

    Whole programs, and the models of other libraries, run under JAX's default arithmetic.
    """
    if request.path.parent.name in ("integration", "families"):
        yield
        return
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(autouse=True)
def arithmetic_of_a_test(request, strict_arithmetic):
    """The same, but for what the test's marks allow."""
    with contextlib.ExitStack() as allowed:
        if request.node.get_closest_marker("promotes_dtypes"):
            allowed.enter_context(jax.numpy_dtype_promotion("standard"))
        if request.node.get_closest_marker("promotes_ranks"):
            allowed.enter_context(jax.numpy_rank_promotion("allow"))
        yield
