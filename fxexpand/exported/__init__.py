"""Exported programs: ATen graphs as the passes read them, and back."""
