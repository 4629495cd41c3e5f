"""Replay memory and its samplers."""
