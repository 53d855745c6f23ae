"""The products one by one: the specification of the kernel."""

from pallas_kernels.spvmm import reference

__all__ = ["run"]


def run(x, ws, levels, scales):
    """Returns what spvmm's reference makes of each matrix, [B M] each."""
    return tuple(reference.run(x, *each) for each in zip(ws, levels, scales, strict=True))
