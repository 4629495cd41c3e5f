"""Tasks: what is observed, rewarded and ends an episode, written once for N environments."""
