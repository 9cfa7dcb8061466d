"""Eight virtual CPU devices for every test, set before JAX looks at its devices, and a compiler in a hurry."""

import os

FLAGS = {
    "xla_force_host_platform_device_count": "8",
    "xla_backend_optimization_level": "0",  # tests spend their time in the compiler: this halves it
}

os.environ.setdefault("JAX_PLATFORMS", "cpu")
given = os.environ.get("XLA_FLAGS", "")
missing = [f"--{name}={value}" for name, value in FLAGS.items() if name not in given]
os.environ["XLA_FLAGS"] = " ".join([given, *missing])
