"""Training of the demo checkpoint, as a user of the code that trains students."""
