"""Names of the metrics, in the order of reports. Imports nothing heavy: help needs them."""

from collections.abc import Mapping

__all__ = ["METRICS"]

METRICS: Mapping[str, str] = {
    "psnr": "pixels against the reference's, in dB; above 40 is the same image",
    "ssim": "structural similarity to the reference, 1 is equal",
    "lpips": "learned perceptual distance to the reference, 0 is equal; with --lpips",
    "perceptual": "perceptual distance by the feature maps of any network; with --network",
    "fid": "Fréchet distance of the feature distributions; with --network or --inception",
    "kid": "kernel distance of the feature distributions, unbiased for few images",
    "is": "Inception score: sharpness and variety",
    "clip": "CLIP score: agreement of images and prompts; with --clip",
    "cmmd": "kernel distance of CLIP embeddings; with --clip",
    "ppl": "perceptual path length between prompts, two more images each; only if named",
    "colour": "accuracy of the background colour; the demo checkpoint only",
    "retrieval": "accuracy of the object, by nearest training image; the demo, with --retrieval",
}
"""Metrics by name, with a line of help each."""
