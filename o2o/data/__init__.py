"""Data: Minari files, datasets, spaces, tasks, recording."""
