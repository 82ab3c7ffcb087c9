"""The life of a job: states, the one writer of status, reading, and the bell."""
