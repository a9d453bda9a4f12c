"""What every strategy is: a frozen value that says what a layer becomes, and with which weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import floor, isfinite
from numbers import Integral, Real
from typing import ClassVar

from torch import nn

from fxexpand.algebra.combine import remainder
from fxexpand.algebra.kernel import Kernel
from fxexpand.algebra.refusal import Refusal
from fxexpand.errors import RuleError
from fxexpand.graph.site import Site
from fxexpand.graph.structure import Sum


@dataclass(frozen=True)
class Strategy(ABC):
    """A way to make several linear layers of one.

    A strategy says which layers (``layers``) and how they make up a given kernel (``factorize``). It edits nothing:
    copying flags, placing padding that no layer can express, rewriting the graph, composing and contracting are done
    for it, whatever the structure.
    """

    dims: ClassVar[frozenset[int]] = frozenset({0, 1, 2, 3})
    """The kinds of layer it is about, by spatial axes: 0 for linear layers, 1 to 3 for convolutions."""

    exact: ClassVar[bool] = True
    """Whether ``factorize`` gives the function that the layer has. One that comes near it only reports how near."""

    source: ClassVar[str] = ""
    structure: ClassVar[str] = ""
    formula: ClassVar[str] = ""
    """Where it comes from, what a layer becomes, and how many weights that has without bias and groups, for people."""

    @abstractmethod
    def layers(self, site: Site) -> Mapping[str, nn.Module] | Sum | Refusal:
        """The new layers, under the names they take below the site's path: a mapping, in the order in which they are
        applied, or a ``Sum`` of branches that are added.

        Built by ``site.layer``, ``site.branch``, ``site.norm`` and ``site.scale``; ``nn.Identity`` and average pools
        without padding may stand between them, and parts may be a ``Series`` or ``Sum`` themselves. The padding of the
        site, which is symmetric, belongs to the first layer of a chain, and to each branch (``site.branch`` sees to
        it); strides and dilation must multiply up to the site's. A ``Refusal`` says what would do instead.
        """

    def factorize(self, target: Kernel, fresh: Sequence[Kernel]) -> Sequence[Kernel] | Refusal:
        """The kernels of the new layers such that they make up ``target``, in float64.

        ``fresh`` are the parts as initialised: those of a chain without padding, branches with theirs. A ``Refusal``
        says which rate is enough. Unless a strategy says otherwise, the first branch takes what the others leave.
        """
        return remainder(target, fresh)

    @property
    def collapses(self) -> bool:
        """Whether the layers are one layer while they train, so that ``collapse`` can run them as one."""
        return True

    @property
    def stages(self) -> tuple[Strategy, ...]:
        """This strategy alone, or those that expand a layer one after another; see ``then``."""
        return (self,)

    def then(self, second: Strategy) -> Strategy:
        """This strategy, with the layers that it makes expanded again by ``second``: those that it reaches."""
        from fxexpand.strategies.then import Then

        return Then(self, second)

    def reaches(self, site: Site) -> bool:
        """Whether the bare strategy, without a ``where``, is meant for this layer. All of its kind, by default."""
        return True

    def __str__(self) -> str:
        """As it is written in Python and in rules: ``CL(rate=4, keep_input=False)``."""
        shown = [field.name for field in fields(self) if field.repr]
        return f"{type(self).__name__}({', '.join(f'{name}={_written(getattr(self, name))}' for name in shown)})"


def _written(value: object) -> str:
    """A value of a field: other strategies as themselves, and numbers of other libraries as Python's, if they are."""
    if isinstance(value, Real) and not isinstance(value, bool):
        plain = int(value) if isinstance(value, Integral) else float(value)
        return repr(plain if plain == value else value)
    return str(value) if isinstance(value, Strategy) else repr(value)


@dataclass(frozen=True)
class Widening(Strategy):
    """A strategy for convolutions, the hidden layers of which have ``rate`` times the channels.

    ``keep_input=True`` leaves the first hidden width at m in a layer that reads a network input.
    Raises ``RuleError`` for a rate that is not positive.
    """

    rate: float
    keep_input: bool = False

    dims: ClassVar[frozenset[int]] = frozenset({1, 2, 3})

    def __post_init__(self) -> None:
        check_rate(self, self.rate)
        check_flag(self, "keep_input", self.keep_input)

    def widths(self, site: Site) -> tuple[int, int]:
        """(p, q): rate·m, or m where the input is kept, and rate·n."""
        p = site.in_channels if self.keep_input and site.reads_input else self._wide(site.in_channels, site)
        return p, self._wide(site.out_channels, site)

    def _wide(self, channels: int, site: Site) -> int:
        return widened(channels, self.rate, site.groups)


def check_rate(strategy: Strategy, rate: object) -> None:
    """Raise ``RuleError`` unless ``rate`` is a positive, finite number."""
    if isinstance(rate, bool) or not isinstance(rate, Real) or not isfinite(rate) or rate <= 0:
        name = type(strategy).__name__
        raise RuleError(f"{name}: rate must be a positive number, found {rate!r}. Use {name}(rate=4), for example.")


def check_flag(strategy: Strategy, name: str, value: object) -> None:
    """Raise ``RuleError`` unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise RuleError(f"{type(strategy).__name__}: {name} must be True or False, found {value!r}.")


def check_count(strategy: Strategy, name: str, value: object, least: int) -> None:
    """Raise ``RuleError`` unless ``value`` is an integer of at least ``least``."""
    if type(value) is not int or value < least:
        raise RuleError(f"{type(strategy).__name__}: {name} must be an integer of at least {least}, found {value!r}.")


def widened(channels: int, rate: float, groups: int = 1) -> int:
    """rate · channels inside each of ``groups``, rounded down but at least 1 (Guo et al. 2020, §3)."""
    inside = channels // groups
    # A rate of 0.29 must make 29 of 100, though 0.29 · 100 is 28.999… in floating point.
    return groups * max(1, floor(rate * inside + 1e-9))
