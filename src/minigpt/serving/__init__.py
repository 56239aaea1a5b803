"""HTTP in, texts out: many requests share one compiled step of a model."""
