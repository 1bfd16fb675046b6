"""Measured latencies of structures, their table, and their prediction."""

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from latentforge.export.models.searched_structure import Choice, SearchedStructure, Site, list_sites
from latentforge.measure.results import ConfidenceInterval
from latentforge.measure.statistics import spearman
from latentforge.optimize.graph import open_session
from latentforge.optimize.graph_io import DENOISER, load_graph
from latentforge.runtime.errors import ManifestError, ResultsError, SettingsError, TargetError
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.progress import Progress
from latentforge.train.search.latency.measure import (
    LatencyPlan,
    count_costs,
    measure_plan,
    random_structures,
)
from latentforge.train.search.latency.model import LatencyModel, fit_latency
from latentforge.train.search.latency.records import Latency, StepSetting
from latentforge.train.search.latency.table import LatencyTable
from latentforge.train.search.surgery import restructure
from latentforge.train.search.variants import WHOLE, Variants

SETTING = StepSetting(
    engines="0" * 64,
    target="cpu",
    recipe="fp32",
    height=64,
    width=64,
    rows=2,
    threads=2,
    processor="a processor",
    gpu="",
    libraries={"onnxruntime": "1.0"},
)


def latency(ratio: float, deviation: float = 0.0) -> Latency:
    low, high = ratio * (1 - 2 * deviation), ratio * (1 + 2 * deviation)
    interval = ConfidenceInterval(value=ratio, low=low, high=high, level=0.95)
    return Latency(seconds=ratio, whole=1.0, ratio=interval)


def config(checkpoint: Path) -> dict[str, object]:
    return dict(json.loads((checkpoint / "unet" / "config.json").read_text()))


@pytest.fixture(scope="module")
def sites(tiny_checkpoint: Path) -> tuple[Site, ...]:
    return list_sites(config(tiny_checkpoint))


def test_a_latency_is_the_median_of_turns_that_agree() -> None:
    turns = [(1.0, 0.5), (1.01, 0.505), (1.0, 0.5), (0.99, 0.5), (1.02, 0.51)]
    measured = Latency.of(turns)
    assert (measured.whole, measured.seconds, measured.ratio.value) == (1.0, 0.5, 0.5)
    assert measured.is_precise


def test_other_load_that_meets_both_sides_of_most_turns_cancels_out() -> None:
    turns = [(1.0, 0.5), (1.5, 0.75), (1.6, 0.8), (1.0, 1.4), (3.0, 0.5), (2.0, 1.0), (1.7, 0.85)]
    measured = Latency.of(turns)
    assert measured.ratio.value == 0.5 and not measured.is_precise
    assert measured.seconds / measured.whole == pytest.approx(0.5)
    low, high = measured.ratio.low, measured.ratio.high
    assert low is not None and high is not None and low < 0.5 < high


def test_a_single_turn_has_no_interval() -> None:
    measured = Latency.of([(1.0, 0.5)])
    assert measured.ratio == ConfidenceInterval(value=0.5) and not measured.is_precise


def test_a_table_is_whole_after_each_measurement(tmp_path: Path, sites: tuple[Site, ...]) -> None:
    first, second = random_structures(sites, 2, seed=0)
    path = tmp_path / "latency.json"
    LatencyTable(path, SETTING).add(first, latency(0.5))
    table = LatencyTable(path, SETTING)
    assert first in table and second not in table and table[first] == latency(0.5)
    table.add(second, latency(0.25))
    assert list(LatencyTable(path, SETTING)) == [first, second]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threads": 1}, r"threads 2 \(here 1\)"),
        ({"processor": "another"}, r"processor a processor \(here another\)"),
        ({"engines": "1" * 64}, "engines 0"),
        ({"libraries": {"onnxruntime": "1.1"}}, r"onnxruntime 1.0 \(here 1.1\)"),
        ({"libraries": {}}, r"onnxruntime 1.0 \(here none\)"),
        ({"gpu": "a GPU"}, r"gpu none \(here a GPU\)"),
        ({"height": 128}, r"height 64 \(here 128\)"),
    ],
)
def test_a_table_of_another_setting_is_refused(
    tmp_path: Path, sites: tuple[Site, ...], changes: dict[str, object], message: str
) -> None:
    path = tmp_path / "latency.json"
    LatencyTable(path, SETTING).add(WHOLE, latency(1.0))
    with pytest.raises(SettingsError, match=message):
        LatencyTable(path, msgspec.structs.replace(SETTING, **changes))


@pytest.mark.parametrize("content", ["", "{}", "[" * 100_000, '{"format": 2}', "\x00"])
def test_a_damaged_table_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "latency.json"
    path.write_text(content)
    with pytest.raises(ResultsError, match="delete it to measure again"):
        LatencyTable(path, SETTING)


@pytest.mark.parametrize("figure", ["0.0", "-1.0", "1e999"])
def test_figures_that_no_clock_gives_are_refused(tmp_path: Path, figure: str) -> None:
    path = tmp_path / "latency.json"
    LatencyTable(path, SETTING).add(WHOLE, latency(0.125))
    path.write_text(path.read_text().replace("0.125", figure))
    with pytest.raises(ResultsError):
        LatencyTable(path, SETTING)


def test_random_structures_are_valid_different_and_cover_the_range(
    sites: tuple[Site, ...],
) -> None:
    structures = random_structures(sites, 40, seed=0)
    assert len(set(structures)) == 40
    for structure in structures:
        structure.check(sites)
    counts = [len(structure.choices) for structure in structures]
    assert min(counts) <= 2 and max(counts) >= 0.7 * len(sites)
    assert structures == random_structures(sites, 40, seed=0) != random_structures(sites, 40, 1)


@dataclass(frozen=True)
class Simulated:
    """Stand-in for engines: latencies by a formula."""

    sites: Sequence[Site]
    signatures: dict[str, str]
    ratio: Callable[[SearchedStructure], float]

    def table(self, path: Path, plan: LatencyPlan) -> LatencyTable:
        table = LatencyTable(path, SETTING)
        for structure in plan.structures:
            table.add(structure, latency(self.ratio(structure)))
        return table

    def plan(self) -> LatencyPlan:
        return LatencyPlan.of(self, fitted=40, held_out=20)  # type: ignore[arg-type]


PARTS: dict[Choice, tuple[str, ...]] = {
    "no_self_attention": ("cross", "ff"),
    "no_feed_forward": ("self", "cross"),
    "cross_attention": ("cross",),
    "drop": (),
}


def simulated(
    sites: Sequence[Site], *, crowding: float = 0.0, noise: float = 0.0, module: float = 0.1
) -> Simulated:
    """Return latencies of what is left, which takes less time the less it is."""
    source = random.Random(1)
    costs = {(s.name, part): source.random() for s in sites for part in (*HALVES, *ATTENTION)}
    blocks = [s.name for s in sites if s.kind == "transformer_block"]
    modules = {name.partition(".transformer_blocks.")[0] for name in blocks}

    def load(structure: SearchedStructure) -> float:
        gone = structure.removed(sites)
        left = 2.0 + sum(
            costs[site.name, part]
            for site in sites
            if site.name not in gone
            for part in parts_left(site, structure.choice(site.name))
        )
        kept = {name.partition(".transformer_blocks.")[0] for name in blocks if name not in gone}
        return left + module * len(modules & kept)

    whole = load(WHOLE)

    def ratio(structure: SearchedStructure) -> float:
        share = load(structure) / whole
        other = random.Random(structure.key).gauss(0, noise)
        return share * (1 - crowding * (1 - share)) * math.exp(other)

    return Simulated(sites, {site.name: site.name for site in sites}, ratio)


HALVES, ATTENTION = ("half", "rest"), ("self", "cross", "ff")


def parts_left(site: Site, choice: Choice) -> Sequence[str]:
    """Return the names of simulated costs that a choice leaves."""
    if choice == "keep":
        return ATTENTION if site.kind == "transformer_block" else HALVES
    return ("half",) if choice == "half" else PARTS[choice]


def fitted(engines: Simulated, path: Path, plan: LatencyPlan | None = None) -> LatencyModel:
    plan = plan or engines.plan()
    return fit_latency(engines.table(path / "t", plan), plan, engines.sites, engines.signatures)


def test_latencies_that_add_up_are_predicted(tmp_path: Path, sites: tuple[Site, ...]) -> None:
    engines = simulated(sites)
    model = fitted(engines, tmp_path)
    assert model.mean_error < 0.01 and model.errors.is_good
    for structure in random_structures(sites, 10, seed=7):
        assert model.seconds(structure) == pytest.approx(engines.ratio(structure), rel=0.04)
    assert model.seconds(WHOLE) == pytest.approx(model.whole, rel=1e-3)
    assert model.saved(sites[0].name, "keep") == pytest.approx(0.0, abs=1e-4)


def test_savings_add_up_where_nothing_crowds(tmp_path: Path, sites: tuple[Site, ...]) -> None:
    model = fitted(simulated(sites), tmp_path)
    for structure in random_structures(sites, 10, seed=7):
        parts = sum(model.saved(*item) for item in structure.choices.items())
        assert model.seconds(structure) == pytest.approx(model.whole - parts, rel=1e-3)


def test_parts_that_are_faster_with_less_beside_them_are_predicted(
    tmp_path: Path, sites: tuple[Site, ...]
) -> None:
    engines = simulated(sites, crowding=0.3)
    model = fitted(engines, tmp_path)
    assert 0.2 <= model.crowding <= 0.3 and model.mean_error < 0.015
    others = random_structures(sites, 40, seed=7)
    measured, predicted = map(engines.ratio, others), map(model.seconds, others)
    assert spearman([*measured], [*predicted]) > 0.99


def test_noise_is_not_explained(tmp_path: Path, sites: tuple[Site, ...]) -> None:
    model = fitted(simulated(sites, crowding=0.3, noise=0.02), tmp_path)
    truth = simulated(sites, crowding=0.3)
    others = random_structures(sites, 50, seed=9)
    errors = [abs(model.seconds(s) / model.whole / truth.ratio(s) - 1) for s in others]
    assert np.mean(errors) < 0.03 and model.errors.is_good
    assert min(model.costs.values()) >= 0.0


def test_a_measurement_counts_by_its_precision(tmp_path: Path, sites: tuple[Site, ...]) -> None:
    engines, plan = simulated(sites), simulated(sites).plan()
    table = engines.table(tmp_path / "t", plan)
    errors = []
    for deviation in (0.0, 0.2):
        for structure in plan.fitted[::4]:  # disturbed by other load
            table.add(structure, latency(1.4 * engines.ratio(structure), deviation))
        errors.append(fit_latency(table, plan, sites, engines.signatures).mean_error)
    assert errors[1] < 0.02 < 0.5 * errors[0]


def test_as_many_structures_as_costs_predict(tmp_path: Path, sites: tuple[Site, ...]) -> None:
    engines = simulated(sites, noise=0.01)
    costs = count_costs(engines)  # type: ignore[arg-type]
    assert costs == sum(len(site.choices) - 1 for site in sites)
    plan = LatencyPlan.of(engines, fitted=costs, held_out=20)  # type: ignore[arg-type]
    assert fitted(engines, tmp_path, plan).errors.is_good


def test_a_model_of_nothing_is_not_good(tmp_path: Path, sites: tuple[Site, ...]) -> None:
    engines = simulated(sites)
    plan = LatencyPlan.of(engines, fitted=4, held_out=0)  # type: ignore[arg-type]
    model = fitted(engines, tmp_path, plan)
    assert not model.crowding and not model.errors.is_good


def test_a_unet_of_few_structures_has_no_more(tmp_path: Path, sites: tuple[Site, ...]) -> None:
    few = [site for site in sites if site.kind == "transformer_block"][:1]
    structures = random_structures(few, 40, seed=0)
    assert {s.choice(few[0].name) for s in structures} == set(few[0].choices) - {"keep", "drop"}


def test_a_bad_prediction_says_so(tmp_path: Path, sites: tuple[Site, ...]) -> None:
    model = fitted(simulated(sites, noise=0.4), tmp_path)
    assert not model.errors.is_good and "trust measured latencies alone" in str(model.errors)


def test_a_module_without_transformer_blocks_saves_its_projections(
    tmp_path: Path, tiny: Callable[[str], Path]
) -> None:
    deep = list_sites(config(tiny("sdxl")))
    model = fitted(simulated(deep, module=0.5), tmp_path)
    assert model.errors.is_good and model.mean_error < 0.02
    name = "mid_block.attentions.0.transformer_blocks.0"
    both = {name: "drop", name[:-1] + "1": "drop"}
    seconds = model.seconds(SearchedStructure.of(both, deep))
    saved = sum(model.saved(*item) for item in both.items())
    assert saved == pytest.approx(model.whole - seconds, rel=1e-3)


@pytest.fixture
def variants(tiny_engines: Path, tmp_path: Path, sites: tuple[Site, ...]) -> Variants:
    return Variants(tiny_engines, "cpu", "fp32", tmp_path, sites=sites)


def test_deployed_engines_compute_what_the_graph_does(
    variants: Variants, tiny_engines: Path, sites: tuple[Site, ...]
) -> None:
    [structure] = random_structures(sites, 1, seed=3)
    random = np.random.default_rng(0)
    sample = random.standard_normal((2, 4, 16, 16), np.float32)
    context = random.standard_normal((2, 24, 32), np.float32)
    feeds = {"sample": sample, "encoder_hidden_states": context}
    model = load_graph(DENOISER, Manifest.read(tiny_engines).components[DENOISER], tiny_engines)
    restructure(model, structure, sites)
    timestep = np.array([400.0], np.float32)
    expected = open_session(model).run(None, {**feeds, "timestep": timestep})[0]
    with variants, variants.open(structure) as step:
        denoiser = step.condition({"encoder_hidden_states": context}, [400.0])
        got = denoiser.predict(sample, 400.0)
    np.testing.assert_allclose(got, expected, atol=2e-4)


def test_measuring_resumes_with_what_the_table_lacks(variants: Variants, tmp_path: Path) -> None:
    names = [site.name for site in variants.sites]
    structures = [SearchedStructure(choices={name: "half"}) for name in names[:2]]
    plan = LatencyPlan(fitted=tuple(structures), held_out=())
    table = LatencyTable(tmp_path / "latency.json", variants.setting)
    table.add(structures[0], latency(0.9))
    with variants, Progress(2) as progress:
        measure_plan(variants, plan, table, repeats=3, progress=progress)
    assert table[structures[0]] == latency(0.9)
    assert 0 < table[structures[1]].ratio.value < 2
    assert len(LatencyTable(tmp_path / "latency.json", variants.setting)) == 2
    assert not list((tmp_path / "engines-of-variants").iterdir())


def test_engines_of_a_killed_process_are_removed(
    tiny_engines: Path, tmp_path: Path, sites: tuple[Site, ...]
) -> None:
    left = tmp_path / "engines-of-variants" / "0123" / "denoiser.onnx"
    left.parent.mkdir(parents=True)
    left.touch()
    Variants(tiny_engines, "cpu", "fp32", tmp_path, sites=sites)
    assert not left.exists()


@pytest.mark.parametrize(
    ("target", "recipe", "message"),
    [
        ("gpu", "fp32", "no target 'gpu'"),
        ("cpu", "int8", "int8 needs calibration"),
        ("cpu", "auto", "auto chooses among others"),
        ("cpu", "none", "no recipe 'none'"),
    ],
)
def test_what_cannot_be_timed_is_refused(
    tiny_engines: Path,
    tmp_path: Path,
    sites: tuple[Site, ...],
    target: str,
    recipe: str,
    message: str,
) -> None:
    with pytest.raises(SettingsError, match=message):
        Variants(tiny_engines, target, recipe, tmp_path, sites=sites)


def test_a_table_of_another_recipe_file_is_refused(
    tiny_engines: Path, tmp_path: Path, sites: tuple[Site, ...]
) -> None:
    recipe = tmp_path / "own.toml"
    settings = []
    for line in ("", 'skip = ["fuse-gelu"]'):
        recipe.write_text(f'summary = "own"\n{line}\n')
        work = tmp_path / f"work{len(settings)}"
        work.mkdir()
        settings.append(Variants(tiny_engines, "cpu", str(recipe), work, sites=sites).setting)
    LatencyTable(tmp_path / "t", settings[0]).add(WHOLE, latency(1.0))
    with pytest.raises(SettingsError, match=r"recipe .*own\.toml"):
        LatencyTable(tmp_path / "t", settings[1])


def test_a_full_disk_is_named(variants: Variants, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with variants, pytest.raises(TargetError, match="choose another disk"), variants.open(WHOLE):
        pass


def test_engines_that_were_not_exported_are_refused(null_engines: Path, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="that latentforge export wrote"):
        Variants(null_engines, "cpu", "fp32", tmp_path, sites=())
