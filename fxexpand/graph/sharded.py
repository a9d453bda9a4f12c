"""Models that are trained in several processes: what no pass can work on, and what no call gathers."""

from __future__ import annotations

from torch import Tensor, fx, nn

from fxexpand.errors import FxExpandError

# They are known by name: to import them would cost each user what few need, and some builds of torch have none.
_WRAPPER = "DistributedDataParallel"
_SHARDING = "FSDPModule"
_SHARDING_WRAPPER = "FullyShardedDataParallel"
_MANAGED = "_is_fsdp_managed_module"  # what both leave in all modules in them, for compilers
_FLATTENED = "_fsdp_flattened"  # what the wrapper leaves in its parameters

_BEFORE_SHARDING = ("trace", "expand", "collapse", "uncollapse", "counterpart")
_ORDER = "Expand first, then collapse, then shard: fully_shard(collapse(expand(model, rules)))."
_GATHER = (
    "Gather it first: torch.distributed.checkpoint.state_dict.get_model_state_dict(model, options=StateDictOptions("
    "full_state_dict=True, cpu_offload=True)) gives rank 0 the whole state_dict. Load that into the model as it was "
    "before it was sharded (expand(net, manifest(model)) makes one anew), and pass this one."
)


def check_whole(model: nn.Module, task: str, error: type[FxExpandError], *, rewritten: bool = True) -> None:
    """Raise ``error`` if ``model`` holds parameters of which each process has a part; the message says the order.

    Where it is ``rewritten``, also if a module in it is wrapped for distributed training: a wrapper knows the
    parameters that it was given, and goes on with these when they are replaced. ``task`` opens the message.
    """
    for path, module in model.named_modules():
        if rewritten and path and _is_a(module, _WRAPPER):
            raise error(
                f"{task}: {path}: expected a plain torch.nn.Module, found one wrapped for distributed training. Put "
                "its .module there, and wrap afterwards."
            )
    found = sharded_part(model)
    if found is not None:
        raise error(
            f"{task}: expected a model whose parameters are whole in each process, found {found} sharded over several. "
            f"{_ORDER if task in _BEFORE_SHARDING else _GATHER}"
        )


def sharded_part(model: nn.Module) -> str | None:
    """The first part of ``model`` that processes have shares of, gathered at the moment or not; None without any."""
    for path, module in model.named_modules():
        # Its parameters tell too little: a root keeps whole ones from its forward to its backward.
        if _MANAGED in vars(module) or _is_a(module, _SHARDING) or _is_a(module, _SHARDING_WRAPPER):
            return path or "the model"
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and is_spread(tensor):
                return f"{path}.{name}".lstrip(".")
    return None


def is_spread(tensor: Tensor) -> bool:
    """Whether each process has a part of ``tensor``: a ``DTensor``, or of the older kind (``is_flattened``)."""
    return is_flattened(tensor) or (type(tensor) not in (Tensor, nn.Parameter) and _is_a(tensor, "DTensor"))


def is_flattened(tensor: Tensor) -> bool:
    """Whether ``FullyShardedDataParallel`` has ``tensor``: its shape then tells nothing of what it is a part of."""
    return hasattr(tensor, _FLATTENED)


def never_gathered(gm: fx.GraphModule) -> list[str]:
    """The paths of modules in ``gm`` that were sharded by themselves, and that its graph does not call.

    ``fully_shard`` gathers parameters when the very module is called. A graph calls layers: neither the blocks that
    tracing went through, nor an expansion that is not collapsed.
    """
    called = [str(node.target) for node in gm.graph.nodes if node.op == "call_module"]

    def is_called(path: str) -> bool:
        return any(path == target or path.startswith(f"{target}.") for target in called)

    sharded = (path for path, module in gm.named_modules() if path and _is_a(module, _SHARDING))
    return [path for path in sharded if not is_called(path)]


def _is_a(value: object, name: str) -> bool:
    """Whether ``value`` is an instance of torch's class of this name."""
    return any(base.__name__ == name and base.__module__.startswith("torch.") for base in type(value).__mro__)
