"""The child process that turns one job into one adapter."""
