"""Where the layers of a model stand: what rules match and strategies read."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxexpand.algebra.kernel import Ints, Sides
from fxexpand.algebra.refusal import Refusal
from fxexpand.graph.expanded import Expanded
from fxexpand.graph.geometry import Geometry, geometry_of, padding_sides, spread
from fxexpand.graph.layers import attributes_named, dtype_refusal, is_expandable_class, is_opaque, peculiarity
from fxexpand.graph.traced import TracedModule
from fxexpand.graph.tree import parameter_owners

_CALLS: dict[Any, int] = {F.linear: 0, F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}
_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_LAYER = {0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@dataclass(frozen=True)
class Call:
    """One use of a layer in a graph: ``node`` of ``graph_module``, which stands at ``prefix`` in the model."""

    graph_module: fx.GraphModule
    node: fx.Node
    prefix: str


@dataclass(frozen=True, eq=False)
class Site:
    """A layer, and where it stands.

    ``path`` is its dotted path in the model; that of a functional call is its weight's. ``module`` is the layer, or
    None for a functional call, whose function is ``function``. ``calls`` are the graph nodes that use it: none in a
    parent that cannot be traced. ``refusal`` says why no strategy can replace it, where that is so.
    """

    path: str
    geometry: Geometry
    module: nn.Module | None
    function: Any
    weight: Tensor | None
    bias: Tensor | None
    calls: tuple[Call, ...]
    reads_input: bool
    expanded: bool
    refusal: Refusal | None

    @property
    def dims(self) -> int:
        """The number of spatial axes: 0 for a linear layer, 1 to 3 for a convolution."""
        return self.geometry.dims

    @property
    def in_channels(self) -> int:
        """Input channels; input features of a linear layer."""
        return self.geometry.in_channels

    @property
    def out_channels(self) -> int:
        """Output channels; output features of a linear layer."""
        return self.geometry.out_channels

    @property
    def kernel_size(self) -> Ints:
        return self.geometry.kernel_size

    @property
    def stride(self) -> Ints:
        return self.geometry.stride

    @property
    def padding(self) -> Sides:
        """(before, after) for each axis, in samples."""
        return self.geometry.padding

    @property
    def padding_mode(self) -> str:
        return self.geometry.padding_mode

    @property
    def dilation(self) -> Ints:
        return self.geometry.dilation

    @property
    def groups(self) -> int:
        return self.geometry.groups

    @property
    def depthwise(self) -> bool:
        return self.geometry.depthwise

    @property
    def has_bias(self) -> bool:
        return self.geometry.has_bias

    @property
    def node(self) -> fx.Node | None:
        """The first graph node that uses the layer; None in a parent that cannot be traced."""
        return self.calls[0].node if self.calls else None

    @property
    def users(self) -> tuple[fx.Node, ...]:
        """The nodes that read the layer's output, over all its calls."""
        return tuple(user for call in self.calls for user in call.node.users)

    def module_of(self, node: fx.Node) -> nn.Module | None:
        """The module that ``node`` calls, for a ``call_module`` node of a graph in which the layer is used."""
        if node.op != "call_module":
            return None
        return next(
            (call.graph_module.get_submodule(str(node.target)) for call in self.calls if call.node.graph is node.graph),
            None,
        )

    def layer(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Ints = 1,
        *,
        stride: int | Ints = 1,
        padding: int | Ints | Sides = 0,
        dilation: int | Ints = 1,
    ) -> nn.Module:
        """A new layer of this site's kind (``Linear`` or ``ConvNd``), groups, bias, dtype and device.

        ``padding`` may be the site's own; the site's padding mode goes with it. A linear layer has channels alone.
        """
        if self.weight is None:
            raise TypeError(f"{self.path}: {self.refusal}")
        options: dict[str, Any] = {"bias": self.has_bias, "dtype": self.weight.dtype, "device": self.weight.device}
        if self.dims == 0:
            return nn.Linear(in_channels, out_channels, **options)
        amounts = tuple(side if isinstance(side, int) else side[0] for side in _spread_sides(padding, self.dims))
        build: Any = _LAYER[self.dims]
        layer: nn.Module = build(
            in_channels,
            out_channels,
            spread(kernel_size, self.dims),
            stride=spread(stride, self.dims),
            padding=amounts,
            dilation=spread(dilation, self.dims),
            groups=self.groups,
            padding_mode=self.padding_mode if any(amounts) else "zeros",
            **options,
        )
        return layer

    def __str__(self) -> str:
        """``features.0 (Conv2d 3×3, 16 -> 32, groups=4)``."""
        name = type(self.module).__name__ if self.module is not None else f"{self.function.__name__}()"
        size = " " + "×".join(map(str, self.kernel_size)) if self.dims else ""
        groups = f", groups={self.groups}" if self.groups > 1 else ""
        return f"{self.path or 'the model'} ({name}{size}, {self.in_channels} -> {self.out_channels}{groups})"


def _spread_sides(padding: Any, dims: int) -> tuple[Any, ...]:
    return (padding,) * dims if isinstance(padding, int) else tuple(padding)


def find_sites(model: nn.Module) -> list[Site]:
    """The convolution and linear layers that ``model`` uses, in the order in which it first uses them.

    ``model`` is what ``trace`` gives, or any ``GraphModule``. A layer that is used at several places is one site.
    """
    owners = parameter_owners(model)
    graphs, running = _running(model)
    found: dict[int, Site] = {}
    for path, site in _walk(model, "", set()):
        key = id(site.module if site.module is not None else site.weight)
        if key not in found:
            found[key] = replace(site, path=path, refusal=site.refusal or _tied(site, owners, running))
        else:
            found[key] = _also_used(found[key], site)
    reads = _reads(graphs)
    return [
        replace(site, refusal=site.refusal or _read_elsewhere(site, reads) or _read_by_code(site, running.values()))
        for site in found.values()
    ]


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
    weight = _parameter(gm, given.get("weight"))
    if weight is None:
        return None
    dims = _CALLS[node.target]
    settings = {name: value for name, value in given.items() if name not in ("input", "weight", "bias")}
    bias_node = given.get("bias")
    bias = _parameter(gm, bias_node)
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


def _parameter(gm: fx.GraphModule, node: object) -> nn.Parameter | None:
    if not (isinstance(node, fx.Node) and node.op == "get_attr"):
        return None
    value = operator.attrgetter(str(node.target))(gm)
    return value if isinstance(value, nn.Parameter) else None


def _also_used(site: Site, other: Site) -> Site:
    """``site`` with the calls of ``other``, which is the same layer used again."""
    refusal = site.refusal or other.refusal
    if site.geometry != other.geometry or (site.bias is not other.bias):
        refusal = Refusal("its weight is used by calls that differ in their settings or bias")
    calls = site.calls + other.calls
    if site.module is None and len({id(call.graph_module) for call in calls}) > 1:
        refusal = Refusal("its weight is used by calls in several modules, each traced for itself")
    return replace(site, calls=calls, reads_input=site.reads_input or other.reads_input, refusal=refusal)


def _running(model: nn.Module) -> tuple[list[fx.GraphModule], dict[int, nn.Module]]:
    """The graph modules whose graphs run when ``model`` does, and by id the modules whose own code runs."""
    graphs: dict[int, fx.GraphModule] = {}
    running: dict[int, nn.Module] = {}
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if id(module) in graphs or id(module) in running:
            continue
        if isinstance(module, fx.GraphModule):
            graphs[id(module)] = module
            waiting += [module.get_submodule(str(n.target)) for n in module.graph.nodes if n.op == "call_module"]
        else:
            running[id(module)] = module
            waiting += module.children()
    return list(graphs.values()), running


def _read_by_code(site: Site, running: Iterable[nn.Module]) -> Refusal | None:
    """Whether code that cannot be traced speaks of an attribute with the name of a functional call's weight or bias.

    A layer that becomes an expansion still answers for its weight and bias; a parameter that is gone cannot.
    """
    if site.module is not None:
        return None
    names = {str(node.target).rpartition(".")[2] for call in site.calls for node in call.node.all_input_nodes[1:]}
    for module in running:
        if not is_opaque(module) and names & attributes_named(type(module)):
            return Refusal(f"its weight or bias may be read by the code of {type(module).__name__}, which has no graph")
    return None


def _tied(
    site: Site, owners: dict[int, list[tuple[nn.Module, str]]], running: Mapping[int, nn.Module]
) -> Refusal | None:
    """Whether anything else holds the layer's weight or bias."""
    for tensor in (site.weight, site.bias):
        others = [o for o in owners.get(id(tensor), []) if o[0] is not site.module] if tensor is not None else []
        if site.module is None and len(others) == 1 and id(others[0][0]) not in running:
            continue  # the module that a functional call takes its weight from, and whose own code does not run
        if others:
            names = ", ".join(sorted(f"{type(module).__name__}.{name}" for module, name in others))
            return Refusal(f"its weight or bias is tied to {names}, and would no longer be; untie it first")
    return None


def _reads(graphs: list[fx.GraphModule]) -> dict[int, list[fx.Node]]:
    """id of each parameter -> the nodes, of any graph that runs, that read it as an attribute."""
    reads: dict[int, list[fx.Node]] = {}
    for gm in graphs:
        for node in gm.graph.nodes:
            parameter = _parameter(gm, node)
            if parameter is not None:
                reads.setdefault(id(parameter), []).append(node)
    return reads


def _read_elsewhere(site: Site, reads: dict[int, list[fx.Node]]) -> Refusal | None:
    """Whether a graph reads the layer's weight or bias for anything but calling the layer."""
    own = {call.node for call in site.calls}
    for tensor in (site.weight, site.bias):
        nodes = reads.get(id(tensor), [])
        others = [user.name for node in nodes for user in node.users if user not in own]
        if others:
            return Refusal(f"its weight or bias is also read by {', '.join(others)}, which would lose it")
    return None


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
