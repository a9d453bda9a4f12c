"""Functions of tensors without their loops and questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from torch import fx


def in_lines(function: Callable[..., Sequence[Any]], arguments: int) -> Callable[..., list[Any]]:
    """``function`` of so many ``arguments`` as straight lines of calls, which give the same.

    It is traced once: what it asks may depend on shapes that it knows, not on its arguments nor on the modes of torch
    at a call. Between convolutions the caches hold neither its code nor its data, and a line of Python that computes
    nothing takes as long as a small product.
    """
    with ThreadPoolExecutor(1) as clean:  # in a thread of its own there are no modes, transforms or subclasses about
        code = clean.submit(_traced, function, arguments).result().python_code("self")
    names = dict(code.globals)
    exec(code.src, names)  # as GraphModule does, which never lets go of the source
    return partial(names["forward"], None)


def _traced(function: Callable[..., Sequence[Any]], arguments: int) -> fx.Graph:
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    found = function(*[fx.Proxy(graph.placeholder(f"a{number}"), tracer) for number in range(arguments)])
    graph.output(tracer.create_arg(list(found)))
    graph.eliminate_dead_code()
    graph.lint()
    return graph
