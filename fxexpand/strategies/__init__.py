"""How one layer becomes several: one frozen class a file."""

from fxexpand.graph.structure import Series, Sum
from fxexpand.strategies.acnet import ACNet
from fxexpand.strategies.ck import CK
from fxexpand.strategies.cl import CL
from fxexpand.strategies.diversebranch import DiverseBranch
from fxexpand.strategies.fc import FC
from fxexpand.strategies.lowrank import LowRank
from fxexpand.strategies.mobileone import MobileOne
from fxexpand.strategies.orepa import Orepa
from fxexpand.strategies.overparam import Overparam
from fxexpand.strategies.repvgg import RepVGG
from fxexpand.strategies.strategy import Strategy
from fxexpand.strategies.then import Then

__all__ = [
    "CK",
    "CL",
    "FC",
    "ACNet",
    "DiverseBranch",
    "LowRank",
    "MobileOne",
    "Orepa",
    "Overparam",
    "RepVGG",
    "Series",
    "Strategy",
    "Sum",
    "Then",
]
