"""Searches for circuits."""
