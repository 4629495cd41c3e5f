"""Language models as policies and critics, for the agents that learn to control robots."""
