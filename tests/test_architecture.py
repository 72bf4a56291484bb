"""The library's shape, held: imports and documentation."""

import ast
import inspect
import pathlib
import re

import pytest

import teon_optax

PUBLIC = teon_optax, teon_optax.contrib
# Words that end as a verb of the third person does, and are none, or stand for what is returned.
NO_VERBS = set(
    """
    across always arrays as axes axis batches bytes coefficients dimensions entries factors fans
    indices its keys layers leaves matrices numbers pairs parts paths pieces positions rows
    rules series shapes shards sizes specs steps structures tensors this thus updates values
    vectors weights widths words
    """.split()
)
LIBRARY = pathlib.Path(teon_optax.__file__).parent
CHECKOUT = pathlib.Path(__file__).parents[1]

# Every room, a package or a file at the top, and the rooms whose names it imports. Each imports
# from rooms above it alone, so a reader who goes down the table meets nothing unread.
ROOMS = {
    "_version": set(),
    "_paths": set(),
    "_memory": {"_paths"},
    "_polar": {"_memory"},
    "_rule": set(),
    "_arguments": set(),
    "_scaling": {"_arguments"},
    "_reading": {"_paths", "_rule"},
    "_plan": {"_paths", "_polar", "_rule", "_scaling"},
    "_planning": {"_paths", "_plan", "_polar", "_reading", "_rule"},
    "_alignment": {"_memory", "_plan", "_planning", "_rule"},
    "_mesh": {"_arguments", "_paths", "_plan", "_polar", "_scaling"},
    "_orthogonalize": {
        "_arguments",
        "_memory",
        "_mesh",
        "_plan",
        "_planning",
        "_polar",
        "_rule",
        "_scaling",
    },
    "_momentum": {
        "_arguments",
        "_memory",
        "_mesh",
        "_orthogonalize",
        "_polar",
        "_rule",
        "_scaling",
    },
    "_teon": {
        "_arguments",
        "_memory",
        "_mesh",
        "_momentum",
        "_paths",
        "_planning",
        "_polar",
        "_rule",
        "_scaling",
    },
    "contrib": {
        "_arguments",
        "_memory",
        "_mesh",
        "_orthogonalize",
        "_paths",
        "_plan",
        "_planning",
        "_polar",
        "_reading",
        "_rule",
        "_scaling",
    },
    "rules": {"_paths", "_plan", "_planning", "_reading", "_rule"},
}


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported_modules(tree):
    """Dotted names of a file's imports: `from a import b` is a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(filter(None, ["teon_optax" if node.level else "", node.module]))
            yield from (f"{package}.{alias.name}" for alias in node.names)


def dotted_names(tree):
    """Imports and attribute chains, such as jax.numpy.einsum in full."""
    yield from imported_modules(tree)
    yield from (ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute))


def library_files():
    return sorted(LIBRARY.rglob("*.py"))


def all_files():
    ours = (
        path
        for name in ("tests", "examples", "benchmarks")
        for path in CHECKOUT.glob(f"{name}/**/*.py")
    )
    return [*library_files(), *sorted(ours)]


def functions(path):
    """Yields every function and method of a file, also one inside of another."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def room(path):
    return path.relative_to(LIBRARY).parts[0].removesuffix(".py")


def test_every_room_is_in_the_table():
    assert {room(path) for path in library_files()} == {"__init__", *ROOMS}


@pytest.mark.parametrize("name", ROOMS)
def test_room_imports_what_the_table_says(name):
    files = (path for path in library_files() if room(path) == name)
    names = {imported for path in files for imported in imported_modules(parse(path))}
    ours = {imported.split(".")[1] for imported in names if imported.startswith("teon_optax.")}
    assert ours - {name} == ROOMS[name]


def test_rooms_import_only_from_rooms_above_them():
    rooms = list(ROOMS)
    assert all(imports <= set(rooms[: rooms.index(name)]) for name, imports in ROOMS.items())


def test_contributing_shows_the_same_table():
    page = (CHECKOUT / "CONTRIBUTING.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)(?:\.py|/)` \|.*\|(.*)\|$", page, re.M)
    shown = [(name, set(re.findall(r"`(\w+)`", imports))) for name, imports in rows]
    assert shown == list(ROOMS.items())


@pytest.mark.parametrize("package", PUBLIC, ids=lambda package: package.__name__)
def test_init_only_re_exports(package):
    docstring, *imports, exports = parse(pathlib.Path(package.__file__)).body
    assert isinstance(docstring, ast.Expr)
    assert all(isinstance(node, ast.ImportFrom) for node in imports)
    assert isinstance(exports, ast.Assign) and ast.unparse(exports.targets[0]) == "__all__"


@pytest.mark.parametrize("package", PUBLIC, ids=lambda package: package.__name__)
def test_all_is_sorted_and_complete(package):
    names = imported_modules(parse(pathlib.Path(package.__file__)))
    assert package.__all__ == sorted(name.split(".")[-1] for name in names)


@pytest.mark.parametrize("path", library_files(), ids=lambda path: f"{room(path)}.{path.stem}")
def test_a_name_with_an_underscore_is_used_in_its_own_file_alone(path):
    ours = (name for name in imported_modules(parse(path)) if name.startswith("teon_optax."))
    assert not [name for name in ours if re.match("_[^_]", name.rsplit(".", 1)[1])]


@pytest.mark.parametrize("path", all_files(), ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_only_public_names_of_other_libraries_are_used(path):
    def is_private(name):
        root, *rest = name.split(".")
        foreign = root in {"flax", "jax", "jaxlib", "jnp", "numpy", "np", "optax", "orbax"}
        return foreign and (
            name.startswith("jax.interpreters") or any(re.match("_[^_]", part) for part in rest)
        )

    assert not [name for name in dotted_names(parse(path)) if is_private(name)]


@pytest.mark.parametrize(
    "value",
    [pytest.param(getattr(each, name), id=name) for each in PUBLIC for name in each.__all__],
)
def test_every_public_name_is_documented(value):
    documentation = inspect.getdoc(value) or ""
    sections = set(re.findall(r"^(\w+):$", documentation, re.M))
    assert documentation
    if inspect.isclass(value):
        assert "Attributes" in sections
    elif callable(value):
        assert {"Args", "Returns", "Examples"} <= sections


@pytest.mark.parametrize("path", library_files(), ids=lambda path: f"{room(path)}.{path.stem}")
def test_every_docstring_of_a_function_begins_with_a_verb(path):
    summaries = {
        f"{path.name}:{function.lineno} {function.name}": documentation.splitlines()[0]
        for function in functions(path)
        if (documentation := ast.get_docstring(function))
    }
    wrong = [
        f"{place}: {summary}"
        for place, summary in summaries.items()
        if not re.match(r"[A-Z][a-z]+s\b", summary) or summary.split()[0].lower() in NO_VERBS
    ]
    assert not wrong, (
        "Begin with a verb in the third person, who does what to which array, then shapes: 'Stacks "
        "the layers of each group: [groups, m, n].', 'Tells whether ..', 'Lists ..', 'Gives ..'. "
        "These do not:\n" + "\n".join(wrong)
    )
