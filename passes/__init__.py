"""One file a pass, named after its function."""
