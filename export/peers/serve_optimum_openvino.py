"""optimum-intel on OpenVINO, as a contender: ``python serve_optimum_openvino.py JOB``."""

from pathlib import Path

from openvino_model import convert, model_bytes, properties
from serving import Job, Loaded, serve, versions
from through_diffusers import Painter


def load(job: Job, directory: Path) -> Loaded:
    """Its pipeline, compiled for the request's size."""
    import torch
    from optimum.intel import OVDiffusionPipeline

    torch.set_num_threads(job.threads)  # the sampler's
    pipe = OVDiffusionPipeline.from_pretrained(
        directory, ov_config=dict(properties(job.threads)), compile=False
    )
    # Its documentation fixes the sizes, which lets OpenVINO plan memory and layouts ahead.
    wanted = job.settings
    pipe.reshape(
        batch_size=len(wanted["prompts"]),
        height=wanted["height"],
        width=wanted["width"],
        num_images_per_prompt=wanted["images_per_prompt"],
    )
    pipe.compile()
    return Loaded(
        paint=Painter(pipe, job),
        versions=versions("optimum-intel", "openvino", "diffusers", "transformers", "torch"),
        precision="fp32",
        bytes=model_bytes(directory),
    )


if __name__ == "__main__":
    serve(load, convert)
