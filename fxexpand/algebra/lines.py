"""Functions of tensors without their loops and questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx


def in_lines(function: Callable[..., Sequence[Any]], arguments: int) -> Callable[..., list[Any]]:
    """``function`` of so many ``arguments`` as straight lines of calls, which give the same.

    It is traced once: what it asks may depend on shapes that it knows, not on its arguments. Between convolutions the
    caches hold neither its code nor its data, and a line of Python that computes nothing takes as long as a small
    product.
    """
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    found = function(*[fx.Proxy(graph.placeholder(f"a{number}"), tracer) for number in range(arguments)])
    graph.output(tracer.create_arg(list(found)))
    graph.eliminate_dead_code()
    graph.lint()
    lines: Callable[..., list[Any]] = fx.GraphModule({}, graph).forward
    return lines
