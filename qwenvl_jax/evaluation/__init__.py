"""Benchmarks: what a prediction scores. `metrics` holds the published scores."""

from qwenvl_jax.evaluation import captions, metrics

__all__ = ["captions", "metrics"]
