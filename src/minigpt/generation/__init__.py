"""Tokens out: how the next one is chosen, and the loop that writes them."""
