"""Where chunks start: strategies that read the text alone, and small models that say where."""
