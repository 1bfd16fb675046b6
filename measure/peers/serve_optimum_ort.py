"""optimum-onnx on ONNX Runtime's CPU provider: ``python serve_optimum_ort.py JOB``.

Uses its own export in float32, its pipeline and its sessions. Sizes stay dynamic: its exporter
would fix them together with a batch of two prompts, while its pipeline encodes one.
"""

import tempfile
from pathlib import Path

import older_layout
from serving import LoadedModel, PeerJob, file_bytes, serve, versions
from through_diffusers import TimedPipeline


def convert(checkpoint: Path, target: Path) -> None:
    """Run ``optimum-cli export onnx`` in float32, without its validation against torch."""
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


def load(job: PeerJob, directory: Path) -> LoadedModel:
    """Load its pipeline with the job's number of threads."""
    import onnxruntime
    import torch
    from optimum.onnxruntime import ORTDiffusionPipeline

    torch.set_num_threads(job.threads)  # used by the scheduler
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job.threads
    pipe = ORTDiffusionPipeline.from_pretrained(
        directory, export=False, session_options=options, provider="CPUExecutionProvider"
    )
    models = ("text_encoder", "text_encoder_2", "unet", "vae_decoder")
    return LoadedModel(
        generate=TimedPipeline(pipe, job),
        versions=versions("optimum-onnx", "onnxruntime", "diffusers", "transformers", "torch"),
        precision="fp32",
        bytes=sum(file_bytes(directory / name, "*.onnx*") for name in models),
    )


if __name__ == "__main__":
    serve(load, convert)
