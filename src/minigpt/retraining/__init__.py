"""Pipelines run as a whole: a retraining with its report, and a search."""
