"""The database: connections and tables."""
