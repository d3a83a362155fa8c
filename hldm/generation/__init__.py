"""Prompt to text: the writers, and the same as a diffusers pipeline."""
