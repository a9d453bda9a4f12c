"""The passes in the pass managers of others: those of ``torch.fx``, and Inductor's hook (in ``pipeline.inductor``)."""

from fxexpand.pipeline.pass_managers import CollapsePass, ContractPass, ExpandPass, FusePass

__all__ = ["CollapsePass", "ContractPass", "ExpandPass", "FusePass"]
