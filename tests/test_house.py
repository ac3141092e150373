"""The house: imports go down only, nothing is loaded before it is used, and README tells the truth."""

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import fantastic4 as f4
from benchmarks import report

ROOT = Path(__file__).resolve().parent.parent
FLOORS = [
    {"devices", "promotion", "now", "msgpack", "threads"},
    {"rounding", "linalg", "expression", "tables"},
    {"entry"},
    {"conv", "dense", "symbol", "jets", "layout"},
    {"border", "unfolding", "gram", "supremum", "tails"},
    {"jacobian", "spectrum", "frequency", "power", "scalar", "values"},
    {"ladder", "interval", "heuristics", "clipping", "together"},
    {"bounds", "kernels"},
    {"layerwise", "classifier", "audit", "checkpoints"},
    {"network", "wrapping", "lipschitz", "attacks"},
    {"linen", "nnx", "transforms", "robustness"},
    {"__init__"},
    {"cli"},
]

LIPSCHITZ_FLOORS = [
    {"graph", "entered", "weights", "sizes"},
    {"numbers"},
    {"fixed"},
    {"entrywise"},
    {"nodes", "operands"},
    {"trace", "patterns", "wrapped"},
    {"losses", "propagation"},
    {"products", "ranges"},
    {"traced"},
    {"moves", "linear", "register", "hessian", "sparse", "forms"},
    {"means", "pooling", "branches"},
    {"norms", "order"},
    {"training"},
    {"scalars", "calls", "windows"},
    {"choices", "scatter", "spectral"},
    {"__init__"},
]

PUBLIC_MODULES = {"dense", "heuristics", "jacobian", "ladder", "network", "lipschitz", "robustness"}
HIDDEN = {name for floor in FLOORS for name in floor} - PUBLIC_MODULES


def imports(path, package="fantastic4"):
    """The modules of a package that a module imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == package:
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(package + "."):
            yield node.module.removeprefix(package + ".").split(".")[0]


def test_imports_go_down_only():
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    modules = {path.stem: [path] for path in (ROOT / "fantastic4").glob("*.py")}
    modules["lipschitz"] = sorted((ROOT / "fantastic4" / "lipschitz").glob("*.py"))
    assert set(modules) == set(floor), "a new module needs a floor here and in CONTRIBUTING.md"
    for name, paths in modules.items():
        for imported in {found for path in paths for found in imports(path)} - {name}:
            assert floor[imported] < floor[name], f"{name} imports {imported}, which is not below it"


def test_imports_within_lipschitz_go_down_only():
    floor = {name: i for i, names in enumerate(LIPSCHITZ_FLOORS) for name in names}
    modules = {path.stem: path for path in (ROOT / "fantastic4" / "lipschitz").glob("*.py")}
    assert set(modules) == set(floor), "a new module needs a floor here"
    for name, path in modules.items():
        for imported in imports(path, "fantastic4.lipschitz"):
            assert floor[imported] < floor[name], f"{name} imports {imported}, which is not below it"


def test_the_package_loads_neither_flax_nor_optax():
    code = "import sys, fantastic4; print({m.split('.')[0] for m in sys.modules} & {'flax', 'optax', 'matplotlib'})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_oracles_do_not_import_the_package():
    for name in ("oracle.py", "cases.py"):
        assert "fantastic4" not in (ROOT / "tests" / name).read_text()


def test_public_names_are_documented():
    public = [n for n in dir(f4) if not n.startswith("_") and n not in HIDDEN]
    assert {"ConvSpec", "four_bounds", "bound", "init", "step", "singular_values", "exact_norm", "from_torch"} <= set(
        public
    )
    for name in public:
        assert getattr(f4, name).__doc__, name


def test_version_is_that_of_the_distribution():
    assert importlib.metadata.version("fantastic4") == f4.__version__


def code_blocks(page="README.md"):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_opens_where_the_project_lives(path):
    home = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Homepage"]
    cells = json.loads(path.read_text())["cells"]
    colab = home.replace("https://github.com", "https://colab.research.google.com/github")
    assert f"({colab}/blob/main/notebooks/{path.name})" in "".join(cells[0]["source"]), "the Colab badge"
    assert f"git+{home}" in "".join(cells[1]["source"]), "the first code cell installs what is missing"
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells), "outputs are not committed"
    assert f"({path.name})" in (ROOT / "notebooks" / "README.md").read_text()


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_code_of_the_docs_runs(page):
    names = {}
    for block in code_blocks(f"docs/{page}"):
        exec(compile(block, page, "exec"), names)


@pytest.mark.parametrize("page", report.PAGES)
def test_tables_of_the_docs_are_the_measured_ones(page):
    assert report.filled(page) == (ROOT / page).read_text(), "run python -m benchmarks.report"


def test_readme_shows_the_train_step_of_the_demo():
    source = (ROOT / "benchmarks" / "demo.py").read_text()
    step = re.search(r"# \[readme: train step\]\n(.*?)\n\n\n# \[readme: end\]", source, re.DOTALL).group(1)
    assert len(step.splitlines()) < 30
    assert step.strip() in (ROOT / "README.md").read_text()


@pytest.mark.filterwarnings("error")
def test_readme_code_runs():
    class CNN(nn.Module):
        """A smaller model with the demo's layer names."""

        @nn.compact
        def __call__(self, x):
            for stride in (2, 1, 2, 1):
                x = nn.relu(nn.Conv(4, (3, 3), stride)(x))
            return nn.Dense(10)(x.reshape(len(x), -1))

    names = {"CNN": CNN}
    blocks = code_blocks()
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    images, labels = jnp.ones((4, 28, 28, 1)), jnp.arange(4)
    params = names["model"].init(jax.random.key(0), images)["params"]
    state = {n: f4.init(params[n]["kernel"], s, key=jax.random.key(1)) for n, s in names["SPECS"].items()}
    opt_state = names["optimizer"].init(params)
    product = lambda params: np.prod([np.linalg.norm(params[n]["kernel"].reshape(-1, 4), 2) for n in names["SPECS"]])
    before = product(params)
    for _ in range(20):
        params, opt_state, state = names["train_step"](params, opt_state, state, 1.0, images, labels)
    assert product(params) < 0.9 * before  # the penalty does what it is for
