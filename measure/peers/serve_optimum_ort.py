"""optimum-onnx on ONNX Runtime's CPU provider, as a participant: ``python serve_optimum_ort.py JOB``.

Its own export to ONNX in float32, its pipeline, its sessions. Sizes stay free: its exporter would
fix them together with the batch, at two prompts, and its pipeline encodes one.
"""

import tempfile
from pathlib import Path

import older_layout
from serving import Job, Loaded, file_bytes, serve, versions
from through_diffusers import Painter


def convert(checkpoint: Path, target: Path) -> None:
    """``optimum-cli export onnx``: in float32, without its comparison with torch."""
    from optimum.exporters.onnx import main_export

    with tempfile.TemporaryDirectory(dir=target.parent) as readable:
        older_layout.link(checkpoint, Path(readable))
        main_export(
            readable,
            target,
            task="text-to-image",
            library_name="diffusers",
            dtype="fp32",
            do_validation=False,
        )


def load(job: Job, directory: Path) -> Loaded:
    """Its pipeline on a job's threads."""
    import onnxruntime
    import torch
    from optimum.onnxruntime import ORTDiffusionPipeline

    torch.set_num_threads(job.threads)  # the sampler's
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job.threads
    pipe = ORTDiffusionPipeline.from_pretrained(
        directory, export=False, session_options=options, provider="CPUExecutionProvider"
    )
    texts = ("text_encoder", "text_encoder_2")
    used = [directory / name for name in (*texts, "unet", "vae_decoder")]
    return Loaded(
        paint=Painter(pipe, job),
        versions=versions("optimum-onnx", "onnxruntime", "diffusers", "transformers", "torch"),
        precision="fp32",
        bytes=sum(file_bytes(folder, "*.onnx*") for folder in used),
    )


if __name__ == "__main__":
    serve(load, convert)
