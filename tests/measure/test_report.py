"""The page: it shows the measured values, loads nothing and escapes all text."""

import base64
import html
import io
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import pytest
from measured import BENCH, EVAL, HEAD, entry, metric
from msgspec.structs import replace
from PIL import Image

from latentforge.__main__ import main
from latentforge.measure.formatting import decibels, seconds, seconds_range, timestamp
from latentforge.measure.report import render
from latentforge.measure.report.bars import bars
from latentforge.measure.report.charts import spaced
from latentforge.measure.report.curves import curves
from latentforge.measure.report.layers import layer_profile
from latentforge.measure.report.scales import Scale, ticks
from latentforge.measure.report.scatter import pareto, scatters
from latentforge.measure.report.tables import metric_tables, participant_tables
from latentforge.measure.results import (
    BenchResult,
    ConfidenceInterval,
    LayerTiming,
    Metric,
    Picture,
    Point,
    ProfileTable,
    Results,
    TimedRun,
)
from latentforge.runtime.errors import ResultsError

WHOLE = replace(BENCH, metrics=EVAL.metrics, pictures=EVAL.pictures)
EMPTY = Results(title="Nothing", **HEAD)  # type: ignore[arg-type]

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """The page's elements, its tables as rows of texts, and the text that is read."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.tables: list[list[list[str]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.words.append(data)
        if {"td", "th"} & set(self.open):
            cells = self.tables[-1][-1]
            cells[-1] = f"{cells[-1]} {data.strip()}".strip()

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def table(self, heading: str) -> dict[str, dict[str, str]]:
        """The rows of each table with this heading, by first cell and heading."""
        found: dict[str, dict[str, str]] = {}
        for rows in self.tables:
            if heading in rows[0]:
                found |= {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[1:]}
        return found


def headings(text: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", text)


# the page as a whole


@pytest.mark.parametrize("results", [(WHOLE,), (BENCH, EVAL), (EMPTY,)], ids=["one", "two", "none"])
def test_it_is_well_formed_and_its_drawings_are_xml(results: tuple[Results, ...]) -> None:
    text = render(*results)
    assert text.startswith("<!doctype html>")
    Page(text)
    for drawing in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(drawing)


def test_it_loads_nothing_and_runs_nothing() -> None:
    text = render(WHOLE)
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    style = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    assert len(style) == 1 and "url(" not in style[0] and "@import" not in style[0]
    assert "http:" not in text and "https:" not in text
    loads = [v for name, v in page.attributes if name in ("src", "href", "srcset", "xlink:href")]
    assert loads and all(value.startswith("data:image/png;base64,") for value in loads)
    assert not [name for name, _ in page.attributes if name.startswith("on")]


def test_it_has_a_dark_scheme_and_a_viewport_for_phones() -> None:
    attributes = Page(render(EMPTY)).attributes
    assert ("content", "light dark") in attributes
    assert ("content", "width=device-width, initial-scale=1") in attributes
    assert "prefers-color-scheme: dark" in render(EMPTY)


def test_the_head_describes_the_measurement() -> None:
    text = Page(render(BENCH)).text
    expected = [
        "A benchmark",
        "2026-01-02 03:04 UTC",
        "Interleaved runs.",
        "Some CPU",
        "an owl",
        "512×512",
    ]
    expected += ["latentforge bench engines --against eager", "sampler ddim", "steps 20", "seed 0"]
    assert [words for words in expected if words not in text] == []


SECTIONS: list[tuple[str, dict[str, Any]]] = [
    ("Participants", {"entries": BENCH.entries[:3]}),
    ("Time per image", {"entries": BENCH.entries[:3]}),
    ("Summary", {"entries": BENCH.entries[:3]}),
    ("Not measured", {"entries": BENCH.entries[5:]}),
    ("Scaling with batch and image size", {"scaling": BENCH.scaling}),
    ("Quality against speed", {"entries": BENCH.entries, "metrics": EVAL.metrics}),
    ("Quality", {"metrics": EVAL.metrics}),
    ("Images", {"pictures": EVAL.pictures}),
    ("Layer profile", {"profiles": BENCH.profiles}),
]


@pytest.mark.parametrize(("heading", "data"), SECTIONS, ids=[name for name, _ in SECTIONS])
def test_sections_come_and_go_with_their_data(heading: str, data: dict[str, Any]) -> None:
    assert heading in headings(render(replace(EMPTY, **data)))
    assert heading in headings(render(WHOLE))
    assert heading not in headings(render(EMPTY))
    assert heading not in headings(render(replace(WHOLE, **dict.fromkeys(data, ()))))


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(ResultsError, match="nothing to draw"):
        render()


def test_the_same_data_give_the_same_page() -> None:
    again = msgspec.json.decode(WHOLE.encode(), type=Results)
    assert render(WHOLE) == render(again)


HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=y>&amp;{{ 7 * 7 }}</svg></style>"


FIXED_WORDS = {"role", "status", "speed_class", "better"}  # enumerations
RECORDS = (
    Results,
    BenchResult,
    ConfidenceInterval,
    TimedRun,
    Point,
    ProfileTable,
    LayerTiming,
    Picture,
    Metric,
)
FIELDS = {name for kind in RECORDS for name in kind.__struct_fields__}


def spoiled(value: Any, path: str = "") -> Any:
    """The same record with every text hostile, names and the keys that people see too."""
    if isinstance(value, dict):
        shown = path not in ("", "settings", "seconds", "median", "ratio")
        return {
            HOSTILE + key if shown and key not in FIELDS else key: spoiled(own, key)
            for key, own in value.items()
        }
    if isinstance(value, list):
        return [spoiled(item, path) for item in value]
    return HOSTILE + value if isinstance(value, str) and path not in FIXED_WORDS else value


def test_hostile_strings_are_text() -> None:
    record = spoiled(json.loads(WHOLE.encode()))
    assert record["machine"] == {
        f"{HOSTILE}cpu": f"{HOSTILE}Some CPU",
        f"{HOSTILE}cores": f"{HOSTILE}2",
    }
    text = render(msgspec.convert(record, Results))
    page = Page(text)
    assert "<script" not in text and "onerror" not in {name for name, _ in page.attributes}
    assert text.count("</style>") == 1 and "49" not in re.findall(r"&amp;amp;(\d+)", text)
    assert text.count(html.escape("<script>alert(1)")) > 100
    assert "img" not in page.tags  # the images' URLs are spoiled too
    assert set(page.tags) <= set(Page(render(WHOLE)).tags)


# participants


def test_classes_never_share_a_table() -> None:
    tables = {table.title: [row.name for row in table.rows] for table in participant_tables(BENCH)}
    assert tables == {
        "Same image (class A)": ["eager", "engines-a", "peer-a"],
        "Different image (class B)": ["engines-b", "peer-b"],
    }
    page = Page(render(BENCH))
    for rows in page.tables:
        names = {row[0].split(" ")[0] for row in rows}
        assert not (names & {"eager", "engines-a", "peer-a"} and names & {"engines-b", "peer-b"})
    groups = {group.title: [bar.name for bar in group.bars] for group in bars(BENCH)}
    assert groups == tables


def test_without_an_image_there_is_no_class() -> None:
    uncompared = replace(
        BENCH, entries=(*BENCH.entries, entry("uncompared", 1.5, speed_class=None))
    )
    tables = {
        table.title: [row.name for row in table.rows] for table in participant_tables(uncompared)
    }
    assert tables["Image not compared"] == ["uncompared"]
    alone = replace(BENCH, entries=(entry("mine", 1.5, speed_class=None),))
    assert [table.title for table in participant_tables(alone)] == ["Times"]


def test_the_figures_on_the_page_are_those_of_the_data() -> None:
    engines = next(e for e in BENCH.entries if e.name == "engines-a")
    ratio = engines.ratio["total"]
    row = next(
        row
        for name, row in Page(render(BENCH)).table("denoiser step").items()
        if "engines-a" in name
    )
    timed = [run.seconds["total"] for run in engines.runs]
    assert row["image"] == f"{engines.median['total']:.2f} s {min(timed):.2f}–{max(timed):.2f} s"
    assert row["speedup"] == f"{ratio.value:.2f}× {ratio.low:.2f}–{ratio.high:.2f}, 93.8 %"
    assert row["denoiser step"] == f"{engines.median['denoiser step'] * 1e3:.1f} ms"
    assert row["text encoder"] == f"{engines.median['text_encoder'] * 1e3:.0f} ms"
    assert row["VAE decoder"] == f"{engines.median['vae_decoder'] * 1e3:.0f} ms"
    others = ["first image", "load", "peak memory", "files", "PSNR"]
    assert [row[key] for key in others] == ["2.75 s", "600 ms", "1.5 GB", "700 MB", "60.0 dB"]


def test_columns_without_values_are_left_out() -> None:
    columns = {table.title: table.columns for table in participant_tables(BENCH)}
    assert "conversion" in columns["Same image (class A)"]
    assert "conversion" not in columns["Different image (class B)"]
    assert not any("energy" in found or "device memory" in found for found in columns.values())


def test_class_b_shows_its_gate() -> None:
    text = Page(render(BENCH)).text
    assert "int8, psnr of 20 dB" in text and "no quality gate" in text


def test_participants_without_values_have_a_reason() -> None:
    rows = Page(render(BENCH)).table("status")
    assert rows["broken"]["status"] == "failed"
    assert rows["broken"]["reason"] == "out of memory: use less"
    assert rows["absent"]["reason"] == "pip install absent==1"


@pytest.mark.parametrize(
    ("runs", "low", "high", "level", "warning"),
    [
        (5, 1.9, 2.1, 0.9375, ""),
        (5, 0.99, 1.02, 0.9375, "no significant difference"),
        (5, 1.1, 1.6, 0.9375, "interval too wide to quantify"),
        (3, 1.9, 2.1, 0.75, "too few runs to conclude"),
        (1, None, None, None, "too few runs to conclude"),
    ],
)
def test_speedups_carry_their_level_and_a_warning(
    runs: int, low: float | None, high: float | None, level: float | None, warning: str
) -> None:
    ratio = ConfidenceInterval(value=2.0, low=low, high=high, level=level)
    one = entry("one", 2.0, ratio={"total": ratio})
    one = replace(one, runs=one.runs[:runs])
    table = participant_tables(replace(BENCH, entries=(BENCH.entries[0], one)))[0]
    cell = table.rows[1].cells[table.columns.index("speedup")]
    assert cell.warning == warning
    text = Page(render(replace(BENCH, entries=(BENCH.entries[0], one)))).text
    assert warning in text
    remedy = f"{runs} runs: 75 % interval, too few to conclude, run 5 or more."
    assert (remedy in text) == (runs == 3)
    if level is not None:
        assert f"{low:.2f}–{high:.2f}, " in cell.detail and cell.detail in text


def test_the_reference_has_empty_cells_for_comparisons_with_itself() -> None:
    table = participant_tables(BENCH)[0]
    reference = dict(zip(table.columns, table.rows[0].cells, strict=True))
    assert reference["speedup"].text == reference["PSNR"].text == ""
    alone = participant_tables(replace(BENCH, entries=BENCH.entries[:1]))[0]
    assert not {"speedup", "PSNR"} & set(alone.columns)


def test_the_legend_names_the_levels_of_whiskers() -> None:
    few = entry(
        "few", 2.0, ratio={"total": ConfidenceInterval(value=2.0, low=1.9, high=2.1, level=0.75)}
    )
    text = Page(render(replace(BENCH, entries=(*BENCH.entries[:3], few)))).text
    assert re.search(r"(93.8 %, 75 %|75 %, 93.8 %) confidence interval of the speedup", text)


# drawings


def test_bars_are_as_long_as_the_times() -> None:
    drawn = {bar.name: bar for group in bars(BENCH) for bar in group.bars}
    assert drawn["eager"].end / drawn["engines-b"].end == pytest.approx(
        BENCH.entries[0].median["total"] / BENCH.entries[3].median["total"]
    )
    reach = max(max(bar.end, *(bar.whisker or (0,))) for bar in drawn.values())
    assert reach == pytest.approx(100)


def test_bars_are_cut_into_stages_that_add_up() -> None:
    eager = bars(BENCH)[0].bars[0]
    parts = {part.stage: part.seconds for part in eager.segments}
    assert parts == pytest.approx({"text encoder": 0.4, "denoiser": 2.4, "VAE": 0.8, "other": 0.4})
    assert all(
        a.start + a.width == pytest.approx(b.start)
        for a, b in zip(eager.segments, eager.segments[1:], strict=False)
    )
    whole = entry("whole", 2.0, median={"total": 2.0})
    segments = bars(replace(BENCH, entries=(whole,)))[0].bars[0].segments
    assert [part.stage for part in segments] == ["not split"]


def test_whiskers_are_the_time_at_the_ends_of_the_ratio() -> None:
    one = entry(
        "one",
        2.0,
        ratio={"total": ConfidenceInterval(value=2.0, low=1.6, high=2.5, level=0.95)},
        median={"total": 2.0},
    )
    bar = bars(replace(BENCH, entries=(one,)))[0].bars[0]
    assert bar.whisker == pytest.approx((100 * 1.6 / 2.5, 100))
    assert bar.end == pytest.approx(80)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (13, 87, [20, 40, 60, 80]),
        (-3, 3, [-2, 0, 2]),
        (0.0123, 0.0181, [0.014, 0.016, 0.018]),
        (5, 5, [5]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_scales() -> None:
    assert Scale(low=0, high=4, start=100, end=0)(1) == 75
    log = Scale(low=1, high=4, start=0, end=10, logarithmic=True)
    assert [log(1), log(2), log(4)] == pytest.approx([0, 5, 10])
    assert Scale(low=3, high=3, start=0, end=10)(3) == 5


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ([10, 50], [10, 50]),
        ([50, 10], [50, 10]),
        ([10, 12, 14], [10, 20, 30]),
        ([98, 99], [90, 100]),
        ([0, 0, 0, 0, 0], [0, 10, 20, 30, 40]),
        ([], []),
    ],
)
def test_labels_keep_their_distance(positions: list[float], expected: list[float]) -> None:
    assert spaced(positions, low=0, high=100, gap=10) == expected


def test_label_gaps_shrink_if_there_is_no_room() -> None:
    assert spaced([5.0] * 5, low=0, high=10, gap=10) == [0, 2.5, 5, 7.5, 10]


def test_the_pareto_front_has_the_undominated_points() -> None:
    points = [(3, 9), (1, 5), (2, 5), (2, 7), (4, 9), (5, 1)]
    assert pareto(points) == [1, 3, 0]
    assert pareto([(1, 1), (1, 1)]) == [0, 1]
    assert pareto([]) == []


def test_the_front_of_a_metric_where_lower_is_better() -> None:
    names = ("eager", "engines-a", "engines-b", "peer-a")
    values = (
        metric(n, v, name="fid", better="lower") for n, v in zip(names, (5, 6, 9, 7), strict=True)
    )
    (chart,) = scatters(BENCH, tuple(values))
    assert {dot.name for dot in chart.dots if dot.on_front} == {"eager", "engines-a", "engines-b"}
    places = {dot.name: dot.y for dot in chart.dots}
    assert (
        places["eager"] < places["engines-a"] < places["peer-a"] < places["engines-b"]
    )  # up is good


def test_metrics_of_one_file_meet_the_times_of_another() -> None:
    assert "Quality against speed" in headings(render(BENCH, EVAL))
    (chart,) = scatters(BENCH, EVAL.metrics)
    assert chart.title == "psnr to eager"
    assert {dot.name: dot.different_image for dot in chart.dots} == {
        "engines-a": False,
        "engines-b": True,
    }
    (fallback,) = scatters(BENCH, ())
    assert fallback.title.startswith("PSNR to the reference") and len(fallback.dots) == 5


def test_labels_of_crowded_points_do_not_overlap() -> None:
    crowd = tuple(entry(f"participant-{n}", 2 + n / 50) for n in range(8))
    chart = scatters(replace(BENCH, entries=crowd), ())[0]
    labels = [(dot.label_x, dot.label_y) for dot in chart.dots]
    for index, (x, y) in enumerate(labels):
        assert 0 <= x <= 440 and 0 <= y <= 300
        for u, v in labels[:index]:
            assert abs(y - v) >= 13.9 or abs(x - u) >= 60


def test_curves_join_points_that_differ_in_one_setting() -> None:
    charts = {chart.title: chart for chart in curves(BENCH)}
    assert list(charts) == [
        "Seconds by batch, 512×512",
        "Seconds by size, batch 1",
        "Peak memory by size in GB, batch 1",
    ]
    by_batch = charts["Seconds by batch, 512×512"]
    assert [tick.text for tick in by_batch.x_ticks] == ["1", "2", "4"]
    assert {line.name: len(line.points) for line in by_batch.lines} == {"eager": 3, "engines-a": 3}
    assert by_batch.lines[0].tips == (
        "eager, 1 images per batch: 4.00 s",
        "eager, 2 images per batch: 8.00 s",
        "eager, 4 images per batch: 16.0 s",
    )
    eager, engines = (line.points for line in by_batch.lines)
    floor = 256
    assert (floor - eager[2][1]) / (floor - engines[2][1]) == pytest.approx(2)
    assert "too little memory" in Page(render(BENCH)).text


def test_one_position_makes_no_curve() -> None:
    assert curves(replace(BENCH, scaling=BENCH.scaling[:1])) == []


def test_layers_are_summed_by_operator() -> None:
    profile = layer_profile(BENCH.profiles[0])
    assert [(p.name, p.count, p.seconds, p.share) for p in profile.groups] == [
        ("denoiser Conv", 2, 1.0, 0.5),
        ("denoiser MatMul", 1, 0.5, 0.25),
    ]
    assert [layer.layer for layer, _ in profile.layers] == ["conv_7", "attend", "conv_8"]
    assert profile.listed == 0.75
    assert Page(render(BENCH)).table("layer")["conv_7"]["share"] == "37.5%"


# metrics and images


def test_metric_tables_show_interval_level_images_and_caveats() -> None:
    page = Page(render(EVAL))
    assert page.table("95 % interval")["engines-b"] == {
        "participant": "engines-b", "value": "25.5 dB", "95 % interval": "24 to 27", "images": "64",
    }  # fmt: skip
    assert "64 images: not comparable" in page.text and "lower is better" in page.text
    assert "against eager, Inception" in page.text


def test_metrics_of_different_kinds_share_no_table() -> None:
    assert [(t.name, len(t.metrics)) for t in metric_tables(EVAL.metrics)] == [
        ("psnr", 2),
        ("fid", 1),
    ]


def test_small_images_are_enlarged_by_whole_pixels() -> None:
    text = render(EVAL)
    page = Page(text)
    urls = [value for name, value in page.attributes if name == "src"]
    picture = EVAL.pictures[0]
    assert urls == [
        picture.images["eager"],
        picture.images["engines-a"],
        picture.differences["engines-a"],
    ]
    assert text.count('class="small"') == 3
    assert f"{picture.psnr['engines-a']:.1f} dB" in page.text and "seed 3" in page.text


def data_url(kind: str, size: int = 200) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size)).save(buffer, kind)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_images_of_supported_formats_are_drawn(kind: str) -> None:
    picture = Picture(prompt="x", seed=0, images={"a": data_url(kind)})
    text = render(replace(EMPTY, pictures=(picture,)))
    assert data_url(kind) in text and 'class="small"' not in text


@pytest.mark.parametrize(
    "url",
    [
        "https://example.org/x.png",
        "//example.org/x.png",
        "javascript:alert(1)",
        "data:text/html;base64,PGI+",
        "data:image/svg+xml;base64,PHN2Zy8+",
        "data:image/png;base64,AAAA",
        "data:image/png;base64,A",
        "",
    ],
)
def test_other_urls_are_not_loaded(url: str) -> None:
    picture = Picture(prompt="x", seed=0, images={"a": url})
    page = Page(render(replace(EMPTY, pictures=(picture,))))
    assert "img" not in page.tags and "image cannot be shown" in page.text


# formatting


def test_values_have_three_digits_and_a_unit() -> None:
    assert [seconds(v) for v in (0.00123, 0.0456, 0.789, 1.234, 12.34, 123.4)] == [
        "1.23 ms", "45.6 ms", "789 ms", "1.23 s", "12.3 s", "123 s",
    ]  # fmt: skip
    assert seconds_range(1.0, 2.0) == "1.00–2.00 s" and seconds_range(0.5, 2.0) == "500 ms – 2.00 s"
    assert decibels(200.0) == "identical"
    assert timestamp("yesterday") == "yesterday"
    assert timestamp("2026-01-02T03:04:05+02:00") == "2026-01-02 01:04 UTC"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_are_dashes(value: float) -> None:
    odd = entry("odd", 2.0, psnr=value, prepare_seconds=value, median={"total": value},
                ratio={"total": ConfidenceInterval(value=value, low=value, high=value,
                                                   level=0.95)})  # fmt: skip
    half = entry("half", 0.5, ratio={"total": ConfidenceInterval(value=value)})
    point = Point(name="odd", batch=1, height=512, width=512, total=value)
    results = replace(
        WHOLE,
        entries=(*WHOLE.entries, odd, half),
        scaling=(*WHOLE.scaling, point),
        metrics=(*WHOLE.metrics, metric("odd", value, low=value, high=value)),
    )
    page = Page(render(results))
    assert not re.search(r"\b(nan|inf)\b", page.text)
    assert not any(
        re.search(r"\b(nan|inf)\b", value) for name, value in page.attributes if name != "src"
    )


def test_zeros_can_be_drawn() -> None:
    still = {"total": 0.0, "denoiser": 0.0}
    zero = entry(
        "zero",
        2.0,
        median=still,
        ratio={"total": ConfidenceInterval(value=0, low=0, high=0, level=0.95)},
    )
    profile = ProfileTable(name="zero", layers=(), total=0)
    point = Point(name="zero", batch=2, height=512, width=512, total=0.0, peak_memory=0)
    results = replace(BENCH, entries=(zero,), scaling=(point, replace(point, batch=1)))
    Page(render(replace(results, profiles=(profile,), metrics=(metric("zero", 0.0),))))


# the command line


def test_report_draws_several_files_on_one_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / "bench.json", tmp_path / "eval.json"]
    for path, results in zip(paths, (BENCH, EVAL), strict=True):
        results.write(path)
    page = tmp_path / "page.html"
    assert main(["report", *map(str, paths), "-o", str(page)]) == 0
    assert capsys.readouterr().out == f"{page}\n"
    assert page.read_text(encoding="utf-8") == render(BENCH, EVAL)


def test_report_refuses_bad_files_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.json").write_text("{}")
    page = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "bad.json"), "-o", str(page)]) == 2
    assert "not a result file" in capsys.readouterr().err and not page.exists()
    assert main(["report", str(tmp_path / "bad.json"), "-o", str(tmp_path / "no" / "p.html")]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_without_jinja_the_extra_is_named() -> None:
    program = (
        "import sys; sys.modules['jinja2'] = None\n"
        "from latentforge.measure.report import render\n"
        "from latentforge.measure.results import Results\n"
        "render(Results(title='', command='', date='', machine={}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "pip install 'latentforge[report]'" in last


def test_a_caveat_shared_by_all_rows_is_shown_once() -> None:
    shared = [metric("mine", 1.0, note="few"), metric("other", 2.0, note="few")]
    own = [metric("mine", 1.0, note="worst 3"), metric("other", 2.0, note="worst 4")]
    assert [table.note for table in metric_tables(shared)] == ["few"]
    (table,) = metric_tables(own)
    assert table.note == ""
    page = render(replace(EVAL, metrics=tuple(own)))
    assert page.count("worst 3") == page.count("worst 4") == 1
