"""Presets and prompt templates: how the values of a manifest's row become one Params."""

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
    """A preset's second pass, under the row's ``detail_mask``.

    values: the parameters that differ from the first pass.
    """

    prompt: str
    values: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A named set of parameters and a prompt template.

    ``prompt`` may contain ``{placeholders}``; ``placeholders`` has the text for those that are
    not columns of the manifest. use: one line for the user. detail: the second pass, if any.
    """

    name: str
    use: str
    prompt: str
    values: Mapping[str, Any]
    placeholders: Mapping[str, str]
    detail: Detail | None = None


# Cached: read for every row of a manifest.
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
    """Parses ``ecommerce`` or ``ecommerce+preview``; values of later presets win.

    Raises ParameterError with the most similar known name.
    """
    known = presets()
    names = tuple(part.strip() for part in text.split("+"))
    for name in names:
        if name not in known:
            raise ParameterError(f"preset: {name!r} is not known{did_you_mean(name, known)}")
    return tuple(known[name] for name in names)


def placeholders(template: str) -> tuple[str, ...]:
    """The placeholder names of a prompt template, in order. ``{{`` and ``}}`` are braces.

    Raises ParameterError for anything between braces that is not a plain name: ``str.format``
    would also evaluate attributes and indexes.
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
    """The passes of a row that has more than one.

    passes: one mapping per pass, the first included: parameter names to values, and optionally
    ``mask``. detail_mask and detail_prompt: shorthand for a second pass.
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
    """Builds Params from, in rising precedence: engine defaults, presets, ``values``, ``passes``.

    prompt: a template that replaces the preset's. values: parameter names to text or numbers,
    parsed and checked here; ``values["prompt"]`` is not a template. columns: texts for the
    template's placeholders. style: appended to the prompt of every pass, unless the template
    contains ``{style}``. The seed is 0 unless given. Raises ParameterError.
    """
    # The first pass is the job itself: its values go into the Params, the others into ``passes``.
    passes = passes or RowPasses()
    chosen = find_presets(preset) if preset else ()
    merged: dict[str, Any] = dict(engine_spec(engine).mask_defaults)
    defaults: dict[str, str] = {}
    template = prompt or ""
    for named in chosen:
        merged.update(named.values)
        defaults.update(named.placeholders)
        template = prompt or named.prompt or template
    merged.update(_read(values))
    prompts = _PromptBuilder(texts={**defaults, **columns}, style=style)
    merged["prompt"] = prompts.build(merged.get("prompt"), template)
    for first_pass in passes.passes[:1]:
        merged.update(prompts.add_style(_read_pass(first_pass)))
    later = _later_passes(passes.passes[1:], prompts)
    detail = _detail_pass(chosen, passes, prompts, row_values=_read(values))
    params = with_values(Params(), merged | {"passes": later + detail})
    params.all_passes()  # raises for a later pass whose parameters contradict each other
    return params


def _later_passes(
    passes: Sequence[Mapping[str, object]], prompts: _PromptBuilder
) -> tuple[PassSpec, ...]:
    return tuple(
        PassSpec(
            mask=str(values.get("mask") or ""),
            values=tuple(sorted(prompts.add_style(_read_pass(values)).items())),
        )
        for values in passes
    )


def _detail_pass(
    chosen: Sequence[Preset],
    passes: RowPasses,
    prompts: _PromptBuilder,
    *,
    row_values: Mapping[str, Any],
) -> tuple[PassSpec, ...]:
    """The second pass of ``detail_mask`` and the presets, if any.

    row_values: the parsed values of row and options; they, and later presets, win over the
    detail's own.
    """
    details = [preset.detail for preset in chosen if preset.detail]
    if passes.passes and (passes.detail_mask or passes.detail_prompt):
        raise ParameterError("passes: cannot be combined with detail_mask or detail_prompt")
    if passes.passes:
        return ()
    if not passes.detail_mask:
        if details or passes.detail_prompt:
            raise ParameterError("detail_mask: empty; the second pass needs its own mask")
        return ()
    values = _detail_values(chosen, row_values) if details else {}
    if passes.detail_prompt:
        values["prompt"] = prompts.build(passes.detail_prompt, "")
    elif details:
        values["prompt"] = prompts.build(None, details[-1].prompt)
    return (PassSpec(mask=passes.detail_mask, values=tuple(sorted(values.items()))),)


def _detail_values(chosen: Sequence[Preset], row_values: Mapping[str, Any]) -> dict[str, Any]:
    last = max(n for n, preset in enumerate(chosen) if preset.detail)
    detail = chosen[last].detail
    # Only what the detail sets itself: everything else it inherits from the first pass.
    values = dict(detail.values) if detail else {}
    for later in (*(preset.values for preset in chosen[last + 1 :]), row_values):
        values.update((name, later[name]) for name in values if name in later)
    return values


@dataclass(frozen=True, kw_only=True)
class _PromptBuilder:
    """Fills prompt templates and adds the style. texts: placeholder names to their texts."""

    texts: Mapping[str, str] = field(default_factory=dict)
    style: str = ""

    def build(self, literal: str | None, template: str) -> str:
        """The literal prompt if there is one, else the filled template; with the style."""
        if literal is not None:
            return self._with_style(literal)
        texts = {**self.texts, "style": self.style} if self.style else self.texts
        filled = _fill(template, texts)
        # The template has already placed the style: do not append it a second time.
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
        # An empty cell counts as missing: a prompt with a gap would paint something else.
        if not texts.get(name):
            raise ParameterError(
                f"prompt: nothing fills {{{name}}}; add a column {name!r} or another --prompt"
            )
    return template.format_map(texts)
