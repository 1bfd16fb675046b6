"""Participants in processes of their own: taking turns, failing, being compared."""

import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from latentforge.benchmark import benchmark
from latentforge.measure.bench.interleaved import measure, require_all_ok
from latentforge.measure.bench.protocol import BenchJob, Participant, Process
from latentforge.measure.bench.statistics import bootstrap_median, medians, ratios
from latentforge.measure.bench.study import noise
from latentforge.measure.bench.summary import summary, told
from latentforge.measure.results import ConfidenceInterval, Results, TimedRun
from latentforge.runtime import machine
from latentforge.runtime.errors import BackendError, SettingsError
from latentforge.runtime.machine import Meter
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.settings import Settings

SETTINGS = Settings(
    prompts=("a cat",), sampler="euler", steps=2, guidance_scale=2.0, guidance_rescale=0.0,
    height=64, width=64, seed=3,
)  # fmt: skip

HEAD = """
import json, sys, time
import numpy as np
job = json.load(open(sys.argv[-1]))
def tell(**message):
    print(json.dumps(message), flush=True)
def note(word):
    with open(job["model"], "a") as log:
        log.write(word + " ")
def paint(value, shape=(1, 3, 8, 8)):
    np.save(job["picture"], np.full(shape, value, np.float32))
"""

SOUND = """
note(NAME + ":load")
tell(ready={"versions": {"library": "1.0"}, "precision": "fp32", "bytes": 12})
for _ in sys.stdin:
    note(NAME)
    paint(0.25)
    tell(total=1.0, stages={"text_encoder": [0.1], "denoiser": [0.2, 0.4], "vae_decoder": [0.1]})
"""

Make = Callable[..., Participant]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A participant of a few lines; all of them write to one log."""

    def made(name: str, body: str = SOUND, **settings: str) -> Participant:
        path = tmp_path / f"{name}.py"
        path.write_text(f"NAME = {name!r}\n{HEAD}{textwrap.dedent(body)}")
        command = (sys.executable, str(path))
        return Participant(name=name, command=command, model=str(tmp_path / "log"), **settings)  # type: ignore[arg-type]

    return made


def test_they_take_turns_and_the_first_run_is_kept_apart(make: Make, tmp_path: Path) -> None:
    found = measure([make("a"), make("b")], SETTINGS, threads=1, repeats=2)
    assert (tmp_path / "log").read_text().split() == ["a:load", "b:load", *"abababab"[:6]]
    for entry in found.entries:
        assert entry.status == "ok" and entry.first is not None and len(entry.runs) == 2
        assert entry.versions == {"library": "1.0"} and entry.file_bytes == 12


def test_one_at_a_time_starts_anew_for_every_turn(make: Make, tmp_path: Path) -> None:
    found = measure([make("a"), make("b")], SETTINGS, threads=1, repeats=2, together=False)
    turn = ["a:load", "a", "a", "b:load", "b", "b"]
    assert (tmp_path / "log").read_text().split() == turn * 2
    assert [len(entry.runs) for entry in found.entries] == [2, 2]
    assert [len(entry.ready_seconds) for entry in found.entries] == [2, 2]


def test_stages_add_up_to_the_whole(make: Make) -> None:
    (entry,) = measure([make("a")], SETTINGS, threads=1, repeats=1).entries
    seconds = entry.median
    assert seconds["denoiser"] == pytest.approx(0.6) and seconds["denoiser step"] == pytest.approx(
        0.3
    )
    assert seconds["sampler"] == pytest.approx(1.0 - 0.6 - 0.2)
    assert entry.peak_memory and entry.peak_memory > 1e6


def test_the_picture_decides_the_class(make: Make) -> None:
    other = SOUND.replace("paint(0.25)", "paint(-0.25)")
    near = SOUND.replace("paint(0.25)", "paint(0.2501)")
    larger = SOUND.replace("paint(0.25)", "paint(0.25, (1, 3, 16, 16))")
    nan = SOUND.replace("paint(0.25)", "paint(float('nan'))")
    participants = [make("a"), make("other", other), make("near", near), make("nan", nan)]
    participants += [make("larger", larger), make("rounds", near, unaccelerated=False)]  # type: ignore[arg-type]
    found = measure(participants, SETTINGS, threads=1, repeats=1)
    kinds = {entry.name: entry.speed_class for entry in found.entries}
    assert kinds == {"a": "A", "other": "B", "near": "A", "nan": "B", "larger": None, "rounds": "B"}
    assert found.entries[-2].psnr is None


FAILURES = {
    "dies while loading": ("raise RuntimeError('no weights')", "failed", "no weights"),
    "says why": ("tell(error='too small'); sys.exit(1)", "failed", "too small"),
    "is missing": ("tell(missing='no module named x')", "missing", "no module named x; pip"),
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
    "chatters": ("print('hello')", "failed", "no answer"),
    "answers beside the point": ("tell(total=1.0)", "failed", "not ready"),
    "dies at work": (
        "tell(ready={})\nfor line in sys.stdin:\n    raise MemoryError('at work')",
        "failed",
        "at work",
    ),
}


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("failure", FAILURES)
def test_who_fails_is_an_entry_and_the_others_go_on(
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


def test_an_interpreter_that_is_none_is_an_entry_too(make: Make) -> None:
    absent = replace(make("b"), command=("/no/such/python", "x.py"))
    found = measure([make("a"), absent], SETTINGS, threads=1, repeats=1)
    assert found.entries[1].status == "failed" and "/no/such" in found.entries[1].message


def test_without_a_reference_the_others_still_have_times(make: Make) -> None:
    found = measure([make("a", "sys.exit('gone')"), make("b")], SETTINGS, threads=1, repeats=1)
    assert found.entries[1].median["total"] == 1.0
    assert found.entries[1].ratio == {} and found.entries[1].psnr is None


def test_no_answer_is_waited_for_so_long(make: Make, tmp_path: Path) -> None:
    job = tmp_path / "job.json"
    BenchJob(model=str(tmp_path / "log"), settings=SETTINGS, threads=1, picture="").write(job)
    with pytest.raises(BackendError, match="no answer within"):
        Process(make("a", "time.sleep(60)"), job, threads=1, patience=0.3)


def test_what_it_started_ends_with_it(make: Make, tmp_path: Path) -> None:
    body = """
    import subprocess
    child = subprocess.Popen(["sleep", "300"])
    note(str(child.pid))
    """ + textwrap.indent(SOUND, "    ")
    measure([make("a", body)], SETTINGS, threads=1, repeats=1)
    pid = (tmp_path / "log").read_text().split()[0]
    status = Path(f"/proc/{pid}/status")
    assert not status.exists() or "State:\tZ" in status.read_text()


def test_an_interrupt_amid_its_start_leaves_no_process(
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
        Process(make("a", "time.sleep(60)"), job, threads=1)
    assert started[0].returncode == -signal.SIGKILL


def test_a_conversion_is_not_part_of_the_load(make: Make) -> None:
    body = "time.sleep(0.4); tell(prepared=0.4)" + SOUND
    (entry,) = measure([make("a", body)], SETTINGS, threads=1, repeats=1).entries
    assert entry.prepare_seconds == 0.4
    whole = measure([make("b", "time.sleep(0.4)" + SOUND)], SETTINGS, threads=1, repeats=1)
    assert entry.ready_seconds[0] < whole.entries[0].ready_seconds[0]


def test_job_round_trip(tmp_path: Path) -> None:
    job = BenchJob(model="m", settings=SETTINGS, threads=2, picture="p", scheduler={"name": "X"})
    job.write(tmp_path / "job.json")
    assert BenchJob.read(str(tmp_path / "job.json")) == job


# statistics


def runs(*totals: float) -> list[TimedRun]:
    return [TimedRun(seconds={"total": total}) for total in totals]


def test_ratios_are_paired() -> None:
    """A machine that slows down tenfold on the way changes no ratio of neighbours."""
    drift = np.geomspace(1, 10, 9)
    found = ratios(runs(*(3 * drift)), runs(*drift))["total"]
    assert (found.value, found.low, found.high) == pytest.approx((3, 3, 3))


def test_the_interval_covers_the_median_as_often_as_it_says() -> None:
    """Medians of 15 draws of a known distribution, 300 times; 95 % within what chance allows."""
    generator = np.random.default_rng(1)
    hits = 0
    for _ in range(300):
        found = bootstrap_median(list(generator.lognormal(0.0, 0.5, 15)))
        assert found.low is not None and found.high is not None
        hits += found.low <= 1.0 <= found.high
    assert 0.90 <= hits / 300 <= 1.0


def test_two_values_tell_nothing_of_their_spread() -> None:
    assert bootstrap_median([1.0, 2.0]) == ConfidenceInterval(value=1.5)


def test_medians_have_joules_where_every_run_has() -> None:
    some = [
        TimedRun(seconds={"total": 1.0}, joules=5.0),
        TimedRun(seconds={"total": 3.0}, joules=7.0),
    ]
    assert medians(some) == {"total": 2.0, "joules": 6.0}
    assert medians([*some, TimedRun(seconds={"total": 9.0})]) == {"total": 3.0}
    assert medians([]) == {}


def test_ratios_are_told_with_what_they_are_worth() -> None:
    assert told(ConfidenceInterval(value=2.0)) == "2.00x"
    assert told(ConfidenceInterval(value=2.0, low=1.9, high=2.1)) == "2.00x (1.90 to 2.10)"
    assert "no difference" in told(ConfidenceInterval(value=1.1, low=0.9, high=1.2))
    assert "too wide" in told(ConfidenceInterval(value=2.0, low=1.5, high=2.5))


# the machine


def powercap(root: Path, name: str, kind: str, energy: int, most: int = 1000) -> Path:
    folder = root / name
    folder.mkdir()
    (folder / "name").write_text(f"{kind}\n")
    (folder / "energy_uj").write_text(str(energy))
    (folder / "max_energy_range_uj").write_text(str(most))
    return folder


def test_rapl_counts_packages_and_wraps(tmp_path: Path) -> None:
    package = powercap(tmp_path, "intel-rapl:0", "package-0", 900_000_000, most=1_000_000_000)
    powercap(tmp_path, "intel-rapl:0:0", "core", 5)
    powercap(tmp_path, "intel-rapl:1", "psys", 5)
    (meter,) = machine._rapl(tmp_path)
    before = meter.read()
    (package / "energy_uj").write_text("950000000")
    assert meter.since(before) == pytest.approx(50)
    (package / "energy_uj").write_text("100000000")
    assert meter.since(before) == pytest.approx(200)


def test_energy_is_summed_and_absent_without_meters() -> None:
    assert machine.joules([1.5, 2.0]) == 3.5
    assert machine.joules([]) is None
    assert Meter("m", lambda: 7.0).since(3.0) == 4.0


def test_memory_of_another_process() -> None:
    assert machine.peak_memory() > machine.resident_memory() * 0.5 > 1e6
    assert machine.peak_memory(1) > 0
    assert machine.peak_memory(2**22 + 1) == 0
    assert {"cpu", "cores", "system", "memory"} <= machine.described().keys()


# engines


def test_engines_against_themselves(tiny_engines: Path, tmp_path: Path) -> None:
    results = benchmark(
        [tiny_engines], request={"steps": 2}, batches=(1, 2), sizes=(128,), layers=True, repeats=2
    )
    (entry,) = results.entries
    assert entry.role == "reference" and entry.speed_class == "A" and entry.psnr == 200
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


def test_directories_of_one_name_are_told_apart(tiny_engines: Path, tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "engines").symlink_to(tiny_engines, target_is_directory=True)
    paths = [tmp_path / "x" / "engines", tmp_path / "y" / "engines"]
    results = benchmark([*paths, paths[0]], request={"steps": 1}, repeats=1)
    assert len({entry.name for entry in results.entries}) == 3
    assert all(entry.status == "ok" for entry in results.entries)


@pytest.mark.parametrize("repeats", [0, -1, 1001])
def test_refuses_repeats_out_of_range(tiny_engines: Path, repeats: int) -> None:
    with pytest.raises(SettingsError, match="1 to 1000"):
        benchmark([tiny_engines], repeats=repeats)


def test_noise_is_what_torch_draws(tiny_engines: Path) -> None:
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
