"""A local page that writes chunk by chunk, and lets one take any of them back."""
