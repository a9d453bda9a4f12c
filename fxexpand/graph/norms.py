"""The batch norm behind a layer, where it is that layer's alone: it takes any bias off again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxexpand.graph.layers import BATCH_NORMS, has_hooks
from fxexpand.graph.tree import modules_beside, submodule
from fxexpand.graph.uses import running


@dataclass(frozen=True)
class NormUses:
    """Who uses the batch norms of a model: how many nodes call each, and what else may run it or see its statistics.

    ``calls``: id of a module -> the nodes that call it, in all graphs. ``shared``: ids of modules that code without a
    graph may call, and of tensors that graphs read or several modules hold.
    """

    calls: Counter[int]
    shared: frozenset[int]

    @staticmethod
    def of(model: nn.Module) -> NormUses:
        calls: Counter[int] = Counter()
        shared: set[int] = set()
        owners: Counter[int] = Counter()
        for module in model.modules():
            owners.update({id(tensor) for tensor in module._buffers.values() if tensor is not None})
            if isinstance(module, fx.GraphModule):
                for node in module.graph.nodes:
                    if node.op == "call_module":
                        calls[id(submodule(module, str(node.target)))] += 1
                    elif node.op == "get_attr":
                        shared.add(id(attrgetter(str(node.target))(module)))
        for module in running(model)[1].values():
            beside = {id(inner) for held in modules_beside(module) for inner in held.modules()}
            shared |= beside | {id(inner) for inner in module.modules() if inner is not module}
        shared |= {tensor for tensor, count in owners.items() if count > 1}
        return NormUses(calls, frozenset(shared))

    def behind(
        self, nodes: Sequence[tuple[fx.GraphModule, fx.Node]], layer: nn.Module | None = None
    ) -> list[_BatchNorm] | None:
        """For each of ``nodes``, of a graph module, the batch norm with running statistics that alone reads it.

        None unless there is one for each, that nothing else calls, reads or shares, and unless nodes alone call
        ``layer``, which gives their values.
        """
        found = [self._behind(gm, node) for gm, node in nodes]
        norms = [norm for norm in found if norm is not None]
        alone = len(norms) == len(nodes) == len(set(map(id, norms))) > 0
        return norms if alone and (layer is None or id(layer) not in self.shared) else None

    def _behind(self, gm: fx.GraphModule, node: fx.Node) -> _BatchNorm | None:
        users = list(node.users)
        if len(users) != 1 or users[0].op != "call_module":
            return None
        norm = gm.get_submodule(str(users[0].target))
        if type(norm) not in BATCH_NORMS or not isinstance(norm, _BatchNorm) or has_hooks(norm):
            return None
        mean = norm.running_mean
        seen = {id(norm), id(mean), id(norm.running_var)} & self.shared
        return None if mean is None or seen or self.calls[id(norm)] != 1 else norm
