"""HTTP only: parse, authorise, call common, shape the reply."""
