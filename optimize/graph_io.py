"""Read and write the ONNX graph of one component of an engine directory."""

import gc
import os
from collections.abc import Iterable
from pathlib import Path

import onnx_ir as ir

from latentforge.runtime.backends import return_memory
from latentforge.runtime.errors import ManifestError
from latentforge.runtime.loggers import escaping_logger
from latentforge.runtime.manifest import Component
from latentforge.runtime.text import one_line

__all__ = ["DENOISER", "free_graphs", "load_graph", "save_graph", "weight_files"]

DENOISER = "denoiser"
"""Name of the component that runs at every step: the one that is pruned, calibrated and split."""

_log = escaping_logger(__name__)

_EXTERNAL = 256_000_000  # bytes of weights, as in exported engines; protobuf's limit is 2 GiB


def load_graph(name: str, component: Component, directory: Path) -> ir.Model:
    """Load a component's graph; weights in external data files stay on disk until they are read.

    Args:
        name: of the component, for error messages.
        component: its entry in the manifest.
        directory: the engine directory.

    Raises:
        ManifestError: the file is not an ONNX graph, or its inputs and outputs differ from those
            in the manifest.
    """
    path = directory / component.file
    try:
        model = ir.load(path)
        _resolve_links(model)
        inputs = [str(value.name) for value in model.graph.inputs]
        outputs = [str(value.name) for value in model.graph.outputs]
    except Exception as error:  # the parser's errors have no common base class
        reason = one_line(error, limit=200)
        raise ManifestError(f"{path} is no ONNX graph ({reason}): export it again") from error
    for kind, names, specs in (
        ("inputs", inputs, component.inputs),
        ("outputs", outputs, component.outputs),
    ):
        if sorted(names) != sorted(specs):
            raise ManifestError(
                f"{name}: the manifest lists the {kind} {', '.join(specs)}, but the graph has "
                f"{', '.join(names) or 'none'}: the file is not the one that was exported; "
                "export it again"
            )
    _log.debug("%s: %d nodes in %s", name, len(model.graph), path)
    return model


class _ListedFolder(str):
    """Folder whose files the manifest lists by their hashes.

    It counts as empty, for which onnx_ir does not refuse links: symbolic ones, as in the cache of
    a hub, and hard ones, as in variants of engines.
    """

    def __bool__(self) -> bool:
        return False


def _resolve_links(model: ir.Model) -> None:
    """Let the external weights of a graph, its subgraphs and attributes be links."""
    for graph in (model.graph, *model.graph.subgraphs()):
        tensors = [value.const_value for value in graph.initializers.values()]
        for node in graph:
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                    tensors.append(attribute.as_tensor())
        for tensor in tensors:
            if isinstance(tensor, ir.ExternalTensor):
                tensor.base_dir = _ListedFolder(os.path.join(tensor.base_dir, ""))


def save_graph(model: ir.Model, path: Path) -> None:
    """Write a graph to ``path``, with its weights in ``path``.data if there are over 256 MB.

    Weights that are external data already are also written there, since the new file could not
    refer to the old one.
    """
    weights = [value.const_value for value in model.graph.initializers.values()]
    size = sum(tensor.nbytes for tensor in weights if tensor is not None)
    outside = any(isinstance(tensor, ir.ExternalTensor) for tensor in weights)
    external = outside or size > _EXTERNAL
    ir.save(model, path, external_data=f"{path.name}.data" if external else None)


def weight_files(model: ir.Model) -> list[ir.ExternalTensor]:
    """Return the weights of a graph that lie in files, for free_graphs()."""
    weights = [value.const_value for value in model.graph.initializers.values()]
    return [tensor for tensor in weights if isinstance(tensor, ir.ExternalTensor)]


def free_graphs(weights: Iterable[ir.ExternalTensor]) -> None:
    """Free graphs that are no longer used, and the files that are mapped into memory for them.

    Graphs hold reference cycles, and the rewriter's rules what they matched last: gigabytes would
    stay mapped.

    Args:
        weights: of the graphs as they were loaded.
    """
    gc.collect()
    for tensor in weights:
        try:
            tensor.release()
        except BufferError:  # an array of it is in use, and keeps the file mapped for itself
            tensor.raw = None
    return_memory()
