"""The settings with which VOGN and noisy K-FAC were published, for a Trainer."""

from collections.abc import Callable
from typing import Any

import optax

from curvtrain import _checks
from curvtrain.curvature import KFAC, CurvatureSchedule, DiagonalFisher
from curvtrain.optim.natural_gradient import RAW
from curvtrain.optim.vogn import vogn

Make = Callable[[float, int], dict[str, Any]]


def vogn_preset(name: str, data_size: float, steps_per_epoch: int) -> dict[str, Any]:
    """The arguments of a Trainer for one of the settings in PyTorch-SSO, that of Osawa et al. (2019).

        trainer = MyTrainer(config, train_data=data, **optim.vogn_preset("lenet", 60_000, 60_000 // 128))

    | name | posterior | rate | draws, of a step and of a prediction | prior's variance | N |
    |---|---|---|---|---|---|
    | "lenet" | diagonal | 0.01, times 0.9 every epoch | 10, 10 | 1 | data_size |
    | "lenet_kfac" | Kronecker factors | 0.004 | 4, 10 | 1, at temperature 0.2 | data_size |
    | "resnet18_cifar10" | diagonal | 1e-4 | 40, 10 | 0.02 | 10 data_size, for augmented data |
    | "resnet18_imagenet" | diagonal | 1.6e-3 after 5 epochs, / 10 after 30, 60, 80 | 128, 10 | 0.0075 | 5 data_size |

    The draws of the last two were spread over 8 and 128 processes, here over the axis "mc" of a mesh. The last one left
    norm layers without a prior and without noise: `optim.route` gives them another optimizer. Its rate is warmed up
    from zero. A decay is here the share of what is old, there that of what is new.

    Args:
      name: of the setting.
      data_size: the number of training examples, before augmentation.
      steps_per_epoch: for the schedules of the rate.

    Returns:
      The arguments `optimizer`, `curvature`, `schedule`, `mc_samples` and `predictive_samples`.
    """
    _checks.one_of("vogn_preset(name)", name, _PRESETS)
    _checks.number_in("vogn_preset(data_size)", data_size, 0.0, open_low=True)
    _checks.positive_int("vogn_preset(steps_per_epoch)", steps_per_epoch)
    every_step = CurvatureSchedule(update_every=1, refresh_every=1)
    return {"schedule": every_step, "predictive_samples": 10, **_PRESETS[name](data_size, steps_per_epoch)}


def _lenet(data_size: float, epoch: int) -> dict[str, Any]:
    rate = optax.exponential_decay(0.01, epoch, 0.9, staircase=True)
    tx = vogn(rate, data_size, init_precision=8e-3, gradient_decay=0.9, gradient_decay_type=RAW)
    return dict(optimizer=tx, curvature=DiagonalFisher("empirical", ema=0.999), mc_samples=10)


def _lenet_kfac(data_size: float, epoch: int) -> dict[str, Any]:
    tx = vogn(4e-3, data_size, damping=1e-4, kl_weight=0.2, momentum=0.9, weight_decay=0.1)
    return dict(optimizer=tx, curvature=KFAC("sampled", ema=0.667, inverse="eigh"), mc_samples=4)


def _resnet18_cifar10(data_size: float, epoch: int) -> dict[str, Any]:
    tx = vogn(1e-4, 10 * data_size, 1 / 0.02, damping=1e-3)
    return dict(optimizer=tx, curvature=DiagonalFisher("empirical", ema=0.001), mc_samples=40)


def _resnet18_imagenet(data_size: float, epoch: int) -> dict[str, Any]:
    falling = optax.piecewise_constant_schedule(1.6e-3, {epoch * (at - 5): 0.1 for at in (30, 60, 80)})
    rate = optax.join_schedules([optax.linear_schedule(0.0, 1.6e-3, 5 * epoch), falling], [5 * epoch])
    tx = vogn(rate, 5 * data_size, 1 / 7.5e-3, damping=1e-4, momentum=0.9, momentum_type=RAW)
    return dict(optimizer=tx, curvature=DiagonalFisher("empirical", ema=0.1), mc_samples=128)


_PRESETS: dict[str, Make] = {
    "lenet": _lenet,
    "lenet_kfac": _lenet_kfac,
    "resnet18_cifar10": _resnet18_cifar10,
    "resnet18_imagenet": _resnet18_imagenet,
}
