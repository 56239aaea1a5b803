"""HTTP in, texts out: many requests share the compiled steps of a model."""
