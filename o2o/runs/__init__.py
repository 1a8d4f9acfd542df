"""Runs: folders, sessions, loggers, presets."""
