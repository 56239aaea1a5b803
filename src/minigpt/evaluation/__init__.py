"""What a model is worth: held-out figures, baselines, copied runs, and pages to read."""
