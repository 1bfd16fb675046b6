"""The metrics there are, in the order in which they are reported. Imports nothing of weight."""

from collections.abc import Mapping

__all__ = ["METRICS"]

METRICS: Mapping[str, str] = {
    "psnr": "pixels against the reference's, in dB; over 40 is the same picture",
    "ssim": "structure against the reference's, 1 is equal",
    "lpips": "learned distance to the reference's, 0 is equal; with --lpips",
    "perceptual": "the same by any network's feature maps, unlearned; with --network",
    "fid": "distance of the distributions; with --network or --inception",
    "kid": "the same without a bias towards few images",
    "is": "Inception score: sharp and varied",
    "clip": "CLIP score: whether pictures fit their prompts; with --clip",
    "cmmd": "distance of the distributions of CLIP embeddings; with --clip",
    "ppl": "perceptual path length between prompts, two images more each; only if named",
    "colour": "share with the background asked for; the demo checkpoint only",
    "retrieval": "share nearest to the thing asked for; the demo, with --retrieval",
}
"""Names, and what each tells."""
