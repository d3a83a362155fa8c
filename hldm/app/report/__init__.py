"""A run as one page: curves, tables, a passage in chunks, its latents, how one is denoised, samples."""
