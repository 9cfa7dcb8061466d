"""Root-free RMSProp and AdamW against their paper's formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy_mlp import EXAMPLES, begin, replay

from curvtrain import optim


def rmsprop(rate, b2=0.999, momentum=0.0, decay=0.0, damping=1e-4, prior=True, B=EXAMPLES):
    """Lin et al. (2024), with v itself, which begins at 1/B."""

    def run(theta, gradient, steps):
        v = {k: np.full_like(a, 1 / B if prior else 0.0) for k, a in theta.items()}
        m = {k: np.zeros_like(a) for k, a in theta.items()}
        for t in range(steps):
            g = gradient(theta, t)
            for k in theta:
                v[k] = b2 * v[k] + (1 - b2) * g[k] ** 2
                m[k] = momentum * m[k] + g[k] / (B * v[k] + damping) + decay * theta[k]
                theta[k] = theta[k] - rate * m[k]
        return theta

    return run


def adamw(rate, b1=0.9, b2=0.999, decay=0.0, damping=1e-4, prior=True, corrected=False, B=EXAMPLES):
    def run(theta, gradient, steps):
        v = {k: np.full_like(a, 1 / B if prior else 0.0) for k, a in theta.items()}
        m = {k: np.zeros_like(a) for k, a in theta.items()}
        for t in range(steps):
            g = gradient(theta, t)
            for k in theta:
                v[k] = b2 * v[k] + (1 - b2) * g[k] ** 2
                m[k] = b1 * m[k] + (1 - b1) * g[k]
                of_m, of_v = (1 - b1 ** (t + 1), 1 - b2 ** (t + 1)) if corrected else (1, 1)
                theta[k] = (1 - rate * decay) * theta[k] - rate * m[k] / of_m / (B * v[k] / of_v + damping)
        return theta

    return run


RMSPROP = {
    "defaults": (dict(), dict()),
    "momentum, decay": (dict(momentum=0.9, weight_decay=0.01, b2=0.99), dict(momentum=0.9, decay=0.01, b2=0.99)),
    "no prior": (dict(initial="zero", damping=1e-1, b2=0.9), dict(prior=False, damping=1e-1, b2=0.9)),
    "a sum": (dict(batch_size=1, b2=0.9), dict(B=1, b2=0.9)),
}
ADAMW = {
    "defaults": (dict(), dict()),
    "decay": (dict(b1=0.8, b2=0.95, weight_decay=0.1, damping=1e-2), dict(b1=0.8, b2=0.95, decay=0.1, damping=1e-2)),
    "corrected": (
        dict(initial="zero", bias_correction=True, damping=1e-1),
        dict(prior=False, corrected=True, damping=1e-1),
    ),
}


@pytest.mark.parametrize(("options", "same"), RMSPROP.values(), ids=RMSPROP)
def test_rmsprop_replays_the_formulas(options, same):
    assert replay(optim.rf_rmsprop(0.01, **options), rmsprop(0.01, **same)) <= 1e-10


@pytest.mark.parametrize(("options", "same"), ADAMW.values(), ids=ADAMW)
def test_adamw_replays_the_formulas(options, same):
    assert replay(optim.rf_adamw(0.01, **options), adamw(0.01, **same)) <= 1e-10


@pytest.mark.parametrize("make", [optim.rf_rmsprop, optim.rf_adamw])
def test_it_wraps_and_reports(make):
    params = jax.tree.map(jnp.float32, begin())
    tx = make(0.1)
    with pytest.raises(TypeError, match=rf"{make.__name__} needs the number of examples .*\(batch_size=\.\.\.\)"):
        tx.update(params, tx.init(params), params)
    for options, message in (
        (dict(learning_rate=-0.1), r"learning_rate\) should be at least 0.0, not -0.1"),
        (dict(learning_rate=0.1, damping=-1), r"damping\) should be at least 0.0, not -1"),
        (dict(learning_rate=0.1, initial="one"), r"initial\) should be one of 'prior', 'zero', not 'one'"),
        (dict(learning_rate=0.1, batch_size=0), r"batch_size\) should be at least 1, not 0"),
    ):
        with pytest.raises(ValueError, match=rf"{make.__name__}\({message}"):
            make(**options)
    injected = optax.inject_hyperparams(make, static_args=("batch_size",))(learning_rate=0.1, batch_size=8)
    updates, _ = injected.update(params, injected.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_a_prior_is_not_debiased():
    with pytest.raises(ValueError, match=r"rf_adamw\(bias_correction=True\) .* initial='zero'"):
        optim.rf_adamw(0.1, bias_correction=True)
