"""One training loop for every stage, and the objectives of each."""
