"""Looking at a model: a run as one page, and a playground. May be deleted without touching the other folders."""
