"""Protects MoE training: keep a stage's state and inbox in host memory, replay them on failure."""

__version__ = "0.1.0"
