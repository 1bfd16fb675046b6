"""OpenVINO graphs that need more than their files have are refused before a library reads them."""

from pathlib import Path

import pytest

from latentforge.runtime.backends.ov.ir_file import check_ir
from latentforge.runtime.errors import BackendError

CONSTANT = '<data element_type="f32" shape="4, 4" offset="0" size="64" />'


def graph(*elements: str, before: str = '<?xml version="1.0"?>') -> str:
    layers = "".join(f'<layer id="{i}" type="Const">{e}</layer>' for i, e in enumerate(elements))
    return f'{before}<net name="m" version="11"><layers>{layers}</layers></net>'


def check(folder: Path, text: str | bytes) -> None:
    path = folder / "m.xml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.with_suffix(".bin").write_bytes(bytes(100))
    check_ir(path, path.with_suffix(".bin"))


FITTING = (
    CONSTANT,
    '<data element_type="f32" shape="" offset="96" size="4" />',
    '<data element_type="f32" shape="0" offset="100" size="0" />',
    '<data element_type="i4" shape="9" offset="0" size="5" />',
    '<data element_type="u1" shape="33" offset="0" size="5" />',
    '<data element_type="boolean" shape="5" offset="0" size="5" />',
    '<data element_type="bf16" shape="2" offset="0" size="4" />',
    '<data element_type="f8e4m3" shape="4" offset="0" size="4" />',
    '<data element_type="nf4" shape="8" offset="0" size="4" />',
    '<data element_type="string" shape="3" offset="0" size="20" />',
    '<data shape="?,4,?,?" element_type="f32" />',
    '<data special_zero="true" />',
)


@pytest.mark.parametrize("element", FITTING)
def test_constants_that_fit(tmp_path: Path, element: str) -> None:
    check(tmp_path, graph(element))


HUGE = 2**62
OUTSIDE = (
    *(CONSTANT.replace('"0"', f'"{offset}"') for offset in (37, HUGE, -1, "", "x", "0,0", 1.5)),
    *(CONSTANT.replace('"64"', f'"{size}"') for size in (101, HUGE, -1, "", 10**30, "0x40")),
    *(CONSTANT.replace("4, 4", shape) for shape in ("4, 5", f"{HUGE}, {HUGE}", "-1", "4,,4", "a")),
    *(CONSTANT.replace("f32", kind) for kind in ("f64", "f4096", "", "float", "9", "f32;")),
    CONSTANT.replace('size="64" ', ""),
)


@pytest.mark.parametrize("element", OUTSIDE)
def test_constants_that_do_not_fit(tmp_path: Path, element: str) -> None:
    with pytest.raises(BackendError, match="refuses .*m.xml: .* compile it again"):
        check(tmp_path, graph(CONSTANT, element))


ENTITIES = '<!DOCTYPE net [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;">]>'
NO_GRAPHS = {
    "entities": graph("&b;", before=ENTITIES),
    "an external entity": graph(before='<!DOCTYPE net SYSTEM "/etc/passwd">'),
    "nesting": "<a>" * 10_000 + "</a>" * 10_000,
    "elements": f"<net>{'<a/>' * 1_100_000}</net>",
    "a loop": '<net><layer id="1" type="Loop"/></net>',
    "an iterator": '<net><layer id="1" type="TensorIterator"/></net>',
    "no text": b"",
    "zeros": bytes(1000),
    "an open element": "<net><layers>",
    "two roots": "<net/><net/>",
    "an unknown encoding": '<?xml version="1.0" encoding="utf-7"?><net/>',
    "no UTF-8": b"<net \xff='1'/>",
}


@pytest.mark.parametrize("kind", NO_GRAPHS)
def test_text_that_is_no_graph(tmp_path: Path, kind: str) -> None:
    with pytest.raises(BackendError, match="openvino refuses .*m.xml: "):
        check(tmp_path, NO_GRAPHS[kind])


def test_a_graph_of_gigabytes(tmp_path: Path) -> None:
    path = tmp_path / "m.xml"
    with path.open("wb") as file:
        file.truncate(1 << 34)
    with pytest.raises(BackendError, match="16384 MiB"):
        check_ir(path, path)
