"""Peers' side of a benchmark, and what their programs do with a checkpoint.

Tests marked ``peers`` run the real software, in environments that benchmarks/peers.py creates.
"""

import ast
import importlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import avx2
import numpy as np
import onnxruntime
import peers
import pytest

from latentforge.benchmark import diffusers_scheduler
from latentforge.export.demo import CHECKPOINT as DEMO
from latentforge.measure.bench.participant_process import MissingError, ParticipantProcess
from latentforge.measure.bench.protocol import BenchJob
from latentforge.measure.peers import PEERS, participant
from latentforge.measure.results import BenchResult, ConfidenceInterval, Results
from latentforge.runtime.errors import BackendError, SettingsError
from latentforge.runtime.image import psnr, to_array
from latentforge.runtime.rng import Generator
from latentforge.runtime.settings import Settings

HERE = Path(__file__).parents[2] / "measure" / "peers"
FOREIGN = [name for name, peer in PEERS.items() if peer.is_foreign]
SETTINGS = Settings(
    prompts=("a red apple on a blue background",),
    sampler="ddim",
    steps=4,
    guidance_scale=1.5,
    guidance_rescale=0.0,
    height=64,
    width=64,
    seed=3,
)

SCRIPT = """
import ctypes, os, sys, time
sys.path.insert(0, {here!r})
import numpy as np
from serving import LoadedModel, serve

def convert(checkpoint, target):
    print("converting")
    (target / "half").write_text("")
    if {convert!r} == "sleep":
        time.sleep(600)
    if {convert!r} == "fail":
        raise ValueError("no such\\nlayer")
    (target / "half").rename(target / "whole")

def load(job, directory):
    print("print")
    os.write(1, b"write")
    ctypes.CDLL(None).puts(b"puts")
    assert (directory / "whole").is_file() or not {convert!r}
    {load}
    def generate(stages):
        os.write(1, b"write")
        {generate}
        stages["denoiser"] = [0.25, 0.5]
        return np.full((1, 3, 8, 8), job.settings["seed"], np.float32)
    return LoadedModel(generate=generate, versions={{"it": "1.0"}}, precision="fp32", bytes=12)

serve(load, convert if {convert!r} else None)
"""


def script(
    folder: Path, *, convert: str = "", load: str = "pass", generate: str = "pass"
) -> list[str]:
    path = folder / "script.py"
    path.write_text(SCRIPT.format(here=str(HERE), convert=convert, load=load, generate=generate))
    return [sys.executable, str(path)]


def job(
    folder: Path,
    *,
    model: Path | str = DEMO,
    settings: Settings = SETTINGS,
    scheduler: Mapping[str, Any] | None = None,
    files: Path | None = None,
) -> Path:
    latent = settings.height // 4, settings.width // 4
    np.save(folder / "noise.npy", Generator(settings.seed).randn((settings.count, 4, *latent)))
    files = files or folder / "files"
    files.mkdir(exist_ok=True)
    path = folder / "job.json"
    BenchJob(
        model=str(model),
        settings=settings,
        threads=1,
        picture=str(folder / "picture.npy"),
        noise=str(folder / "noise.npy"),
        folder=str(files),
        scheduler=scheduler or {},
    ).write(path)
    return path


def answers(command: list[str], path: Path, requests: str = "") -> tuple[int, list[dict[str, Any]]]:
    """Return the exit status and the messages on standard output, each of which must be JSON."""
    ended = subprocess.run([*command, str(path)], input=requests, capture_output=True, text=True)
    return ended.returncode, [json.loads(line) for line in ended.stdout.splitlines()]


# The protocol


def test_it_is_ready_then_runs_once_per_line(tmp_path: Path) -> None:
    status, (ready, *runs) = answers(script(tmp_path), job(tmp_path), "\n\n")
    assert status == 0
    assert ready == {"ready": {"versions": {"it": "1.0"}, "precision": "fp32", "bytes": 12}}
    assert [run["stages"] for run in runs] == [{"denoiser": [0.25, 0.5]}] * 2
    assert all(0 < run["total"] < 5 for run in runs)
    assert (np.load(tmp_path / "picture.npy") == SETTINGS.seed).all()


def test_errors_of_loading_and_running_are_one_line(tmp_path: Path) -> None:
    for part in ("load", "generate"):
        command = script(tmp_path, **{part: "raise ValueError('two\\nlines')"})
        status, messages = answers(command, job(tmp_path), "\n")
        assert status == 1 and messages[-1] == {"error": "two lines"}


def test_a_library_that_is_not_installed_is_missing(tmp_path: Path) -> None:
    command = script(tmp_path, load="import no_such_library.part")
    _, messages = answers(command, job(tmp_path))
    assert messages == [{"missing": "no_such_library is not installed in its environment"}]


def test_a_checkpoint_is_converted_once(tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(DEMO, tmp_path / "checkpoint"))
    command, path = script(tmp_path, convert="work"), job(tmp_path, model=checkpoint)
    _, (prepared, ready) = answers(command, path)
    assert prepared["prepared"] > 0 and "ready" in ready
    assert "ready" in answers(command, path)[1][0]
    (checkpoint / "model_index.json").write_text("{}")
    assert "prepared" in answers(command, path)[1][0]


def test_a_failed_conversion_has_a_reason(tmp_path: Path) -> None:
    for _ in range(2):  # the incomplete result is not loaded
        _, messages = answers(script(tmp_path, convert="fail"), job(tmp_path))
        assert messages == [{"error": "no such layer"}]


def test_the_result_of_a_killed_conversion_is_not_loaded(tmp_path: Path) -> None:
    path = job(tmp_path)
    command = [*script(tmp_path, convert="sleep"), str(path)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    while not list((tmp_path / "files").rglob("half")):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    _, messages = answers(script(tmp_path, convert="work"), path)
    assert [*messages[0], *messages[1]] == ["prepared", "ready"]


# The table and the programs


def test_every_peer_has_a_program() -> None:
    assert list(PEERS)[0] == "eager"
    assert set(FOREIGN) == set(peers.ENVIRONMENTS)
    for name in PEERS:
        peer = participant(name, DEMO, python="/there/python")
        assert (peer.name, peer.command[0]) == (name, "/there/python")
        launcher, program = peer.command[1:3]
        assert Path(launcher).is_file()
        assert Path(program).is_file() or find_spec(program) is not None
        assert peer.model == str(DEMO.resolve()) and peer.install.startswith("pip install '")
    message = "no peer 'sdcpp': did you mean 'sd-cpp'\\? choose from eager, compile"
    with pytest.raises(SettingsError, match=message):
        participant("sdcpp", DEMO)


def test_samplers_have_a_diffusers_scheduler() -> None:
    """With the options that StableDiffusionPipeline corrects in older checkpoints."""
    assert diffusers_scheduler(DEMO, "dpmpp_2m_karras", 20) == {
        "name": "DPMSolverMultistepScheduler",
        "options": {
            "steps_offset": 1,
            "clip_sample": False,
            "algorithm_type": "dpmsolver++",
            "use_karras_sigmas": True,
            "use_exponential_sigmas": False,
            "use_beta_sigmas": False,
            "use_lu_lambdas": False,
        },
    }
    squeezed = diffusers_scheduler(DEMO, "squeezed_11", 8)
    assert squeezed["timesteps"][0] == 998
    assert squeezed["timesteps"] == sorted(squeezed["timesteps"], reverse=True)


def test_the_table_imports_nothing_heavy() -> None:
    program = "import latentforge.measure.peers, sys; print(*sys.modules)"
    loaded = set(subprocess.check_output([sys.executable, "-c", program], text=True).split())
    assert "latentforge.measure.peers" in loaded
    assert not loaded & {"torch", "diffusers", "transformers", "onnx"}


def test_programs_run_without_latentforge() -> None:
    """No program has the name of a library, which it would hide from its siblings."""
    programs = [path for path in HERE.glob("*.py") if path.name != "__init__.py"]
    own = {path.stem for path in programs}
    assert len(own) == 8
    imported = {name for path in programs for name in imports(path)}
    assert "latentforge" not in imported and "optimum" in imported
    assert own & imported == {"older_layout", "openvino_model", "serving", "through_diffusers"}


def imports(path: Path) -> set[str]:
    """Return the top-level modules that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_peer_that_is_not_installed_is_missing(name: str, tmp_path: Path) -> None:
    library = "stable_diffusion_cpp" if name == "sd-cpp" else "optimum"
    if importlib.util.find_spec(library):
        pytest.skip(f"{library} is installed here")
    scheduler = diffusers_scheduler(DEMO, "ddim", 4)
    peer = participant(name, DEMO, scheduler=scheduler)
    with pytest.raises(MissingError, match=f"{library} is not installed"):
        ParticipantProcess(peer, job(tmp_path, scheduler=scheduler), threads=1)


# Conversion of checkpoints


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that imports a peer's program as its siblings do."""
    monkeypatch.syspath_prepend(str(HERE))
    return importlib.import_module


def test_names_get_the_prefix_that_published_checkpoints_have(program: Any, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    link = program("older_layout").link
    original = Path(shutil.copytree(DEMO, tmp_path / "original"))
    (original / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    link(original, tmp_path / "once")
    link(tmp_path / "once", tmp_path / "twice")
    before = safetensors.load_file(DEMO / "text_encoder" / "model.safetensors")
    for folder in ("once", "twice"):
        after = safetensors.load_file(tmp_path / folder / "text_encoder" / "model.safetensors")
        assert after.keys() == {f"text_model.{name}" for name in before}
        for name, values in before.items():
            assert np.array_equal(after[f"text_model.{name}"], values)
    assert not (tmp_path / "once" / "text_encoder" / "model.safetensors").is_symlink()
    assert (tmp_path / "twice" / "text_encoder" / "model.safetensors").is_symlink()
    unet = Path("unet") / "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "twice" / unet).resolve() == (original / unet).resolve()
    assert not list(tmp_path.glob("once/**/*.bin"))


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_noise_levels_given_to_sd_cpp(name: str, spacing: str, program: Any) -> None:
    diffusers = pytest.importorskip("diffusers", exc_type=ImportError)
    config = {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "steps_offset": 1,
        "timestep_spacing": spacing,
    }
    if name == "DDIMScheduler":
        config |= {"set_alpha_to_one": False}
    scheduler = getattr(diffusers, name)(**config)
    scheduler.set_timesteps(7)
    if name == "DDIMScheduler":
        alphas = scheduler.alphas_cumprod[[*scheduler.timesteps.tolist(), 0]].double()
        expected = ((1 - alphas) / alphas).sqrt().tolist()
    else:
        expected = scheduler.sigmas.tolist()
    request = type("Request", (), {"settings": {"steps": 7}, "scheduler": {"name": name}})
    found = program("serve_sd_cpp")._sigmas(request, config)
    assert found == pytest.approx(expected, rel=1e-4)


def test_cosine_betas_given_to_genai(program: Any) -> None:
    diffusers = pytest.importorskip("diffusers", exc_type=ImportError)
    expected = diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2").betas.numpy()
    assert np.allclose(program("serve_openvino_genai")._cosine_betas(1000), expected, rtol=1e-5)


# benchmarks/peers.py


def test_an_environment_is_created_once_and_continued_after_an_interruption(tmp_path: Path) -> None:
    requirements = tmp_path / "empty.txt"
    requirements.write_text("# nothing\n")
    python = peers.environment(requirements, tmp_path / "all")
    assert python == tmp_path / "all" / "empty" / "bin" / "python"
    record = tmp_path / "all" / "empty" / "requirements.txt"
    for unfinished in (False, True):
        if unfinished:
            record.unlink()
        before = record.stat().st_mtime_ns if record.exists() else None
        created = (tmp_path / "all" / "empty" / "pyvenv.cfg").stat().st_mtime_ns
        assert peers.environment(requirements, tmp_path / "all") == python
        assert (record.stat().st_mtime_ns == before) is not unfinished
        assert (tmp_path / "all" / "empty" / "pyvenv.cfg").stat().st_mtime_ns == created


def test_class_b_has_its_own_table() -> None:
    median = {"total": 2.0, "denoiser step": 0.5}
    ratio = {"total": ConfidenceInterval(value=1.5, low=1.25, high=1.75, level=0.9375)}
    results = Results(
        title="t",
        command="c",
        date="d",
        machine={},
        entries=(
            BenchResult(name="eager", role="reference", speed_class="A", median={"total": 3.0}),
            BenchResult(
                name="same", role="engines", speed_class="A", median=median, ratio=ratio, psnr=50.0
            ),
            BenchResult(
                name="other", role="peer", speed_class="B", median=median, peak_memory=10**9
            ),
            BenchResult(name="broken", role="peer", status="failed", message="why"),
        ),
    )
    same, other = peers.table(results).split("Class B, images that differ from the reference's:")
    rows = [line.split(" | ") for line in same.strip().splitlines()]
    assert len({len(row) for row in (rows[0], *rows[2:])}) == 1
    assert [row[0] for row in rows[2:]] == ["| same", "| eager"]
    assert "1.50× (1.25–1.75, 93.8 %)" in rows[2] and rows[2][-1] == "50.0 |"
    assert "| other |" in other and "1.00 GB" in other
    assert other.endswith("broken: failed: why")


# With the peers themselves


@pytest.fixture(scope="module")
def eager() -> Any:
    pytest.importorskip("diffusers", exc_type=ImportError)
    from latentforge.export.checkpoint import open_checkpoint
    from latentforge.export.reference.eager import EagerPipeline

    return EagerPipeline(open_checkpoint("demo"))


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the converted checkpoints, shared by all samplers."""
    return tmp_path_factory.mktemp("converted")


@pytest.mark.peers
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("sampler", "guidance"), [("ddim", 1.5), ("euler", 1.5), ("pndm", 1.5), ("ddim", 1.0)]
)
@pytest.mark.parametrize("name", ["optimum-ort", "optimum-openvino", "openvino-genai"])
def test_a_peer_generates_the_reference_image(
    name: str, sampler: str, guidance: float, eager: Any, converted: Path, tmp_path: Path
) -> None:
    python = peers.environment(peers.ENVIRONMENTS[name])
    scheduler = diffusers_scheduler(DEMO, sampler, SETTINGS.steps)
    peer = participant(name, DEMO, scheduler=scheduler, python=str(python))
    settings = replace(SETTINGS, sampler=sampler, guidance_scale=guidance)
    path = job(tmp_path, settings=settings, scheduler=scheduler, files=converted / name)
    process = ParticipantProcess(peer, path, threads=2)
    try:
        run = process.run([])
        assert process.ready["precision"] == "fp32"
    finally:
        process.close()
    assert {
        "text_encoder",
        "denoiser",
        "denoiser step",
        "vae_decoder",
        "total",
    } <= run.seconds.keys()
    expected = to_array(eager(settings).images)
    assert psnr(np.load(tmp_path / "picture.npy"), expected) > 45


@pytest.mark.peers
@pytest.mark.timeout(1800)
def test_sd_cpp_refuses_the_demo(tmp_path: Path) -> None:
    python = peers.environment(peers.ENVIRONMENTS["sd-cpp"])
    scheduler = diffusers_scheduler(DEMO, "ddim", 4)
    peer = participant("sd-cpp", DEMO, scheduler=scheduler, python=str(python))
    with pytest.raises(BackendError, match="this one has blocks of \\[48, 96, 160\\]"):
        ParticipantProcess(peer, job(tmp_path, scheduler=scheduler), threads=2)


# benchmarks/avx2.py

XGETBV, CLEAR, CUT = b"\x0f\x01\xd0", b"\x89\xc0", b"\x24\x1f"


@pytest.mark.parametrize("shift", [b"", b"\x48\xc1\xe2\x20"])
def test_an_answer_of_xgetbv_is_cut(shift: bytes) -> None:
    code = b"\x90" + XGETBV + shift + CLEAR + b"\x90"
    assert avx2.without_avx512(code) == (b"\x90" + XGETBV + shift + CUT + b"\x90", 1)
    assert avx2.without_avx512(b"\x90" + CLEAR + XGETBV) == (b"\x90" + CLEAR + XGETBV, 0)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="of processors that have AVX-512")
def test_the_copy_of_a_library_computes(tmp_path: Path) -> None:
    assert avx2.copy(Path(onnxruntime.__path__[0]), tmp_path) == 2
    program = """
import numpy as np, onnxruntime as ort, onnx.parser, sys
assert ort.__file__.startswith(sys.argv[1]), ort.__file__
text = '<ir_version: 9, opset_import: ["" : 17]> m (float[n,64] a, float[64,k] b) => (float[n,k] c) {c = MatMul(a, b)}'
session = ort.InferenceSession(onnx.parser.parse_model(text).SerializeToString())
a, b = np.random.default_rng(0).normal(size=(2, 64, 64)).astype(np.float32)
assert np.allclose(session.run(None, {"a": a, "b": b})[0], a @ b, atol=1e-4)
"""  # noqa: E501
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, env=environment)


def test_a_library_that_asks_in_another_way_is_refused(tmp_path: Path) -> None:
    package = tmp_path / "openvino"
    (package / "libs").mkdir(parents=True)
    (package / "libs" / "libopenvino_intel_cpu_plugin.so").write_bytes(b"\x90" * 64)
    with pytest.raises(SystemExit, match="no XGETBV in the expected form"):
        avx2.copy(package, tmp_path / "copies")
    assert not (tmp_path / "copies").exists()
