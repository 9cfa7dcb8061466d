"""Every recipe runs as a user runs it, goes on where it stopped, and says what it did."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

TEXT = ["--layers", "1", "--width", "8", "--length", "8", "--batch-size", "8"]
FOSI, KFAC, PSGD = ("fosi_adam", "adam"), ("kfac", "adamw"), ("psgd", "adamw")
SMALL = {  # recipe, options, the optimizers that are compared
    "resnet_fosi": ("resnet_fosi.py", ["--width", "4", "--batch-size", "32", "--k", "2"], FOSI),
    "mlp_autoencoder": ("mlp_autoencoder.py", ["--sizes", "12", "4", "--k", "3"], FOSI),
    "char_lm": ("char_lm.py", ["--model", "gru", *TEXT, "--k", "2"], FOSI),
    "resnet_kfac": ("resnet_kfac.py", ["--width", "4", "--batch-size", "32"], KFAC),
    "autoencoder_kfac": ("autoencoder_kfac.py", ["--sizes", "12", "4", "--inverse", "ekfac"], KFAC),
    "char_lm with K-FAC": ("char_lm.py", ["--optimizer", "kfac", "--heads", "2", *TEXT], KFAC),
    "char_lm with K-FAC, gru": ("char_lm.py", ["--optimizer", "kfac", "--model", "gru", *TEXT], KFAC),
    "transformer_psgd": ("transformer_psgd.py", ["--heads", "2", "--scan", "--decay", "cosine", *TEXT], PSGD),
    "resnet with PSGD": (
        "resnet_fosi.py",
        ["--optimizer", "psgd", "--fit", "hessian", "--learning-rate", "0.01", "--width", "4", "--batch-size", "32"],
        PSGD,
    ),
    "autoencoder with PSGD": (
        "mlp_autoencoder.py",
        ["--optimizer", "psgd", "--preconditioner", "low_rank", "--sizes", "12", "4"],
        PSGD,
    ),
}


def run(recipe: str, *options: str, ok: bool = True) -> str:
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    command = [sys.executable, str(ROOT / "recipes" / recipe), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False, timeout=600)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", SMALL)
def test_a_recipe_trains_compares_and_resumes(name, tmp_path):
    recipe, options, (optimizer, base) = SMALL[name]
    every = ["--refresh-every", "3", "--save-every", "4", "--eval-every", "4", "--log-every", "2"]
    text = ["--text", str(_text(tmp_path))] if recipe in ("char_lm.py", "transformer_psgd.py") else []
    common = [*options, *text, *every, "--workdir", str(tmp_path / "run")]
    first = run(recipe, *common, "--steps", "4", "--no-compare")
    assert re.search(r"step 4/4 .* steps/s .* left", first)
    second = run(recipe, *common, "--steps", "6")
    assert "resumed after step 4" in second
    table = re.search(rf"optimizer +steps.*\n *{optimizer} +6 .*\n *{base} +6 ", second)
    assert table, second
    assert (tmp_path / "run" / "comparison.png").stat().st_size > 10_000


def test_wrong_options_say_what_to_do(tmp_path):
    unknown = run("resnet_fosi.py", "--optimizer", "fosi_adm", "--workdir", str(tmp_path), ok=False)
    assert "fosi_adam" in unknown
    mesh = run("resnet_fosi.py", "--mesh", "dat=1", "--workdir", str(tmp_path / "run"), ok=False)
    assert "Did you mean 'data'?" in mesh
    folder = run("resnet_fosi.py", "--dataset", "cifar10", "--workdir", str(tmp_path / "run"), ok=False)
    assert "cifar-10-batches-py" in folder
    assert not (tmp_path / "run").exists()


def _text(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 60, encoding="utf-8")
    return path
