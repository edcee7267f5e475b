"""The structure of the package: layers that only look down, small files, no modules at the root."""

import ast
from pathlib import Path
from statistics import median

import lminf_eval

PACKAGE = Path(lminf_eval.__file__).parent
# From the bottom up; rooms of one layer may know each other, in one direction.
LAYERS = [
    {"errors", "paths", "__init__"},
    {"utils"},
    {"config"},
    {"methods"},
    {"attention", "cache"},
    {"models"},
    {"resume"},
    {"inference"},
    {"parallel"},
    {"tasks"},
    {"harness"},
    {"sweep", "report", "bench", "diagnosis", "offline", "demo"},
    {"cli"},
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(path: Path) -> set[str]:
    """The rooms that a file imports from, also inside functions; not those that only types are taken from."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lminf_eval":
            nested = node.module == "lminf_eval"
            for name in node.names:
                here = nested and (PACKAGE / name.name).exists()
                found.add(name.name if here else room_of(node.module))
        elif isinstance(node, ast.Import):
            found |= {room_of(name.name) for name in node.names if name.name.split(".")[0] == "lminf_eval"}
    return found


def arrows() -> dict[tuple[str, str], set[str]]:
    found: dict[tuple[str, str], set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        for room in imports(path) - {parts[0]}:
            found.setdefault((parts[0], room), set()).add("/".join(parts))
    return found


def test_a_layer_knows_those_below_it_and_none_above():
    up = {pair: files for pair, files in arrows().items() if LEVEL[pair[1]] > LEVEL[pair[0]]}
    assert not up


def test_rooms_of_one_layer_know_each_other_in_one_direction_at_most():
    pairs = arrows().keys()
    assert not {pair for pair in pairs if pair[::-1] in pairs}


def test_rooms_form_no_circle():
    below = {}
    for upper, lower in arrows():
        if "__init__" not in (upper, lower):  # which tells the version
            below.setdefault(upper, set()).add(lower)
    while below:
        ground = [room for room, rooms in below.items() if not rooms & below.keys()]
        assert ground, below
        for room in ground:
            del below[room]


def test_nothing_lies_at_the_root_but_what_belongs_there():
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", "errors", "paths"}
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} <= LEVEL.keys()


def test_no_file_is_long():
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_functions_are_short():
    """Counted without docstrings, which tell more than the code does."""
    lengths = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lengths.append(node.end_lineno - body[0].lineno + 1 if body else 1)
    assert median(lengths) < 10
