"""Robot descriptions: joints, limits, gains, models, and the drivers that reach the hardware."""

if __name__ != "ctrlrl.robots":  # a second copy of every class would exist under the bare name
    raise ImportError(f"import ctrlrl.robots, not {__name__}")
