"""The network and its loss, and the directory that a trained model lives in."""
