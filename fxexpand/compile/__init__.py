"""Where graphs that a compiler has captured meet the regions: the backend of torch.compile."""
