"""Fitting the network: epochs, optimizers and checkpoints."""
