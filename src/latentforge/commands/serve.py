"""latentforge serve: engines behind HTTP, with a page."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentforge.commands import arguments

if TYPE_CHECKING:
    from latentforge.serve.keys import KeyRing
    from latentforge.serve.launch import ServeOptions
    from latentforge.serve.service import Service

__all__ = ["add"]

KEYS_VARIABLE = "LATENTFORGE_KEYS"
"""Environment variable with API keys, separated by commas."""

_EXAMPLES = """examples:
  latentforge serve                                  the demo: open the address that it prints
  latentforge serve engines/                         one model, named engines
  latentforge serve fast=engines-fast/ sdxl=xl/      two models; the first is the default
  latentforge serve --new-key alice >> keys.toml     a key, shown once, and its digest
  latentforge serve engines/ --host 0.0.0.0 --keys keys.toml

clients:
  curl http://127.0.0.1:8000/v1/images/generations -H "content-type: application/json" \\
    -d '{"prompt": "a red apple", "size": "512x512", "seed": 1}'
  openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none").images.generate(...)
  clients of the web UI: host 127.0.0.1, port 8000
  /openapi.json describes everything, and docs/serving.md explains it

The first SIGTERM or Ctrl-C refuses new requests and lets accepted ones end; the second ends at
once, with exit status 130."""


def add(commands: Any) -> None:
    """Add the command and its arguments."""
    parser = arguments.command(
        commands,
        "serve",
        _serve,
        "Serve engines over HTTP, with a page to try them",
        "Each model runs in a process of its own. Requests wait in a bounded queue, run in batches "
        "where that is faster, and end between two steps when their client leaves. OpenAI's image "
        "API, jobs with progress, and the subset of the web UI's API that its clients need. Needs "
        "pip install 'latentforge[cpu,serve]', or another backend in place of cpu.",
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXAMPLES
    parser.add_argument(
        "engines",
        nargs="*",
        metavar="[NAME=]ENGINES",
        help="engine directories, each named like its folder or NAME (default: the demo's, built "
        "on first use into the cache, which takes a minute and needs latentforge[demo,export])",
    )
    _add_address(parser)
    _add_queue(parser)
    _add_workers(parser)
    _add_interface(parser)


def _add_numbers(group: Any, *rows: tuple[str, str, float, str]) -> None:
    """Add options by their names, units, defaults and texts."""
    for name, unit, default, text in rows:
        group.add_argument(name, type=type(default), default=default, metavar=unit, help=text)


def _add_flags(group: Any, **texts: str) -> None:
    """Add options without values, by their texts."""
    for name, text in texts.items():
        group.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=text)


def _add_address(parser: Any) -> None:
    group = parser.add_argument_group("address and keys")
    group.add_argument(
        "--host", default="127.0.0.1", metavar="HOST",
        help="interface to listen at (default: 127.0.0.1, this machine alone); 0.0.0.0 for all, "
        "which needs a key",
    )  # fmt: skip
    _add_numbers(group, ("--port", "N", 8000, "port (default: %(default)s; 0 for a free one)"))
    group.add_argument(
        "--keys", type=Path, metavar="FILE",
        help="API keys as SHA-256 with limits of each, in TOML; $LATENTFORGE_KEYS has keys "
        "without limits, separated by commas",
    )  # fmt: skip
    group.add_argument(
        "--new-key", metavar="NAME",
        help="print a new key and its entry for the file of --keys, and end",
    )  # fmt: skip
    _add_flags(group, insecure="let other machines in without a key")
    group.add_argument(
        "--url", default="", metavar="URL",
        help="address that clients use, for links, where a proxy is in front",
    )  # fmt: skip


def _add_queue(parser: Any) -> None:
    _add_numbers(
        parser.add_argument_group("queue"),
        ("--queue-seconds", "S", 60.0,
         "longest wait, by the measured speed, that a request is accepted for; others get "
         "503 with Retry-After (default: %(default)g)"),
        ("--deadline", "S", 600.0,
         "longest time of a request until its end, then 504 (default: %(default)g)"),
        ("--max-batch", "N", 8,
         "most images that run together, where that was measured to be faster "
         "(default: %(default)s)"),
        ("--measure-seconds", "S", 20.0,
         "time that measuring batches may take per model at the first start; the result is "
         "kept in the cache (default: %(default)g; 0 runs images one by one)"),
        ("--keep", "S", 600.0, "time for which results of jobs are kept (default: %(default)g)"),
        ("--drain-timeout", "S", 60.0,
         "time for accepted requests after the first SIGTERM (default: %(default)g)"),
    )  # fmt: skip


def _add_workers(parser: Any) -> None:
    group = parser.add_argument_group("workers")
    _add_numbers(
        group,
        ("--replicas", "N", 1,
         "processes of each model, which share the cores (default: %(default)s)"),
    )  # fmt: skip
    arguments.add_threads(group)
    _add_flags(
        group,
        low_memory="one row at a time and one copy of the weights: about half the memory, slower",
    )
    _add_numbers(
        group,
        ("--prompt-cache", "N", 256,
         "prompts whose embeddings each process keeps (default: %(default)s)"),
        ("--load-timeout", "S", 1800.0,
         "time for a model to load and to run one step (default: %(default)g)"),
        ("--step-timeout", "S", 300.0,
         "time of a step after which a process counts as hung, and is started again "
         "(default: %(default)g)"),
    )  # fmt: skip


def _add_interface(parser: Any) -> None:
    group = parser.add_argument_group("interface")
    _add_numbers(
        group,
        ("--max-body", "MB", 32, "largest request, pictures included (default: %(default)s)"),
        ("--max-pixels", "N", 4_194_304,
         "most pixels of an image that is made (default: %(default)s, which is 2048x2048)"),
    )  # fmt: skip
    _add_flags(
        group,
        no_metadata="leave the settings, and so the prompt, out of PNG files",
        no_shares="no links to images that need no key",
        log_prompts="have the prompts in the log",
    )
    group.add_argument(
        "--log", choices=["json", "text"], default="json",
        help="format of the log on standard error (default: json)",
    )  # fmt: skip


def _serve(options: argparse.Namespace) -> None:
    if options.new_key is not None:
        _print_key(options.new_key)
        return
    from latentforge.serve.launch import launch

    status = launch(_options_of(options), _announce, lambda: print("ready", flush=True))
    if status:
        raise KeyboardInterrupt("by a second signal")


def _options_of(options: argparse.Namespace) -> ServeOptions:
    """Return the options of the server, after building the demo's engines if none are named."""
    from latentforge.serve.http.body import BodyLimits
    from latentforge.serve.http.context import HttpOptions
    from latentforge.serve.http.server import ServerOptions
    from latentforge.serve.launch import Address, ServeOptions, model_sources
    from latentforge.serve.scheduler import Limits
    from latentforge.serve.service import ServiceOptions
    from latentforge.serve.worker.replica import WorkerLimits

    address = Address(host=options.host, port=options.port, insecure=options.insecure)
    ring = _ring(options)
    address.check(ring)
    limits = Limits(queue_seconds=options.queue_seconds, max_batch=options.max_batch)
    loaded = {
        "low_memory": options.low_memory,
        "prompt_cache": options.prompt_cache,
        **({"threads": options.threads} if options.threads else {}),
    }
    return ServeOptions(
        sources=model_sources(_engines(options), loaded, options.replicas),
        address=address,
        ring=ring,
        service=ServiceOptions(
            limits=limits,
            worker=WorkerLimits(load=options.load_timeout, step=options.step_timeout),
            result_seconds=options.keep,
            measure_seconds=options.measure_seconds,
        ),
        http=HttpOptions(
            body=BodyLimits(bytes=options.max_body << 20),
            image_pixels=options.max_pixels,
            deadline=options.deadline,
            url=options.url,
            metadata=not options.no_metadata,
            log_prompts=options.log_prompts,
        ),
        server=ServerOptions(drain_seconds=options.drain_timeout),
        shares=_shares(options),
        log=options.log,
        debug=options.debug,
    )


def _engines(options: argparse.Namespace) -> list[str]:
    if options.engines:
        return list(options.engines)
    from latentforge.demo_engines import cached_demo_engines

    return [str(cached_demo_engines())]


def _shares(options: argparse.Namespace) -> Path | None:
    """Return the folder of shared images, in the user's cache."""
    from latentforge.runtime.cache import cache_folder

    cache = cache_folder()
    return None if cache is None or options.no_shares else cache / "shares"


def _ring(options: argparse.Namespace) -> KeyRing:
    from latentforge.runtime.errors import SettingsError
    from latentforge.serve.keys import KeyRing

    plain = [key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",") if key.strip()]
    if options.keys is None:
        return KeyRing.of(plain)
    if plain:
        raise SettingsError(f"keys are in --keys and in ${KEYS_VARIABLE}: give one of them")
    return KeyRing.read(options.keys)


def _print_key(name: str) -> None:
    """Print a key to standard error, and its entry for the server's file to standard output."""
    import secrets
    import sys

    from latentforge.serve.keys import digest_of

    secret = f"lf-{secrets.token_urlsafe(32)}"
    print(f"the key of {name}, which is shown this once: {secret}", file=sys.stderr)
    print(f'[keys.{name}]\nsha256 = "{digest_of(secret)}"')


def _announce(url: str, service: Service) -> None:
    """Print where the server is, its models and its limits, before the models are loaded."""
    print(f"latentforge serves at {url}  (page, API, /openapi.json, /metrics)")
    for name, card in service.models.items():
        print(f"  model {name}: {_described(card.manifest)}")
    limits = service.scheduler.limits
    print(f"  waits up to {limits.queue_seconds:g} s, up to {limits.max_batch} images together")
    print("loading", flush=True)


def _described(manifest: Any) -> str:
    defaults = manifest.defaults
    sizes = manifest.latent.image_sizes(manifest.components["denoiser"])
    listed = ", ".join(f"{width}x{height}" for height, width in sizes) or "any size"
    return (
        f"{manifest.family}, {listed} (default {defaults.width}x{defaults.height}), "
        f"{defaults.sampler} with {defaults.steps} steps"
    )
