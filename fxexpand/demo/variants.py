"""What the demo compares: ways to train one and the same SmallNet."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from fxexpand import CK, CL, collapse, contract, expand
from fxexpand.demo.smallnet import SmallNet


@dataclass(frozen=True)
class Variant:
    """One way to train a compact network.

    `name` goes into file names, `label` into tables and figures. `build` turns the fresh compact network into the one
    that is trained, and `deploy` turns that one back into a network with the compact one's `state_dict` keys.
    """

    name: str
    label: str
    build: Callable[[nn.Module], nn.Module]
    deploy: Callable[[nn.Module], nn.Module] = contract

    def deployed(self, trained: nn.Module, kernel_size: int) -> SmallNet:
        """A fresh SmallNet with the weights of the contracted `trained`, loaded strictly, in eval mode."""
        network = SmallNet(kernel_size=kernel_size)
        network.load_state_dict(self.deploy(trained).state_dict(), strict=True)
        return network.eval()


def variants(rate: float, kernel_size: int) -> tuple[Variant, ...]:
    """The columns of the comparison; the first one is what the others are compared with.

    The strategies reach the three convolutions only. As in the authors' SmallNet, the layer that reads the image keeps
    its 3 input channels, and the new layers start from their classes' own initialisation. "collapsed" is CL again, each
    expansion run as one layer. CK needs a kernel larger than 3×3 and is left out for `kernel_size` 3.
    """
    compact = Variant("compact", "compact", build=_unchanged, deploy=_unchanged)
    cl = Variant("cl", f"CL({rate:g})", lambda net: expand(net, CL(rate, keep_input=True), init="standard"))
    fast = Variant("cl-collapsed", "collapsed", lambda net: collapse(cl.build(net)))
    ck = Variant("ck", f"CK({rate:g})", lambda net: expand(net, CK(rate, keep_input=True), init="standard"))
    return (compact, cl, fast, ck) if kernel_size > 3 else (compact, cl, fast)


def _unchanged(model: nn.Module) -> nn.Module:
    return model
