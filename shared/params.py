"""Parameters of a job: names, ranges, presets, and how a row's values become one Params."""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import string
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from shared.errors import ParameterError

Mode = Literal["auto", "full", "tile"]
Scheduler = Literal["ddim", "ddpm", "pndm", "euler", "euler_a", "dpmpp_2m", "unipc", "lcm"]
OpenCVMethod = Literal["telea", "navier-stokes"]

MAX_SEED = 2**63 - 1
NATIVE_ENGINE = "opencv"
PROMPT_LIMIT = 4000
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


_canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode


@dataclass(frozen=True, kw_only=True)
class Params:
    """Everything that decides a job's pixels, besides its image, its mask and its engine.

    Names and meanings are diffusers' where diffusers has them. ``width`` and ``height``
    are the engine's window in pixels; ``mask_*`` lengths are original-image pixels.
    """

    mode: Mode = "auto"
    prompt: str = ""
    negative_prompt: str = ""
    seed: int = 0
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    strength: float = 0.8
    eta: float = 0.0
    scheduler: Scheduler = "ddim"
    width: int = 512
    height: int = 512
    mask_threshold: int = 128
    mask_dilation: int = 0
    mask_feather: int = 0
    opencv_method: OpenCVMethod = "telea"
    opencv_radius: int = 5

    def to_json(self) -> str:
        """Canonical: sorted keys, no spaces; the seed is stored beside it, not in it."""
        values = dict(vars(self))
        del values["seed"]
        return _canonical(values)

    @classmethod
    def from_json(cls, text: str, *, seed: int) -> Params:
        return cls(**json.loads(text), seed=seed)


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One name a user may set, how its text is read, and what is allowed."""

    name: str
    parse: Callable[[str], Any]
    allowed: str
    check: Callable[[Any], bool]

    def read(self, value: object) -> Any:
        """Raises ParameterError naming the value and what is allowed."""
        try:
            parsed = self.parse(value if isinstance(value, str) else _as_text(value))
        except ValueError:
            parsed = None
        if parsed is None or not self.check(parsed):
            shown = str(value) if len(str(value)) <= 60 else str(value)[:57] + "..."
            raise ParameterError(f"{self.name}: {shown!r} is not allowed; use {self.allowed}")
        return parsed


def _as_text(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(value)  # noqa: TRY004 - read as the user's mistake, like bad text
    return repr(value)


def _integer(name: str, low: int, high: int, *, multiple: int = 1) -> Parameter:
    step = f" in multiples of {multiple}" if multiple > 1 else ""
    return Parameter(
        name=name,
        parse=_parse_integer,
        allowed=f"a whole number from {low} to {high}{step}",
        check=lambda v: low <= v <= high and v % multiple == 0,
    )


def _parse_integer(text: str) -> int:
    number = float(text)
    if not number.is_integer():
        raise ValueError(text)
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


def _text(name: str) -> Parameter:
    return Parameter(
        name=name,
        parse=str.strip,
        allowed=f"up to {PROMPT_LIMIT} characters of text without control characters",
        check=lambda v: len(v) <= PROMPT_LIMIT and not _CONTROL.search(v),
    )


PARAMETERS: Mapping[str, Parameter] = {
    p.name: p
    for p in (
        _choice("mode", get_args(Mode)),
        _text("prompt"),
        _text("negative_prompt"),
        _integer("seed", 0, MAX_SEED),
        _integer("num_inference_steps", 1, 200),
        _number("guidance_scale", 1, 20),
        _number("strength", 0, 1, above=True),
        _number("eta", 0, 1),
        _choice("scheduler", get_args(Scheduler)),
        _integer("width", 512, 1024, multiple=64),
        _integer("height", 512, 1024, multiple=64),
        _integer("mask_threshold", 1, 255),
        _integer("mask_dilation", 0, 256),
        _integer("mask_feather", 0, 256),
        _choice("opencv_method", get_args(OpenCVMethod)),
        _integer("opencv_radius", 1, 64),
    )
}

PRIORITY = _integer("priority", -1000, 1000)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A named set of parameters and a prompt template.

    ``prompt`` may hold ``{placeholders}``; ``placeholders`` gives the text used where a
    manifest has no column of that name.
    """

    name: str
    use: str
    prompt: str
    values: Mapping[str, Any]
    placeholders: Mapping[str, str]


@cache
def presets() -> Mapping[str, Preset]:
    """All presets by name, in the order of ``presets.toml``."""
    text = resources.files("shared").joinpath("presets.toml").read_text("utf-8")
    return {name: _preset(name, table) for name, table in tomllib.loads(text).items()}


def _preset(name: str, table: dict[str, Any]) -> Preset:
    use, placeholders = table.pop("use"), table.pop("placeholders", {})
    prompt = table.pop("prompt", "")
    values = {key: find_parameter(key).read(value) for key, value in table.items()}
    return Preset(name=name, use=use, prompt=prompt, values=values, placeholders=placeholders)


def find_parameter(name: str) -> Parameter:
    """Raises ParameterError naming the nearest known parameter."""
    if name in PARAMETERS:
        return PARAMETERS[name]
    raise ParameterError(f"{name!r} is not a parameter{did_you_mean(name, PARAMETERS)}")


def find_presets(text: str) -> tuple[Preset, ...]:
    """``ecommerce`` or ``ecommerce+preview``: one preset, or several of which the later wins.

    Raises ParameterError naming the nearest known preset.
    """
    known = presets()
    names = tuple(part.strip() for part in text.split("+"))
    for name in names:
        if name not in known:
            raise ParameterError(f"preset: {name!r} is not known{did_you_mean(name, known)}")
    return tuple(known[name] for name in names)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'seed'?``, or the list of what is known where nothing is near."""
    names = {one.lower(): one for one in known}
    near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {names[near[0]]!r}?"
    return f"; known: {', '.join(names.values())}"


def placeholders(template: str) -> tuple[str, ...]:
    """The names in a prompt template, in order. ``{{`` and ``}}`` stand for braces.

    Raises ParameterError for anything but plain names between braces.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ParameterError(f"prompt: {template!r}: {error}; write '{{{{' for a brace") from error
    names = []
    for _, name, spec, conversion in parts:
        if name is None:
            continue
        if not name.isidentifier() or spec or conversion:
            raise ParameterError(f"prompt: {{{name}}} is not a plain placeholder name")
        names.append(name)
    return tuple(names)


def resolve(
    *,
    engine: str,
    preset: str | None,
    prompt: str | None,
    values: Mapping[str, object],
    columns: Mapping[str, str],
) -> Params:
    """One Params from, in rising precedence: engine defaults, presets, ``values``.

    prompt: a template that replaces the preset's. values: parameter name to text or
    number, read and range-checked here; ``values["prompt"]`` is taken as it is.
    columns: text for the template's placeholders. The seed stays 0 where none is given.
    Raises ParameterError.
    """
    chosen = find_presets(preset) if preset else ()
    merged: dict[str, Any] = {"mask_feather": 0 if is_native(engine) else 4}
    defaults: dict[str, str] = {}
    template = prompt or ""
    for one in chosen:
        merged.update(one.values)
        defaults.update(one.placeholders)
        template = prompt or one.prompt or template
    merged.update((name, find_parameter(name).read(value)) for name, value in values.items())
    if "prompt" not in values:
        merged["prompt"] = PARAMETERS["prompt"].read(_fill(template, {**defaults, **columns}))
    return changed(Params(), merged)


def changed(params: Params, values: Mapping[str, Any]) -> Params:
    """The same with other values, each read already; raises ParameterError if they disagree."""
    found = Params(**{**vars(params), **values})
    if found.eta and found.scheduler != "ddim":
        raise ParameterError(
            f"eta: {found.eta:g} has no meaning for scheduler {found.scheduler!r}; "
            "use 0, or scheduler ddim"
        )
    return found


def engine_name(text: str) -> str:
    """One name per engine and queue: a model's folder becomes absolute. Raises ParameterError."""
    kind, _, model = text.partition(":")
    if text in ("sd2", "opencv"):
        return text
    if kind != "diffusers" or not model:
        raise ParameterError(
            f"engine: {text!r} is not known; use sd2, opencv or "
            "diffusers:FOLDER_OR_HUB_ID[@REVISION]"
        )
    if Path(model).is_dir():
        return f"diffusers:{os.path.realpath(model)}"
    return text


def is_native(engine: str) -> bool:
    """Whether the engine takes regions of any size as they are, without a model's window."""
    return engine == NATIVE_ENGINE


def _fill(template: str, texts: Mapping[str, str]) -> str:
    for name in placeholders(template):
        if not texts.get(name):
            raise ParameterError(
                f"prompt: nothing fills {{{name}}}; add a column {name!r} or another --prompt"
            )
    return template.format_map(texts)
