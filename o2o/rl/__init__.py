"""Losses and the windows of rows that agents learn from."""
