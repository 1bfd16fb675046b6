"""Images and scores of the demo checkpoint, and access to the package that holds it.

The weights are a distribution of their own, ``latentforge-demo`` (``demo/`` in the repository).

Raises:
    CheckpointError: on import, if that distribution is not installed.
"""

from latentforge.runtime.errors import CheckpointError

try:
    from latentforge_demo import CHECKPOINT, COLORS, GUIDANCE, NAMES, prompts
except ImportError as error:
    raise CheckpointError(
        "the demo checkpoint is not installed: pip install latentforge-demo, "
        "or in a clone of the repository: pip install ./demo"
    ) from error

__all__ = ["CHECKPOINT", "COLORS", "GUIDANCE", "NAMES", "prompts"]
