"""Bits per character, reconstruction and continuations of a trained run."""
