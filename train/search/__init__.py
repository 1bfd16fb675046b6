"""Search for the structure of a student."""
