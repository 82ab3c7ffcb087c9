"""Chat completions over one base in memory and many finished adapters: an optional server and its child."""
