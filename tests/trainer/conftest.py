"""Fixtures of the Trainer's tests."""

import jax
import pytest


@pytest.fixture(scope="module")
def quick_compile():
    """Programs that are compiled in half the time and run slower: these tests run few steps of tiny models."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
