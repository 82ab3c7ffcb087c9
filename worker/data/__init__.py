"""Reads datasets: any file, row by row, into one form. No torch."""
