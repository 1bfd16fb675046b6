"""Plain server around optimum-onnx's pipeline: ``python optimum_ort.py MODEL PORT``."""

from diffusers_pipeline import DiffusersPipeline
from optimum.onnxruntime import ORTDiffusionPipeline
from plain import arguments, serve

options = arguments()
pipe = ORTDiffusionPipeline.from_pretrained(options.model, provider="CPUExecutionProvider")
serve(DiffusersPipeline(pipe), options.port)
