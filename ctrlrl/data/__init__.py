"""Datasets: the store, importers and exporters, inspection."""
