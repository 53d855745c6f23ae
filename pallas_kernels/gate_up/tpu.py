"""gate_up on a TPU: XLA multiplies by the gate's weights, which are all read, and vmmsp's kernel by up's."""

from pallas_kernels.gate_up import reference
from pallas_kernels.vmmsp import tpu

__all__ = ["run"]


def run(x, gate_t, up_t, level, weight, scales, *, act: str):
    """Returns what `reference.run` returns.

    Raises:
        NotImplementedError: for batches and types that the kernel does not take.
    """
    gate_scale, up_scale = scales or (None, None)
    return tpu.run(x, reference.gates(x, gate_t, level, weight, gate_scale, act=act), up_t, up_scale)
