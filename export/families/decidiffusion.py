"""DeciDiffusion 1.0 and 2.0: Stable Diffusion with a smaller UNet, found by architecture search.

The UNet is in the folder flexible_unet/; unet/ is a placeholder of the size of Stable Diffusion
1.5's UNet and is never read. https://huggingface.co/Deci/DeciDiffusion-v1-0 and -v2-0.
"""

from transformers import CLIPTextModel

from latentforge.export.checkpoint import Checkpoint
from latentforge.export.families import parts
from latentforge.export.families.types import ExportPlan, Family, FamilyDefaults, Reference
from latentforge.export.models.flexible_unet import load_flexible_unet, structure_of
from latentforge.export.schedulers import corrected
from latentforge.runtime.manifest import Conditioning, TextEncoding

__all__ = ["DECIDIFFUSION"]

_FOLDER = "flexible_unet"

# Defaults of the two releases' own pipelines. Only the first release has a mid block. The steps of
# the second are those before its scheduler maps them to fewer.
_FIRST = FamilyDefaults(steps=30, guidance_rescale=0.7)
_SECOND = FamilyDefaults(sampler="squeezed_10", steps=16, guidance_rescale=0.8)


def _plan(checkpoint: Checkpoint) -> ExportPlan:
    with parts.reading(checkpoint):
        structure = structure_of(checkpoint, _FOLDER)
        latent = parts.latent_space(checkpoint, structure.multiple)
        text = parts.text_encoder(checkpoint, CLIPTextModel, ("last_hidden_state",))
        parts.check_context(checkpoint, [text], structure.cross_attention_dim)
        images = parts.inpainting(structure.in_channels, latent)
        unet = parts.unet(
            {
                "in_channels": structure.in_channels,
                "cross_attention_dim": structure.cross_attention_dim,
            },
            latent,
            tokens=parts.tokens(text),
            images=images,
            folder=_FOLDER,
            module=load_flexible_unet,
        )
        return ExportPlan(
            components=(text, unet, *parts.vae(checkpoint, latent)),
            conditioning=Conditioning(
                encoders=(TextEncoding(component="text_encoder", tokenizer="tokenizer"),),
                channels=images,
            ),
            latent=latent,
            sample_size=(structure.sample_size * latent.downscale,) * 2,
            defaults=_SECOND if structure.mid is None else _FIRST,
        )


DECIDIFFUSION = Family(
    name="decidiffusion",
    pipelines=("DeciDiffusionPipeline",),
    plan=_plan,
    reference=Reference(
        text="StableDiffusionPipeline",
        image="StableDiffusionImg2ImgPipeline",
        inpaint="StableDiffusionInpaintPipeline",
    ),
    scheduler=corrected,
)
