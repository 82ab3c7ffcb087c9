"""The child process that holds the model. It knows no database, store, key or tenant."""
