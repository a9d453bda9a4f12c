"""What optimisers are told about a model, and regularisation of what its expansions stand for."""
