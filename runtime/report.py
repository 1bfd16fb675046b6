"""One self-contained HTML page: what was made, and what it took."""

import base64
import html
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from string import Template

from PIL import Image

from latentforge.runtime.bench import Comparison, Measurement
from latentforge.runtime.image import MAX_PSNR

__all__ = ["Pair", "render"]


@dataclass(frozen=True)
class Pair:
    """One prompt's picture from the reference and from the engines, and how close they are."""

    prompt: str
    reference: Image.Image
    ours: Image.Image
    psnr: float


def render(title: str, subtitle: str, comparison: Comparison, pairs: Sequence[Pair] = ()) -> str:
    """The page as text. It loads nothing from anywhere."""
    template = Template(resources.files(__package__).joinpath("report.html").read_text("utf-8"))
    body = "\n".join([*_bars(comparison), *_table(comparison), *_pictures(comparison, pairs)])
    return template.substitute(title=html.escape(title), subtitle=html.escape(subtitle), body=body)


def _bars(comparison: Comparison) -> Iterator[str]:
    yield "<h2>One image</h2>"
    longest = max(m.medians["total"] for m in comparison.measurements)
    for measured in comparison.measurements:
        seconds = measured.medians["total"]
        kind = "bar reference" if measured is comparison.reference else "bar"
        width = 70 * seconds / longest
        yield (
            f'<div class="{kind}"><span>{html.escape(measured.name)}</span>'
            f'<span><i style="width:{width:.1f}%"></i>{seconds * 1e3:.0f} ms</span></div>'
        )
    for other in comparison.measurements[1:]:
        low, high = comparison.spread(other)
        yield (
            f"<p>{html.escape(other.name)}: {1 / comparison.ratio(other, 'total'):.0%} of the "
            f"time ({low:.2f} to {high:.2f} times faster over {len(other.runs)} pairs), with "
            f"an image within {comparison.psnr(other):.1f} dB PSNR at equal seed.</p>"
        )


def _table(comparison: Comparison) -> Iterator[str]:
    others = comparison.measurements[1:]
    names = [m.name for m in comparison.measurements]
    names += ["ratio"] if len(others) == 1 else [f"{m.name} ratio" for m in others]
    yield '<h2>By stage</h2><div class="scroll"><table><tr><th>median</th>'
    yield "".join(f"<th>{html.escape(name)}</th>" for name in names) + "</tr>"
    for stage in comparison.stages:
        cells = [f"<td>{m.medians[stage] * 1e3:.1f} ms</td>" for m in comparison.measurements]
        cells += [f'<td class="ratio">{comparison.ratio(m, stage):.2f}x</td>' for m in others]
        yield f"<tr><td>{html.escape(stage)}</td>{''.join(cells)}</tr>"
    yield _row(comparison, "start to ready", [m.ready for m in comparison.measurements], "s")
    firsts = [m.first.total for m in comparison.measurements if m.first]
    yield _row(comparison, "first image", firsts, "s")
    peaks = [m.peak_memory / 1e6 for m in comparison.measurements]
    yield _row(comparison, "peak memory", peaks, "MB")
    yield "</table></div>"
    yield f'<p class="soft">{html.escape(_machine(comparison))}</p>'


def _row(comparison: Comparison, name: str, values: Sequence[float], unit: str) -> str:
    digits = 2 if unit == "s" else 0
    cells = "".join(f"<td>{value:.{digits}f} {unit}</td>" for value in values)
    ratios = "".join(f'<td class="ratio">{values[0] / value:.2f}x</td>' for value in values[1:])
    return f"<tr><td>{name}</td>{cells}{ratios}</tr>"


def _machine(comparison: Comparison) -> str:
    def versions(measured: Measurement) -> str:
        return ", ".join(f"{name} {version}" for name, version in measured.versions.items())

    machine, settings = comparison.machine, comparison.settings
    makers = "; ".join(f"{m.name}: {versions(m)}" for m in comparison.measurements)
    return (
        f"{settings['sampler']}, {settings['steps']} steps, guidance "
        f"{settings['guidance_scale']:g}, {settings['width']}x{settings['height']}, seed "
        f"{settings['seed']}. {machine['cpu']}, {comparison.threads} threads each, runs taking "
        f"turns, the first of each not counted. {makers}."
    )


def _pictures(comparison: Comparison, pairs: Sequence[Pair]) -> Iterator[str]:
    if not pairs:
        return
    reference = html.escape(comparison.reference.name)
    yield f'<h2>Same prompt, same seed: {reference} left, engines right</h2><div class="pairs">'
    for pair in pairs:
        label = html.escape(pair.prompt)
        images = "".join(
            f'<img alt="{label}, {side}" src="{_data_url(image)}">'
            for side, image in ((reference, pair.reference), ("engines", pair.ours))
        )
        close = "identical" if pair.psnr >= MAX_PSNR else f"{pair.psnr:.1f} dB"
        caption = f"<figcaption>{label}<br>{close}</figcaption>"
        yield f"<figure><div>{images}</div>{caption}</figure>"
    yield "</div>"


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
