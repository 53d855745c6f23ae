"""Sets up every test run: JAX on CPU, shapes checked at run time, one model loaded once."""

import os

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

# Before any of our modules is imported, and for the test run only.
install_import_hook(["kvjax", "pallas_kernels"], "type_check.checked")

collect_ignore_glob = ["golden/make_*.py"]  # scripts that need the peers; no tests in them

settings.register_profile("dev", deadline=None, max_examples=20)
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


_CLEAR_EVERY = 40  # tests


@pytest.fixture(autouse=True)
def _bounded_programs(request):
    """Forgets compiled programs now and then: each maps memory, and a process may map only so often."""
    yield
    request.session.n_run = getattr(request.session, "n_run", 0) + 1
    if request.session.n_run % _CLEAR_EVERY == 0:
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
