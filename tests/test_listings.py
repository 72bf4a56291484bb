"""The notation of trees: what its files may hold, and which readings are the same."""

import pytest
from listings import (
    Found,
    Reading,
    canonical,
    expanded,
    is_right,
    parsed,
    reading,
    reading_of,
    rules_in,
    same,
    stacked,
)
from optax.contrib import MuonDimensionNumbers

from teon_optax import Rule

TREE = """
# Two layers
# made up 1.0
# by hand
embed/table: 99x64 F
blocks/{0,1}/{q,k}/kernel: 64x4x16 T ioo | ? T oio
blocks/{0,1}/{q,k}/bias: 4x16 F
blocks/{0,1}/up/kernel: 64x256 M io  # a comment
scale: ()
boxed/weight/<0>: 8x4 ? M oi
"""


def tree():
    (made,) = parsed(TREE)
    return made


def test_braces_are_those_of_a_shell():
    assert expanded("a/{0..2}/b") == ["a/0/b", "a/1/b", "a/2/b"]
    assert expanded("{q,k}/{0,10}") == ["q/0", "q/10", "k/0", "k/10"]
    assert expanded("block{,_1}/w") == ["block/w", "block_1/w"]
    assert expanded("{q,k}/{0..1}", numbers=False) == ["q/{0..1}", "k/{0..1}"]


def test_a_listing_is_a_tree_with_an_answer_for_every_leaf():
    made = tree()
    assert (made.title, made.library, made.how) == ("Two layers", "made up 1.0", "by hand")
    assert made.params["blocks"]["1"]["k"]["kernel"].shape == (64, 4, 16)
    assert made.params["scale"].shape == ()
    assert made.params["boxed"]["weight"].array.shape == (8, 4)
    assert str(made.answers["blocks/0/up/kernel"].readings[0]) == "M io"
    assert made.answers["blocks/1/q/kernel"].is_asked
    assert made.answers["boxed/weight"].readings == ()


def test_a_file_may_hold_several_trees():
    one, other = parsed("# one\na: 2x3 F\n\n# other\na: 3x4 M io\nb: 4\n")
    assert (one.title, other.title) == ("one", "other")
    assert len(other.lines) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a 2x3 F", "should be `path: shape reading`"),
        ("a: 2x3", "should say how the leaf is read"),
        ("a: 2x3 X io", "is no reading"),
        ("a: 2x3 M ioo", "does not fit the shape 2x3"),
        ("a: 2x3 M io as 2x4", "does not fit the shape 2x3"),
        ("a: 2x3 M ii", "should have `i`, `o`"),
        ("a: 2x6 T io/3", "should have one `O`"),
        ("a: 2x6 T iO/2+2", "not as long as the axis `O`"),
        ("a/{0,1}/{0,1}: 2x3 T io", "which of them count its layers"),
    ],
)
def test_a_line_that_cannot_be_read_is_refused(line, message):
    with pytest.raises(ValueError, match=message):
        parsed(f"# A tree\n{line}")


def test_a_path_that_stands_there_twice_is_refused():
    with pytest.raises(ValueError, match=r"\['a/1'\] stand there twice"):
        parsed("# A tree\na/{0..1}: 2x3 F\na/1: 2x3 F")


def test_a_tree_of_two_lines_of_head_is_refused():
    with pytest.raises(ValueError, match="should be a title, or title, library and how"):
        parsed("# A tree\n# a library\na: 2x3 F")


@pytest.mark.parametrize(
    ("shape", "rule", "text"),
    [
        ((4, 8), Rule("a", stack=0), "F"),
        ((4, 8), Rule("a"), "M io"),
        ((4, 8), Rule("(?P<layer>a)", stack=2, dims=MuonDimensionNumbers(1, 0)), "T oi"),
        ((4, 2, 8), Rule("a", layer_axis=1), "M ilo"),
        ((4, 2, 8), Rule("a", dims=MuonDimensionNumbers(-1, (0, 1))), "M ooi"),
        ((4, 2, 8), Rule("a", dims=MuonDimensionNumbers(0, 2)), "M ibo"),
        ((2, 4, 9), Rule("a", stack=2, layer_axis=0, split=3), "T liO/3"),
        ((3, 2, 8, 5), Rule("a", dims=MuonDimensionNumbers(2, (0, 1, 3)), split=3), "M Ooio/3"),
        ((8, 12), Rule("a", split=(6, 3, 3)), "M iO/6+3+3"),
    ],
)
def test_a_rule_is_written_as_it_reads_a_leaf(shape, rule, text):
    assert str(reading_of(rule, shape)) == text
    assert reading(text, shape) == reading_of(rule, shape)


@pytest.mark.parametrize(
    ("shape", "one", "other"),
    [
        ((64, 4, 16), "T ioo", "T io as 64x64"),
        ((64, 192), "T iO/3", "T ibo as 64x3x64"),
        ((3, 4, 64, 16), "T Ooio/3", "T boio"),
        ((6, 64, 32), "M lio", "M bio"),
        ((64, 64), "M io", "M oi"),
        ((64, 4, 16), "M ioo", "M oii"),
    ],
)
def test_readings_of_the_same_updates_are_the_same(shape, one, other):
    assert same(reading(one, shape), reading(other, shape), shape)


@pytest.mark.parametrize(
    ("shape", "one", "other"),
    [
        ((64, 64), "T io", "T oi"),
        ((64, 64), "T io", "M io"),
        ((64, 32), "M io", "M oi"),
        ((64, 192), "T iO/3", "T iobo as 64x4x3x16"),
        ((64, 64), "M iO/32+32", "M iO/16+48"),
        ((6, 64, 32), "T lio", "T bio"),
        ((4, 16, 64), "M iio", "M bio"),
    ],
)
def test_readings_of_other_updates_are_not(shape, one, other):
    assert canonical(reading(one, shape), shape) != canonical(reading(other, shape), shape)


def test_a_leaf_that_is_asked_is_right_only_if_a_right_answer_is_offered():
    line = tree().lines_by_path["blocks/0/q/kernel"]
    offered = reading("T oio", line.shape), reading("T ioo", line.shape)
    assert is_right(Found(Reading("F"), True, offered), line)
    assert not is_right(Found(Reading("F"), True, offered[1:]), line)
    assert is_right(Found(offered[1]), line)
    assert not is_right(Found(offered[0]), line)


def test_the_numbers_in_braces_count_the_layers_of_a_stack():
    found = {
        path: Found(line.answer.readings[0])
        for path, line in list(tree().lines_by_path.items())[:-1]
    }
    found["boxed/weight"] = Found(Reading("F"))
    assert stacked(tree(), found) == {
        ("blocks/0/q/kernel", "blocks/1/q/kernel"),
        ("blocks/0/k/kernel", "blocks/1/k/kernel"),
    }


def test_rules_are_found_in_a_message():
    rule = Rule(r"^a/(?P<layer>\\d+)/q\\(1\\)$", stack=2, dims=MuonDimensionNumbers(0, (1, 2)))
    other = Rule("b", split=(2, 1))
    assert rules_in(f"one of\n    {rule}  # (in, out)\n    {other}  # parts") == [rule, other]
