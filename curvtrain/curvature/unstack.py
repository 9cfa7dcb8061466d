"""Taking an array apart in programs whose compile time does not grow with the number of parts.

XLA on CPUs compiles a kernel for every slice, as the place it reads from is part of the kernel: 30 ms each, 9 s for the
parameters of 150 layers. Kernels that are given the place at run time are all the same one, which is compiled once.
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

_FEW = 4  # parts for which it is not worth the while


def unstack(a: jax.Array, counts: Sequence[int], axis: int) -> list[jax.Array]:
    """Consecutive parts of an array, so many entries of one of its axes each."""
    starts = [0, *itertools.accumulate(counts)][:-1]
    if len(counts) == 1:
        return [a]
    if len(counts) > _FEW and on_one_device():
        places = jax.lax.platform_dependent(a, cpu=lambda a: _at_run_time(starts, a), default=lambda a: _known(starts))
        return [jax.lax.dynamic_slice_in_dim(a, i, n, axis) for i, n in zip(places, counts, strict=True)]
    return [jax.lax.slice_in_dim(a, i, i + n, axis=axis) for i, n in zip(starts, counts, strict=True)]


def _at_run_time(starts: Sequence[int], a: jax.Array) -> tuple[jax.Array, ...]:
    """The same numbers whatever `a` holds, which compilers do not see."""
    known = lambda: _known(starts)
    return jax.lax.cond(a[(0,) * a.ndim] > 0, known, known)


def _known(starts: Sequence[int]) -> tuple[jax.Array, ...]:
    return tuple(jnp.int32(start) for start in starts)


def on_one_device() -> bool:
    """Whether a program that is being traced is certainly for one device.

    That is so if the mesh of `jax.set_mesh` has one; without a mesh, arrays may be split over all devices there are.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return (jax.device_count() if mesh.empty else mesh.size) == 1
