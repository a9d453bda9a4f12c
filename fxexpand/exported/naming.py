"""What the parameters of merged layers are called in a program: as those of the layer that they replace."""

from __future__ import annotations

from collections.abc import Iterable


class Names:
    """The names of parameters, buffers and constants that a program has, and keeps; ``taken`` are those that stay."""

    def __init__(self, taken: Iterable[str]) -> None:
        self._taken = set(taken)

    def owner(self, weight: str, label: str) -> str:
        """The path for a layer in place of the one whose weight was called ``weight``.

        That of the layer it was, where the names of its parameters are free; else with ``label`` behind it.
        """
        path = owner_of(weight)
        while not all(self._is_free(join(path, name)) for name in ("weight", "bias")):
            path = f"{path}_{label}" if path else label
        self._taken.update((join(path, "weight"), join(path, "bias")))
        return path

    def _is_free(self, name: str) -> bool:
        """Whether ``name`` is no name, no part of the path of one, and no name is part of its path."""
        return not any(
            f"{name}.".startswith(f"{other}.") or f"{other}.".startswith(f"{name}.") for other in self._taken
        )


def owner_of(weight: str) -> str:
    """The path of the layer the weight of which has this name; the name itself where it is not called ``weight``."""
    above, _, name = weight.rpartition(".")
    return above if name == "weight" else weight


def join(path: str, name: str) -> str:
    """The name of what ``path`` holds under ``name``."""
    return f"{path}.{name}" if path else name
