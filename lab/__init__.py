"""The laboratory: what must be the same for every run.  Each room has one subject."""
