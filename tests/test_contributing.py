"""What CONTRIBUTING.md says to write is written, one file each, and passes the contract."""

import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, OPTIMIZERS, Case, by_curvature
from flax import nnx
from test_contract import test_estimator as passes_as_an_estimator
from test_contract import test_optimizer as passes_as_an_optimizer

from curvtrain import Objective, losses
from curvtrain.curvature import KFAC, DiagonalFisher, register_layer

GUIDE = Path(__file__).resolve().parent.parent / "CONTRIBUTING.md"
PIECES = re.findall(r"^```python file=(\S+)\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), flags=re.S | re.M)


@pytest.fixture
def written(tmp_path):
    """The modules of the guide's new files, by name, and the lines that it adds to `tests/cases.py`."""
    modules, lines = {}, []
    for file, source in PIECES:
        name = Path(file).stem
        if name == "cases":
            lines.append(source)
            continue
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, tmp_path / f"{name}.py")
        assert spec is not None and spec.loader is not None
        modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[name])
    return modules, lines


def test_a_new_estimator_and_a_new_optimizer_are_one_file_and_one_line_each(written, monkeypatch):
    modules, lines = written
    assert sorted(modules) == ["mean_square", "scaled", "sign_newton"] and len(lines) == 2
    cases, optimizers = dict(CASES), dict(OPTIMIZERS)
    names = dict(
        CASES=CASES, OPTIMIZERS=OPTIMIZERS, Case=Case, by_curvature=by_curvature, DiagonalFisher=DiagonalFisher
    )
    names |= dict(MeanSquare=modules["mean_square"].MeanSquare, sign_newton=modules["sign_newton"].sign_newton)
    try:
        for line in lines:
            exec(line, names)
        passes_as_an_estimator("MeanSquare")
        passes_as_an_optimizer("sign_newton")
    finally:
        for table, before in ((CASES, cases), (OPTIMIZERS, optimizers)):
            table.clear()
            table.update(before)


def test_a_new_layer_has_its_own_statistics(written):
    """K-FAC's A is then the mean of (2 x)(2 x)^T."""
    scaled = written[0]["scaled"]
    register_layer(scaled.ScaledLinear, scaled.ScaledLayer)
    model = scaled.ScaledLinear(3, 2, use_bias=False, rngs=nnx.Rngs(0))
    objective, params = Objective.from_model(model, lambda m, b: m(b["x"]), losses.SquaredError())
    x = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    batch = {"x": jnp.asarray(x), "target": jnp.zeros((6, 2))}
    estimator = KFAC("exact")
    found = estimator.update(estimator.init(objective, params), objective, params, batch, jax.random.key(0))
    right = np.kron(4 * x.T @ x / 6, np.eye(2))
    np.testing.assert_allclose(found.as_matrix(), right, rtol=1e-5, atol=1e-6)
