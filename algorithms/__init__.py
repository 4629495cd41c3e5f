"""One file per algorithm, to be read beside its paper."""

if __name__ != "ctrlrl.algorithms":  # a second copy of every class would exist under the bare name
    raise ImportError(f"import ctrlrl.algorithms, not {__name__}")
