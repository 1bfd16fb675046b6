"""Server: engines behind HTTP, with a queue, batches, and one process per loaded model."""
