"""Where the passes meet the compilers of others: pass managers, Inductor's hook, and a backend of torch.compile."""

from fxexpand.pipeline.pass_managers import CollapsePass, ContractPass, ExpandPass, FusePass

__all__ = ["CollapsePass", "ContractPass", "ExpandPass", "FusePass"]
