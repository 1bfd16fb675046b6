"""Export of diffusers checkpoints to engine directories, with torch."""
