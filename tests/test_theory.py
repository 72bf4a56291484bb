"""What the quadratics of `benchmarks.theory` say of L_TEON <= L_Muon <= K L_TEON."""

import numpy as np
import pytest

from benchmarks import theory

K, SIZE = 2, 8
ALIKE = "all alike, gradients alike"
DISJOINT = "all alike, gradients disjoint"
SEPARATE = "no output curved in two layers"


@pytest.fixture(scope="module")
def problems():
    return theory.problems(K, SIZE)


def curvature_along(problem, point):
    """<X, H X> of layers (m, n, K)."""
    return float(np.sum(problem.curvature.T[:, None, :] * point**2))


def norms(point):
    joint = np.concatenate(list(np.moveaxis(point, -1, 0)), axis=1)
    layers = max(np.linalg.norm(point[..., k], 2) for k in range(point.shape[-1]))
    return {"muon": layers, "teon": np.linalg.norm(joint, 2)}


def worst(problem, name):
    """Rows of one length, each where it is curved most."""
    point = np.zeros((SIZE, SIZE, K))
    owners = problem.curvature.argmax(axis=0)
    for k in range(K):
        rows = owners == k if name == "teon" else np.full(SIZE, True)
        point[:, :, k] = np.diag(rows.astype(float))
    return point


@pytest.mark.parametrize("name", ["muon", "teon"])
@pytest.mark.parametrize("problem", [ALIKE, SEPARATE])
def test_a_constant_is_reached_and_never_passed(problems, problem, name):
    problem = problems[problem]
    constant = problem.constants[name]
    extreme = worst(problem, name)
    assert norms(extreme)[name] == pytest.approx(1)
    assert curvature_along(problem, extreme) == pytest.approx(constant)
    generator = np.random.default_rng(0)
    for _ in range(20):
        point = generator.normal(size=extreme.shape)
        assert curvature_along(problem, point) <= constant * norms(point)[name] ** 2


def test_set_ups_are_at_both_ends_of_the_inequality(problems):
    ratios = {
        name: problem.constants["muon"] / problem.constants["teon"]
        for name, problem in problems.items()
    }
    assert ratios.pop(SEPARATE) == pytest.approx(1)
    assert list(ratios.values()) == pytest.approx([K] * 3)


def test_constants_tell_the_steps_only_where_gradients_are_not_alike(problems):
    """At the upper end the constants alone predict K times fewer steps for TEON."""
    ratio = {
        name: theory.sharp_steps(problems[name], "muon")
        / theory.sharp_steps(problems[name], "teon")
        for name in (SEPARATE, ALIKE, DISJOINT)
    }
    assert ratio[SEPARATE] == pytest.approx(1, abs=0.1)  # as predicted
    assert ratio[ALIKE] == pytest.approx(1, abs=0.1)  # not K: the prediction fails
    assert 1.3 < ratio[DISJOINT] < 1.5 * K


def test_steps_of_one_length_do_not_show_the_constants(problems):
    muon, teon = (theory.fixed_steps(problems[DISJOINT], name) for name in ("muon", "teon"))
    assert 0.7 < muon / teon < 1.3  # K was predicted


def test_equal_left_singular_vectors_shorten_the_joint_dual_norm_and_right_ones_do_not():
    """Mode 1, m x nK: r of the bound K / r^2."""
    u, v = np.eye(4, 2)[:, :, None], np.eye(4, 2)[:, :, None]
    left = np.stack([u[:, 0] @ v[:, k].T for k in range(2)], axis=-1)
    right = np.stack([u[:, k] @ v[:, 0].T for k in range(2)], axis=-1)
    ratios = [theory.dual_norm("muon", x) / theory.dual_norm("teon", x) for x in (left, right)]
    assert ratios == pytest.approx([np.sqrt(2), 1], rel=1e-5)
