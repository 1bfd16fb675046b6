"""HTTP interface of the server."""
