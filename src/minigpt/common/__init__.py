"""What every room may use: errors, files, locks, progress, and the choice of a backend."""
