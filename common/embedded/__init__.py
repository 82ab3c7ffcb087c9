"""The servers that `tunery up` starts where no address of a real one is set: real ones, from PyPI wheels."""
