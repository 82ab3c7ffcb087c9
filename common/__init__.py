"""What API and workers share: settings, rows, states, storage, schemas; and the client and the command."""
