"""Variants of engine directories: further components made of the denoiser, other files shared."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import onnx_ir as ir

from latentforge.optimize.graph_io import DENOISER, load_graph
from latentforge.optimize.partition.hoist import GraphPartition
from latentforge.runtime.errors import ManifestError
from latentforge.runtime.files import link_files
from latentforge.runtime.manifest import Component, FileEntry, Manifest, Stage

__all__ = ["add_components", "load_denoiser"]

_TOOLS = ("onnx", "onnx-ir", "numpy")


def load_denoiser(source: Path, added: str) -> tuple[Manifest, GraphPartition]:
    """Load a directory's manifest and the graph that its denoiser runs at every step.

    Args:
        source: the engine directory.
        added: name of the component that will be made of it.

    Raises:
        ManifestError: the directory is damaged, has no graph of the denoiser, or already has the
            component.
    """
    manifest = Manifest.read(source, hashes=False)
    component = manifest.components.get(DENOISER)
    if component is None:
        raise ManifestError(f"{source} has no {DENOISER}, which {added} is made of: export it")
    if added in manifest.components:
        raise ManifestError(f"{source} already has {added}: start from the engines it was made of")
    return manifest, GraphPartition.whole(load_graph(DENOISER, component, source), component)


def add_components(
    source: Path,
    folder: Path,
    graphs: Mapping[str, GraphPartition],
    *,
    name: str,
    options: Mapping[str, Any],
    measured: Mapping[str, float],
    start: float,
) -> Manifest:
    """Write the engines of a directory, and further graphs made of its denoiser, into a folder.

    External weights are not copied: the new graphs refer to the same data file. Files that do not
    change are hard links where the file system supports them, and copies otherwise.

    Args:
        source: the engine directory.
        folder: existing, without any of these files.
        graphs: by component; a graph of the denoiser itself replaces it.
        name: of the stage, for the history.
        options: of the stage, for the history.
        measured: figures of the first new component, for the history.
        start: time.perf_counter() when the stage began.
    """
    manifest = Manifest.read(source, hashes=False)
    denoiser = manifest.components[DENOISER]
    replaced = {manifest.components[key].file for key in graphs if key in manifest.components}
    link_files((e.file for e in manifest.files if e.file not in replaced), source, folder)
    components = {key: _write(key, part, denoiser, folder) for key, part in graphs.items()}
    added = next(key for key in graphs if key not in manifest.components)
    stage = Stage.ended(name, start, options, packages=_TOOLS, measured={added: measured})
    result = msgspec.structs.replace(
        manifest,
        components={**manifest.components, **components},
        history=(*manifest.history, stage),
    )
    result.write(folder)
    return result


def _write(name: str, part: GraphPartition, denoiser: Component, folder: Path) -> Component:
    """Write a graph beside the denoiser's, or in its place, with the same file of weights."""
    path = (folder / denoiser.file).with_name(f"{name}.onnx")
    path = folder / denoiser.file if name == DENOISER else path
    ir.save(part.model, path)  # keeps references to external weights
    entry = FileEntry.of(path, folder)
    return msgspec.structs.replace(
        denoiser,
        file=entry.file,
        sha256=entry.sha256,
        bytes=entry.bytes,
        inputs=part.inputs,
        outputs=part.outputs,
    )
