"""Structures on exported graphs: what torch computes with the same structure."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import write
from diffusers import UNet2DConditionModel
from numpy.typing import NDArray
from tiers import further
from tiny import TINY

from latentforge.export.models.searched_structure import SearchedStructure, list_sites
from latentforge.export.stage import ExportRequest, export
from latentforge.optimize.graph import open_session
from latentforge.optimize.graph_io import DENOISER, load_graph
from latentforge.runtime.errors import ManifestError
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.tensor import Feeds
from latentforge.train.search.latency.measure import random_structures
from latentforge.train.search.surgery import restructure, signatures
from latentforge.train.student.importance import measured_importance
from latentforge.train.student.inherit import applied

STAGE = {  # its innermost level can be dropped; heads do not fill the width; no attention inside
    "mid_block_type": "UNetMidBlock2D",
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 3,
}


class Teacher:
    """UNet in torch, its exported graph, and inputs."""

    def __init__(self, checkpoint: Path, engines: Path) -> None:
        self.unet: Any = UNet2DConditionModel.from_pretrained(checkpoint / "unet").eval()
        self.sites = list_sites(self.unet.config)
        component = Manifest.read(engines).components[DENOISER]
        self.graph = load_graph(DENOISER, component, engines)
        source, sizes = np.random.default_rng(0), {"batch": 2, "latent_height": 8}
        self.feeds: Feeds = {
            name: source.standard_normal(
                spec.resolve({**sizes, "latent_width": 16}), np.float32
            ).astype(spec.dtype)
            for name, spec in component.inputs.items()
        } | {"timestep": np.array([301.0], np.float32)}
        self.importance = measured_importance(self.unet, self.torch)
        self.whole = self.torch()

    def torch(self) -> NDArray[np.float32]:
        given = {name: torch.from_numpy(np.array(array)) for name, array in self.feeds.items()}
        sample, timestep, context = (
            given.pop(name) for name in ("sample", "timestep", "encoder_hidden_states")
        )
        with torch.inference_mode():
            output = self.unet(sample, timestep[0], context, added_cond_kwargs=given).sample
        return np.array(output.numpy())

    def differences(self, structure: SearchedStructure) -> tuple[float, float]:
        """Return the largest errors of the graph against torch, and of the whole UNet."""
        with applied(self.unet, structure, self.importance):
            expected = self.torch()
        model = self.graph.clone()
        restructure(model, structure, self.sites, self.importance)
        output = open_session(model).run(None, dict(self.feeds))[0]
        scale = float(np.abs(expected).max())
        return (
            float(np.abs(output - expected).max()) / scale,
            float(np.abs(self.whole - expected).max()) / scale,
        )


@pytest.fixture(scope="module")
def teacher(
    tiny: Callable[[str], Path],
    tiny_denoiser: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Teacher]:
    """A function that returns the teacher of a tiny family, or the one with a stage."""

    @cache
    def made(name: str) -> Teacher:
        if name != "stage":
            return Teacher(tiny(name), tiny_denoiser(name))
        folder = tmp_path_factory.mktemp("stage")
        unet: Any = TINY["sd"].unet
        write(replace(TINY["sd"], unet={**unet, **STAGE}), folder / "checkpoint")
        request = ExportRequest(components=(DENOISER,))
        export(str(folder / "checkpoint"), folder / "engines", request)
        return Teacher(folder / "checkpoint", folder / "engines")

    return made


FAMILIES = (
    "sd",
    *further("sdxl-inpainting", "stage"),
)


@pytest.mark.parametrize("family", FAMILIES)
def test_random_structures_compute_what_torch_does(
    family: str, teacher: Callable[[str], Teacher]
) -> None:
    own = teacher(family)
    structures = random_structures(own.sites, 5, seed=4)
    kinds = {site.name: site.kind for site in own.sites}
    covered = {(kinds[n], c) for s in structures for n, c in s.choices.items()}
    others = {
        (site.kind, choice): SearchedStructure.of({site.name: choice}, own.sites)
        for site in own.sites
        for choice in site.choices[1:]
        if (site.kind, choice) not in covered
    }
    for structure in (*structures, *others.values()):
        error, change = own.differences(structure)
        assert error < 1e-5 < change, structure


@pytest.mark.thorough
def test_an_empty_attention_module_leaves_the_graph(teacher: Callable[[str], Teacher]) -> None:
    own = teacher("sdxl-inpainting")
    blocks = [s.name for s in own.sites if s.name.startswith("mid_block.attentions.0.")]
    assert len(blocks) == 2
    for names, is_left in ((blocks[:1], True), (blocks, False)):
        model = own.graph.clone()
        structure = SearchedStructure(choices=dict.fromkeys(names, "drop"))
        restructure(model, structure, own.sites)
        modules = {str(node.name) for node in model.graph}
        assert any(name.startswith("mid_block.attentions.0.proj_in") for name in modules) == is_left


@pytest.mark.thorough
def test_sites_of_equal_layers_share_a_signature(teacher: Callable[[str], Teacher]) -> None:
    own = teacher("sd")
    texts = signatures(own.graph.graph, own.sites)
    assert texts["mid_block.resnets.0"] == texts["mid_block.resnets.1"]
    assert len(set(texts.values())) < len(own.sites)
    own = teacher("stage")
    texts = signatures(own.graph.graph, own.sites)
    assert texts["down_blocks.1.resnets.0"] != texts["down_blocks.2.resnets.0"]  # 32, 64 enter
    assert texts["down_blocks.0.resnets.0"] != texts["mid_block.resnets.0"]


def test_halves_without_importance_are_as_small(teacher: Callable[[str], Teacher]) -> None:
    own = teacher("sd")
    halves = {site.name: "half" for site in own.sites if "half" in site.choices}
    structure = SearchedStructure.of(halves, own.sites)  # type: ignore[arg-type]
    sizes = []
    for importance in (None, own.importance):
        model = own.graph.clone()
        restructure(model, structure, own.sites, importance)
        shapes = [v.shape for n in model.graph for v in n.inputs if v and v.is_initializer()]
        sizes.append(sorted(str(shape) for shape in shapes))
    assert sizes[0] == sizes[1]


def test_a_graph_of_foreign_names_is_refused(teacher: Callable[[str], Teacher]) -> None:
    own = teacher("sd")
    model = own.graph.clone()
    for node in model.graph:
        node.name = f"/unet/{node.name}"
    structure = random_structures(own.sites, 1, seed=0)[0]
    with pytest.raises(ManifestError, match="export the checkpoint with this version"):
        restructure(model, structure, own.sites)
