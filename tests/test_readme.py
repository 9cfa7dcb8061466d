"""The README's programs run as they stand."""

import json
import re
import typing
from pathlib import Path

import numpy as np

from benchmarks import optimizers
from recipes.common.optimizers import OptimizerName

README = Path(__file__).resolve().parent.parent / "README.md"


def test_python_blocks_run_in_order(capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.S | re.M)
    assert len(blocks) == 11
    namespace: dict = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
    printed = capsys.readouterr().out
    assert "train + refresh" in printed  # the dry run's table
    assert "step 100/100" in printed
    assert np.all(np.diff(namespace["eigenvalues"]) <= 0)
    assert namespace["result"].step == 100
    assert namespace["kfac_loss"] < 2 and namespace["factors"].failures == 0
    assert namespace["psgd_loss"] < namespace["kfac_loss"] + 0.1
    assert namespace["soap_state"].curvature.refreshes == 1
    assert namespace["sirf_state"].curvature.updates == 1
    assert namespace["sum_now"] < 1e-12
    assert 0 < namespace["scores"]["calibration_error"] < 1


def test_the_table_of_optimizers_is_that_of_the_results():
    text, results = README.read_text(encoding="utf-8"), json.loads(optimizers.RESULTS.read_text(encoding="utf-8"))
    assert optimizers.with_table(text, results) == text
    left_out = {"nesterov", "fosi_momentum", "fosi_nesterov", "fosi_sgd"}  # as others of the table are
    assert set(optimizers.USES) | left_out == set(typing.get_args(OptimizerName))
