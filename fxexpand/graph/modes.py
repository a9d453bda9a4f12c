"""The modes of torch that composing is to know of."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

_NOTHING = nullcontext()


def is_followed() -> bool:
    """Whether a compiler follows what runs: it sees through checks, and through plain operations better than through
    a function of ours.
    """
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


def exact_products(device: str) -> AbstractContextManager[None]:
    """No autocast: bfloat16 products would lose four digits."""
    if not torch._C._is_any_autocast_enabled():
        return _NOTHING
    enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if enabled else _NOTHING
