"""Replay: on the device, or observations in host memory and on disk."""
