"""What a kernel costs: parameters and multiply-accumulates."""

from __future__ import annotations

from math import prod

from fxexpand.algebra.kernel import Ints, Kernel


def parameters(kernel: Kernel) -> int:
    """The number of weights and biases."""
    return kernel.weight.numel() + (0 if kernel.bias is None else kernel.bias.numel())


def macs_per_output(kernel: Kernel) -> int:
    """Multiply-accumulates for one output position (all channels): n · m/g · Πk. The bias is free."""
    return kernel.weight.numel()


def macs(kernel: Kernel, size: Ints) -> int:
    """Multiply-accumulates for one sample of spatial size ``size`` (``()`` for a linear layer on one vector)."""
    return macs_per_output(kernel) * prod(kernel.output_size(size))
