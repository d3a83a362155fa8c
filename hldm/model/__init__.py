"""The model: all of its mathematics in plain torch."""
