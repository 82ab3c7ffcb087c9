"""Measured comparisons; each prints its own table and writes JSON. Not installed with the product."""
