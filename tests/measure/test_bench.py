"""Participants in their own processes: interleaved runs, failures, comparison of images."""

import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Handmade
from msgspec.structs import replace as replace_record

from latentforge.benchmark import BenchRequest, benchmark
from latentforge.measure import energy, hardware
from latentforge.measure.bench.interleaved import measure, require_all_ok
from latentforge.measure.bench.participant_process import ParticipantProcess
from latentforge.measure.bench.protocol import BenchJob, Participant
from latentforge.measure.bench.study import method, noise
from latentforge.measure.bench.summary import speedup_text, summary
from latentforge.measure.results import ConfidenceInterval, Results
from latentforge.runtime import machine
from latentforge.runtime.errors import BackendError, SettingsError
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.settings import Request, Settings

SETTINGS = Settings(
    prompts=("a cat",), sampler="euler", steps=2, guidance_scale=2.0, guidance_rescale=0.0,
    height=64, width=64, seed=3,
)  # fmt: skip

HEAD = """
import json, sys, time
import numpy as np
job = json.load(open(sys.argv[-1]))
def send(**message):
    print(json.dumps(message), flush=True)
def log(word):
    with open(job["model"], "a") as file:
        file.write(word + " ")
def save(value, shape=(1, 3, 8, 8)):
    np.save(job["picture"], np.full(shape, value, np.float32))
"""

WORKING = """
log(NAME + ":load")
send(ready={"versions": {"library": "1.0"}, "precision": "fp32", "bytes": 12})
for _ in sys.stdin:
    log(NAME)
    save(0.25)
    send(total=1.0, stages={"text_encoder": [0.1], "denoiser": [0.2, 0.4], "vae_decoder": [0.1]})
"""

Make = Callable[..., Participant]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Make participants of a few lines, which all write to one log."""

    def make_participant(name: str, body: str = WORKING, **fields: object) -> Participant:
        path = tmp_path / f"{name}.py"
        path.write_text(f"NAME = {name!r}\n{HEAD}{textwrap.dedent(body)}")
        command = (sys.executable, str(path))
        return Participant(name=name, command=command, model=str(tmp_path / "log"), **fields)  # type: ignore[arg-type]

    return make_participant


def test_runs_are_interleaved_and_the_first_is_not_counted(make: Make, tmp_path: Path) -> None:
    found = measure([make("a"), make("b")], SETTINGS, threads=1, repeats=2)
    assert (tmp_path / "log").read_text().split() == ["a:load", "b:load", *"abababab"[:6]]
    for entry in found.entries:
        assert entry.status == "ok" and entry.first is not None and len(entry.runs) == 2
        assert entry.versions == {"library": "1.0"} and entry.file_bytes == 12


def test_one_at_a_time_restarts_for_every_run(make: Make, tmp_path: Path) -> None:
    found = measure([make("a"), make("b")], SETTINGS, threads=1, repeats=2, together=False)
    expected = ["a:load", "a", "a", "b:load", "b", "b"]
    assert (tmp_path / "log").read_text().split() == expected * 2
    assert [len(entry.runs) for entry in found.entries] == [2, 2]
    assert [len(entry.ready_seconds) for entry in found.entries] == [2, 2]


def test_stages_add_up_to_the_total(make: Make) -> None:
    (entry,) = measure([make("a")], SETTINGS, threads=1, repeats=1).entries
    seconds = entry.median
    assert seconds["denoiser"] == pytest.approx(0.6) and seconds["denoiser step"] == pytest.approx(
        0.3
    )
    assert seconds["sampler"] == pytest.approx(1.0 - 0.6 - 0.2)
    assert entry.peak_memory and entry.peak_memory > 1e6


def test_the_image_decides_the_class(make: Make) -> None:
    other = WORKING.replace("save(0.25)", "save(-0.25)")
    near = WORKING.replace("save(0.25)", "save(0.2501)")
    larger = WORKING.replace("save(0.25)", "save(0.25, (1, 3, 16, 16))")
    nan = WORKING.replace("save(0.25)", "save(float('nan'))")
    participants = [make("a"), make("other", other), make("near", near), make("nan", nan)]
    participants += [make("larger", larger), make("rounds", near, same_trajectory=False)]
    found = measure(participants, SETTINGS, threads=1, repeats=1)
    classes = {entry.name: entry.speed_class for entry in found.entries}
    assert classes == {
        "a": "A",
        "other": "B",
        "near": "A",
        "nan": "B",
        "larger": None,
        "rounds": "B",
    }
    assert found.entries[-2].psnr is None


FAILURES = {
    "dies while loading": ("raise RuntimeError('no weights')", "failed", "no weights"),
    "says why": ("send(error='too small'); sys.exit(1)", "failed", "too small"),
    "is missing": ("send(missing='no module named x')", "missing", "no module named x; pip"),
    "is killed": ("import os; os.kill(os.getpid(), 9)", "failed", "memory runs out"),
    "runs out of memory": (
        """
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
        np.ones(1 << 29)
        """,
        "failed",
        "allocate",
    ),
    "prints": ("print('hello')", "failed", "not a JSON object"),
    "answers out of order": ("send(total=1.0)", "failed", "expected 'ready'"),
    "dies while running": (
        "send(ready={})\nfor line in sys.stdin:\n    raise MemoryError('too large')",
        "failed",
        "too large",
    ),
}


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_is_a_result_and_the_others_continue(
    make: Make, failure: str, together: bool
) -> None:
    body, status, words = FAILURES[failure]
    participants = [make("a"), make("b", body, install="pip install x"), make("c")]
    found = measure(participants, SETTINGS, threads=1, repeats=2, together=together)
    first, failed, last = found.entries
    assert (failed.status, failed.runs, failed.speed_class) == (status, (), None)
    assert words in failed.message and "\n" not in failed.message
    assert len(first.runs) == len(last.runs) == 2 and last.ratio["total"].value == 1.0
    with pytest.raises(BackendError, match="^b: "):
        require_all_ok(found)


def test_a_missing_interpreter_is_a_result(make: Make) -> None:
    absent = replace(make("b"), command=("/no/such/python", "x.py"))
    found = measure([make("a"), absent], SETTINGS, threads=1, repeats=1)
    assert found.entries[1].status == "failed" and "/no/such" in found.entries[1].message


def test_times_are_kept_if_the_reference_fails(make: Make) -> None:
    found = measure([make("a", "sys.exit('gone')"), make("b")], SETTINGS, threads=1, repeats=1)
    assert found.entries[1].median["total"] == 1.0
    assert found.entries[1].ratio == {} and found.entries[1].psnr is None


def test_a_missing_answer_times_out(make: Make, tmp_path: Path) -> None:
    job = tmp_path / "job.json"
    BenchJob(model=str(tmp_path / "log"), settings=SETTINGS, threads=1, picture="").write(job)
    with pytest.raises(BackendError, match="no answer within"):
        ParticipantProcess(make("a", "time.sleep(60)"), job, threads=1, timeout=0.3)


def test_children_of_a_participant_end_with_it(make: Make, tmp_path: Path) -> None:
    body = """
    import subprocess
    child = subprocess.Popen(["sleep", "300"])
    log(str(child.pid))
    """ + textwrap.indent(WORKING, "    ")
    measure([make("a", body)], SETTINGS, threads=1, repeats=1)
    pid = (tmp_path / "log").read_text().split()[0]
    status = Path(f"/proc/{pid}/status")
    assert not status.exists() or "State:\tZ" in status.read_text()


def test_an_interrupt_during_the_start_leaves_no_process(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, started, popen = tmp_path / "job.json", [], subprocess.Popen

    def interrupted(*command: object, **options: object) -> object:
        started.append(popen(*command, **options))  # type: ignore[call-overload]
        signal.raise_signal(signal.SIGINT)
        return started[0]

    BenchJob(model=str(tmp_path / "log"), settings=SETTINGS, threads=1, picture="").write(job)
    monkeypatch.setattr(subprocess, "Popen", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ParticipantProcess(make("a", "time.sleep(60)"), job, threads=1)
    assert started[0].returncode == -signal.SIGKILL


def test_the_conversion_is_not_part_of_the_load_time(make: Make) -> None:
    body, claimed = "send(prepared=4000.0)" + WORKING, 4000.0  # longer than any start takes
    start = time.perf_counter()
    (entry,) = measure([make("a", body)], SETTINGS, threads=1, repeats=1).entries
    assert entry.prepare_seconds == claimed
    assert -claimed < entry.ready_seconds[0] < time.perf_counter() - start - claimed


def test_job_round_trip(tmp_path: Path) -> None:
    job = BenchJob(model="m", settings=SETTINGS, threads=2, picture="p", scheduler={"name": "X"})
    job.write(tmp_path / "job.json")
    assert BenchJob.read(str(tmp_path / "job.json")) == job


# the table


def test_speedups_are_printed_with_their_interval_and_what_it_supports() -> None:
    def text(**fields: float) -> str:
        return speedup_text(ConfidenceInterval(**fields))

    assert text(value=2.0, low=1.9, high=2.1, level=0.9375) == "2.00x (1.90–2.10, 93.8 %)"
    assert "no significant difference" in text(value=1.1, low=0.9, high=1.2, level=0.95)
    assert "too wide to quantify" in text(value=2.0, low=1.5, high=2.5, level=0.95)
    assert text(value=2.0) == "2.00x: too few runs to conclude"
    assert text(value=2.0, low=1.9, high=2.1, level=0.75) == (
        "2.00x (1.90–2.10, 75 %): too few runs to conclude"
    )


def test_the_reference_is_not_compared_with_itself(make: Make) -> None:
    measured = measure([make("a"), make("b")], SETTINGS, threads=1, repeats=2)
    assert [entry.psnr for entry in measured.entries] == [None, 200.0]
    results = Results(title="", command="", date="", machine={}, entries=measured.entries)
    reference = replace_record(results.entries[0], role="reference")
    table = summary(replace_record(results, entries=(reference, *results.entries[1:])))
    assert "speedups: 2 runs: 50 % interval, too few to conclude, run 5 or more" in table
    _, first, second, *_ = table.splitlines()
    assert first.endswith("reference") and "dB" not in first and "x" not in first
    assert "identical" in second and "50 %" in second


@pytest.mark.parametrize(("repeats", "words"), [(1, "no confidence"), (3, "75 %"), (6, "96.9 %")])
def test_the_method_names_the_level(repeats: int, words: str) -> None:
    assert words in method(2, repeats, together=True)
    assert "restarted" in method(2, repeats, together=False)


# energy and memory


def powercap(root: Path, name: str, kind: str, microjoules: int, wrap: int = 1000) -> Path:
    folder = root / name
    folder.mkdir()
    (folder / "name").write_text(f"{kind}\n")
    (folder / "energy_uj").write_text(str(microjoules))
    (folder / "max_energy_range_uj").write_text(str(wrap))
    return folder


def test_rapl_meters_count_packages_and_wrap(tmp_path: Path) -> None:
    package = powercap(tmp_path, "intel-rapl:0", "package-0", 900_000_000, wrap=1_000_000_000)
    powercap(tmp_path, "intel-rapl:0:0", "core", 5)
    powercap(tmp_path, "intel-rapl:1", "psys", 5)
    (meter,) = energy._rapl_meters(tmp_path)
    before = meter.read()
    (package / "energy_uj").write_text("950000000")
    assert meter.since(before) == pytest.approx(50)
    (package / "energy_uj").write_text("100000000")
    assert meter.since(before) == pytest.approx(200)


def test_energy_is_summed_and_unknown_without_meters() -> None:
    assert energy.total_joules([1.5, 2.0]) == 3.5
    assert energy.total_joules([]) is None
    assert energy.EnergyMeter("m", lambda: 7.0).since(3.0) == 4.0


def test_memory_of_another_process() -> None:
    assert machine.peak_memory() > machine.resident_memory() * 0.5 > 1e6
    assert machine.peak_memory(1) > 0
    assert machine.peak_memory(2**22 + 1) == 0
    assert {"cpu", "cores", "system", "memory"} <= hardware.describe_machine().keys()


def test_the_instruction_sets_of_a_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = frozenset({"avx2", "fma", "amx_tile", "amx_bf16", "avx512f"})
    monkeypatch.setattr(machine, "cpu_flags", lambda: flags)
    assert hardware.describe_machine()["instructions"] == "AMX-BF16, AVX-512, AVX2"
    monkeypatch.setattr(machine, "cpu_flags", frozenset)
    assert "instructions" not in hardware.describe_machine()


@pytest.mark.parametrize(("variable", "threads"), [("3", 3), ("", hardware.available_cores())])
def test_threads_where_none_are_given(
    monkeypatch: pytest.MonkeyPatch, variable: str, threads: int
) -> None:
    monkeypatch.setenv("LATENTFORGE_THREADS", variable)
    assert hardware.available_threads() == threads


# engines


def test_engines_against_themselves(tiny_engines: Path, tmp_path: Path) -> None:
    request = BenchRequest(
        engines=[tiny_engines],
        settings={"steps": 2},
        batches=(1, 2),
        sizes=(128,),
        layers=True,
        repeats=2,
    )
    results = benchmark(request)
    (entry,) = results.entries
    assert entry.role == "reference" and entry.speed_class == "A" and entry.psnr is None
    assert entry.file_bytes == Manifest.read(tiny_engines).size
    assert {
        "text_encoder",
        "denoiser",
        "denoiser step",
        "vae_decoder",
        "sampler",
    } <= entry.median.keys()
    points = [(p.batch, p.height) for p in results.scaling]
    assert points == [(1, results.settings["height"]), (2, results.settings["height"]), (1, 128)]
    assert all(point.total and point.peak_memory for point in results.scaling)
    (table,) = results.profiles
    assert table.layers[0].seconds >= table.layers[3].seconds
    assert 0.9 * table.total < sum(layer.seconds for layer in table.layers) <= table.total * 1.001
    assert table.layers[0].component in Manifest.read(tiny_engines).components
    results.write(tmp_path / "r.json")
    assert Results.read(tmp_path / "r.json").entries == results.entries
    assert entry.name in summary(results)


def test_directories_of_one_name_get_different_names(tiny_engines: Path, tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "engines").symlink_to(tiny_engines, target_is_directory=True)
    paths = [tmp_path / "x" / "engines", tmp_path / "y" / "engines"]
    request = BenchRequest(engines=[*paths, paths[0]], settings={"steps": 1}, repeats=1)
    results = benchmark(request)
    assert len({entry.name for entry in results.entries}) == 3
    assert all(entry.status == "ok" for entry in results.entries)


BAD_REQUESTS: list[tuple[dict[str, Any], str]] = [
    ({"engines": ()}, "engines must be one or several paths"),
    ({"engines": 3}, "engines must be a tuple, not 3"),
    ({"engines": [3]}, "each of engines must be a path, not 3"),
    ({"repeats": "3"}, "repeats must be an integer, not '3'"),
    ({"repeats": 0}, "repeats must be an integer from 1 to 1000, not 0"),
    ({"repeats": True}, "repeats must be an integer, not True"),
    ({"threads": "2"}, "threads must be an integer"),
    ({"threads": -1}, "threads must be an integer"),
    ({"threads": False}, "threads must be an integer"),
    ({"batches": 3}, "batches must be a tuple, not 3"),
    ({"batches": ["3"]}, "each of batches must be an integer"),
    ({"sizes": [0]}, "each of sizes must be an integer"),
    ({"layers": 1}, "layers must be True or False"),
    ({"settings": 3}, "settings must be a dictionary"),
]


@pytest.mark.parametrize(("options", "message"), BAD_REQUESTS, ids=[m for _, m in BAD_REQUESTS])
def test_a_request_of_other_types(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        BenchRequest(**{"engines": [Path("engines")], **options})


def test_a_request_of_numpy_numbers() -> None:
    points: Any = np.array([1, 2])
    request = BenchRequest(engines="engines", repeats=np.int64(3), batches=points)  # type: ignore[arg-type]
    assert request.engines == (Path("engines"),) and request.batches == (1, 2)


def test_a_seed_for_each_image_is_refused(handmade: Handmade) -> None:
    settings: Request = {"seed": [1, 2], "images_per_prompt": 2}
    with pytest.raises(SettingsError, match="one seed: give one, not a list"):
        benchmark(BenchRequest(engines=[handmade()], settings=settings))


@pytest.mark.parametrize("repeats", [0, -1, 1001])
def test_refuses_repeats_out_of_range(repeats: int) -> None:
    with pytest.raises(SettingsError, match="1 to 1000"):
        BenchRequest(engines=[Path("engines")], repeats=repeats)


def test_noise_equals_torchs(tiny_engines: Path) -> None:
    torch = pytest.importorskip("torch")
    drawn = noise(SETTINGS, Manifest.read(tiny_engines).latent)
    expected = torch.randn(drawn.shape, generator=torch.Generator().manual_seed(3)).numpy()
    assert np.array_equal(drawn, expected)


def test_benchmark_of_one_pipeline_has_inferys_fields(tiny_engines: Path) -> None:
    import latentforge

    with latentforge.load(tiny_engines) as pipe:
        found = pipe.benchmark(batch_size=2, repetitions=2, steps=2)
    assert found.batch_inf_time == pytest.approx(2 * found.sample_inf_time)
    assert found.throughput == pytest.approx(1e3 / found.sample_inf_time)
    assert found.memory >= found.post_inference_memory_used > 0 and found.include_io
    assert found.framework_type == "onnxruntime" and found.framework_version
    assert sum(found.stages[s] for s in ("text_encoder", "denoiser", "vae_decoder")) <= (
        1.5 * found.stages["total"]
    )
