"""The paper's set-ups in `examples/configs`: they load, and are as large as their names say."""

import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples import optimizers, training
from examples.command_line import UserError
from examples.options import parse, resolve
from teon_optax import plan

pytestmark = [pytest.mark.promotes_dtypes, pytest.mark.promotes_ranks]
FOLDER = Path(__file__).parents[1] / "examples/configs"
MILLIONS = {
    "gpt-small": 124,
    "gpt-base": 362,
    "gpt-large": 774,
    "llama-60m": 60,
    "llama-130m": 130,
    "llama-350m": 350,
    "llama-1b": 1000,
}
SMALL = ("llama-60m",)


def load(name, *flags):
    return resolve(parse(["--config", str(FOLDER / f"{name}.toml"), *flags]).given)


def built(name, *flags):
    options = load(name, *flags)
    return options, training.build(options, options.vocab_size)


def test_every_configuration_is_tested():
    assert {path.stem for path in FOLDER.iterdir()} == set(MILLIONS)


@pytest.mark.parametrize("name", MILLIONS)
def test_a_configuration_has_the_parameters_of_its_name(name):
    _, built_program = built(name)
    params = built_program.shapes.params
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count / 1e6 == pytest.approx(MILLIONS[name], rel=0.02)
    assert f"{count / 1e6:.1f}" in (FOLDER / f"{name}.toml").read_text()[:200]
    stacked = [group for group in plan(params).groups if len(group.layers) > 1]
    depth = sum(path.startswith("block_") for path in params)
    assert len(stacked) == 3 * depth / 2
    assert all(len(group.layers) == 2 and group.rule.mode == 1 for group in stacked)


@pytest.mark.parametrize(
    ("name", "tokens_per_step", "tokens", "rate", "decay"),
    [("gpt-small", 1_048_576, 10e9, 0.01, 0.1), ("llama-60m", 524_288, 1.1e9, 0.04, 0.05)],
)
def test_published_settings_are_the_papers(name, tokens_per_step, tokens, rate, decay):
    options = load(name)
    assert options.batch_size * options.context == tokens_per_step
    assert options.steps * tokens_per_step == pytest.approx(tokens, rel=1e-3)
    assert (options.learning_rate, options.weight_decay) == (rate, decay)
    assert (options.adam_b1, options.adam_b2, options.dtype) == (0.95, 0.95, "bfloat16")


@pytest.mark.parametrize("name", MILLIONS)
def test_every_line_of_a_configuration_says_where_it_comes_from(name):
    for line in (FOLDER / f"{name}.toml").read_text().splitlines():
        if line and line[0] != "#":
            assert line.split("# ")[1].startswith(("published", "ours")), line


@pytest.mark.slow
@pytest.mark.parametrize("name", MILLIONS)
def test_a_configuration_compiles_for_abstract_arrays(name):
    if name not in SMALL and "TEON_LARGE" not in os.environ:
        pytest.skip("minutes: set TEON_LARGE=1")
    options, built_program = built(name)
    batch = jax.ShapeDtypeStruct((options.batch_size, options.context + 1), jnp.int32)
    train_step: Any = built_program.train_step
    compiled = train_step.lower(built_program.shapes, batch).compile()
    assert jax.tree.structure(compiled.out_info[0]) == jax.tree.structure(built_program.shapes)


@pytest.mark.slow
def test_llama_60m_takes_real_steps():
    flags = ["--batch-size", "2", "--microbatches", "2", "--context", "16", "--steps", "20"]
    options, built_program = built("llama-60m", *flags)
    state = built_program.init(jax.random.key(0))
    batch = np.random.default_rng(0).integers(options.vocab_size, size=(2, 17)).astype(np.int32)
    losses = []
    for _ in range(3):
        state, loss = built_program.train_step(state, batch)
        losses.append(float(loss))
    assert losses[0] == pytest.approx(math.log(options.vocab_size), rel=0.05)
    assert losses[2] < losses[1] < losses[0]


@pytest.fixture
def toml(tmp_path):
    def write(text):
        path = tmp_path / "config.toml"
        path.write_text(text)
        return ["--config", str(path)]

    return write


def test_a_flag_comes_before_the_file(toml):
    options = resolve(parse([*toml("steps = 7\nseed = 3"), "--steps", "9"]).given)
    assert (options.steps, options.seed) == (9, 3)


def test_a_file_may_say_what_another_optimizer_does_not_need(toml):
    flags = toml('adam_learning_rate = 0.5\nmethod = "jordan"')
    assert resolve(parse([*flags, "--optimizer", "adamw"]).given).method == "polar_express"
    assert resolve(parse([*flags, "--optimizer", "muon"]).given).adam_learning_rate == 0.5


def test_shards_hold_tokens_whatever_the_file_says(toml, tmp_path):
    (tmp_path / "fineweb_train.bin").write_bytes(b"")
    flags = toml('tokenizer = "bpe"\nvocab_size = 300')
    assert resolve(parse(flags).given).tokenizer == "bpe"
    assert resolve(parse([*flags, "--data", str(tmp_path)]).given).tokenizer == "shards"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step = 3", "step: no such setting"),
        ('out = "x"', "out: no such setting"),
        ("resume = true", "resume: no such setting"),
        ('"" = 1', ": no such setting"),
        ("steps = 0", "--steps: 0 is not a whole number"),
        ("steps = ", "config.toml: "),
        ("steps = [1, 2]", r"--steps: \[1, 2\] is not a whole number"),
        ("steps = 7.0", "--steps: 7.0 is not a whole number"),
        ('steps = "7"', "--steps: '7' is not a whole number"),
        ("steps = true", "--steps: True is not a whole number"),
        ("steps = 2020-01-01", "--steps: .* is not a whole number"),
        ("[steps]\na = 1", "--steps: {'a': 1} is not a whole number"),
        ("[[steps]]\na = 1", "--steps: .* is not a whole number"),
        ("steps = 0x" + "f" * 5000, "config.toml: "),
        ("steps = " + "9" * 5000, "config.toml: "),
        ("steps = " + "[" * 100_000, "config.toml: "),
        ("seed = []", r"--seed: \[\] is not a whole number"),
        ("batch-size = 1\nbatch_size = 2", "batch_size and batch-size are one setting: write it o"),
        ("batch-size = 1\nbatch-size = 2", "config.toml: "),
        ("adam_b1 = 1.0", "--adam-b1: 1.0 is not zero or a positive number below 1"),
        ("learning_rate = nan", "--learning-rate: nan is not a positive number"),
        ("learning_rate = inf", "--learning-rate: inf is not a positive number"),
        ("learning_rate = [0.1]", r"--learning-rate: \[0.1\] is not a positive number"),
        ("learning_rate = false", "--learning-rate: False is not a positive number"),
        ('learning_rate = "0.1"', "--learning-rate: '0.1' is not a positive number"),
        ("model = 3", "--model: 3 is not one of tiny, gpt-small"),
        ('model = ["tiny"]', r"--model: \['tiny'\] is not one of tiny"),
        ('data = "a\\u0000b"', r"--data: 'a\\x00b' has a NUL character"),
        ('data = ""', "--data: an empty path"),
        ("data = 1", "--data: 1 is not a string"),
        ("rules = []", r"--rules: \[\] is not a string or a list of strings"),
        ("rules = [1]", r"--rules: \(1,\) is not a string or a list of strings"),
        ('rules = [["x:stack=1"]]', "is not a string or a list of strings"),
        ('rules = ["x"]', "--rules 'x' is not REGEX"),
        ("batch_size = 6\nmicrobatches = 4", "--microbatches 4 does not divide --batch-size 6"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused(toml, text, message):
    with pytest.raises(UserError, match=message):
        resolve(parse(toml(text)).given)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "latin.toml").write_bytes(b'data = "caf\xe9"')
    for path in ("/nowhere.toml", str(tmp_path), str(tmp_path / "latin.toml")):
        with pytest.raises(UserError, match=f"--config {path}: "):
            parse(["--config", path])


def test_a_file_may_write_hyphens_whole_numbers_and_one_rule(toml):
    text = 'batch-size = 3\nlearning_rate = 1\nrules = "block_:stack=1"'
    options = resolve(parse(toml(text)).given)
    assert (options.batch_size, options.learning_rate) == (3, 1.0)
    assert options.rules == ("block_:stack=1",)


@pytest.mark.slow
def test_microbatches_change_nothing_but_the_order_of_sums():
    flags = ["--model", "tiny", "--depth", "1", "--hidden", "16", "--batch-size", "6"]
    flags += ["--context", "8", "--optimizer", "adamw"]
    batch = np.random.default_rng(0).integers(31, size=(6, 9)).astype(np.int32)
    after = []
    for parts in ("1", "3"):
        options = resolve(parse([*flags, "--microbatches", parts]).given)
        built_program = training.build(options, 31)
        state, loss = built_program.train_step(built_program.init(jax.random.key(0)), batch)
        first_moment = optax.tree.get(state.opt_state, "mu")  # a tenth of the gradient
        after.append([loss, *jax.tree.leaves(first_moment)])
    for one, three in zip(*after, strict=True):
        np.testing.assert_allclose(one, three, atol=1e-5 * np.abs(one).max())


def test_a_cosine_rises_over_a_tenth_and_ends_at_zero():
    schedule: Any = optimizers.cosine_schedule(0.4, 100)
    rate = [float(schedule(step)) for step in range(101)]
    assert rate[:11] == pytest.approx([0.04 + 0.036 * step for step in range(11)])
    assert rate[55] == pytest.approx(0.2)
    assert rate[100] == pytest.approx(0.0, abs=1e-6)
    schedule = optimizers.cosine_schedule(0.4, 1)
    assert float(schedule(0)) == pytest.approx(0.4)
