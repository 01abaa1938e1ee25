"""What a model is worth: benchmarks, protocols, metrics, scores, reports."""
