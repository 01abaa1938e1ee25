"""Evaluation: benchmarks, protocols, metrics, scores and reports."""
