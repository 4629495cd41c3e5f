"""Collection, the training loops, evaluation."""
