"""FAdam against its paper's formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy_mlp import begin, replay

from curvtrain import optim

RATE = 0.02


def rms(x):
    return np.sqrt(np.mean(x**2))


def reference(b1=0.9, b2=0.999, decay=0.1, clip=1.0, p=0.5, eps=1e-8, eps_mode="released", form="paper", debias=False):
    """Algorithm 1 of arXiv 2405.12807, and the released code's clip."""

    def clipped(x):
        if clip is None:
            return x
        return x / max(1, rms(x) / clip) if form == "paper" else x / (max(1, rms(x)) / clip)

    def run(theta, gradient, steps):
        m = {k: np.zeros_like(a) for k, a in theta.items()}
        f = {k: np.ones_like(a) for k, a in theta.items()}
        for t in range(1, steps + 1):
            g = gradient(theta, t - 1)
            for k in theta:
                b = b2 * (1 - b2 ** (t - 1)) / (1 - b2**t)
                f[k] = b * f[k] + (1 - b) * g[k] ** 2
                at = {"released": eps * max(1, rms(g[k])), "paper": min(eps, 0.01 * rms(g[k])), "none": eps}[eps_mode]
                D = f[k] ** p + at
                m[k] = b1 * m[k] + (1 - b1) * clipped(g[k] / D)
                u = m[k] / (1 - b1**t) if debias else m[k]
                theta[k] = theta[k] - RATE * (u + decay * clipped(theta[k] / D))
        return theta

    return run


OPTIONS = {
    "defaults": (dict(), dict()),
    "no clip, no decay": (dict(clip=None, weight_decay=0.0), dict(clip=None, decay=0.0)),
    "released clip": (dict(clip=0.5, clip_form="released"), dict(clip=0.5, form="released")),
    "paper's clip": (dict(clip=0.5), dict(clip=0.5)),
    "natural": (dict(exponent=1.0, eps=1e-3, eps_mode="none"), dict(p=1.0, eps=1e-3, eps_mode="none")),
    "paper's eps": (dict(eps=1e-2, eps_mode="paper"), dict(eps=1e-2, eps_mode="paper")),
    "debiased": (dict(b1=0.8, b2=0.9, debias=True), dict(b1=0.8, b2=0.9, debias=True)),
}


@pytest.mark.parametrize(("options", "same"), OPTIONS.values(), ids=OPTIONS)
def test_replays_the_formulas(options, same):
    assert replay(optim.fadam(RATE, **options), reference(**same)) <= 1e-10


def test_the_two_clips_differ_below_the_bound():
    """A natural gradient below c stays in the paper and is scaled by c in the released code."""
    g, moved = {"w": jnp.full(3, 1e-3)}, {}
    for form in ("paper", "released"):
        tx = optim.fadam(1.0, weight_decay=0.0, clip=0.5, clip_form=form, eps=1e-1, eps_mode="none", exponent=1.0)
        moved[form] = tx.update(g, tx.init(g), g)[0]["w"][0]
    assert np.isclose(moved["released"], 0.5 * moved["paper"])


def test_where_no_gradient_was_seen_nothing_moves():
    params = {"dead": jnp.ones(4), "none": jnp.zeros((0, 2)), "live": jnp.ones(2)}
    tx = optim.fadam(1e-2, eps=0.0)
    grads = {"dead": jnp.zeros(4), "none": jnp.zeros((0, 2)), "live": jnp.ones(2)}
    updates, _ = tx.update(grads, tx.init(params), params)
    assert not np.any(updates["dead"]) and np.all(np.isfinite(updates["live"])) and updates["none"].shape == (0, 2)


def test_averages_keep_their_dtypes():
    params = jax.tree.map(jnp.float32, begin())
    tx = optim.fadam(1e-2, mu_dtype=jnp.bfloat16, fim_dtype=jnp.bfloat16)
    state = tx.init(params)
    after = tx.update(params, state, params)[1]
    assert jax.tree.map(lambda a: a.dtype, after) == jax.tree.map(lambda a: a.dtype, state)


def test_mistakes_are_reported():
    with pytest.raises(ValueError, match=r"fadam\(exponent\) should be above 0.0 and at most 1.0, not 0"):
        optim.fadam(exponent=0.0)
    with pytest.raises(ValueError, match=r"fadam\(clip_form\) should be one of 'paper', 'released', not 'code'"):
        optim.fadam(clip_form="code")
    with pytest.raises(ValueError, match=r"fadam\(learning_rate\) should be at least 0.0, not -1"):
        optim.fadam(-1)
    tx, params = optim.fadam(), {"w": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"fadam needs the parameters"):
        tx.update(params, tx.init(params))
    assert optax.inject_hyperparams(optim.fadam)(learning_rate=0.1).init(params)
