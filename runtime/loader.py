"""Load an engine directory into a pipeline."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentforge.runtime import backends
from latentforge.runtime.compile.rebuild import rebuild_hint
from latentforge.runtime.conditioning.tokenizer import Tokenizer
from latentforge.runtime.engine import Engine, Engines
from latentforge.runtime.errors import DeviceError, ForeignEngineError, SettingsError
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.pipeline import Pipeline
from latentforge.runtime.validation import (
    check_flag,
    check_max_rows,
    check_prompt_cache,
    checked_path,
    plain,
    shown,
)

__all__ = ["EngineLoader", "SessionWrapper", "load"]

SessionWrapper = Callable[[str, backends.Session], backends.Session]
"""Called with a component's name and its loaded session; the engine runs the session returned."""

_EVERY_STEP = ("denoiser", "denoiser_reduced", "denoiser_cached")
_MICRO_BATCHED = (*_EVERY_STEP, "denoiser_prompt")

# Pixels take far more memory than latents, so the VAE processes one image per run.
_VAE_ROWS: Mapping[str, int] = {"vae_decoder": 1, "vae_encoder": 1}


def load(
    directory: str | Path,
    *,
    hashes: bool = True,
    max_rows: int | None = None,
    low_memory: bool = False,
    prompt_cache: int = 0,
    wrap_session: SessionWrapper | None = None,
    example_images: bool = False,
    **options: Any,
) -> Pipeline:
    """Verify an engine directory and load its engines.

    Args:
        directory: written by latentforge build, export, optimize or compile.
        hashes: compare the sha256 of each file with the manifest, not only its size.
        max_rows: largest micro-batch of one denoiser run; classifier-free guidance takes two rows
            per image. None: the manifest's value, which was the fastest when measured, or all rows
            in one run if the manifest has none.
        low_memory: run one row at a time and do not repack the weights. Takes about half the
            memory and more time.
        prompt_cache: prompts whose embeddings are kept for later requests, at most; they take 0.2
            to 1 MB each. With a cache each prompt is encoded alone: its image does not depend on
            the other prompts of a request.
        wrap_session: replaces each loaded session, for example to record its inputs.
        example_images: for measurements: a model that needs an image gets the example image in
            requests without one, which are refused otherwise.
        options: backend options, such as threads=2. Each backend takes those it supports.

    Raises:
        ManifestError: the directory does not match its manifest.
        BackendError: a backend is not installed, or rejects an engine.
        DeviceError: an engine needs a device that this machine does not have.
        ForeignEngineError: an engine was built for another device or version; the message has
            the command that rebuilds it for this one.
        SettingsError: an argument has another type or is out of range, or no backend of these
            engines has such an option.
    """
    check_max_rows(max_rows)
    _check_options(wrap_session, prompt_cache, hashes=hashes, low_memory=low_memory)
    path = checked_path("directory", directory)
    options = {name: plain(value) for name, value in options.items()}
    manifest = Manifest.read(path, hashes=hashes)
    manifest.check_complete(path)
    backends.check_option_names(options, manifest.required_backends)
    loader = EngineLoader(
        manifest=manifest,
        directory=path,
        max_rows=max_rows,
        low_memory=low_memory,
        wrap_session=wrap_session,
    )
    return Pipeline(
        manifest,
        Engines(loader, manifest.required_components, options),
        _tokenizers(manifest, path),
        path,
        example_images=example_images,
        prompt_cache=prompt_cache,
    )


def _tokenizers(manifest: Manifest, directory: Path) -> dict[str, Tokenizer]:
    entries = manifest.tokenizers.items()
    return {name: Tokenizer(directory / entry.file, entry) for name, entry in entries}


def _check_options(wrap_session: object, prompt_cache: int, **flags: bool) -> None:
    check_prompt_cache(prompt_cache)
    for name, value in flags.items():
        check_flag(name, value)
    if wrap_session is not None and not callable(wrap_session):
        raise SettingsError(f"wrap_session must be a function, not {shown(wrap_session)}")


@dataclass(frozen=True, kw_only=True)
class EngineLoader:
    """Function that loads one component of an engine directory; its attributes are load()'s."""

    manifest: Manifest
    directory: Path
    max_rows: int | None = None
    low_memory: bool = False
    wrap_session: SessionWrapper | None = None

    def __call__(self, name: str, options: backends.Options) -> Engine:
        """Load a component with these backend options: see Engine.load()."""
        if (component := self.manifest.components.get(name)) is None:
            names = ", ".join(self.manifest.components)
            raise SettingsError(f"no component {shown(name)}: choose from {names}")
        try:
            return Engine.load(
                name,
                component,
                self.directory,
                options,
                max_rows=self._limits.get(name) or component.max_rows,
                low_memory=self.low_memory,
                spin=name in _EVERY_STEP,
                wrap=self.wrap_session,
            )
        except ForeignEngineError as error:
            hint = rebuild_hint(self.manifest, self.directory)
            raise ForeignEngineError(f"{name}: {error}{hint}") from error
        except DeviceError as error:
            raise DeviceError(f"{name}: {error}") from error

    @property
    def _limits(self) -> dict[str, int | None]:
        rows = 1 if self.low_memory else self.max_rows
        return {**dict.fromkeys(_MICRO_BATCHED, rows), **_VAE_ROWS}
