"""Describes devices that are not here, so that programs can be compiled for them on any machine.

TPU topologies need libtpu, GPU ones JAX's CUDA plugin; neither needs the hardware or its driver.
libtpu reads its settings from the environment, so `environment()` is given to a child process:
some failures of these compilers end the process.

Example:
    >>> at = Described("v5e")
    >>> at.platform, at.kind
    ('tpu', 'TPU v5 lite')
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from pallas_kernels import backend
from pallas_kernels.host import on_host

__all__ = ["DEVICES", "Described", "environment"]

_TPUS = {  # name: kind, smallest topology, topology of eight chips
    "v5e": ("TPU v5 lite", "v5e:2x2", "v5e:2x4"),
    "v5p": ("TPU v5", "v5p:2x2x1", "v5p:2x2x2"),
    "v6e": ("TPU v6 lite", "v6e:2x2", "v6e:2x4"),
}
# name: kind, capability, multiprocessors, shared memory of one and of a block (KiB), L2 (MiB), GB/s, GiB
_GPUS = {
    "l4": ("NVIDIA L4", (8, 9), 58, 100, 99, 48, 300, 24),
    "a100": ("NVIDIA A100-SXM4-80GB", (8, 0), 108, 164, 163, 40, 2039, 80),
    "h100": ("NVIDIA H100 80GB HBM3", (9, 0), 132, 228, 227, 50, 3352, 80),
}
DEVICES = (*_TPUS, *_GPUS)


def environment() -> dict[str, str]:
    """Returns environment variables with which libtpu loads where there is no TPU."""
    return {
        "JAX_PLATFORMS": "cpu",  # arrays live on the CPU; described devices only compile
        "TPU_SKIP_MDS_QUERY": "1",  # ask no metadata server
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a second process fails on a lock file
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
        "XLA_FLAGS": "--xla_gpu_autotune_level=0",  # nothing to time on
    }


@dataclass(frozen=True)
class Described:
    """A device by name, one of `DEVICES`; with eight, eight TPU chips of one host."""

    name: str
    eight: bool = False

    @property
    def platform(self) -> str:
        """Returns "tpu" or "gpu"."""
        return "tpu" if self.name in _TPUS else "gpu"

    @property
    def kind(self) -> str:
        """The device's kind, as JAX names it."""
        return (_TPUS if self.name in _TPUS else _GPUS)[self.name][0]

    @property
    def n_devices(self) -> int:
        """How many devices the topology has."""
        return len(self._topology().devices)

    def spread(self, tree: Any, specs: Any = None) -> Any:
        """Puts shapes on the described device, or by partition specs on all, over one axis "x".

        On a TPU, what `jax.eval_shape` made for host memory is put there (JAX 0.10 does not tell).
        """
        devices = self._topology().devices
        if specs is None:
            return jax.tree.map(lambda x: x.update(sharding=self._place(x, devices[0])), tree)
        mesh = self.mesh()
        return jax.tree.map(
            lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
            tree, specs, is_leaf=lambda x: isinstance(x, PartitionSpec),
        )  # fmt: skip

    def mesh(self) -> Mesh:
        """Returns a mesh of all devices over one axis "x"."""
        devices = self._topology().devices
        return Mesh(devices, ("x",))

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Builds kernels for this device."""
        with backend.aim(backend.Target(self.platform, self.kind)), self._lowering():
            yield

    def compile(self, traced: Any) -> Any:
        """Compiles for a described GPU what was traced in `compiling` with arrays of this machine.

        So memory kinds are kept, which described GPUs have none of. Returns XLA's executable.
        """
        lowered = traced.lower(lowering_platforms=("cuda",))
        return backend.compile_only(lowered.compiler_ir("stablehlo"), self._topology().devices[0])

    def _lowering(self) -> contextlib.AbstractContextManager:
        """From JAX 0.12, Pallas asks the abstract mesh which GPU it lowers for."""
        if self.platform == "tpu" or not hasattr(jax.sharding, "AbstractDevice"):
            return contextlib.nullcontext()
        device = jax.sharding.AbstractDevice(device_kind=self.kind, num_cores=None, platform="cuda")
        return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device))

    def _place(self, x: jax.ShapeDtypeStruct, device: Any) -> SingleDeviceSharding:
        far = self.platform == "tpu" and on_host(x)
        return SingleDeviceSharding(device, memory_kind="pinned_host" if far else None)

    def _topology(self) -> Any:
        jax.devices()  # finds the plugins
        if self.platform == "tpu":
            name = _TPUS[self.name][2 if self.eight else 1]
            return backend.topologies.get_topology_desc(platform="tpu", topology_name=name)
        return backend.topologies.get_topology_desc(
            platform="cuda", topology_name="", topology="1x1x1", target_config=_gpu_config(*_GPUS[self.name])
        )


def _gpu_config(
    kind: str, capability: tuple[int, int], sms: int, smem: int, optin: int, l2: int, rate: int, memory: int
) -> str:
    """Returns what XLA wants to know of a GPU, as a text proto."""
    return f"""gpu_device_info {{
        threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
        shared_memory_per_core: {smem * 1024} threads_per_core_limit: 2048 core_count: {sms}
        fpus_per_core: 128
        block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        memory_bandwidth: {rate}000000000 l2_cache_size: {l2 * 2**20} clock_rate_ghz: 1.98
        device_memory_size: {memory * 2**30} shared_memory_per_block_optin: {optin * 1024}
        cuda_compute_capability {{ major: {capability[0]} minor: {capability[1]} }}
        registers_per_core_limit: 65536 registers_per_block_limit: 65536 }}
        platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 }}
        runtime_version {{ major: 13 minor: 0 patch: 0 }} device_description_str: "{kind}" """
