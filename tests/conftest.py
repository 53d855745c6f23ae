"""Sets up every test run: JAX on CPU, shapes checked at run time, one model loaded once."""

import os
from pathlib import Path

import platformdirs
import pytest
from hypothesis import settings

# JAX reads these when it is imported. On an accelerator: JAX_PLATFORMS=cuda (or tpu) make test.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(platformdirs.user_cache_path("kvjax") / "xla-tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2**30))

import jax
from jaxtyping import install_import_hook
from long_tests import is_long

# Before any of our modules is imported, and for the test run only.
install_import_hook(["kvjax", "pallas_kernels"], "type_check.checked")

collect_ignore_glob = ["golden/make_*.py"]  # scripts that need the peers; no tests in them

settings.register_profile("dev", deadline=None, max_examples=20)
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True, database=None, max_examples=10)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items):
    for item in items:
        if is_long(item.nodeid):
            item.add_marker(pytest.mark.long)


_LOOK_EVERY, _MAPS = 20, 30_000  # tests; Linux lets a process map 65,530 parts of its memory


def _n_maps() -> int:
    """How many parts of memory this process maps."""
    path = Path("/proc/self/maps")
    return path.read_bytes().count(b"\n") if path.exists() else _MAPS + 1


@pytest.fixture(autouse=True)
def _bounded_programs(request):
    """Forgets compiled programs when they are many: each maps memory, and a process may map only so often."""
    yield
    request.session.n_run = getattr(request.session, "n_run", 0) + 1
    if request.session.n_run % _LOOK_EVERY == 0 and _n_maps() > _MAPS:
        jax.clear_caches()


# These look at programs, or compare bits.
_AS_EVER = (
    "test_disk.py",
    "test_memory.py",
    "test_prefill_attention.py",
    "test_sharding.py",
    "test_smollm2.py",
    "test_tiers.py",
)


@pytest.fixture(autouse=True, scope="module")  # before a module's own fixtures, which are compared with
def _programs_made_sooner(request):
    """Leaves out most of the compiler's optimizations where that takes less time in all."""
    jax.config.update("jax_disable_most_optimizations", request.path.name not in _AS_EVER)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct in float32, the model that the reference outputs are of."""
    import kvjax

    return kvjax.load("smollm2-135m", dtype="float32")
