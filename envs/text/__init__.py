"""Environments that speak text: what is seen, what may be answered and what is to be done are words."""
