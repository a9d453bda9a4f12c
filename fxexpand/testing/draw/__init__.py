"""Hypothesis strategies for layers, chains, graphs and networks, each with inputs that fit."""

try:
    import hypothesis  # noqa: F401
except ImportError as missing:
    raise ImportError(
        'fxexpand.testing: drawing random models needs Hypothesis: pip install "fxexpand[testing]". '
        "What draws nothing (assert_equivalent, check_model, the matrix oracle) works without it."
    ) from missing
