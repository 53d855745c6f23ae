"""spvmm_each on a TPU: spvmm's kernel for each matrix."""

from pallas_kernels.spvmm import tpu

__all__ = ["run"]


def run(x, ws, levels, scales):
    """Returns what `reference.run` returns.

    Raises:
        NotImplementedError: for batches and types that the kernel does not take.
    """
    return tuple(tpu.run(x, *each) for each in zip(ws, levels, scales, strict=True))
