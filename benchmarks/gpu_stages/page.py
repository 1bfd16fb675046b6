"""The page of a run: aims, stages, benchmarks as latentforge's report draws them, and errors."""

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any

__all__ = ["Aim", "Content", "aims", "render_page", "summary"]

Content = Mapping[str, Mapping[str, Any]]
"""Content of the stages' files by name."""

Ends = Mapping[str, Mapping[str, Any]]
"""How each stage ended: code, end and seconds."""


@dataclass(frozen=True)
class Aim:
    """Figure that a GPU has to show.

    Attributes:
        text: the aim.
        measured: the figure, or None if it was not measured.
        bound: the figure to reach.
        unit: of both.
        at_most: True if less is better.
        judged: False in a rehearsal, whose figures say nothing.
    """

    text: str
    measured: float | None
    bound: float
    unit: str = ""
    at_most: bool = False
    judged: bool = True

    @property
    def verdict(self) -> str:
        """The aim in a word."""
        if self.measured is None:
            return "not measured"
        if not self.judged:
            return "a rehearsal"
        reached = self.measured <= self.bound if self.at_most else self.measured >= self.bound
        return "reached" if reached else "missed"

    def __str__(self) -> str:
        figure = "" if self.measured is None else f"{self.measured:.3g}{self.unit}, "
        sign = "at most" if self.at_most else "at least"
        return f"{self.text}: {figure}{sign} {self.bound:g}{self.unit}: {self.verdict}"


def aims(content: Content, *, dry: bool = False) -> list[Aim]:
    """Return the aims of an H200 with what was measured; ratios are of one run each."""
    first, compiled = (_entries(content, title) for title in ("batch 1", "torch.compile"))
    sd, deci = first.get("sd15-ours", {}), first.get("deci1-ours", {})
    rival = compiled.get("sd15-ours", {})
    psnrs = [m["value"] for m in content.get("full", {}).get("metrics", [])]
    load = min(sd.get("ready_seconds", []), default=None)
    found = [
        Aim("Stable Diffusion 1.5, 50 steps, over eager", _speedup(sd), 2, "x"),
        Aim("Stable Diffusion 1.5, 50 steps, over torch.compile", _speedup(rival), 1.15, "x"),
        Aim("Stable Diffusion 1.5, an image", sd.get("median", {}).get("total"), 0.5, " s", True),
        Aim("DeciDiffusion, 30 steps, over eager Stable Diffusion 1.5", _speedup(deci), 3, "x"),
        Aim("PSNR to diffusers in half precision", min(psnrs, default=None), 30, " dB"),
        Aim("load of Stable Diffusion 1.5", load, 5, " s", True),
    ]
    return [replace(aim, judged=not dry) for aim in found]


def _entries(content: Content, title: str) -> dict[str, Any]:
    """Return the participants that ran in a benchmark of the stage ``full``."""
    for one in content.get("full", {}).get("results", []):
        if title in one["title"]:
            return {entry["name"]: entry for entry in one["entries"] if entry["status"] == "ok"}
    return {}


def _speedup(entry: Mapping[str, Any]) -> float | None:
    value = entry.get("ratio", {}).get("total", {}).get("value")
    return None if value is None else float(value)


def summary(content: Content, ends: Ends, *, dry: bool) -> list[str]:
    """Return the run in at most ten lines."""
    machine = content.get("devices", {}).get("facts", {}).get("machine", {})
    where = machine.get("gpu") or machine.get("cpu", "unknown machine")
    failures = sum(len(one.get("failures", {})) for one in content.values())
    done = ", ".join(f"{name} {end['seconds']:.0f} s" for name, end in ends.items())
    bad = [f"{name} {end['end']}" for name, end in ends.items() if end["code"]]
    lines = [
        f"{'rehearsed on' if dry else 'run on'} {where}: {done}",
        f"{failures} failures; {'; '.join(bad) or 'every stage ended by itself'}",
    ]
    lines += map(str, aims(content, dry=dry))
    lines += [_lowest(content)]
    return lines[:10]


def _lowest(content: Content) -> str:
    """Return the picture of the embedded checkpoint that differs most from diffusers'."""
    metrics = content.get("demo", {}).get("metrics", [])
    if not metrics:
        return "embedded checkpoint: no picture"
    worst = min(metrics, key=lambda m: m["value"])
    return f"embedded checkpoint: {len(metrics)} pictures, worst PSNR {worst['value']} dB"


def render_page(content: Content, ends: Ends, *, dry: bool) -> str:
    """Return the page of a run, with failures whole at its end."""
    import msgspec

    from latentforge.measure.report import render
    from latentforge.measure.results import Results

    measured = [
        msgspec.convert(one, Results) for stage in content.values() for one in stage["results"]
    ]
    page = render(_overview(content, dry), *measured)
    head = _aims_table(aims(content, dry=dry)) + _stages_table(ends)
    page = page.replace("</header>", f"</header>{head}", 1)
    return page.replace("</body>", f"{_details(content)}{_failures(content)}</body>")


def _overview(content: Content, dry: bool) -> Any:
    """Return the machine and the quality of the pictures as a section of the report."""
    from latentforge.measure.results import Metric, Results

    devices = content.get("devices", {}).get("facts", {})
    return Results(
        title="GPU paths",
        command="",
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        machine={**devices.get("machine", {}), **devices.get("libraries", {})},
        method="Rehearsed on a CPU with tiny sizes: no figure says anything." if dry else "",
        metrics=tuple(
            Metric(better="higher", **metric)
            for stage in content.values()
            for metric in stage["metrics"]
        ),
    )


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    heads = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{_cells(row)}</tr>" for row in rows)
    return (
        f"<section><h2>{html.escape(title)}</h2><div class=scroll tabindex=0><table>"
        f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div></section>"
    )


def _cells(row: Sequence[object]) -> str:
    first, *others = (html.escape(str(cell)) for cell in row)
    return f"<th scope=row>{first}</th>" + "".join(f"<td>{cell}</td>" for cell in others)


def _aims_table(found: Sequence[Aim]) -> str:
    rows = []
    for aim in found:
        figure = "–" if aim.measured is None else f"{aim.measured:.3g}{aim.unit}"
        bound = f"{'at most' if aim.at_most else 'at least'} {aim.bound:g}{aim.unit}"
        rows.append((aim.text, figure, bound, aim.verdict))
    return _table("Aims", ("aim", "measured", "bound", ""), rows)


def _stages_table(ends: Ends) -> str:
    rows = [
        (name, f"{end['seconds']:.1f} s", end["end"], end.get("memory") or "–")
        for name, end in ends.items()
    ]
    return _table("Stages", ("stage", "time", "end", "peak GPU memory"), rows)


def _details(content: Content) -> str:
    parts = ["<article><h2>Steps</h2>"]
    for name, stage in content.items():
        rows = "".join(_fact(key, value) for key, value in stage["facts"].items())
        parts.append(f"<h3>{html.escape(name)}</h3><dl>{rows}</dl>")
    return "".join([*parts, "</article>"])


def _fact(key: str, value: object) -> str:
    text = str(value).strip()
    shown = html.escape(text)
    if "\n" in text:
        first = html.escape(text.partition("\n")[0])
        shown = f"<details><summary>{first}</summary><pre>{shown}</pre></details>"
    return f"<dt>{html.escape(key)}</dt><dd>{shown}</dd>"


def _failures(content: Content) -> str:
    found = list(_each_failure(content))
    if not found:
        return "<article><h2>Failures</h2><p>None.</p></article>"
    blocks = (f"<h3>{html.escape(name)}</h3><pre>{html.escape(text)}</pre>" for name, text in found)
    return f"<article><h2>Failures</h2>{''.join(blocks)}</article>"


def _each_failure(content: Content) -> Iterator[tuple[str, str]]:
    for stage, one in content.items():
        for name, text in one["failures"].items():
            yield f"{stage}: {name}", text
