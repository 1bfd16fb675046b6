"""Denoisers that diffusers has no class for."""
