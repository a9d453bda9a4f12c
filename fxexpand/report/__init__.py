"""What a model costs, and whether two models compute the same."""
