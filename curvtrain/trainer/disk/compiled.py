"""JAX's persistent compilation cache, for the time of a run: a repeated or resumed run does not compile again."""

import contextlib
import logging
import os
import zlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from curvtrain.trainer.mesh.sharding import of_several_cpus

log = logging.getLogger("curvtrain")

FOLDER = "compiled"  # in the workdir
ZSTANDARD = b"\x28\xb5\x2f\xfd"  # the first bytes of an entry where JAX finds that library; else it uses zlib
_DIR = "jax_compilation_cache_dir"


@contextlib.contextmanager
def compilation_cache_of(
    option: str | os.PathLike | bool | None, workdir: str | os.PathLike | None, mesh: Mesh
) -> Generator[Path | None]:
    """Keeps compiled programs in a folder while the context lasts, and gives the folder, or None if it keeps none.

    On a mesh of several CPU devices there is no cache, neither the run's nor the user's: read back, programs for
    these may wait for themselves forever (`of_several_cpus`).

    A cache that the user has configured (JAX_COMPILATION_CACHE_DIR, `jax.config`) stays as it is, unless a folder is
    named. JAX has one cache per process, so other threads use it too. Afterwards JAX's options are as they were.

    An entry's key is a hash of the program, the compiler and its options, and the devices. Of several processes, the
    first writes and all read. Entries that a full disk cut short are removed at the end; one that a kill cut short is
    passed over by JAX, with a warning.

    Args:
      option: True for the folder `compiled` in the workdir, a path for that folder, False or None for no cache.
      workdir: the run's folder, or None: then True keeps nothing.
      mesh: of the run.
    """
    folder = None if of_several_cpus(mesh) else _folder(option, workdir)
    if folder is not None:
        options: dict[str, Any] = {
            _DIR: os.fspath(folder),
            "jax_persistent_cache_min_compile_time_secs": 0.0,
            "jax_persistent_cache_min_entry_size_bytes": -1,
        }
    elif of_several_cpus(mesh):
        if isinstance(option, str | os.PathLike):
            log.warning(
                "compilation_cache=%r keeps nothing on a mesh of several CPU devices: programs that are read back "
                "may wait for themselves forever.",
                os.fspath(option),
            )
        options = {"jax_enable_compilation_cache": False}
    else:
        yield None
        return
    before, held = {name: getattr(jax.config, name) for name in options}, set(_entries(folder))
    try:
        _configure(options)
        yield folder
    finally:
        _configure(before)
        if jax.process_index() == 0:
            for entry in _entries(folder):
                if entry not in held and not _is_whole(entry):
                    entry.unlink(missing_ok=True)


def _folder(option: str | os.PathLike | bool | None, workdir: str | os.PathLike | None) -> Path | None:
    if option is None or option is False:
        return None
    if option is not True:
        return Path(option).absolute()
    if workdir is None or getattr(jax.config, _DIR) is not None:
        return None
    return Path(workdir).absolute() / FOLDER


def _entries(folder: Path | None) -> list[Path]:
    return [] if folder is None else list(folder.glob("*-cache"))


def _is_whole(entry: Path) -> bool:
    """Says whether a compressed entry has its end. JAX writes it in place, and never again."""
    stream, data = zlib.decompressobj(), entry.read_bytes()
    if data.startswith(ZSTANDARD):
        return True  # its library is not ours to require
    try:
        stream.decompress(data)
    except zlib.error:
        return False
    return stream.eof


def _configure(options: dict[str, Any]) -> None:
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # JAX looks at the folder's name once, when it first compiles
