"""optimum-intel on OpenVINO, as a participant: ``python serve_optimum_openvino.py JOB``."""

from pathlib import Path
from typing import Any

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
    if wanted["guidance_scale"] <= 1:
        _halve(pipe.unet.model)
    pipe.compile()
    return Loaded(
        paint=Painter(pipe, job),
        versions=versions("optimum-intel", "openvino", "diffusers", "transformers", "torch"),
        precision="fp32",
        bytes=model_bytes(directory),
    )


def _halve(unet: Any) -> None:
    """One row an image: reshape() counts two, guided or not, unless for a consistency model."""
    named = {each.get_any_name(): each for each in unet.inputs}
    if "timestep_cond" in named:
        return
    shapes = {name: each.get_partial_shape() for name, each in named.items() if name != "timestep"}
    for shape in shapes.values():
        shape[0] = shape[0].get_length() // 2
    unet.reshape({named[name]: shape for name, shape in shapes.items()})


if __name__ == "__main__":
    serve(load, convert)
