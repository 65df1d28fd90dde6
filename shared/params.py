"""The parameters of a job: names, allowed values, parsing, and the Params built from them."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from shared.errors import ParameterError
from shared.image_formats import FORMAT_PARAMETERS

Mode = Literal["auto", "full", "tile"]
Scheduler = Literal["ddim", "ddpm", "pndm", "euler", "euler_a", "dpmpp_2m", "unipc", "lcm"]
OpenCVMethod = Literal["telea", "navier-stokes"]
MaskFit = Literal[
    "exact",
    "scale",
    "center",
    "top",
    "bottom",
    "left",
    "right",
    "top-left",
    "top-right",
    "bottom-left",
    "bottom-right",
]
ColourFit = Literal["ring", "membrane", "off"]
Gate = Literal["fail", "review", "off"]
TextAlign = Literal["left", "center", "right"]

MAX_SEED = 2**63 - 1
PROMPT_LIMIT = 4000
# Control characters, Unicode line separators and lone surrogates.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


_canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode


@dataclass(frozen=True, kw_only=True)
class PassSpec:
    """A pass of a job after the first.

    mask: as in a manifest; empty for the job's own mask. values: parsed parameters that differ
    from the first pass, as (name, value).
    """

    mask: str = ""
    values: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Params:
    """Everything that determines a job's result except its image, its mask and its engine.

    Names and meanings follow diffusers where it has them. ``width`` and ``height`` are the
    engine's window in pixels; lengths ``mask_*`` are in pixels of the original image. Empty text
    and 0 mean "off" for ``scale``, ``refine_strength``, ``text*``, ``postprocess``, ``format`` and
    ``quality``. passes: the passes after the first.
    """

    mode: Mode = "auto"
    scale: float = 0.0
    prompt: str = ""
    negative_prompt: str = ""
    seed: int = 0
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    guidance_end: float = 1.0
    cache_interval: int = 1
    strength: float = 0.8
    refine_strength: float = 0.0
    eta: float = 0.0
    scheduler: Scheduler = "ddim"
    width: int = 512
    height: int = 512
    mask_threshold: int = 48
    mask_dilation: int = 0
    mask_feather: int = 0
    mask_invert: bool = False
    mask_fit: MaskFit = "exact"
    colour_fit: ColourFit = "membrane"
    opencv_method: OpenCVMethod = "telea"
    opencv_radius: int = 5
    text: str = ""
    text_box: str = ""
    text_font: str = ""
    text_size: int = 0
    text_color: str = "black"
    text_align: TextAlign = "center"
    postprocess: str = ""
    gate: Gate = "fail"
    format: str = ""
    quality: int = 0
    provenance: bool = True
    passes: tuple[PassSpec, ...] = ()

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces, without the seed, which has its own column.

        Optional parameters with their default values are left out.
        """
        # A job's content key is a hash of this text: a parameter that is added later must be
        # optional, or every job recorded before would get another key.
        values = {k: v for k, v in vars(self).items() if k not in _OPTIONAL or v != _OPTIONAL[k]}
        del values["seed"]
        if self.passes:
            values["passes"] = [{"mask": spec.mask, **dict(spec.values)} for spec in self.passes]
        return _canonical(values)

    @classmethod
    def from_json(cls, text: str, *, seed: int) -> Params:
        values = json.loads(text)
        if "passes" in values:
            values["passes"] = tuple(
                PassSpec(mask=fields.pop("mask"), values=tuple(fields.items()))
                for fields in values["passes"]
            )
        return cls(**values, seed=seed)

    def all_passes(self) -> tuple[tuple[str, Params], ...]:
        """The mask (empty for the job's own) and the parameters of each pass, first to last."""
        first = replace(self, passes=())
        return (
            ("", first),
            *((spec.mask, with_values(first, dict(spec.values))) for spec in self.passes),
        )


_OPTIONAL: Mapping[str, Any] = {
    name: Params.__dataclass_fields__[name].default
    for name in (
        *("scale", "guidance_end", "cache_interval", "refine_strength", "mask_invert", "mask_fit"),
        *("text", "text_box", "text_font", "text_size", "text_color", "text_align"),
        *("postprocess", "format", "quality", "passes"),
    )
}


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter: how its text is parsed and which values are allowed.

    allowed: the allowed values in words, for error messages.
    """

    name: str
    parse: Callable[[str], Any]
    allowed: str
    check: Callable[[Any], bool]

    def read(self, value: object) -> Any:
        """Parses text or a number. Raises ParameterError with the value and what is allowed."""
        try:
            parsed = self.parse(value if isinstance(value, str) else self._as_text(value))
        except ValueError:
            parsed = None
        if parsed is None or not self.check(parsed):
            shown = str(value) if len(str(value)) <= 60 else str(value)[:57] + "..."
            raise ParameterError(f"{self.name}: {shown!r} is not allowed; use {self.allowed}")
        return parsed

    def _as_text(self, value: object) -> str:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number or (isinstance(value, bool) and self.parse is _parse_bool):
            return repr(value)
        raise ValueError(value)


def _integer(name: str, low: int, high: int, *, multiple: int = 1) -> Parameter:
    step = f" in multiples of {multiple}" if multiple > 1 else ""
    return Parameter(
        name=name,
        parse=_parse_integer,
        allowed=f"a whole number from {low} to {high}{step}",
        check=lambda v: low <= v <= high and v % multiple == 0,
    )


def _parse_integer(text: str) -> int:
    """Accepts ``50.0`` too: spreadsheets write integers like that."""
    number = float(text)
    if not number.is_integer():
        raise ValueError(text)
    # Not int(number): a float is exact only to 2**53, a seed has 63 bits.
    return int(text) if text.strip().lstrip("+-").isdigit() else int(number)


def _number(name: str, low: float, high: float, *, above: bool = False) -> Parameter:
    return Parameter(
        name=name,
        parse=float,
        allowed=f"a number {f'above {low:g} and up' if above else f'from {low:g}'} to {high:g}",
        check=lambda v: math.isfinite(v) and (low < v if above else low <= v) and v <= high,
    )


def _choice(name: str, choices: Iterable[str]) -> Parameter:
    names = tuple(choices)
    return Parameter(
        name=name, parse=str.strip, allowed="one of " + ", ".join(names), check=names.__contains__
    )


def _boolean(name: str) -> Parameter:
    return Parameter(
        name=name, parse=_parse_bool, allowed="true or false", check=lambda v: v is not None
    )


def _parse_bool(text: str) -> bool:
    word = text.strip().lower()
    if word in ("true", "yes", "on", "1"):
        return True
    if word in ("false", "no", "off", "0"):
        return False
    raise ValueError(text)


def _text(name: str, *, lines: bool = False) -> Parameter:
    """lines: whether several lines are allowed."""
    return Parameter(
        name=name,
        parse=str.strip,
        allowed=f"up to {PROMPT_LIMIT} characters of text without control characters",
        check=lambda v: (
            len(v) <= PROMPT_LIMIT and not _CONTROL.search(v.replace("\n", "") if lines else v)
        ),
    )


def _pattern(name: str, pattern: str, allowed: str) -> Parameter:
    matches = re.compile(pattern).fullmatch
    return Parameter(
        name=name, parse=str.strip, allowed=allowed, check=lambda v: matches(v) is not None
    )


def _is_colour(text: str) -> bool:
    from PIL import ImageColor  # imported here: most manifests have no text, and Pillow is slow

    try:
        ImageColor.getrgb(text)
    except ValueError:
        return False
    return True


_EDGE = r"\s*\d{1,6}\s*"


PARAMETERS: Mapping[str, Parameter] = {
    p.name: p
    for p in (
        _choice("mode", get_args(Mode)),
        Parameter(
            name="scale",
            parse=float,
            allowed="a number from 0.25 to 64, or 0",
            check=lambda v: v == 0 or 0.25 <= v <= 64,
        ),
        _text("prompt"),
        _text("negative_prompt"),
        _integer("seed", 0, MAX_SEED),
        _integer("num_inference_steps", 1, 200),
        _number("guidance_scale", 1, 20),
        _number("guidance_end", 0, 1),
        _integer("cache_interval", 1, 10),
        _number("strength", 0, 1, above=True),
        _number("refine_strength", 0, 1),
        _number("eta", 0, 1),
        _choice("scheduler", get_args(Scheduler)),
        _integer("width", 512, 1024, multiple=64),
        _integer("height", 512, 1024, multiple=64),
        _integer("mask_threshold", 1, 255),
        _integer("mask_dilation", 0, 256),
        _integer("mask_feather", 0, 256),
        _boolean("mask_invert"),
        _choice("mask_fit", get_args(MaskFit)),
        _choice("colour_fit", get_args(ColourFit)),
        _choice("opencv_method", get_args(OpenCVMethod)),
        _integer("opencv_radius", 1, 64),
        _text("text", lines=True),
        _pattern("text_box", f"{_EDGE},{_EDGE},{_EDGE},{_EDGE}", "left,top,right,bottom"),
        _text("text_font"),
        _integer("text_size", 0, 4096),
        Parameter(
            name="text_color",
            parse=str.strip,
            allowed="a colour's name, #rrggbb or #rrggbbaa",
            check=_is_colour,
        ),
        _choice("text_align", get_args(TextAlign)),
        _pattern("postprocess", r"[\w.-]{1,100}", "the name of an installed entry point"),
        _choice("gate", get_args(Gate)),
        _choice("format", FORMAT_PARAMETERS),
        _integer("quality", 1, 100),
        _boolean("provenance"),
    )
}

BOOLEANS = frozenset(name for name, spec in PARAMETERS.items() if spec.parse is _parse_bool)

# The parameters that may differ between the passes of a job.
PASS_PARAMETERS = (
    *("mode", "scale", "prompt", "negative_prompt", "num_inference_steps", "guidance_scale"),
    *("guidance_end", "cache_interval", "strength", "refine_strength", "eta", "scheduler"),
    *("width", "height", "mask_threshold", "mask_dilation", "mask_feather", "mask_invert"),
    *("mask_fit", "colour_fit", "opencv_method", "opencv_radius"),
)

PRIORITY = _integer("priority", -1000, 1000)


def find_parameter(name: str) -> Parameter:
    """Raises ParameterError naming the nearest known parameter."""
    if name in PARAMETERS:
        return PARAMETERS[name]
    raise ParameterError(f"{name!r} is not a parameter{did_you_mean(name, PARAMETERS)}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'seed'?``, or the list of known names if none is similar."""
    names = {known_name.lower(): known_name for known_name in known}
    similar = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.6)
    if similar:
        return f"; did you mean {names[similar[0]]!r}?"
    return f"; known: {', '.join(names.values())}"


def with_values(params: Params, values: Mapping[str, Any]) -> Params:
    """A copy with other, already parsed values; raises ParameterError if they contradict."""
    merged = Params(**{**vars(params), **values})
    if merged.eta and merged.scheduler != "ddim":
        raise ParameterError(
            f"eta: {merged.eta:g} has no meaning for scheduler {merged.scheduler!r}; "
            "use 0, or scheduler ddim"
        )
    if int(merged.num_inference_steps * merged.strength) < 1:
        raise ParameterError(
            f"strength: {merged.strength:g} of {merged.num_inference_steps} num_inference_steps "
            "leaves no step; raise one of them"
        )
    if merged.refine_strength and int(merged.num_inference_steps * merged.refine_strength) < 1:
        raise ParameterError(
            f"refine_strength: {merged.refine_strength:g} of {merged.num_inference_steps} "
            "num_inference_steps leaves no step; raise one of them"
        )
    return merged


def further_inputs(params: str) -> tuple[str, ...]:
    """Locations of the further files that a job reads: masks of later passes and the font.

    params: the text of ``to_json``. ``alpha`` and ``box:...`` are not files and are left out.
    """
    # Called for every row of a manifest: parse the JSON only if it can name a file.
    if '"passes"' not in params and '"text_font"' not in params:
        return ()
    values = json.loads(params)
    masks = [fields["mask"] for fields in values.get("passes", ())]
    locations = [*masks, values.get("text_font", "")]
    return tuple(dict.fromkeys(uri for uri in locations if uri and is_file(uri)))


def is_file(mask: str) -> bool:
    """Whether a manifest's mask is a location, not ``alpha`` or ``box:...``."""
    return mask != "alpha" and not mask.startswith("box:")
