"""Modules as they are trained and as they are evaluated: Dropout off, running averages on, and the way back.

A module in evaluation mode remembers, layer by layer, how it is trained. So a model that was read from a checkpoint, or
a part of it, is trained as the original was: with dropout, and with BatchNorm's statistics moving. What a user switched
off in the original stays off.
"""

from flax import nnx

DETERMINISTIC = dict(deterministic=True)
EVALUATION = dict(deterministic=True, use_running_average=True)
_MEMORY = "_curvtrain_training"  # an attribute of a layer: ((flag, its value in training), ...)


def evaluated(module: nnx.Module) -> nnx.Module:
    """A view of the module in evaluation mode, whose layers remember the flags that they had."""
    view = nnx.view(module, raise_if_not_found=False, **EVALUATION)
    before = dict(nnx.iter_modules(module))
    for path, layer in nnx.iter_modules(view):
        old = [(flag, getattr(before[path], flag)) for flag in EVALUATION if hasattr(before[path], flag)]
        changed = tuple((flag, value) for flag, value in old if getattr(layer, flag) != value)
        if changed and not hasattr(layer, _MEMORY):
            setattr(layer, _MEMORY, changed)
    return view


def trained(module: nnx.Module) -> nnx.Module:
    """The module itself, or, if layers of it are in evaluation mode by `evaluated`, a view that has them as before."""
    if not any(hasattr(layer, _MEMORY) for _, layer in nnx.iter_modules(module)):
        return module
    view = nnx.view(module, raise_if_not_found=False)  # of this trace: it may be changed
    for _, layer in nnx.iter_modules(view):
        for flag, value in getattr(layer, _MEMORY, ()):
            if getattr(layer, flag) == EVALUATION[flag]:  # else somebody has changed it since
                setattr(layer, flag, value)
        if hasattr(layer, _MEMORY):
            delattr(layer, _MEMORY)
    return view
