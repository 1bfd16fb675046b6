"""Plain server around optimum-intel's pipeline: ``python optimum_openvino.py MODEL PORT``."""

from diffusers_pipeline import DiffusersPipeline
from optimum.intel import OVDiffusionPipeline
from plain import arguments, serve

options = arguments()
config = {"INFERENCE_PRECISION_HINT": "f32"} if options.f32 else {}
pipe = OVDiffusionPipeline.from_pretrained(options.model, ov_config=config)
serve(DiffusersPipeline(pipe), options.port)
