"""Engines of the demo checkpoint, built once."""

from pathlib import Path

from latentforge.runtime.cache import CACHE_VARIABLE, cache_folder
from latentforge.runtime.errors import LatentforgeError, SettingsError
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.version import __version__

__all__ = ["cached_demo_engines"]


def cached_demo_engines() -> Path:
    """Return the demo's engines in the user's cache, after building them if they are not there.

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
    engines = cache / "demo" / __version__ / "demo"
    if not _is_intact(engines):
        _build(engines)
    return engines


def _is_intact(engines: Path) -> bool:
    try:
        Manifest.read(engines)
    except LatentforgeError:
        return False
    return True


def _build(engines: Path) -> None:
    from latentforge.build import BuildRequest, build
    from latentforge.export.checkpoint import DEMO
    from latentforge.optimize.stage.request import OptimizeRequest

    engines.parent.mkdir(parents=True, exist_ok=True)
    options = OptimizeRequest(overwrite=engines.exists(), quiet=False, repeats=0)
    build(DEMO, engines, BuildRequest(optimization=options))
