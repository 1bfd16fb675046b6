"""optimum-intel on OpenVINO: ``python serve_optimum_openvino.py JOB``."""

from pathlib import Path
from typing import Any

from openvino_model import convert, model_bytes, properties
from serving import LoadedModel, PeerJob, serve, versions
from through_diffusers import TimedPipeline


def load(job: PeerJob, directory: Path) -> LoadedModel:
    """Load its pipeline, compiled for the request's size."""
    import torch
    from optimum.intel import OVDiffusionPipeline

    torch.set_num_threads(job.threads)  # used by the scheduler
    pipe = OVDiffusionPipeline.from_pretrained(
        directory, ov_config=dict(properties(job.threads)), compile=False
    )
    # Static sizes, as its documentation recommends: OpenVINO then plans memory and layouts.
    settings = job.settings
    pipe.reshape(
        batch_size=len(settings["prompts"]),
        height=settings["height"],
        width=settings["width"],
        num_images_per_prompt=settings["images_per_prompt"],
    )
    if settings["guidance_scale"] <= 1:
        _halve_batch(pipe.unet.model)
    pipe.compile()
    return LoadedModel(
        generate=TimedPipeline(pipe, job),
        versions=versions("optimum-intel", "openvino", "diffusers", "transformers", "torch"),
        precision="fp32",
        bytes=model_bytes(directory),
    )


def _halve_batch(unet: Any) -> None:
    """Reshape a UNet to one row per image.

    Its pipeline's reshape() always doubles the batch for classifier-free guidance, except for
    consistency models (with an input timestep_cond).
    """
    inputs = {port.get_any_name(): port for port in unet.inputs}
    if "timestep_cond" in inputs:
        return
    shapes = {name: port.get_partial_shape() for name, port in inputs.items() if name != "timestep"}
    for shape in shapes.values():
        shape[0] = shape[0].get_length() // 2
    unet.reshape({inputs[name]: shape for name, shape in shapes.items()})


if __name__ == "__main__":
    serve(load, convert)
