"""Manifest of an engine directory: the components in it and how they fit together.

Every stage reads one engine directory and writes another, so manifest.json is the only thing
that export, optimize and runtime share. docs/format.md is its specification.
"""

from latentforge.runtime.acceleration import AccelerationPlan, DenoiserVariant
from latentforge.runtime.manifest.formats import FORMAT
from latentforge.runtime.manifest.records import (
    MAX_TOKENS,
    CalibrationSchedule,
    Component,
    Conditioning,
    FileEntry,
    Latent,
    Manifest,
    RequestDefaults,
    Stage,
    TextEncoding,
    TimeId,
    TokenizerEntry,
    WeightSource,
)
from latentforge.runtime.manifest.signatures import CACHED_FEATURE, DENOISER_PARTS

__all__ = [
    "CACHED_FEATURE",
    "DENOISER_PARTS",
    "FORMAT",
    "MAX_TOKENS",
    "AccelerationPlan",
    "CalibrationSchedule",
    "Component",
    "Conditioning",
    "DenoiserVariant",
    "FileEntry",
    "Latent",
    "Manifest",
    "RequestDefaults",
    "Stage",
    "TextEncoding",
    "TimeId",
    "TokenizerEntry",
    "WeightSource",
]
