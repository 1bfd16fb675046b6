"""Partitioned denoisers compute what the whole graph computes, with less work per step."""

import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from tiers import tiered

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import onnx_ir as ir
import onnxruntime as ort

from latentforge.commands.describe import describe
from latentforge.optimize.graph import dependencies, layers
from latentforge.optimize.partition.hoist import GraphPartition, PartitionedGraph, hoist
from latentforge.optimize.passes import PASSES
from latentforge.optimize.passes.runner import optimize
from latentforge.runtime.compile.verify import trial
from latentforge.runtime.denoising.step_engines import StepEngines
from latentforge.runtime.engine import Engine
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.files import hash_file
from latentforge.runtime.image import psnr
from latentforge.runtime.loader import load
from latentforge.runtime.manifest import Component, Manifest
from latentforge.runtime.pipeline import Pipeline, Result
from latentforge.runtime.tensor import TensorSpec
from latentforge.runtime.timings import Stopwatch

Array = NDArray[Any]

FAMILIES = tiered(("bk-sdm", "sdxl-inpainting"))  # test_families.py optimizes all of them
LARGER = ("lcm", "sd", "sdxl", "decidiffusion-1", "sd-inpainting", "sd/2")
TOKENS = 24
ENOUGH = 100  # dB between latents: rounding alone
PROMPTS = ["a red fox", "an owl on the moon"]


# Engine directories: real UNets between simple encoders, which cost nothing to export


ENCODER = """<ir_version: 9, opset_import: ["" : 17]>
m (int64[batch, TOKENS] input_ids)
  => (float[batch, TOKENS, WIDTH] context, float[batch, WIDE] pooled)
<int64[1] last = {2}, float[WIDTH] rates = {RATES}, float[WIDE] more = {MORE}>
{
  ids = Cast<to = 1>(input_ids)
  column = Unsqueeze(ids, last)
  angles = Mul(column, rates)
  context = Sin(angles)
  mean = ReduceMean<axes = [1], keepdims = 1>(ids)
  turns = Mul(mean, more)
  pooled = Sin(turns)
}"""


def encoder(width: int, wide: int, *names: str) -> ir.Model:
    """Return a text encoder with different outputs for different prompts."""
    rates, more = (", ".join(f"{0.4 + 0.31 * i:.3f}" for i in range(n)) for n in (width, wide))
    text = ENCODER.replace("RATES", rates).replace("MORE", more).replace("TOKENS", str(TOKENS))
    model = ir.from_onnx_text(text.replace("WIDTH", str(width)).replace("WIDE", str(wide)))
    for output, name in zip(model.graph.outputs, names, strict=True):
        output.name = name
    return model


def component(path: Path, inputs: Any, outputs: Any, backend: str = "onnxruntime") -> Component:
    return Component(
        file=path.name,
        sha256=hash_file(path),
        bytes=path.stat().st_size,
        backend=backend,
        precision="fp32",
        inputs=inputs,
        outputs=outputs,
    )


def complete(directory: Path) -> Path:
    """Add text encoders and an autoencoder to an engine directory with a UNet alone."""
    manifest = Manifest.read(directory)
    components = dict(manifest.components)
    inputs = components["denoiser"].inputs
    encoders = manifest.conditioning.encoders
    width = int(inputs["encoder_hidden_states"].shape[2]) // len(encoders)
    for part in encoders:
        pooled = part.pooled or "unused"
        wide = int(inputs["text_embeds"].shape[1]) if part.pooled else 1
        path = directory / f"{part.component}.onnx"
        ir.save(encoder(width, wide, part.context, pooled), path)
        outputs = {
            part.context: TensorSpec("float32", ("batch", TOKENS, width)),
            pooled: TensorSpec("float32", ("batch", wide)),
        }
        ids = {"input_ids": TensorSpec("int64", ("batch", TOKENS))}
        components[part.component] = component(path, ids, outputs)
    components |= autoencoder(directory)
    msgspec.structs.replace(manifest, components=components).write(directory)
    return directory


def autoencoder(directory: Path) -> dict[str, Component]:
    """Return an autoencoder that computes nothing, since tests compare latents only."""
    latent = TensorSpec("float32", ("batch", 4, "h", "w"))
    pixels = TensorSpec("float32", ("batch", 3, "h*2", "w*2"))
    image = TensorSpec("float32", ("batch", 3, "height", "width"))
    parameters = TensorSpec("float32", ("batch", 8, "height//2", "width//2"))
    signatures: dict[str, tuple[Any, Any]] = {
        "vae_decoder": ({"latent_sample": latent}, {"sample": pixels}),
        "vae_encoder": ({"sample": image}, {"latent_parameters": parameters}),
    }
    parts = {}
    for name, (inputs, outputs) in signatures.items():
        path = directory / f"{name}.onnx"
        path.write_bytes(b"")
        parts[name] = component(path, inputs, outputs, "null")
    return parts


def cut(source: Path, target: Path, passes: tuple[str, ...] = ()) -> Path:
    """Copy an engine directory and partition its UNet."""
    manifest = Manifest.read(source)
    unet = manifest.components["denoiser"]
    model = ir.load(source / unet.file)
    optimize(model, {name: PASSES[name] for name in passes})
    shutil.copytree(source, target)
    (target / unet.file).unlink()
    components = dict(manifest.components)
    for name, part in hoist(model, unet.inputs, unet.outputs).parts("denoiser").items():
        ir.save(part.model, target / f"{name}.onnx")
        components[name] = component(target / f"{name}.onnx", part.inputs, part.outputs)
    msgspec.structs.replace(manifest, components=components).write(target)
    return target


Both = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def both(
    tiny: Callable[[str], Path],
    tiny_denoiser: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Both:
    """Return a function that exports a family, whole and partitioned; ``sd/2`` has fixed sizes."""
    from latentforge.export.onnx import Dimensions
    from latentforge.export.stage import ExportRequest, export

    folder = tmp_path_factory.mktemp("hoist")

    @cache
    def built(name: str) -> tuple[Path, Path]:
        family, _, batch = name.partition("/")
        whole = folder / name.replace("/", "-")
        if batch:
            sizes = Dimensions(batch=int(batch), height=32, width=32)
            part = ExportRequest(components=("denoiser",), dimensions=sizes)
            export(str(tiny(family)), whole, part)
        else:
            shutil.copytree(tiny_denoiser(family), whole)
        complete(whole)
        return whole, cut(whole, whole.with_name(f"{whole.name}-cut"))

    return built


def parts_of(directory: Path) -> PartitionedGraph:
    unet = Manifest.read(directory).components["denoiser"]
    return hoist(ir.load(directory / unet.file), unet.inputs, unet.outputs)


# Equal latents


def generate(pipe: Pipeline, **request: Any) -> Result:
    """Run a few steps; an inpainting UNet gets an image of one colour."""
    if pipe.manifest.conditioning.channels:
        image = Image.new("RGB", (32, 32), (200, 30, 40))
        request |= {"image": image, "mask": Image.new("L", (32, 32), 255)}
    defaults = {"steps": 3, "sampler": "ddim", "guidance_scale": 5.0, "height": 32, "width": 32}
    request = {"seed": 5, **defaults, **request}
    return pipe(request.pop("prompt", "a red fox"), **request)


def latents(pipe: Pipeline, **request: Any) -> Array:
    return generate(pipe, **request).latents


SAMPLERS = ("ddim", "heun", "dpmpp_2m_sde")


@pytest.mark.parametrize(
    "name",
    [*FAMILIES, "bk-sdm/2", *(pytest.param(name, marks=pytest.mark.slow) for name in LARGER)],
)
def test_latents_equal_those_of_the_whole_graph(both: Both, name: str) -> None:
    whole, cut = both(name)
    with (
        load(whole, threads=1) as a,
        load(cut, threads=1) as b,
        load(cut, threads=1, max_rows=1) as frugal,
    ):
        for sampler in SAMPLERS:
            expected = latents(a, sampler=sampler)
            assert expected.std() > 0.1
            assert psnr(expected, latents(b, sampler=sampler)) >= ENOUGH
        request: dict[str, Any] = {"prompt": PROMPTS, "negative_prompt": "moon"}
        expected = latents(a, **request)
        assert psnr(expected, latents(b, **request)) >= ENOUGH
        assert psnr(expected, latents(frugal, **request)) >= ENOUGH
        assert psnr(expected, latents(a, prompt=PROMPTS[::-1])) < 80  # the prompt matters


def test_fused_graphs_are_partitioned_too(both: Both, tmp_path: Path) -> None:
    whole, _ = both("bk-sdm")
    fused = cut(whole, tmp_path / "fused", ("fold-constants", "fuse-attention"))
    with load(whole, threads=1) as a, load(fused, threads=1) as b:
        assert psnr(latents(a), latents(b)) >= ENOUGH


# Assignment of nodes to parts


@pytest.mark.parametrize("name", FAMILIES)
def test_the_step_part_depends_on_the_sample_throughout(both: Both, name: str) -> None:
    hoisted = parts_of(both(name)[0])
    found = dependencies(hoisted.step.model.graph)
    left = [
        node.name
        for node in hoisted.step.model.graph
        if found[node.outputs[0]] and "sample" not in found[node.outputs[0]]
    ]
    assert left == []
    assert hoisted.prompt is not None and hoisted.time is not None
    taken = hoisted.step.inputs.keys() - {"sample"}
    assert taken == {*hoisted.prompt.outputs, *hoisted.time.outputs} - hoisted.time.inputs.keys()
    for part in hoisted.parts("denoiser").values():
        used = {str(value.name) for node in part.model.graph for value in node.inputs if value}
        assert used >= part.model.graph.initializers.keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_all_keys_values_and_time_embeddings_are_hoisted(both: Both, name: str) -> None:
    whole, _ = both(name)
    hoisted = parts_of(whole)
    model = ir.load(whole / "denoiser.onnx")
    modules = {layer.name.rpartition("/")[0] for layer in layers(model.graph)}
    crossed = {m for m in modules if m.endswith(("attn2.to_k", "attn2.to_v", "cond_proj"))}
    timed = {m for m in modules if m.endswith("time_emb_proj")}
    assert len(crossed) >= 4 and len(timed) >= 3
    assert hoisted.prompt is not None and hoisted.time is not None
    prompted = {m for m in modules if m.startswith("add_embedding")}
    embedded = {m for m in modules if m.startswith("time_embedding.linear")}
    assert modules_of(hoisted.prompt) == crossed | prompted
    assert modules_of(hoisted.time) == timed | embedded
    assert hoisted.counts == {
        "hoist-prompt": len(crossed | prompted),
        "hoist-time": len(timed | embedded),
    }
    assert set(hoisted.time.outputs) == timed
    assert crossed <= {*hoisted.prompt.outputs}
    assert {spec.shape[0] for spec in hoisted.time.outputs.values()} == {"rows"}


def modules_of(part: GraphPartition) -> set[str]:
    return {layer.name.rpartition("/")[0] for layer in layers(part.model.graph)}


def test_fused_attention_takes_one_key_and_one_value(both: Both) -> None:
    model = ir.load(both("bk-sdm")[0] / "denoiser.onnx")
    optimize(model, {name: PASSES[name] for name in ("fold-constants", "fuse-attention")})
    hoisted = hoist(model)
    assert hoisted.prompt is not None
    kinds = {node.op_type for node in hoisted.prompt.model.graph}
    assert kinds == {"MatMul"}
    attentions = {name.rpartition(".")[0] for name in hoisted.prompt.outputs}
    assert set(hoisted.prompt.outputs) == {f"{a}.{k}" for a in attentions for k in ("to_k", "to_v")}
    assert hoisted.prompt.layers == 2 * len(attentions)


def test_the_same_graph_gives_the_same_bytes(both: Both) -> None:
    path = both("sd")[0] / "denoiser.onnx"
    model = ir.load(path)
    before = content(model)
    first, second = hoist(model), hoist(ir.load(path))
    assert content(model) == before  # hoist() does not change it
    for name, part in first.parts("denoiser").items():
        assert content(part.model) == content(second.parts("denoiser")[name].model)


def content(model: Any) -> bytes:
    return bytes(ir.serde.serialize_model(model).SerializeToString(deterministic=True))


# Small graphs


HEAD = '<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>\n'
SIGNATURE = (
    "m (float[batch, 4, h, w] sample, float[1] timestep, float[batch, 3, 4] encoder_hidden_states)"
    " => (float[batch, 4, h, w] out_sample)"
)


def graph(body: str, weights: str = "", signature: str = SIGNATURE) -> Any:
    return ir.from_onnx_text(f"{HEAD}{signature}\n<{weights}>\n{{{body}}}")


def feeds_of(model: Any, batch: int = 2) -> dict[str, Array]:
    """Return random numbers for every input except the timestep."""
    rng = np.random.default_rng(0)
    sizes = {"batch": batch, "h": 6, "w": 5, "latent_height": 8, "latent_width": 8}
    feeds = {}
    for value in model.graph.inputs:
        if value.name != "timestep":
            shape = [s if isinstance(s, int) else size_of(str(s), sizes) for s in value.shape]
            feeds[value.name] = rng.standard_normal(shape).astype(value.dtype.numpy())
    return feeds


def size_of(size: str, sizes: Mapping[str, int]) -> int:
    return TensorSpec("int8", (size,)).resolve(sizes)[0]


def run(model: Any, feeds: Mapping[str, Array]) -> dict[str, Array]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(content(model), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    used = {value.name: feeds[value.name] for value in session.get_inputs()}
    return dict(zip(names, session.run(names, used), strict=True))


TIMESTEPS = (981.0, 501.0, 20.0)


def check(model: Any, tolerance: float = 1e-5, **options: Any) -> PartitionedGraph:
    """Run the whole graph and its parts for several timesteps, and compare every output."""
    hoisted = hoist(model, **options)
    feeds = feeds_of(model)
    rows = len(feeds["sample"])
    values = dict(feeds)
    if hoisted.prompt is not None:
        values |= run(hoisted.prompt.model, feeds)
    timed = run_time_part(hoisted, values, rows)
    steps = []
    for index, timestep in enumerate(TIMESTEPS):
        shape = next(v.shape for v in model.graph.inputs if v.name == "timestep")
        expected = run(model, {**feeds, "timestep": np.full(tuple(shape), timestep, np.float32)})
        selected = {name: array[index * rows : (index + 1) * rows] for name, array in timed.items()}
        for name, spec in hoisted.step.inputs.items():
            if name in selected and spec.shape[0] == 1:
                selected[name] = selected[name][:1]
        now = {"timestep": np.full(1, timestep, np.float32)}
        outputs = run(hoisted.step.model, {**values, **now, **selected})
        for name, array in expected.items():
            scale = np.abs(array).max()
            np.testing.assert_allclose(outputs[name], array, rtol=0, atol=tolerance * scale)
        steps.append(np.concatenate([array.ravel() for array in expected.values()]))
    assert np.abs(steps[0] - steps[1]).max() > 1e-3  # the timestep matters
    return hoisted


def run_time_part(
    hoisted: PartitionedGraph, values: Mapping[str, Array], rows: int
) -> dict[str, Array]:
    """Return the outputs of the time part for all rows of all timesteps."""
    if hoisted.time is None:
        return {}
    stacked = {
        name: np.concatenate([values[name]] * len(TIMESTEPS))
        for name in hoisted.time.inputs
        if name != "timestep"
    }
    numbers = np.repeat(np.float32(TIMESTEPS), rows)
    return run(hoisted.time.model, {"timestep": numbers, **stacked})


TIME = """
  size = Shape<start = 0, end = 1>(sample)
  repeated = Expand(timestep, size)
  column = Unsqueeze(repeated, one)
  angles = Mul(column, rates)
  waves = Sin(angles)
"""
ADDED = """
  embedding = Unsqueeze(waves, sides)
  out_sample = Add(sample, embedding)
"""
RATES = "float[1, 4] rates = {0.1, 0.02, 0.003, 0.04}, int64[1] one = {1}, int64[2] sides = {2, 3}"


def test_the_expand_of_the_timestep_is_removed() -> None:
    hoisted = check(graph(TIME + ADDED, RATES))
    assert hoisted.prompt is None and hoisted.time is not None
    assert [node.op_type for node in hoisted.step.model.graph] == ["Add"]
    assert {str(spec) for spec in hoisted.time.outputs.values()} == {"float32[rows, 4, 1, 1]"}
    taken = [spec for name, spec in hoisted.step.inputs.items() if name != "sample"]
    assert [str(spec) for spec in taken] == ["float32[1, 4, 1, 1]"]


def test_the_expand_is_restored_where_no_operand_broadcasts() -> None:
    body = """
      mean = ReduceMean<keepdims = 0>(sample, sides)
      both = Concat<axis = 1>(mean, waves)
      sum = ReduceSum<keepdims = 1>(both, one)
      wide = Unsqueeze(sum, sides)
      out_sample = Mul(sample, wide)
    """
    hoisted = check(graph(TIME + body, RATES))
    assert hoisted.time is not None
    assert "Expand" in {node.op_type for node in hoisted.step.model.graph}


def test_operators_that_mix_rows_stay_in_the_step() -> None:
    body = """
      spread = Softmax<axis = 0>(waves)
      scaled = Add(waves, spread)
      embedding = Unsqueeze(scaled, sides)
      out_sample = Add(sample, embedding)
    """
    hoisted = check(graph(TIME + body, RATES))
    assert hoisted.time is not None
    assert "Softmax" not in {node.op_type for node in hoisted.time.model.graph}
    assert "Softmax" in {node.op_type for node in hoisted.step.model.graph}


@pytest.mark.parametrize("cast", ["", "late = Cast<to = 1>(timestep)"])
def test_a_timestep_without_dimensions(cast: str) -> None:
    body = TIME.replace("Expand(timestep", "Expand(late" if cast else "Expand(timestep") + ADDED
    signature = SIGNATURE.replace("float[1] timestep", "float timestep")
    hoisted = check(graph(f"{cast}\n{body}", RATES, signature))
    assert hoisted.time is not None and len(hoisted.step.model.graph) == 1


def test_a_scalar_timestep_used_as_a_scalar() -> None:
    body = "scaled = Mul(sample, timestep)\n out_sample = Sin(scaled)"
    hoisted = check(graph(body, "", SIGNATURE.replace("float[1] timestep", "float timestep")))
    assert hoisted.time is None and str(hoisted.step.inputs["timestep"]) == "float32[1]"


@pytest.mark.parametrize("batch", [1, 2])
def test_a_fixed_batch(batch: int) -> None:
    body = TIME.replace("(timestep, size)", "(timestep, fixed)") + ADDED
    weights = f"{RATES}, int64[1] fixed = {{{batch}}}"
    model = graph(body, weights, SIGNATURE.replace("batch", str(batch)))
    hoisted = hoist(model)
    assert hoisted.time is not None and len(hoisted.step.model.graph) == 1
    assert [str(s) for s in hoisted.step.inputs.values()][1:] == ["float32[1, 4, 1, 1]"]


PROMPT = """
  context = MatMul(encoder_hidden_states, weight)
  mean = ReduceMean<keepdims = 0>(context, one)
"""
WEIGHT = "float[4, 4] weight = {1, 2, 3, 4, 0, 1, 0, 1, -2, 0, 1, 0, 3, 1, 0, 1}"


def test_a_time_part_that_depends_on_the_prompt_has_a_row_per_image() -> None:
    body = PROMPT + TIME + "both = Add(waves, mean)\n" + ADDED.replace("waves", "both")
    hoisted = check(graph(body, f"{RATES}, {WEIGHT}"))
    assert hoisted.prompt is not None and hoisted.time is not None
    assert [s.shape[0] for s in hoisted.time.inputs.values()] == ["rows", "rows"]
    assert [s.shape[0] for s in hoisted.step.inputs.values()] == ["batch", "batch"]


ATTENDED = """
  wide = Unsqueeze({name}, sides)
  shifted = Add(sample, wide)
  timed = Mul(shifted, timestep)
  out_sample = Identity(timed)
"""


def test_sizes_do_not_cross() -> None:
    """The batch is measured on the prompt and used on the sample, and vice versa."""
    body = (
        PROMPT
        + """
      size = Shape<start = 0, end = 1>(context)
      flat = Concat<axis = 0>(size, rest)
      seen = Shape<start = 0, end = 1>(sample)
      again = Concat<axis = 0>(seen, four)
      straight = Reshape(mean, again)
      sin = Sin(straight)
      rows = Reshape(sample, flat)
      sum = ReduceSum<keepdims = 1>(rows, one)
      both = Add(sum, sin)
    """
        + ATTENDED.format(name="both")
    )
    weights = f"{RATES}, {WEIGHT}, int64[1] rest = {{-1}}, int64[1] four = {{4}}"
    hoisted = check(graph(body, weights))
    assert hoisted.prompt is not None and len(hoisted.prompt.outputs) == 1
    assert "Sin" in {node.op_type for node in hoisted.prompt.model.graph}
    assert hoisted.step.inputs.keys() == {"sample", "timestep", *hoisted.prompt.outputs}


def test_values_with_other_rows_than_the_sample_do_not_cross() -> None:
    """Heads are folded into the rows, as in attention that is written by hand."""
    body = (
        PROMPT
        + """
      heads = Reshape(context, pairs)
      negative = Neg(heads)
      back = Reshape(negative, whole)
      first = ReduceMean<keepdims = 0>(back, one)
      shown = Mul(first, first)
    """
        + ATTENDED.format(name="shown")
    )
    weights = f"{RATES}, {WEIGHT}, int64[3] pairs = {{-1, 3, 2}}, int64[3] whole = {{-1, 3, 4}}"
    hoisted = check(graph(body, weights))
    assert hoisted.prompt is not None
    assert [str(spec) for spec in hoisted.prompt.outputs.values()] == ["float32[batch, 4, 1, 1]"]
    body = body.replace("back = Reshape(negative, whole)", "used = Mul(negative, timestep)")
    body = body.replace("Mean<keepdims = 0>(back", "Mean<keepdims = 0>(kept")
    body = body.replace("first =", "kept = Reshape(used, whole)\n first =")
    late = check(graph(body, weights))
    assert late.prompt is not None
    assert [str(spec) for spec in late.prompt.outputs.values()] == ["float32[batch, 3, 4]"]


def test_quantized_values_cross_in_eight_bits() -> None:
    body = (
        PROMPT
        + """
      wide = Unsqueeze(mean, sides)
      small = QuantizeLinear(wide, scale, zero)
      large = DequantizeLinear(small, scale, zero)
      shifted = Add(sample, large)
      out_sample = Mul(shifted, timestep)
    """
    )
    hoisted = check(graph(body, f"{RATES}, {WEIGHT}, float scale = {{0.05}}, int8 zero = {{0}}"))
    assert hoisted.prompt is not None
    assert [spec.dtype for spec in hoisted.prompt.outputs.values()] == ["int8"]
    assert "DequantizeLinear" in {node.op_type for node in hoisted.step.model.graph}


def test_half_precision_values_cross_in_half_precision() -> None:
    body = (
        PROMPT
        + """
      half = Cast<to = 10>(mean)
      double = Add(half, half)
      wide = Unsqueeze(double, sides)
      halves = Cast<to = 10>(sample)
      shifted = Add(halves, wide)
      full = Cast<to = 1>(shifted)
      out_sample = Mul(full, timestep)
    """
    )
    # ONNX Runtime adds halves in float, and rounds what crosses
    hoisted = check(graph(body, f"{RATES}, {WEIGHT}"), tolerance=2e-3)
    assert hoisted.prompt is not None
    assert [spec.dtype for spec in hoisted.prompt.outputs.values()] == ["float16"]


def test_a_graph_with_nothing_to_hoist() -> None:
    model = graph("changed = Sin(sample)\n out_sample = Mul(changed, timestep)")
    hoisted = check(model)
    assert hoisted.prompt is None and hoisted.time is None
    assert hoisted.parts("denoiser").keys() == {"denoiser"} and hoisted.counts == {}
    assert hoisted.step.inputs.keys() == {"sample", "timestep"}
    assert [n.op_type for n in hoisted.step.model.graph] == [n.op_type for n in model.graph]


def test_refuses_a_graph_without_a_sample() -> None:
    with pytest.raises(SettingsError, match="no input 'latents', only sample, timestep"):
        hoist(graph("out_sample = Mul(sample, timestep)"), step_inputs=("latents",))


@pytest.mark.thorough
def test_a_controlnet() -> None:
    """The conditioning image is embedded once per prompt, and all outputs are equal."""
    pytest.importorskip("diffusers", exc_type=ImportError)
    hoisted = check(controlnet(), 1e-4)
    assert hoisted.prompt is not None and hoisted.time is not None
    assert "controlnet_cond" in hoisted.prompt.inputs
    assert "Conv" in {node.op_type for node in hoisted.prompt.model.graph}
    assert "float32[batch, 32, latent_height, latent_width]" in {
        str(spec) for spec in hoisted.prompt.outputs.values()
    }
    assert not {"controlnet_cond", "encoder_hidden_states", "timestep"} & hoisted.step.inputs.keys()


def controlnet() -> Any:
    """Export a small ControlNet."""
    import torch
    from diffusers import ControlNetModel

    from latentforge.export.onnx import _name_nodes, _quiet

    class Flat(torch.nn.Module):
        """ControlNet that returns a flat tuple."""

        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, sample: Any, timestep: Any, states: Any, image: Any) -> Any:
            blocks, mid = self.inner(sample, timestep, states, image, return_dict=False)
            return (*blocks, mid)

    torch.manual_seed(0)
    model = ControlNetModel(
        in_channels=4,
        down_block_types=("CrossAttnDownBlock2D",),
        block_out_channels=(32,),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=8,
        conditioning_embedding_out_channels=(8, 16, 16, 16),
    ).eval()
    for parameter in model.parameters():  # the last layer of each branch is initialized with zeros
        torch.nn.init.normal_(parameter, std=0.1)
    batch, height, width = (torch.export.Dim(n) for n in ("batch", "latent_height", "latent_width"))
    sides = {2: height, 3: width}
    with _quiet(), torch.inference_mode():
        program = torch.onnx.export(
            Flat(model),
            (
                torch.randn(2, 4, 8, 8),
                torch.tensor([5.0]),
                torch.randn(2, 3, 16),
                torch.randn(2, 3, 64, 64),
            ),
            input_names=["sample", "timestep", "encoder_hidden_states", "controlnet_cond"],
            dynamo=True,
            opset_version=20,
            dynamic_shapes=[
                {0: batch, **sides},
                {},
                {0: batch},
                {0: batch, 2: 8 * height, 3: 8 * width},
            ],
            verbose=False,
        )
    assert program is not None
    _name_nodes(program.model.graph)
    shapes = {"sample": ["batch", 4, "latent_height", "latent_width"]}
    shapes["controlnet_cond"] = ["batch", 3, "latent_height*8", "latent_width*8"]
    for value in program.model.graph.inputs:
        value.shape = ir.Shape(shapes.get(value.name, value.shape))
    return program.model


# At run time


def test_each_part_runs_as_often_as_it_has_to(both: Both) -> None:
    with load(both("sd")[1], threads=1) as pipe:
        for sampler, evaluations in (("ddim", 3), ("heun", 5)):
            stages = generate(pipe, prompt=PROMPTS, sampler=sampler).timings.stages
            calls = {name: len(times) for name, times in stages.items()}
            assert (calls["denoiser_prompt"], calls["denoiser_time"]) == (1, 1)
            assert calls["denoiser"] == evaluations


def test_an_unplanned_timestep_is_computed_and_cached(both: Both) -> None:
    whole, cut = both("sd")
    rng = np.random.default_rng(0)
    sample = rng.standard_normal((2, 4, 16, 16)).astype(np.float32)
    results, watch = [], Stopwatch()
    for directory in (whole, cut):
        unet = loaded(directory)
        rows = {
            name: rng.standard_normal((2, *spec.shape[1:])).astype(np.float32)
            for name, spec in sorted(loaded(whole).inputs.items())
            if name not in ("sample", "timestep")
        }
        rng = np.random.default_rng(0)
        rng.standard_normal((2, 4, 16, 16))
        conditioned = unet.condition(rows, [999.0, 500.0], watch)
        results.append([conditioned.predict(sample, t) for t in (999.0, 731.5, 731.5, 500.0)])
    for expected, actual in zip(*results, strict=True):
        assert psnr(expected, actual) >= ENOUGH
    assert np.abs(results[0][0] - results[0][1]).max() > 1e-4
    stages = watch.timings().stages
    assert [len(stages[name]) for name in ("denoiser_prompt", "denoiser_time", "denoiser")] == [
        1,
        2,
        8,
    ]


def loaded(directory: Path) -> StepEngines:
    components = Manifest.read(directory).components
    return StepEngines.of(
        {
            name: Engine.load(name, component, directory, {"threads": 1})
            for name, component in components.items()
            if name.startswith("denoiser")
        }
    )


def test_threads_may_share_the_parts(both: Both) -> None:
    with load(both("sd")[1], threads=1) as pipe:
        alone = [latents(pipe, prompt=prompt, steps=4) for prompt in PROMPTS]
        with ThreadPoolExecutor(2) as pool:
            jobs = [pool.submit(latents, pipe, prompt=p, steps=4) for p in PROMPTS * 2]
        for expected, job in zip(alone * 2, jobs, strict=True):
            np.testing.assert_array_equal(job.result(), expected)


def test_the_commands_know_the_parts(both: Both, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(both("bk-sdm")[1], tmp_path / "engines"))
    lines = describe(Manifest.read(directory)).splitlines()
    for name in ("text_encoder", "denoiser_prompt", "denoiser_time", "denoiser"):
        assert any(line.startswith(f"{name}: ") for line in lines)
    with load(directory, threads=1) as pipe:
        assert {"denoiser_prompt", "denoiser_time", "denoiser"} <= pipe.engines.keys()
        assert len(trial(pipe, steps=1).timings.stages["denoiser"]) == 1
        names = {layer.name.partition("/")[0] for layer in pipe.profile(steps=2).layers}
        assert {"denoiser_prompt", "denoiser_time", "denoiser"} <= names
        stages = pipe.benchmark(repetitions=1, steps=2).stages
        assert {"denoiser_prompt", "denoiser_time", "denoiser"} <= stages.keys()
