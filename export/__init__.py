"""Turn a diffusers checkpoint into an engine directory. The only part that needs torch."""
