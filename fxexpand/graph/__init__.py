"""Everything that touches torch.fx: tracing, layers and their sites, and the one driver that edits graphs."""
