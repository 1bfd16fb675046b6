"""Read and write the ONNX graph of one component of an engine directory."""

import gc
import logging
from pathlib import Path

import onnx_ir as ir

from latentforge.runtime.backends import return_memory
from latentforge.runtime.errors import ManifestError
from latentforge.runtime.manifest import Component
from latentforge.runtime.text import one_line

__all__ = ["DENOISER", "free_graphs", "load_graph", "save_graph"]

DENOISER = "denoiser"
"""Name of the component that runs at every step: the one that is pruned, calibrated and split."""

_log = logging.getLogger(__name__)

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


def free_graphs() -> None:
    """Free graphs that are no longer used, and the files that are mapped into memory for them.

    Graphs hold reference cycles: gigabytes would stay mapped until Python looks for cycles.
    """
    gc.collect()
    return_memory()
