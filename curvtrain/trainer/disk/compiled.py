"""JAX's persistent compilation cache, for the time of a run: a repeated or resumed run does not compile again."""

import contextlib
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

FOLDER = "compiled"  # in the workdir
_DIR = "jax_compilation_cache_dir"


@contextlib.contextmanager
def compilation_cache_of(
    option: str | os.PathLike | bool | None, workdir: str | os.PathLike | None
) -> Generator[Path | None]:
    """Keeps compiled programs in a folder while the context lasts, and gives the folder, or None if it keeps none.

    A cache that the user has configured (JAX_COMPILATION_CACHE_DIR, `jax.config`) stays as it is, unless a folder is
    named. JAX has one cache per process, so other threads use it too. Afterwards JAX's options are as they were.

    An entry's key is a hash of the program, the compiler and its options, and the devices; JAX ignores, with a warning,
    an entry that it cannot read. Of several processes, the first writes and all read.

    Args:
      option: True for the folder `compiled` in the workdir, a path for that folder, False or None for no cache.
      workdir: the run's folder, or None: then True keeps nothing.
    """
    folder = _folder(option, workdir)
    if folder is None:
        yield None
        return
    options: dict[str, Any] = {
        _DIR: os.fspath(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    try:
        _configure(options)
        yield folder
    finally:
        _configure(before)


def _folder(option: str | os.PathLike | bool | None, workdir: str | os.PathLike | None) -> Path | None:
    if option is None or option is False:
        return None
    if option is not True:
        return Path(option).absolute()
    if workdir is None or getattr(jax.config, _DIR) is not None:
        return None
    return Path(workdir).absolute() / FOLDER


def _configure(options: dict[str, Any]) -> None:
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # JAX looks at the folder's name once, when it first compiles
