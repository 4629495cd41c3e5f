"""The run folder: configuration, provenance, checkpoints, metrics, videos, report."""
