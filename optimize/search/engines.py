"""Engine directory and its variants for cheaper evaluations, made on demand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from latentforge.optimize.search.cached_step import add_cached_step
from latentforge.optimize.search.reduced_attention import MIN_TOKENS, add_reduced_attention
from latentforge.optimize.search.space import UNACCELERATED, Variant
from latentforge.runtime.loader import load
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.pipeline import Pipeline

__all__ = ["SearchEngines"]

_LEVELS = (0, 1)  # skip connections to split at: deeper ones save too little


class SearchEngines:
    """Engines and their variants; each variant is written when first needed, one is loaded.

    Attributes:
        directory: of the unaccelerated engines.
        manifest: of the unaccelerated engines.
    """

    def __init__(self, directory: Path, work: Path) -> None:
        """Open an engine directory; ``work`` is an existing folder for the variants."""
        self.directory = directory
        self.manifest = Manifest.read(directory, hashes=False)
        self._work = work
        self._folders = {UNACCELERATED: directory}
        self._loaded: tuple[Variant, Pipeline] | None = None

    def __enter__(self) -> SearchEngines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the loaded pipeline, if any."""
        if self._loaded is not None:
            self._loaded[1].close()
        self._loaded = None

    @property
    def variants(self) -> list[Variant]:
        """Variants worth trying: only of ONNX graphs, and reduced attention only for large grids.

        One of them may turn out to be impossible for this graph, see folder().
        """
        if self.manifest.components["denoiser"].backend != "onnxruntime":
            return [UNACCELERATED]
        defaults, downscale = self.manifest.defaults, self.manifest.latent.downscale
        tokens = (defaults.height // downscale) * (defaults.width // downscale)
        return [
            Variant(level=level, reduced=reduced)
            for reduced in ((False, True) if tokens >= MIN_TOKENS else (False,))
            for level in (None, *_LEVELS)
        ]

    def folder(self, variant: Variant) -> Path:
        """Return the engine directory of a variant, which is written on the first call.

        Raises:
            SettingsError: the graph cannot be changed this way.
            ManifestError: the engines already have such a component.
        """
        if variant not in self._folders:
            folder = self._work / str(variant).replace(", ", "-").replace(" ", "-")
            folder.mkdir()
            if variant.reduced:  # applied after the split, so that both graphs give the feature
                add_reduced_attention(self.folder(replace(variant, reduced=False)), folder)
            else:
                add_cached_step(self.directory, folder, level=variant.level or 0)
            self._folders[variant] = folder
        return self._folders[variant]

    def pipeline(self, variant: Variant) -> Pipeline:
        """Return the pipeline of a variant, loading it in place of the one loaded before."""
        if self._loaded is None or self._loaded[0] != variant:
            self.close()
            self._loaded = (variant, load(self.folder(variant), hashes=False, example_images=True))
        return self._loaded[1]

    def publish(self, variant: Variant) -> None:
        """Move the files of a variant over those of the unaccelerated engines."""
        folder = self.folder(variant)
        if folder == self.directory:
            return
        files = [entry.file for entry in Manifest.read(folder, hashes=False).files]
        for file in (*files, "manifest.json"):
            (self.directory / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).replace(self.directory / file)
