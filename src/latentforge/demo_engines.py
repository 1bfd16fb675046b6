"""Engines of the demo checkpoint, built once."""

import hashlib
from contextlib import suppress
from pathlib import Path

import msgspec

from latentforge.runtime.cache import CACHE_VARIABLE, cache_folder
from latentforge.runtime.errors import LatentforgeError, SettingsError
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.version import __version__

__all__ = ["cached_demo_engines"]

_PACKAGE = Path(__file__).parent
_MAKERS = ("export", "optimize")
"""Folders of the code that decides what engines contain."""


def cached_demo_engines() -> Path:
    """Return the demo's engines in the user's cache, after building them if they are not there.

    Those that other code wrote, or that have the weights of another demo checkpoint, count for
    nothing: they may lack what this version expects.

    Raises:
        SettingsError: there is no cache.
        CheckpointError: the package latentforge-demo is not installed.
        ImportError: what builds engines is not installed.
    """
    cache = cache_folder()
    if cache is None:
        raise SettingsError(
            f"the demo's engines are kept in the cache, which {CACHE_VARIABLE} turns off: name an "
            "engine directory"
        )
    engines = cache / "demo" / _edition(_PACKAGE) / "demo"
    if not _is_current(engines):
        _build(engines)
    return engines


def _edition(package: Path) -> str:
    """Return a name for the engines that the code of a package writes: version and digest."""
    manifest = msgspec.json.encode(msgspec.json.schema(Manifest), order="deterministic")
    digest = hashlib.sha256(manifest)
    for path in sorted(path for maker in _MAKERS for path in (package / maker).rglob("*.py")):
        digest.update(path.read_bytes())
    return f"{__version__}-{digest.hexdigest()[:12]}"


def _is_current(engines: Path) -> bool:
    """Return True if the engines are whole and have the weights of the installed checkpoint."""
    try:
        weights = Manifest.read(engines).source.sha256
    except LatentforgeError:
        return False
    try:
        from latentforge.export.checkpoint import DEMO, open_checkpoint

        checkpoint = open_checkpoint(DEMO)
    except (LatentforgeError, ImportError):  # nothing to build others from
        return True
    with suppress(LatentforgeError):  # it has no such part
        return all(checkpoint.sha256(folder) == digest for folder, digest in weights.items())
    return False


def _build(engines: Path) -> None:
    from latentforge.build import BuildRequest, build
    from latentforge.export.checkpoint import DEMO
    from latentforge.optimize.stage.request import OptimizeRequest

    engines.parent.mkdir(parents=True, exist_ok=True)
    options = OptimizeRequest(overwrite=engines.exists(), quiet=False, repeats=0)
    build(DEMO, engines, BuildRequest(optimization=options))
