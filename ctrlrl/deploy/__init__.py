"""From a run to a robot controller: policy bundles and what runs them. Needs NumPy, and onnxruntime for ONNX."""

from ctrlrl.deploy.actor import Actor
from ctrlrl.deploy.bundle import Bundle

__all__ = ["Actor", "Bundle"]
