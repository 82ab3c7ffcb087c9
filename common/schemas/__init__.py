"""What goes over the wire: pydantic models for API, client and worker."""
