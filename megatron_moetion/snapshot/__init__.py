"""Capture: what one rank copies to host memory after the optimizer step of an iteration."""
