"""Where text comes from: files and their encodings, datasets, the built-in corpus, and which part is held out."""
