"""Presets and prompt templates: how what a manifest's row says becomes one Params."""

from __future__ import annotations

import string
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from shared.engines import engine_spec
from shared.errors import ParameterError
from shared.params import (
    PARAMETERS,
    PASS_PARAMETERS,
    Params,
    PassSpec,
    did_you_mean,
    find_parameter,
    with_values,
)


@dataclass(frozen=True, kw_only=True)
class Detail:
    """A preset's second pass, over a ``detail_mask``: where it differs from the first."""

    prompt: str
    values: Mapping[str, Any]


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
    detail: Detail | None = None


@cache
def presets() -> Mapping[str, Preset]:
    """All presets by name, in the order of ``presets.toml``."""
    text = resources.files("shared").joinpath("presets.toml").read_text("utf-8")
    return {name: _preset(name, table) for name, table in tomllib.loads(text).items()}


def _preset(name: str, table: dict[str, Any]) -> Preset:
    use, placeholders = table.pop("use"), table.pop("placeholders", {})
    prompt, detail = table.pop("prompt", ""), table.pop("detail", None)
    return Preset(
        name=name,
        use=use,
        prompt=prompt,
        values=_read(table),
        placeholders=placeholders,
        detail=Detail(prompt=detail.pop("prompt"), values=_read(detail)) if detail else None,
    )


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


@dataclass(frozen=True, kw_only=True)
class RowPasses:
    """A row's passes, where it has more than one.

    passes: one mapping per pass, parameter names to values and perhaps a ``mask``, the first one
    included. detail_mask and detail_prompt: shorthand for a second pass.
    """

    passes: Sequence[Mapping[str, object]] = ()
    detail_mask: str = ""
    detail_prompt: str = ""


def resolve(
    *,
    engine: str,
    preset: str | None,
    prompt: str | None,
    values: Mapping[str, object],
    columns: Mapping[str, str],
    style: str = "",
    passes: RowPasses | None = None,
) -> Params:
    """One Params from, in rising precedence: engine defaults, presets, ``values``, ``passes``.

    prompt: a template that replaces the preset's. values: parameter name to text or
    number, read and range-checked here; ``values["prompt"]`` is taken as it is.
    columns: text for the template's placeholders. style: added to every pass's prompt,
    unless a template has a place for it. The seed stays 0 where none is given.
    Raises ParameterError.
    """
    passes = passes or RowPasses()
    chosen = find_presets(preset) if preset else ()
    merged: dict[str, Any] = dict(engine_spec(engine).mask_defaults)
    defaults: dict[str, str] = {}
    template = prompt or ""
    for one in chosen:
        merged.update(one.values)
        defaults.update(one.placeholders)
        template = prompt or one.prompt or template
    merged.update(_read(values))
    prompts = _PromptBuilder(texts={**defaults, **columns}, style=style)
    merged["prompt"] = prompts.build(merged.get("prompt"), template)
    for values_of_pass in passes.passes[:1]:
        merged.update(prompts.add_style(_read_pass(values_of_pass)))
    further = tuple(
        PassSpec(
            mask=str(one.get("mask") or ""),
            values=tuple(sorted(prompts.add_style(_read_pass(one)).items())),
        )
        for one in passes.passes[1:]
    )
    detail = _detail_pass(chosen, passes, prompts, given=_read(values))
    params = with_values(Params(), merged | {"passes": further + detail})
    params.all_passes()
    return params


def _detail_pass(
    chosen: Sequence[Preset],
    passes: RowPasses,
    prompts: _PromptBuilder,
    *,
    given: Mapping[str, Any],
) -> tuple[PassSpec, ...]:
    """given: what row and options say; it, and later presets, win over the detail's own."""
    details = [one.detail for one in chosen if one.detail]
    if passes.passes and (passes.detail_mask or passes.detail_prompt):
        raise ParameterError("passes: not together with detail_mask or detail_prompt")
    if passes.passes:
        return ()
    if not passes.detail_mask:
        if details or passes.detail_prompt:
            raise ParameterError("detail_mask: empty; a second pass needs a mask of its own")
        return ()
    values = _detail_values(chosen, given) if details else {}
    if passes.detail_prompt:
        values["prompt"] = prompts.build(passes.detail_prompt, "")
    elif details:
        values["prompt"] = prompts.build(None, details[-1].prompt)
    return (PassSpec(mask=passes.detail_mask, values=tuple(sorted(values.items()))),)


def _detail_values(chosen: Sequence[Preset], given: Mapping[str, Any]) -> dict[str, Any]:
    last = max(n for n, one in enumerate(chosen) if one.detail)
    detail = chosen[last].detail
    values = dict(detail.values) if detail else {}
    for later in (*(one.values for one in chosen[last + 1 :]), given):
        values.update((name, later[name]) for name in values if name in later)
    return values


@dataclass(frozen=True, kw_only=True)
class _PromptBuilder:
    """texts: what fills placeholders."""

    texts: Mapping[str, str] = field(default_factory=dict)
    style: str = ""

    def build(self, literal: str | None, template: str) -> str:
        """The prompt: taken as it is where it is literal, else filled."""
        if literal is not None:
            return self._with_style(literal)
        texts = {**self.texts, "style": self.style} if self.style else self.texts
        filled = _fill(template, texts)
        if "style" in placeholders(template):
            return str(PARAMETERS["prompt"].read(filled))
        return self._with_style(filled)

    def add_style(self, values: dict[str, Any]) -> dict[str, Any]:
        if "prompt" in values:
            return values | {"prompt": self._with_style(values["prompt"])}
        return values

    def _with_style(self, prompt: str) -> str:
        parts = [part for part in (prompt, self.style) if part]
        return str(PARAMETERS["prompt"].read(", ".join(parts)))


def _read(values: Mapping[str, object]) -> dict[str, Any]:
    return {name: find_parameter(name).read(value) for name, value in values.items()}


def _read_pass(values: Mapping[str, object]) -> dict[str, Any]:
    named = {name: value for name, value in values.items() if name != "mask"}
    for name in named:
        if name not in PASS_PARAMETERS:
            raise ParameterError(
                f"passes: {name!r} cannot differ between passes"
                f"{did_you_mean(name, PASS_PARAMETERS)}"
            )
    return _read(named)


def _fill(template: str, texts: Mapping[str, str]) -> str:
    for name in placeholders(template):
        if not texts.get(name):
            raise ParameterError(
                f"prompt: nothing fills {{{name}}}; add a column {name!r} or another --prompt"
            )
    return template.format_map(texts)
