"""One runnable module a question: ``python -m benchmarks.rewrite_time``."""
