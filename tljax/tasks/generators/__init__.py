"""Generators of prompts from templates, one module for each kind of task."""
