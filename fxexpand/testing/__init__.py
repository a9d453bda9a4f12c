"""What users test their own architectures and strategies with: layers as matrices, slow and obviously right."""

from fxexpand.testing.oracle import chain_matrix, conv_matrix, matrix

__all__ = ["chain_matrix", "conv_matrix", "matrix"]
