"""What a person reads of a record: one file a callback, formatting only."""
