"""Conversion of a checkpoint's scheduler_config.json to the runtime's schedule and sampler."""

import inspect
import reprlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import diffusers
import msgspec
from diffusers.utils import logging as diffusers_logging

from latentforge.export.checkpoint import warn_once
from latentforge.runtime.errors import CheckpointError, ManifestError
from latentforge.runtime.loggers import escaping_logger
from latentforge.runtime.sampling import SAMPLERS
from latentforge.runtime.sampling.options import SolverOptions
from latentforge.runtime.sampling.prediction import Prediction
from latentforge.runtime.sampling.sampler import Sampler
from latentforge.runtime.sampling.schedule import MAX_TRAIN_STEPS, EDMSchedule, Schedule
from latentforge.runtime.text import one_line, printable

__all__ = [
    "SCHEDULERS",
    "CheckpointScheduler",
    "Counterpart",
    "corrected",
    "default_sampler",
    "diffusers_scheduler",
    "follows",
    "prediction_of",
    "quiet_diffusers",
    "schedule_of",
    "with_class",
]

_log = escaping_logger(__name__)

_SCHEDULE_KEYS = frozenset(
    "num_train_timesteps beta_start beta_end beta_schedule trained_betas prediction_type "
    "timestep_spacing steps_offset rescale_betas_zero_snr set_alpha_to_one sigma_data "
    "sigma_schedule rho".split()
)
"""Arguments of diffusers' schedulers that a schedule and a prediction type hold."""

_INERT_KEYS: Mapping[str, frozenset[str]] = {
    "": frozenset(
        "flow_shift time_shift_type dynamic_thresholding_ratio sample_max_value clip_sample_range "
        "lower_order_final".split()
    ),
    "LCMScheduler": frozenset({"set_alpha_to_one"}),
    "TCDScheduler": frozenset({"clip_sample", "timestep_scaling"}),
    "EDMEulerScheduler": frozenset({"sigma_min", "sigma_max"}),
    "EDMDPMSolverMultistepScheduler": frozenset({"sigma_min", "sigma_max"}),
}
"""Arguments that change nothing: of any class, and of some. (Those of EDM are its schedule's.)"""

_SPACINGS = {
    "use_karras_sigmas": "karras",
    "use_lu_lambdas": "lu",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta",
}  # in the order in which diffusers looks at them


@dataclass(frozen=True, kw_only=True)
class Counterpart:
    """diffusers scheduler that a sampler is numerically equal to.

    Attributes:
        scheduler: class name.
        options: arguments of its from_config, besides the checkpoint's own configuration.
        timesteps: (schedule, steps) -> argument of its set_timesteps, in place of a number of
            steps; None if it computes the timesteps itself.
    """

    scheduler: str
    options: Mapping[str, Any] = field(default_factory=dict)
    timesteps: Callable[[Any, int], list[int]] | None = None

    @classmethod
    def of(cls, sampler: Sampler) -> "Counterpart":
        """Return the counterpart that a sampler names."""

        def timesteps(schedule: Any, steps: int) -> list[int]:
            return [int(time) for time in sampler.plan(schedule, steps).timesteps]

        row = sampler.diffusers
        explicit = timesteps if row.explicit_timesteps else None
        return cls(scheduler=row.name, options=row.options, timesteps=explicit)


SCHEDULERS: Mapping[str, Counterpart] = {
    name: Counterpart.of(sampler) for name, sampler in SAMPLERS.items()
}
"""diffusers scheduler of each sampler, from the runtime's table of samplers."""


@dataclass(frozen=True, kw_only=True)
class CheckpointScheduler:
    """Scheduler of a checkpoint, in the runtime's terms.

    Attributes:
        config: scheduler_config.json, corrected as the pipelines of its family do.
        name: diffusers class.
        sampler: the sampler that follows it, or the one that was requested instead.
        schedule: its noise schedule and its options.
        prediction: prediction type of the network.
    """

    config: Mapping[str, Any]
    name: str
    sampler: str
    schedule: Schedule | EDMSchedule
    prediction: Prediction

    @classmethod
    def of(cls, config: Mapping[str, Any], sampler: str | None = None) -> "CheckpointScheduler":
        """Interpret a configuration.

        Args:
            config: scheduler_config.json, corrected.
            sampler: to take in place of the one that corresponds to the scheduler.

        Raises:
            CheckpointError: the configuration is malformed, or an option is not followed.
        """
        name = _class_name(config, sampler)
        resolved = _resolved(name, config)
        _warn_of_unknown_keys(name, config)
        return cls(
            config=config,
            name=name,
            sampler=sampler or _sampler_for(name, resolved),
            schedule=_schedule(resolved, config),
            prediction=prediction_of(resolved),
        )

    @property
    def followed(self) -> dict[str, Any]:
        """Options that the checkpoint names and that the schedule holds or the sampler reads."""
        counterpart = SAMPLERS[self.sampler].diffusers
        reads = _SCHEDULE_KEYS | counterpart.follows | set(counterpart.options)
        named = {key: value for key, value in self.config.items() if key in reads}
        if named.get("trained_betas"):
            named["trained_betas"] = f"{len(named['trained_betas'])} values"
        return named


def corrected(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a scheduler_config.json with the corrections that StableDiffusionPipeline makes.

    Some files predate two options that latent diffusion needs at fixed values; diffusers sets them
    in the pipeline's constructor, with a deprecation warning.
    """
    return {**config, "steps_offset": 1, "clip_sample": False}


def diffusers_scheduler(name: str, config: Mapping[str, Any], **options: Any) -> Any:
    """Return the diffusers scheduler of a class name and a scheduler_config.json.

    Raises:
        CheckpointError: diffusers refuses the configuration.
    """
    public = {key: value for key, value in config.items() if not key.startswith("_")}
    try:
        with quiet_diffusers():  # keys that it ignores are warned of here
            return getattr(diffusers, name).from_config(public, **options)
    except Exception as error:
        reason = printable(one_line(error))
        raise CheckpointError(f"scheduler_config.json: {name}: {reason}") from error


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Context manager that silences the warnings of diffusers."""
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        diffusers_logging.set_verbosity(verbosity)


def with_class(config: Mapping[str, Any], index: Mapping[str, Any]) -> dict[str, Any]:
    """Return a scheduler_config.json with the class of model_index.json if it names none itself.

    If the two differ, a warning says so: diffusers loads the one of model_index.json.

    Args:
        config: scheduler_config.json.
        index: model_index.json.
    """
    entry, own = index.get("scheduler"), config.get("_class_name")
    named = entry[-1] if isinstance(entry, list) and entry else None
    if own is None and isinstance(named, str):
        return {**config, "_class_name": named}
    if named is not None and named != own:
        warn_once(
            f"model_index.json names the scheduler {reprlib.repr(named)}, and "
            f"scheduler_config.json {reprlib.repr(own)}: this follows scheduler_config.json, but "
            f"diffusers would load {reprlib.repr(named)}"
        )
    return dict(config)


def schedule_of(config: Mapping[str, Any]) -> Schedule | EDMSchedule:
    """Return the noise schedule that a scheduler_config.json describes.

    Options that the file leaves out have the defaults of the class that it names.

    Raises:
        CheckpointError: the schedule is malformed or not supported.
    """
    return _schedule(_resolved(_class_name(config, None), config), config)


def prediction_of(config: Mapping[str, Any]) -> Prediction:
    """Return the prediction type that the denoiser was trained for.

    Raises:
        CheckpointError: the prediction type is not supported.
    """
    edm = str(config.get("_class_name", "")).startswith("EDM") or "sigma_data" in config
    match config.get("prediction_type", "epsilon"):
        case "epsilon":
            return "edm_epsilon" if edm else "epsilon"
        case "v_prediction":
            return "edm_v_prediction" if edm else "v_prediction"
        case "sample" if not edm:
            return "sample"
        case other:
            raise CheckpointError(
                f"scheduler_config.json: prediction_type {reprlib.repr(other)} is not epsilon, "
                "v_prediction or sample"
            )


def default_sampler(config: Mapping[str, Any]) -> str:
    """Return the sampler that corresponds to the checkpoint's scheduler.

    Raises:
        CheckpointError: there is none, or it does not follow one of the scheduler's options.
    """
    name = _class_name(config, None)
    return _sampler_for(name, _resolved(name, config))


def _sampler_for(name: str, resolved: Mapping[str, Any]) -> str:
    """Return the sampler that corresponds to a class with all of its arguments: default_sampler().

    Raises:
        CheckpointError: see default_sampler().
    """
    rows = [row for row in SAMPLERS.values() if _is_counterpart(row, name, resolved)]
    if not rows:
        raise CheckpointError(
            f"scheduler_config.json: no sampler corresponds to this {name}: to take another, "
            "export with --sampler"
        )
    sampler = max(rows, key=lambda row: len(row.diffusers.options))
    if ignored := _ignored_options(name, resolved, sampler):
        option = next(iter(ignored))
        raise CheckpointError(
            f"scheduler_config.json: {option} = {reprlib.repr(ignored[option])} of {name} is not "
            "followed: to take another sampler, export with --sampler"
        )
    return sampler.name


def _is_counterpart(row: Sampler, name: str, resolved: Mapping[str, Any]) -> bool:
    counterpart = row.diffusers
    return (
        name in (counterpart.name, *counterpart.aliases)
        and not counterpart.explicit_timesteps
        and all(resolved.get(key) == value for key, value in counterpart.options.items())
    )


def _ignored_options(name: str, resolved: Mapping[str, Any], sampler: Sampler) -> dict[str, Any]:
    """Return the options that differ from their defaults and that the sampler does not read."""
    read = _SCHEDULE_KEYS | sampler.diffusers.follows | set(sampler.diffusers.options)
    read |= _INERT_KEYS[""] | _INERT_KEYS.get(name, frozenset())
    defaults = _defaults(name)
    return {
        key: resolved[key]
        for key, default in defaults.items()
        if key not in read and (resolved[key] or None) != (default or None)
    }


def _class_name(config: Mapping[str, Any], sampler: str | None) -> str:
    """Return the diffusers class that a configuration names; that of the sampler if unknown.

    Raises:
        CheckpointError: there is no such class, or no network here can use it.
    """
    name = str(config.get("_class_name"))
    kind = getattr(diffusers, name, None)
    if inspect.isclass(kind) and issubclass(kind, diffusers.SchedulerMixin):
        if "beta_schedule" in _defaults(name) or "sigma_data" in _defaults(name):
            return name
        raise CheckpointError(
            f"scheduler_config.json: {name} has no noise schedule of betas, which these models are "
            "trained on: diffusers' pipeline cannot use it either"
        )
    if sampler is not None:
        return SAMPLERS[sampler].diffusers.name
    raise CheckpointError(
        f"scheduler_config.json: {reprlib.repr(name)} is no scheduler of diffusers "
        f"{diffusers.__version__} as installed: to take a sampler, export with --sampler"
    )


def _defaults(name: str) -> dict[str, Any]:
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    return {key: row.default for key, row in parameters.items() if row.default is not row.empty}


def _resolved(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return every argument of the class: the configuration's, or its default.

    Raises:
        CheckpointError: a value is malformed or not supported.
    """
    steps = config.get("num_train_timesteps", 1)
    if type(steps) is not int or not 1 <= steps <= MAX_TRAIN_STEPS:
        raise CheckpointError(
            f"scheduler_config.json: num_train_timesteps must be between 1 and {MAX_TRAIN_STEPS}, "
            f"not {reprlib.repr(steps)}"
        )
    if config.get("thresholding"):
        raise CheckpointError(
            "scheduler_config.json: thresholding is for models of pixels, not of latents"
        )
    return dict(diffusers_scheduler(name, config).config)


def _warn_of_unknown_keys(name: str, config: Mapping[str, Any]) -> None:
    known = {*_defaults(name), *_SCHEDULE_KEYS, *_INERT_KEYS[""]}
    known |= {"clip_sample", "sigma_min", "sigma_max"}  # of the pipelines, of every spacing
    unknown = [key for key in config if key not in known and not key.startswith("_")]
    if unknown:
        _log.warning(
            "scheduler_config.json: %s has no option %s: diffusers ignores it, and so does this%s",
            name,
            unknown[0],
            f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else "",
        )


def _schedule(resolved: Mapping[str, Any], config: Mapping[str, Any]) -> Schedule | EDMSchedule:
    options = _options(resolved, config)
    if "sigma_data" in resolved:
        names = ("sigma_min", "sigma_max", "sigma_data", "sigma_schedule", "rho")
        edm = {name: resolved[name] for name in names}
        edm = {"train_steps": resolved["num_train_timesteps"], **edm, "options": options}
        return _converted({"kind": "edm", **edm}, EDMSchedule)
    betas = resolved.get("trained_betas")
    fields = {
        "train_steps": resolved["num_train_timesteps"],
        "beta_kind": "explicit" if betas else resolved["beta_schedule"],
        "beta_start": resolved["beta_start"],
        "beta_end": resolved["beta_end"],
        "betas": betas or (),
        "spacing": config.get("timestep_spacing"),
        "offset": config.get("steps_offset", 0),
        "zero_terminal_snr": config.get("rescale_betas_zero_snr", False),
        "final_alpha_one": config.get("set_alpha_to_one"),
        "options": options,
    }
    return _converted({"kind": "discrete", **fields}, Schedule)


def _converted(fields: Mapping[str, Any], kind: type[Any]) -> Any:
    try:
        return msgspec.convert(fields, kind)
    except (ManifestError, msgspec.ValidationError) as error:
        raise CheckpointError(f"scheduler_config.json: {error}") from error


def _options(resolved: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the solver options that the configuration names.

    Options that it leaves out stay out: each sampler then has the default of its own diffusers
    counterpart, as after from_config there.
    """
    names = set(SolverOptions.__struct_fields__)
    edm_keys = {"sigma_min", "sigma_max"} if "sigma_data" in resolved else set()
    options = {
        key: resolved[key]
        for key in config
        if key in names - edm_keys and resolved.get(key) is not None
    }
    spacing = [value for key, value in _SPACINGS.items() if resolved.get(key)]
    if spacing:
        options["sigma_spacing"] = spacing[0]
    if resolved.get("timestep_type") == "continuous":
        options["continuous_timesteps"] = resolved.get("prediction_type") == "v_prediction"
    return options


def follows(sampler: str, config: Mapping[str, Any]) -> bool:
    """Return True if a sampler stands for the checkpoint's own scheduler, as it is configured.

    False if the family or the user has another sampler in its place.
    """
    try:
        return default_sampler(config) == sampler
    except CheckpointError:  # the user has chosen a sampler for a scheduler that none follows
        return False
