"""Eight virtual CPU devices for every test, set before JAX looks at its devices, and a compiler in a hurry."""

import gc
import importlib.metadata
import os

import pytest

FLAGS = {
    "xla_force_host_platform_device_count": "8",
    "xla_backend_optimization_level": "0",  # tests spend their time in the compiler: this halves it,
    "xla_cpu_collective_call_warn_stuck_timeout_seconds": "120",  # of eight devices' threads on two busy cores:
    "xla_cpu_collective_call_terminate_timeout_seconds": "600",  # after 40 s of waiting XLA would abort the process
}

if importlib.metadata.version("jaxlib").startswith(
    "0.10."
):  # later ones do not know it, and abort at what they do not know
    FLAGS["xla_cpu_use_fusion_emitters"] = "false"  # halves it once more, of large programs it leaves a third

os.environ.setdefault("JAX_PLATFORMS", "cpu")
given = os.environ.get("XLA_FLAGS", "")
missing = [f"--{name}={value}" for name, value in FLAGS.items() if name not in given]
os.environ["XLA_FLAGS"] = " ".join([given, *missing])


@pytest.fixture(scope="module")
def quick_compile():
    """Programs that are compiled in half the time and run slower: for tests that run few steps of tiny models."""
    import jax  # not before the flags are set

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_are_dropped():
    """After each file: a program is some memory maps, of which Linux allows a process 65,530. Then LLVM fails."""
    yield
    import jax

    jax.clear_caches()
    gc.collect()
