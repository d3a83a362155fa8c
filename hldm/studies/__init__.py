"""Measurements of all kinds: speed, leagues, curves, diagnoses."""
