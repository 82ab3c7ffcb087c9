"""The fast training path: each part computes the same function as the plain path, with fewer passes over memory."""
