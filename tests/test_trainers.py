"""examples/trainers: what can be known of its scripts without the frameworks that they show."""

import ast
import importlib.util
import os
import pathlib
import re
import subprocess
import tomllib

import pytest

import teon_optax

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "trainers"
SCRIPTS = {path.stem.removeprefix("with_"): path for path in sorted(FOLDER.glob("with_*.py"))}
PAGE = (ROOT / "docs" / "in_your_trainer.md").read_text("utf-8")
# PEP 723: a TOML document in a comment.
ENVIRONMENT = re.compile(r"^# /// script\n(.*?)^# ///$", re.M | re.S)
PLAN_BLOCK = re.compile(r"<!-- plan (\d+): (\w+) -->\n\n```text\n(.*?)^```$", re.M | re.S)


def load(name):
    specification = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def environment(script):
    (document,) = ENVIRONMENT.findall(script.read_text("utf-8"))
    return tomllib.loads(re.sub(r"^# ?", "", document, flags=re.M))


def lines(code):
    return {line.strip() for line in code.splitlines() if line.strip()}


each_script = pytest.mark.parametrize("name, script", SCRIPTS.items(), ids=list(SCRIPTS))


@each_script
def test_a_script_compiles_and_imports_public_names_alone(name, script):
    tree = ast.parse(script.read_text("utf-8"))
    compile(tree, script, "exec")
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    (ours,) = [node for node in imported if (node.module or "").startswith("teon_optax")]
    assert ours.module == "teon_optax"
    assert {alias.name for alias in ours.names} <= set(teon_optax.__all__)


@each_script
def test_an_environment_is_pinned_and_has_this_package(name, script):
    declared = environment(script)
    assert declared["requires-python"] == "==3.12.*"
    assert declared["dependencies"][0] == "teon_optax"
    source = declared["tool"]["uv"]["sources"]["teon_optax"]["path"]
    assert (FOLDER / source).resolve() == ROOT
    assert declared["tool"]["uv"]["exclude-newer"]
    pins = {re.split(r"[^\w-]", dependency)[0] for dependency in declared["dependencies"]}
    assert {"jax", "optax"} <= pins
    assert all("==" in dependency for dependency in declared["dependencies"][1:])


@each_script
def test_the_page_and_the_weekly_job_have_every_trainer(name, script):
    weekly = (ROOT / ".github" / "workflows" / "trainers.yml").read_text("utf-8")
    assert re.search(rf"^ +- {name}$", weekly, re.M)
    assert f"<!-- plan 1: {name} -->" in PAGE
    (row,) = re.findall(rf"^\| `{name}` \|.*$", PAGE, re.M)
    for dependency in environment(script)["dependencies"][1:]:
        assert dependency in row


def test_the_code_of_frameworks_on_the_page_is_that_of_the_scripts():
    files = [*SCRIPTS.values(), FOLDER / "shared.py"]
    written = set().union(*(lines(file.read_text("utf-8")) for file in files))
    _, frameworks = PAGE.split("\n## Frameworks\n")
    blocks = re.findall(r"^```python\n(.*?)^```$", frameworks, re.M | re.S)
    assert len(blocks) >= 6
    imports = re.compile("(import|from) ")
    code = [line for block in blocks for line in lines(block) if not imports.match(line)]
    assert [line for line in code if line not in written] == []


def test_the_plans_on_the_page_are_plans():
    plans = PLAN_BLOCK.findall(PAGE)
    assert {name for _, name, _ in plans} == set(SCRIPTS)
    for _, _, plan in plans:
        assert plan.startswith("orthogonalized ") and "\nmatrix products per step: " in plan


def test_a_plan_that_changed_is_put_onto_the_page():
    page = load("page")
    old, new = (f"orthogonalized {word}\n\nmatrix products per step: 1\n" for word in "ab")
    text = "<!-- plan {}: nnx -->\n\n```text\n{}```\n"
    shown = text.format(1, old) + text.format(2, old)
    output = f"losses: 1\n{old}between\n{new}after\n"
    assert page.with_plans(shown, "nnx", output) == text.format(1, old) + text.format(2, new)
    assert page.with_plans(shown, "keras", output) == shown


@pytest.mark.parametrize("arguments", [[], ["no_such"], ["nnx", "keras"]])
def test_run_lists_the_trainers(arguments):
    done = subprocess.run([FOLDER / "run", *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.rstrip().endswith(": " + " ".join(sorted(SCRIPTS)))


@pytest.mark.parametrize("installed", [True, False])
def test_run_says_that_it_fetches_a_python_where_there_is_none(installed, tmp_path):
    uv = tmp_path / "uv"
    uv.write_text(f'#!/bin/sh\n[ "$1" = run ] && echo "$@"\n{"true" if installed else "false"}\n')
    uv.chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        [FOLDER / "run", "nnx"], capture_output=True, text=True, env=os.environ | path
    )
    assert done.stdout == "run --script with_nnx.py\n"
    words = (
        "Python 3.12, for which with_nnx.py pins its versions, is not installed: uv fetches it\n"
    )
    assert done.stderr == ("" if installed else words)


def test_the_text_is_the_same_bytes_for_every_trainer():
    shared = load("shared")
    batches = shared.text(rows=4, columns=9)
    assert batches.shape == (shared.STEPS, 4, 9)
    assert batches.max() < shared.VOCABULARY
    source = pathlib.Path(shared.argparse.__file__).read_bytes()
    assert bytes(batches[0, 0].tolist()) + bytes(batches[1, 0].tolist()) == source[:18]


def test_a_loss_that_falls_and_a_restart_that_is_equal_pass(capsys):
    load("shared").check(range(10, 0, -1), range(5, 0, -1))
    assert "The loss fell from 10.0000 to 1.0000." in capsys.readouterr().out


@pytest.mark.parametrize("losses", [[1.0] * 10, [2.0, 1.0], [float("nan")] * 10])
def test_a_loss_that_does_not_fall_fails(losses):
    with pytest.raises(SystemExit, match="The loss should fall over 10 steps"):
        load("shared").check(losses)


@pytest.mark.parametrize("restarted", [[], [5, 4, 3, 2, 1.0000001]])
def test_a_restart_with_other_losses_fails(restarted):
    with pytest.raises(SystemExit, match="should give the losses after step 5 again"):
        load("shared").check(range(10, 0, -1), restarted)
