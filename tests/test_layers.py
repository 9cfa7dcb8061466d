"""The arrows between the rooms of the project, read from the source.

    recipes ─► trainer ─► curvature ─► objective, losses
          └──► optim ───► curvature

A room may import what its arrows lead to, however far; never the other way, and trainer and optim never each other.
`curvtrain/__init__.py` only re-exports, so it may import everything; inside the package nobody imports from it.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import curvtrain
from curvtrain import curvature, losses, optim, trainer

ROOT = Path(curvtrain.__file__).parent
PACKAGE = sorted(ROOT.rglob("*.py"))
RECIPES = sorted((ROOT.parent / "recipes").rglob("*.py"))

# argument checks, dtypes, extra arguments of updates, random keys, outputs as pytrees, tables: for every room
BOTTOM = {"_checks", "_dtypes", "_extra", "_keys", "_outputs", "_text", "_version"}
MAY_IMPORT = {
    "_checks": set(),
    "_dtypes": set(),
    "_extra": set(),
    "_keys": set(),
    "_outputs": set(),
    "_text": set(),
    "_version": set(),
    "losses": BOTTOM,
    "objective": BOTTOM | {"losses"},
    "curvature": BOTTOM | {"losses", "objective"},
    "optim": BOTTOM | {"losses", "objective", "curvature"},
    "trainer": BOTTOM | {"losses", "objective", "curvature"},
    "launch": set(),  # starts processes, knows nothing that they do
}
IN_TRAINER = {  # what may be imported between the parts of curvtrain/trainer
    "config": set(),
    "state": set(),
    "mesh": {"config"},
    "data": {"mesh"},
    "live": {"data", "state"},  # the run as it is now
    "disk": {"config", "mesh"},
    "watch": {"live", "mesh"},
    "run": {"config", "state", "mesh", "data", "live", "disk", "watch"},
    "trainer": {"config", "state", "mesh", "data", "live", "disk", "watch", "run"},
}
FORBIDDEN = {"torch", "torchvision", "torchopt", "functorch", "tensorflow", "tensorflow_datasets", "keras"}


def imports(source: str, package: str = "") -> Iterator[str]:
    """The dotted names that a module imports, `from a import b` as a.b; also inside functions and strings of importlib.

    `package` is the dotted name of the package that the module is in, for relative imports.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))


def wrong_arrows(source: str, room: str, package: str = "curvtrain") -> list[str]:
    """The imports of a module in `room` that its arrows do not allow."""
    found = []
    for name in imports(source, package):
        first, *rest = name.split(".")
        if first == "recipes":
            found.append(name)
        elif first == "curvtrain":
            target = rest[0] if rest else "__init__"
            if target != room and target not in MAY_IMPORT[room]:
                found.append(name)
    return found


def wrong_packages(source: str) -> list[str]:
    """Private modules of other packages, and frameworks that the project does without."""
    return [
        name
        for name in imports(source)
        if name.split(".")[0] in FORBIDDEN or (name.split(".")[0] != "curvtrain" and "_src" in name.split("."))
    ]


def words(source: str) -> set[str]:
    """The identifiers of a module's code, and the words of its strings other than docstrings."""
    tree, found, docstrings = ast.parse(source), set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | ast.Expr):
            body = [node] if isinstance(node, ast.Expr) else node.body[:1]
            docstrings |= {id(e.value) for e in body if isinstance(e, ast.Expr) and isinstance(e.value, ast.Constant)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.alias):
            found |= set(node.name.split(".")) | {node.asname or ""}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            found |= set("".join(c if c.isalnum() or c == "_" else " " for c in node.value).split())
    return found


def concrete_names() -> set[str]:
    """Estimators and curvatures other than the interfaces, and all optimizers: what the trainer does not know."""
    interfaces = {curvature.Curvature, curvature.CurvatureEstimator}
    kinds = {
        name
        for name, value in vars(curvature).items()
        if isinstance(value, type) and issubclass(value, tuple(interfaces)) and value not in interfaces
    }
    optimizers = {name for name, value in vars(optim).items() if callable(value)}
    return kinds | optimizers | {"KFAC", "KroneckerFactors", "DiagonalFisher", "KroneckerDiagonal", "PSGD", "kfac"}


def room_of(path: Path) -> tuple[str, str]:
    """(the room, the dotted name of the package that the file is in)."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0], ".".join(["curvtrain", *parts[:-1]])


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT.parent))


# -------------------------------------------------------------------------------------------------------- the project


@pytest.mark.parametrize("path", [p for p in PACKAGE if p != ROOT / "__init__.py"], ids=name_of)
def test_imports_follow_the_arrows(path):
    room, package = room_of(path)
    assert room in MAY_IMPORT, f"curvtrain/{room} is a new room: draw its arrows in MAY_IMPORT"
    assert wrong_arrows(path.read_text(), room, package) == []


@pytest.mark.parametrize("path", PACKAGE + RECIPES, ids=name_of)
def test_no_private_modules_of_others_and_no_other_frameworks(path):
    assert wrong_packages(path.read_text()) == []


@pytest.mark.parametrize("path", [p for p in PACKAGE if room_of(p)[0] == "trainer"], ids=name_of)
def test_trainer_knows_no_estimator_and_no_optimizer(path):
    assert words(path.read_text()) & concrete_names() == set()


@pytest.mark.parametrize("path", [p for p in PACKAGE if p.parent != ROOT and room_of(p)[0] == "trainer"], ids=name_of)
def test_the_parts_of_the_trainer_import_in_one_direction(path):
    part = path.relative_to(ROOT / "trainer").with_suffix("").parts[0]
    if part == "__init__":
        return
    found = [name.split(".")[2:] for name in imports(path.read_text()) if name.startswith("curvtrain.trainer.")]
    assert [name for name in found if name[0] != part and name[0] not in IN_TRAINER[part]] == []


def test_every_room_is_there():
    rooms = {room_of(path)[0] for path in PACKAGE} - {"__init__"}
    assert rooms == set(MAY_IMPORT)
    assert {"Lanczos", "Eigenpairs", "fosi", "self_contained"} <= concrete_names()


@pytest.mark.parametrize("module", [curvtrain, curvature, optim, trainer], ids=lambda m: m.__name__)
def test_a_package_init_only_re_exports(module):
    """`from a import b as b` and a docstring: the public names are a list that one can read."""
    docstring, *body = ast.parse(Path(module.__file__).read_text()).body
    assert isinstance(docstring, ast.Expr)
    for node in body:
        assert isinstance(node, ast.ImportFrom), ast.unparse(node)
        assert node.module.split(".")[0] == "curvtrain"
        assert all(alias.asname == alias.name for alias in node.names), ast.unparse(node)


# ------------------------------------------------------------------------------------------------- the rules, checked


@pytest.mark.parametrize(
    ("room", "source", "wrong"),
    [
        ("optim", "from curvtrain.trainer.state import TrainState", ["curvtrain.trainer.state.TrainState"]),
        ("optim", "from curvtrain import trainer", ["curvtrain.trainer"]),
        ("optim", "def f():\n    import curvtrain.trainer.step", ["curvtrain.trainer.step"]),
        ("optim", "from ..trainer import Trainer", ["curvtrain.trainer.Trainer"]),
        ("trainer", "from curvtrain.optim import fosi", ["curvtrain.optim.fosi"]),
        ("trainer", "import importlib\nimportlib.import_module('curvtrain.optim')", ["curvtrain.optim"]),
        ("trainer", "import curvtrain", ["curvtrain"]),
        ("curvature", "from curvtrain import optim as o, trainer", ["curvtrain.optim", "curvtrain.trainer"]),
        ("objective", "from curvtrain.curvature import trees", ["curvtrain.curvature.trees"]),
        ("losses", "from curvtrain.objective import Objective", ["curvtrain.objective.Objective"]),
        ("losses", "from curvtrain import Objective", ["curvtrain.Objective"]),
        ("trainer", "from recipes.common import images", ["recipes.common.images"]),
        ("optim", "from curvtrain.curvature.base import Curvature\nfrom curvtrain import _checks\nimport optax", []),
        ("optim", "from .base import require_params\nfrom ..curvature import Eigenpairs", []),
        ("trainer", '"""See curvtrain.optim."""\nfrom curvtrain.curvature import CurvatureEstimator', []),
    ],
)
def test_the_arrow_rule_sees(room, source, wrong):
    assert wrong_arrows(source, room, f"curvtrain.{room}") == wrong


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("from optax._src import base", ["optax._src.base"]),
        ("import jax._src.core", ["jax._src.core"]),
        ("def f():\n    import torch.nn", ["torch.nn"]),
        ("from tensorflow import data", ["tensorflow.data"]),
        ("import jax\nfrom flax import nnx\nimport tensorboardX", []),
    ],
)
def test_the_package_rule_sees(source, wrong):
    assert wrong_packages(source) == wrong


@pytest.mark.parametrize(
    ("source", "seen"),
    [
        ("x = curvature.Lanczos(k=3)", {"Lanczos"}),
        ("from curvtrain.curvature import Eigenpairs as E", {"Eigenpairs"}),
        ("def f(c):\n    return type(c).__name__ == 'KFAC'", {"KFAC"}),
        ("raise ValueError(f'{x}: pass optim.fosi(base)')", {"fosi"}),
        ('class Plan:\n    """A plan.\n\n    curvature=Lanczos(k=3)\n    """', set()),
        ("x: int = 0\n'as for Lanczos, an attribute docstring'", set()),
        ("fosil = 1", set()),
    ],
)
def test_the_name_rule_sees(source, seen):
    assert words(source) & concrete_names() == seen


def test_public_names_of_the_top():
    """What a user imports from `curvtrain` itself is the rooms' own."""
    assert curvtrain.optim is optim and curvtrain.curvature is curvature and curvtrain.losses is losses
    assert curvtrain.Trainer is trainer.Trainer and curvtrain.TrainerConfig is trainer.TrainerConfig
    assert curvtrain.CurvatureSchedule is curvature.CurvatureSchedule
