"""Training of smaller UNets: students that a search makes of a teacher, with torch."""
