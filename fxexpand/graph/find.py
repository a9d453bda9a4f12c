"""Finding the layers that a model uses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxexpand.algebra.refusal import Refusal
from fxexpand.graph.expanded import Expanded
from fxexpand.graph.geometry import Geometry, geometry_of, padding_sides, spread
from fxexpand.graph.layers import dtype_refusal, is_expandable_class, is_opaque, peculiarity
from fxexpand.graph.norms import NormUses
from fxexpand.graph.site import Call, Site
from fxexpand.graph.traced import TracedModule
from fxexpand.graph.uses import OtherUses, parameter_read

_CALLS: dict[Any, int] = {F.linear: 0, F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}
_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


def find_sites(model: nn.Module) -> list[Site]:
    """The convolution and linear layers that ``model`` uses, in the order in which it first uses them.

    ``model`` is what ``trace`` gives, or any ``GraphModule``. A layer that is used at several places is one site.
    """
    found: dict[int, Site] = {}
    for path, site in _walk(model, "", set()):
        key = id(site.module if site.module is not None else site.weight)
        if key not in found:
            found[key] = replace(site, path=path)
        else:
            found[key] = _also_used(found[key], site)
    uses, norms = OtherUses.of(model), NormUses.of(model)
    return [
        replace(site, refusal=site.refusal or uses.refusal(site), feeds_norm=_feeds_norm(site, norms))
        for site in found.values()
    ]


def _feeds_norm(site: Site, norms: NormUses) -> bool:
    return norms.behind([(call.graph_module, call.node) for call in site.calls], site.module) is not None


def _walk(module: nn.Module, prefix: str, seen: set[int], *, inside: bool = False) -> Iterator[tuple[str, Site]]:
    """(path, site) of every use of a layer; ``inside`` an expansion the layers are marked as expanded."""
    if is_expandable_class(module):
        yield prefix, _module_site(module, (), reads_input=False, expanded=inside)
        return
    if id(module) in seen or is_opaque(module):
        return
    seen.add(id(module))
    if isinstance(module, fx.GraphModule):
        yield from _walk_graph(module, prefix, seen)
        return
    for name, child in module._modules.items():
        if child is not None:
            inner = inside or isinstance(module, Expanded)
            yield from _walk(child, _join(prefix, name), seen, inside=inner)


def _walk_graph(gm: fx.GraphModule, prefix: str, seen: set[int]) -> Iterator[tuple[str, Site]]:
    leaves = gm.traced_leaves if isinstance(gm, TracedModule) else None  # others chose what to leave whole
    for node in gm.graph.nodes:
        reads_input = not prefix and any(n.op == "placeholder" for n in _sources(node))
        if node.op == "call_module":
            target = str(node.target)
            module = gm.get_submodule(target)
            if is_expandable_class(module):
                call = Call(gm, node, prefix)
                expanded = _inside_expanded(gm, target)
                site = _module_site(module, (call,), reads_input=reads_input, expanded=expanded)
                yield _join(prefix, target), site
            elif isinstance(module, fx.GraphModule) or (leaves is not None and not isinstance(module, leaves)):
                yield from _walk(module, _join(prefix, target), seen)
        elif node.op == "call_function" and node.target in _CALLS:
            call_site = _call_site(gm, node, prefix, reads_input)
            if call_site is not None:
                yield call_site.path, call_site


def layer_site(layer: nn.Module, path: str, *, reads_input: bool, expanded: bool) -> Site:
    """The site of a layer that no graph calls yet; ``expanded``: it belongs to an expansion."""
    return replace(_module_site(layer, (), reads_input=reads_input, expanded=expanded), path=path)


def _sources(node: fx.Node) -> list[fx.Node]:
    """The node that a layer is applied to, as its first argument or by name; none for a node that is no such call."""
    value = node.args[0] if node.args else node.kwargs.get("input")
    return [value] if isinstance(value, fx.Node) else []


def _inside_expanded(gm: fx.GraphModule, target: str) -> bool:
    parents = target.split(".")[:-1]
    return any(isinstance(gm.get_submodule(".".join(parents[: i + 1])), Expanded) for i in range(len(parents)))


def _module_site(module: nn.Module, calls: tuple[Call, ...], *, reads_input: bool, expanded: bool) -> Site:
    refusal = peculiarity(module) or _empty(module.weight)  # type: ignore[arg-type]
    weight = None if refusal is not None else module.weight
    bias = None if refusal is not None else module.bias
    return Site("", geometry_of(module), module, None, weight, bias, calls, reads_input, expanded, refusal)  # type: ignore[arg-type]


def _call_site(gm: fx.GraphModule, node: fx.Node, prefix: str, reads_input: bool) -> Site | None:
    """The site of ``F.conv2d(x, self.weight, …)``; None when its weight is no parameter that it reads directly."""
    given = dict(zip(_NAMES, node.args, strict=False)) | dict(node.kwargs)
    weight = parameter_read(gm, given.get("weight"))
    dims = _CALLS[node.target]
    if weight is None or weight.dim() != dims + 2:  # F.linear takes a vector too, and gives no axis for it
        return None
    settings = {name: value for name, value in given.items() if name not in ("input", "weight", "bias")}
    bias_node = given.get("bias")
    bias = parameter_read(gm, bias_node)
    refusal = dtype_refusal(weight) or _empty(weight)
    if bias_node is not None and bias is None:
        refusal = Refusal("its bias is computed, and not a parameter")
    elif bias is not None and _owner_path(bias_node) != _owner_path(given["weight"]):
        refusal = Refusal("its weight and bias are parameters of different modules")
    if any(isinstance(value, fx.Node) for setting in settings.values() for value in _flat(setting)):
        return None
    geometry = _call_geometry(weight, bias_node is not None, dims, settings)
    call = Call(gm, node, prefix)
    path = _join(prefix, str(given["weight"].target))  # type: ignore[union-attr]
    return Site(path, geometry, None, node.target, weight, bias, (call,), reads_input, False, refusal)


def _call_geometry(weight: Tensor, has_bias: bool, dims: int, settings: dict[str, Any]) -> Geometry:
    if dims == 0:
        return Geometry(weight.shape[1], weight.shape[0], has_bias)
    kernel_size = tuple(weight.shape[2:])
    groups = int(settings.get("groups", 1))
    dilation = spread(settings.get("dilation", 1), dims)
    return Geometry(
        in_channels=weight.shape[1] * groups,
        out_channels=weight.shape[0],
        has_bias=has_bias,
        kernel_size=kernel_size,
        stride=spread(settings.get("stride", 1), dims),
        padding=padding_sides(settings.get("padding", 0), kernel_size, dilation),
        dilation=dilation,
        groups=groups,
    )


def _empty(weight: Tensor) -> Refusal | None:
    return None if weight.numel() else Refusal(f"its weight of shape {tuple(weight.shape)} is empty")


def _owner_path(node: Any) -> str:
    return str(node.target).rpartition(".")[0]


def _flat(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _also_used(site: Site, other: Site) -> Site:
    """``site`` with the calls of ``other``, which is the same layer used again."""
    refusal = site.refusal or other.refusal
    if site.geometry != other.geometry or (site.bias is not other.bias):
        refusal = Refusal("its weight is used by calls that differ in their settings or bias")
    calls = site.calls + other.calls
    if site.module is None and len({id(call.graph_module) for call in calls}) > 1:
        refusal = Refusal("its weight is used by calls in several modules, each traced for itself")
    return replace(site, calls=calls, reads_input=site.reads_input or other.reads_input, refusal=refusal)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
