"""Loading of engine directories: wrapped sessions, limits of rows, second copies."""

from collections.abc import Callable
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import numpy as np
import pytest
from conftest import Handmade
from numpy.typing import NDArray
from test_tasks import NETWORKS

from latentforge.runtime.backends import LayerTime, Session
from latentforge.runtime.errors import BackendError, SettingsError, ShapeError
from latentforge.runtime.loader import EngineLoader, load
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.pipeline import Pipeline
from latentforge.runtime.tensor import Feeds


class Recorder:
    """Session that records the rows of each run."""

    def __init__(self, session: Session) -> None:
        self.rows: list[int] = []
        self._session = session

    def run(self, feeds: Feeds) -> dict[str, NDArray[np.generic]]:
        self.rows.append(len(next(iter(feeds.values()))))
        return self._session.run(feeds)

    def layers(self) -> list[LayerTime]:
        return self._session.layers()

    def close(self) -> None:
        self._session.close()


def test_every_session_is_wrapped_once(handmade: Handmade) -> None:
    recorders: dict[str, Recorder] = {}

    def wrap(name: str, session: Session) -> Session:
        assert name not in recorders
        recorders[name] = Recorder(session)
        return recorders[name]

    with load(handmade(), wrap_session=wrap) as pipeline:
        assert set(recorders) == {"text_encoder", "denoiser", "vae_decoder"}
        pipeline("a", steps=3)
        assert recorders["denoiser"].rows == [2, 2, 2]
        assert pipeline.engines["denoiser"].session is recorders["denoiser"]


def test_a_stream_can_have_its_own_limit_of_rows(handmade: Handmade) -> None:
    recorders: dict[str, Recorder] = {}

    def wrap(name: str, session: Session) -> Session:
        return recorders.setdefault(name, Recorder(session))

    with load(handmade(), wrap_session=wrap) as pipeline:
        for _ in pipeline.stream("a", steps=2, max_rows=1):
            pass
        assert recorders["denoiser"].rows == [1, 1, 1, 1]
        pipeline("a", steps=1)
        assert recorders["denoiser"].rows[4:] == [2]


def test_prompts_are_encoded_once_with_a_cache(handmade: Handmade) -> None:
    """The most recent ones are kept; each is encoded alone."""
    pytest.importorskip("onnxruntime")
    directory = handmade(onnx=NETWORKS)
    recorders = dict[str, Recorder]()

    def wrap(name: str, session: Session) -> Session:
        recorders[name] = Recorder(session)
        return recorders[name]

    options: dict[str, Any] = {"steps": 2, "seed": [1, 2], "negative_prompt": "a"}
    with (
        load(directory, threads=1, prompt_cache=3, wrap_session=wrap) as cached,
        load(directory, threads=1) as pipe,
    ):
        runs = recorders["text_encoder"].rows
        for prompts, count in ((["red", "a"], 2), (["apple", "red"], 3), (["a", "a red"], 4)):
            together = cached(prompts, **options).latents
            assert together.tobytes() == pipe(prompts, **options).latents.tobytes()
            assert runs == [1] * count
        cached(["apple", "apple"], **options)  # gave way to "a red", and replaces "red"
        assert runs == [1] * 5
        cached(["a red", "red"], **options)
        assert runs == [1] * 6


def test_limits_of_rows(handmade: Handmade) -> None:
    """The VAE always runs one image at a time; text encoders have no limit."""
    limits: list[tuple[dict[str, Any], int | None]]
    limits = [({}, None), ({"max_rows": 3}, 3), ({"low_memory": True}, 1)]
    directory = handmade()
    for options, expected in limits:
        engines = load(directory, **options).engines
        assert engines["denoiser"].max_rows == expected
        assert engines["vae_decoder"].max_rows == 1 and engines["text_encoder"].max_rows is None
    with pytest.raises(SettingsError, match="max_rows must be an integer from 1 to [0-9]+, not 0"):
        load(directory, max_rows=0)


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"max_rows": "2"}, "max_rows must be an integer from 1 to .*, not '2'"),
    ({"max_rows": True}, "max_rows must be an integer from 1 to .*, not True"),
    ({"max_rows": 1.5}, "max_rows must be an integer from 1 to .*, not 1.5"),
    ({"prompt_cache": -1}, "prompt_cache must be an integer from 1 to .*, not -1"),
    ({"prompt_cache": False}, "prompt_cache must be an integer from 1 to .*, not False"),
    ({"hashes": "no"}, "hashes must be True or False, not 'no'"),
    ({"low_memory": 1}, "low_memory must be True or False, not 1"),
    ({"wrap_session": "x"}, "wrap_session must be a function, not 'x'"),
    ({"directory": None}, "directory must be a path, not None"),
    ({"directory": b"engines"}, "directory must be a path, not b'engines'"),
    ({"directory": "a\0b"}, "directory is a path that no file can have"),
    ({"thread": 2}, "no backend option 'thread'"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=[text for _, text in BAD_OPTIONS])
def test_refuses_options(handmade: Handmade, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        load(**{"directory": handmade(), **options})
    assert "\n" not in str(caught.value)


def test_numbers_of_numpy_are_options(handmade: Handmade) -> None:
    engines = load(handmade(), max_rows=np.int64(3), hashes=np.True_).engines  # type: ignore[arg-type]
    assert engines["denoiser"].max_rows == 3


@pytest.mark.parametrize("value", [0, -1, "2", 1.5, True, None, float("nan")])
def test_refuses_arguments_of_a_pipeline(handmade: Handmade, value: Any) -> None:
    pipeline = load(handmade())
    for name in ("repetitions", "batch_size"):
        with pytest.raises(SettingsError, match=f"^{name} must be an integer from 1 to"):
            pipeline.benchmark(**{name: value})
    if value is not None:
        with pytest.raises(SettingsError, match="^max_rows must be an integer from 1 to"):
            pipeline.stream("a", max_rows=value)
    with pytest.raises(SettingsError, match="^settings must be a Settings record, not"):
        pipeline.run(value)
    with pytest.raises(SettingsError, match="^no component .*: choose from text_encoder, denoiser"):
        pipeline.load_engine(value)
    for latents in (value, [value], np.zeros((1, 4, 2)), np.zeros((1, 4, 2, 2), int)):
        with pytest.raises(ShapeError, match="^latents must be an array of floats"):
            pipeline.decode(latents)


def test_engines_cannot_be_replaced(handmade: Handmade) -> None:
    pipeline = load(handmade())
    engine: Any = pipeline.engines["denoiser"]
    engines: Any = pipeline.engines
    with pytest.raises(TypeError):
        engines["denoiser"] = engine
    for name in ("session", "max_rows", "component"):
        with pytest.raises(AttributeError):
            setattr(engine, name, None)


def test_a_closed_pipeline_loads_nothing(handmade: Handmade) -> None:
    pipeline = load(handmade())
    pipeline.close()
    before = list(pipeline.engines)
    for name in ("vae_encoder", "vae_decoder", "nothing"):
        with pytest.raises(BackendError, match="^the pipeline is closed: load its "):
            pipeline.load_engine(name)
    for use in (pipeline.profile, pipeline.benchmark, lambda: pipeline("a", steps=1)):
        with pytest.raises(BackendError, match="is closed"):
            use()
    assert list(pipeline.engines) == before
    pipeline.close()


CLOSED: dict[str, Callable[[Pipeline], object]] = {
    "call": lambda pipeline: pipeline("a", steps=1),
    "stream": lambda pipeline: list(pipeline.stream("a", steps=1)),
    "run": lambda pipeline: pipeline.run(pipeline.settings("a", steps=1)),
    "steps": lambda pipeline: list(pipeline.steps(pipeline.settings("a", steps=1))),
    "encode": lambda pipeline: pipeline.encode(pipeline.settings("a")),
    "benchmark": lambda pipeline: pipeline.benchmark(repetitions=1, steps=1),
    "profile": lambda pipeline: pipeline.profile(steps=1),
    "decode": lambda pipeline: pipeline.decode(np.zeros((1, 4, 4, 6), np.float32)),
    "pixels": lambda pipeline: pipeline.decode_pixels(np.zeros((1, 4, 4, 6), np.float32)),
    "load_engine": lambda pipeline: pipeline.load_engine("denoiser"),
    "engine": lambda pipeline: pipeline.engines["vae_decoder"].run(
        {"latent_sample": np.zeros((1, 4, 4, 6), np.float32)}
    ),
}
HARMLESS: dict[str, Callable[[Pipeline], object]] = {
    "settings": lambda pipeline: pipeline.settings("a", steps=1),
    "engines": lambda pipeline: list(pipeline.engines),
    "versions": lambda pipeline: pipeline.versions(),
    "layers": lambda pipeline: pipeline.layers(),
    "repr": repr,
    "close": lambda pipeline: pipeline.close(),
    "with": lambda pipeline: pipeline.__enter__(),
    "attributes": lambda pipeline: (pipeline.manifest, pipeline.tokenizers, pipeline.directory),
}


@pytest.mark.parametrize("networks", [{}, NETWORKS], ids=["null", "onnxruntime"])
@pytest.mark.parametrize("name", CLOSED)
def test_uses_of_a_closed_pipeline(handmade: Handmade, name: str, networks: dict[str, str]) -> None:
    with load(handmade(onnx=networks), threads=1) as pipeline:
        expected = CLOSED[name](pipeline)
    assert expected is not None
    for _ in range(2):
        with pytest.raises(BackendError, match=r"^[^\n]* is closed(: load its directory again)?$"):
            CLOSED[name](pipeline)
        with pipeline:  # closed still, and closed again
            pass


def test_every_method_of_a_closed_pipeline(handmade: Handmade) -> None:
    with load(handmade()) as pipeline:
        stream = pipeline.stream("a", steps=2)
        next(stream)
    for use in HARMLESS.values():
        use(pipeline)
    with pytest.raises(BackendError, match="is closed$"):
        next(stream)
    public = {name for name in dir(Pipeline) if not name.startswith("_")}
    assert public - {"decode_pixels"} <= {*CLOSED, *HARMLESS}


@pytest.mark.parametrize("networks", [{}, NETWORKS], ids=["null", "onnxruntime"])
def test_closing_while_other_threads_draw(handmade: Handmade, networks: dict[str, str]) -> None:
    pipeline = load(handmade(onnx=networks), threads=1)
    drawn, errors = Barrier(5), list[BaseException]()

    def draw() -> None:
        try:
            pipeline("a", steps=1)
            drawn.wait()
            while True:
                pipeline("a", steps=2)
        except BaseException as error:
            errors.append(error)

    threads = [Thread(target=draw) for _ in range(4)]
    for thread in threads:
        thread.start()
    drawn.wait()
    pipeline.close()
    for thread in threads:
        thread.join(60)
    assert [type(error) for error in errors] == [BackendError] * 4
    assert all(str(error).split(" is closed")[1:] for error in errors)


def test_one_component(handmade: Handmade, tmp_path: Path) -> None:
    directory = handmade()
    loader = EngineLoader(manifest=Manifest.read(directory), directory=directory, low_memory=True)
    engine = loader("vae_decoder", {})
    pixels = engine.run({"latent_sample": np.zeros((2, 4, 4, 6), np.float32)})["sample"]
    assert engine.name == "vae_decoder" and pixels.shape == (2, 3, 32, 48)
