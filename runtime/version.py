"""Version of the package, which pyproject.toml and that of distributions/torch repeat."""

__all__ = ["__version__"]

__version__ = "0.1.0"
