"""Fits the network: epochs that can be resumed, optimizers and checkpoints."""
