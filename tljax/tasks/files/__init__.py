"""Readers of public task files: local files only, nothing is downloaded."""
