"""Add graphs to an engine directory, in another one that shares its other files."""

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import onnx_ir as ir

from latentforge.optimize.graph_io import DENOISER, load_graph
from latentforge.optimize.partition.hoist import GraphPartition
from latentforge.runtime.errors import ManifestError
from latentforge.runtime.history import package_versions, stage_record
from latentforge.runtime.manifest import Component, FileEntry, Manifest

__all__ = ["extend", "load_unet"]

_TOOLS = ("onnx", "onnx-ir", "numpy")


def load_unet(source: Path, added: str) -> tuple[Manifest, GraphPartition]:
    """A directory's manifest, and the graph that its UNet runs every step.

    Args:
        source: the engine directory.
        added: the name of the component that is to be made of it.

    Raises:
        ManifestError: the directory is damaged, holds no graph of a UNet, or was extended so
            already.
    """
    manifest = Manifest.read(source, hashes=False)
    component = manifest.components.get(DENOISER)
    if component is None:
        raise ManifestError(f"{source} has no {DENOISER}, of which {added} is made: export it")
    if added in manifest.components:
        raise ManifestError(f"{source} has {added} already: start from what that was made of")
    return manifest, GraphPartition.whole(load_graph(DENOISER, component, source), component)


def extend(
    source: Path,
    folder: Path,
    graphs: Mapping[str, GraphPartition],
    *,
    name: str,
    options: Mapping[str, Any],
    measured: Mapping[str, float],
    start: float,
) -> Manifest:
    """Write a directory's engines and further graphs, made of its UNet, into a folder.

    Weights that lie in a file of their own stay there: graphs refer to the same places of it.
    Files that do not change are hard links where the file system has them, else copies.

    Args:
        source: the engine directory, as it is.
        folder: where to write; it is there and holds none of these files.
        graphs: by component; a graph of the UNet itself takes its place.
        name, options: of the stage, for the history.
        measured: figures of the first component that is new.
        start: when the stage began, by time.perf_counter().
    """
    manifest = Manifest.read(source, hashes=False)
    unet = manifest.components[DENOISER]
    replaced = {manifest.components[key].file for key in graphs if key in manifest.components}
    _share(source, folder, (e.file for e in manifest.files if e.file not in replaced))
    made = {key: _written(key, part, unet, folder) for key, part in graphs.items()}
    added = next(key for key in graphs if key not in manifest.components)
    stage = stage_record(
        name, start, options, tools=package_versions(*_TOOLS), measured={added: measured}
    )
    result = msgspec.structs.replace(
        manifest,
        components={**manifest.components, **made},
        history=(*manifest.history, stage),
    )
    result.write(folder)
    return result


def _share(source: Path, folder: Path, files: Iterable[str]) -> None:
    for file in dict.fromkeys(files):
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source / file, target)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source / file, target)


def _written(name: str, part: GraphPartition, unet: Component, folder: Path) -> Component:
    """A graph in a file beside the UNet's own, or in its place, with the same file of weights."""
    path = (folder / unet.file).with_name(f"{name}.onnx")
    path = folder / unet.file if name == DENOISER else path
    ir.save(part.model, path)  # which leaves weights that lie in a file where they are
    main = FileEntry.of(path, folder)
    return msgspec.structs.replace(
        unet,
        file=main.file,
        sha256=main.sha256,
        bytes=main.bytes,
        inputs=part.inputs,
        outputs=part.outputs,
    )
