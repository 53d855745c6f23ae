"""Stands between the project and jax.experimental: the only file that imports it.

GPU kernels are written in Pallas Triton, which JAX has marked as deprecated without a date; it is
the one language that runs from A100 to H100 and takes operands in pinned host memory. The warning is
silenced here, and nowhere else.
"""

import contextlib
import re
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import checkify, io_callback, topologies
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton
from jax.experimental.pallas.ops.tpu import splash_attention

__all__ = [
    "Target",
    "aim",
    "barrier",
    "call_host",
    "checked",
    "compile_only",
    "debug_check",
    "float32_precision",
    "gpu_call",
    "in_hbm",
    "jax_decode_attention",
    "pl",
    "pltpu",
    "program_id",
    "races",
    "splash_kernel",
    "target",
    "topologies",
    "tpu_call",
    "triton",
]


@dataclass(frozen=True)
class Target:
    """What kernels are built for.

    platform: "cpu", "gpu" (NVIDIA's), "tpu" or another. device: its kind, as JAX names it.
    interpret: None compiles; "forward" and "backward" interpret a kernel's programs in that order.
    capability: a GPU's, where it is known.
    """

    platform: str
    device: str
    interpret: str | None = None
    capability: tuple[int, int] | None = None


_target = jax.make_user_context(default_value=None)  # part of the key of every compiled program
_checking = jax.make_user_context(default_value=False)


def target() -> Target:
    """Returns what kernels are built for: the default device, or what `aim` says."""
    if _target.value is not None:
        return _target.value
    device = jax.config.jax_default_device
    if not isinstance(device, jax.Device):
        device = jax.devices(device)[0]
    if device.platform not in ("cuda", "gpu"):
        return Target(device.platform, device.device_kind)
    capability = re.fullmatch(r"(\d+)\.(\d+)", device.compute_capability)
    if capability is None:
        return Target("rocm", device.device_kind)  # our kernels hold NVIDIA's instructions
    return Target("gpu", device.device_kind, capability=(int(capability[1]), int(capability[2])))


@contextlib.contextmanager
def aim(at: Target) -> Iterator[None]:
    """Builds kernels for another target than the default device: to interpret, or to compile ahead."""
    with _target(at):
        yield


def program_id(axis: int) -> jax.Array:
    """Returns this program's place in the grid of a `gpu_call`.

    Interpreted "backward", programs run in reverse: one that reads or overwrites what another
    writes gives another result then, which is how tests find races between programs.
    """
    place = pl.program_id(axis)
    return pl.num_programs(axis) - 1 - place if target().interpret == "backward" else place


def barrier() -> None:
    """Makes the threads of a `gpu_call`'s program wait for each other: none stores what another still loads.

    Interpreted, a program is one thread.
    """
    if target().interpret is None:
        triton.debug_barrier()


def gpu_call(
    kernel: Callable[..., None],
    *operands: Any,
    grid: tuple[int, ...],
    out_shape: Any,
    warps: int = 4,
    stages: int = 2,
    aliases: Mapping[int, int] = types.MappingProxyType({}),
    name: str,
) -> Any:
    """Runs a Pallas Triton kernel, whose refs are whole arrays, over a grid of programs.

    aliases: operands (counted as leaves) that are written in place, and the outputs that they become.

    Raises:
        NotImplementedError: for bytes that the kernel's offsets, 32 bits wide up to 4 GiB, do not reach.
    """
    at = target()
    for x in jax.tree.leaves(operands):
        if x.dtype.itemsize == 1 and 2**31 <= x.size <= 2**32 and at.interpret is None:
            raise NotImplementedError(
                f"a kernel addresses 2^31 elements of one byte, got {x.shape} {x.dtype}: put two in a word"
            )
    options = {"grid": grid, "out_shape": out_shape, "name": name, "input_output_aliases": dict(aliases)}
    if at.interpret is not None:
        return pl.pallas_call(kernel, interpret=True, **options)(*operands)
    with _triton_is_deprecated():
        params = triton.CompilerParams(num_warps=warps, num_stages=stages)
        return pl.pallas_call(kernel, compiler_params=params, **options)(*operands)


def float32_precision() -> Any:
    """Returns the precision of a float32 product in a `gpu_call`: three on tensor cores, of 1e-6 together.

    Interpreted, it is one of float32.
    """
    if target().interpret is not None:
        return jax.lax.Precision.HIGHEST
    return jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3


def tpu_call(
    kernel: Callable[..., None],
    *operands: Any,
    grid_spec: pltpu.PrefetchScalarGridSpec,
    out_shape: Any,
    semantics: Sequence[str],
    vmem_bytes: int,
    aliases: Mapping[int, int] = types.MappingProxyType({}),
    name: str,
) -> Any:
    """Runs a Pallas Mosaic kernel.

    semantics: "parallel" or "arbitrary" per grid axis. vmem_bytes: what the kernel may use; the
    compiler refuses one that needs more. aliases: as in `gpu_call`.
    """
    options = {"grid_spec": grid_spec, "out_shape": out_shape, "name": name}
    options["input_output_aliases"] = dict(aliases)
    if target().interpret is not None:
        races = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
        return pl.pallas_call(kernel, interpret=races, **options)(*operands)
    params = pltpu.CompilerParams(dimension_semantics=tuple(semantics), vmem_limit_bytes=vmem_bytes)
    return pl.pallas_call(kernel, compiler_params=params, **options)(*operands)


def call_host(fn: Callable[..., Any], result: Any, *args: Any) -> Any:
    """Calls a Python function from a program, each time that it runs, and returns its arrays on the device.

    fn takes NumPy-like arrays and must not use JAX. result: shapes and types.
    """
    return io_callback(fn, result, *args, ordered=False)


def in_hbm(x: jax.Array) -> jax.Array:
    """Returns x, held in a TPU's main memory: to change a few rows XLA would move all to VMEM and back."""
    at = target()
    if at.platform != "tpu" or at.interpret is not None or x.dtype == "float16":  # which no kernel takes
        return x
    here = pl.BlockSpec(memory_space=pltpu.HBM)
    options = {"in_specs": [here], "out_specs": here, "input_output_aliases": {0: 0}, "name": "in_hbm"}
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)

    def same(x: jax.Array) -> jax.Array:
        x = pltpu.with_memory_space_constraint(x, pltpu.HBM)  # its type says so; XLA's operations refuse it
        return pl.pallas_call(lambda x_ref, same_ref: None, out_shape=shape, **options)(x)

    held = jax.custom_jvp(same)
    held.defjvp(lambda values, changes: (held(*values), *changes))  # a kernel that aliases has no gradient
    return held(x)


def splash_kernel(mask: jax.Array, block_q: int, block_kv: int) -> Callable[..., jax.Array]:
    """Returns JAX's splash attention over a mask [heads T S]: a function of scaled q, k and v [heads S D]."""
    sizes = splash_attention.BlockSizes(
        block_q=block_q, block_kv=block_kv, block_kv_compute=block_kv, block_q_dkv=block_q,
        block_kv_dkv=block_kv, block_kv_dkv_compute=block_kv, block_q_dq=block_q, block_kv_dq=block_kv,
    )  # fmt: skip
    kernel = splash_attention.make_splash_mha_single_device(
        mask, block_sizes=sizes, interpret=target().interpret is not None
    )
    # Under jit JAX makes an array of this flag, and then asks Python whether it is true.
    for name in ("fwd_mask_info", "dq_mask_info", "dkv_mask_info"):
        setattr(kernel, name, getattr(kernel, name)._replace(is_dynamic_mask=True))
    return kernel


def races() -> bool:
    """Returns whether the TPU interpreter found a race since the last call (in JAX 0.12 it raises)."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # no public name in JAX 0.10

    state = interpret_pallas_call.races
    pltpu.reset_tpu_interpret_mode_state()
    return state is not None and state.races_found


def compile_only(module: Any, device: Any) -> Any:
    """Compiles a module for a described device as it is: JAX would give it that device's memory kinds."""
    from jax._src.lib import xla_client  # jax.extend has no client of described devices

    with module.context:
        return device.client.compile(
            module,
            executable_devices=xla_client.DeviceList((device,)),
            compile_options=xla_client.CompileOptions(),
        )


def jax_decode_attention() -> Callable[..., jax.Array]:
    """Returns JAX's own decode attention for GPUs, a peer: (q [B H D], k [B S K D], v) to [B H D]."""
    with _triton_is_deprecated():
        from jax.experimental.pallas.ops.gpu import decode_attention

    return decode_attention.gqa


@contextlib.contextmanager
def _triton_is_deprecated() -> Iterator[None]:
    """Keeps JAX from saying so each time: we know."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(triton|pallas.ops.gpu).*", category=DeprecationWarning)
        yield


def debug_check(condition: Callable[[], jax.Array], message: str) -> None:
    """Checks a condition in functions that are `checked`.

    Elsewhere it is not even traced: a check is an effect, and JAX dispatches programs with effects
    in Python, which takes longer than an op.
    """
    if _checking.value:
        checkify.debug_check(condition(), message)


def checked(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps fn so that its debug checks run and raise on the host, as a ValueError.

    Example:
        >>> def root(x):
        ...     debug_check(lambda: x >= 0, "x is not negative")
        ...     return x**0.5
        >>> try:
        ...     checked(root)(-1.0)
        ... except ValueError as error:
        ...     print(error)
        x is not negative (`check` failed)
    """
    run = jax.jit(checkify.checkify(fn))

    def call(*args: Any, **kwargs: Any) -> Any:
        with _checking(True):
            error, out = run(*args, **kwargs)
        checkify.check_error(error)
        return out

    return call
