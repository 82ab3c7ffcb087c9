"""Turns one job row into one published adapter."""
