"""Checkpoint files in three formats, and where they come from."""
