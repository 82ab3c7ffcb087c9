"""What `tunery doctor` looks at. Each check returns findings and never raises."""
