"""Text as data: bytes, corpora, windows of them. Knows no model."""
