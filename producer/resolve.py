"""From a manifest's row to a job: locations made absolute, parameters resolved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from producer.manifest import COLUMNS, LOCATION_COLUMNS, PASS_COLUMNS, ManifestRow, Problem
from shared import masks
from shared.engines import engine_name
from shared.errors import InputError, ParameterError
from shared.image_formats import FORMATS, SUFFIX_CHOICE, format_of
from shared.jobs import content_key, derive_seed
from shared.jobs.submissions import NewJob
from shared.params import PARAMETERS, PRIORITY, Params, is_file
from shared.presets import RowPasses, placeholders, presets, resolve
from shared.storage import Storage
from shared.storage.locations import absolute, name, parent

RESOLVED_CACHE = 10_000
MAX_PASSES = 8
_PARAMETERS = frozenset(PARAMETERS) - {"seed"}
_OURS = frozenset(COLUMNS)
_DECISIVE = _PARAMETERS | {"style", *PASS_COLUMNS}


@dataclass(frozen=True, kw_only=True)
class RowDefaults:
    """What the command line says about every row.

    output: folder or prefix. values: parameters from ``--set``, read and checked.
    """

    manifest: str
    output: str
    engine: str
    mask: str | None = None
    preset: str | None = None
    prompt: str | None = None
    style: str = ""
    values: Mapping[str, object] = field(default_factory=dict)
    priority: int = 0
    has_output: bool = False

    def known_placeholders(self) -> frozenset[str]:
        """Every column that could fill a template: any preset's, where rows may choose one."""
        templates = [self.prompt or ""] + [preset.prompt for preset in presets().values()]
        templates += [one.detail.prompt for one in presets().values() if one.detail]
        names = {name for template in templates for name in placeholders(template)}
        return frozenset(names - _OURS)


class RowResolver:
    """Turns rows into jobs. Resolved parameters are kept: most rows share theirs."""

    def __init__(self, options: RowDefaults, storage: Storage) -> None:
        self._options = options
        self._storage = storage
        self._base = parent(options.manifest)
        self._resolved: dict[tuple[object, ...], str] = {}

    def job(self, row: ManifestRow) -> NewJob | list[Problem]:
        """The job, or everything that is wrong with the row."""
        problems: list[Problem] = []
        found: dict[str, object] = {}
        for what in ("image", "mask", "output", "engine", "priority", "seed"):
            try:
                found[what] = getattr(self, f"_{what}")(row.cells, found)
            except InputError as error:
                text = str(error)
                problems.append(_problem(row, text if text.startswith(what) else f"{what}: {text}"))
        try:
            params = self._params(row.cells, str(found.get("engine", self._options.engine)))
        except InputError as error:
            problems += [_problem(row, text) for text in _wrong_cells(row) or [str(error)]]
        if problems:
            return problems
        return _new_job(row, found, params)

    def _image(self, cells: Mapping[str, str], _found: object) -> str:
        if "image" not in cells:
            raise InputError("empty; name the picture")
        return self._location(cells["image"])

    def _mask(self, cells: Mapping[str, str], _found: object) -> str:
        try:
            first = _passes(cells)[:1]
        except ParameterError:
            return ""  # said where the parameters are read
        text = (first and first[0].get("mask")) or cells.get("mask") or self._options.mask
        if not text:
            raise InputError("empty; name the mask, or alpha, or box:left,top,right,bottom")
        return self._mask_location(str(text))

    def _mask_location(self, text: str) -> str:
        if text.startswith("box:"):
            masks.parse_boxes(text)
        return self._location(text) if is_file(text) else text

    def _output(self, cells: Mapping[str, str], found: Mapping[str, object]) -> str:
        if "output" in cells:
            base = self._options.output if self._options.has_output else self._base
            location = self._location(cells["output"], base=base)
            _check_format(name(location))
        elif "image" not in found:
            return ""  # the row is bad already, and this is not why
        else:
            named = _named_as(name(cells["image"]), self._format(cells))
            location = self._location(f"{self._options.output.rstrip('/')}/{named}")
        asked, wanted = format_of(location), self._format(cells)
        if wanted and asked and asked.lower() != wanted:
            raise InputError(f"{name(location)!r} contradicts format {wanted}; drop one of them")
        if location in (found.get("image"), found.get("mask")):
            raise InputError(f"{location!r} is also an input; choose another output")
        return location

    def _format(self, cells: Mapping[str, str]) -> str:
        return str(cells.get("format") or self._options.values.get("format") or "")

    def _engine(self, cells: Mapping[str, str], _found: object) -> str:
        return engine_name(cells["engine"]) if "engine" in cells else self._options.engine

    def _priority(self, cells: Mapping[str, str], _found: object) -> int:
        if "priority" not in cells:
            return self._options.priority
        return int(PRIORITY.read(cells["priority"]))

    def _seed(self, cells: Mapping[str, str], _found: object) -> int | None:
        if "seed" in cells:
            return int(PARAMETERS["seed"].read(cells["seed"]))
        given = self._options.values.get("seed")
        return None if given is None else int(str(given))

    def _location(self, reference: str, *, base: str | None = None) -> str:
        if reference.endswith("/"):
            raise InputError(f"{reference!r} is a folder; name the file")
        uri = absolute(reference, base=base or self._base)
        return self._storage.check(uri)

    def _params(self, cells: Mapping[str, str], engine: str) -> str:
        """Canonical JSON of the row's parameters without the seed."""
        decisive = tuple(
            item for item in cells.items() if item[0] in _DECISIVE or item[0] not in _OURS
        )
        preset = cells.get("preset", self._options.preset)
        known = (engine, preset, decisive)
        if known not in self._resolved:
            if len(self._resolved) >= RESOLVED_CACHE:
                self._resolved.clear()
            self._resolved[known] = self._resolve(cells, engine, preset).to_json()
        return self._resolved[known]

    def _resolve(self, cells: Mapping[str, str], engine: str, preset: str | None) -> Params:
        values = {k: v for k, v in self._options.values.items() if k != "seed"}
        values.update((k, v) for k, v in cells.items() if k in _PARAMETERS)
        if "text_font" in cells:
            values["text_font"] = self._location(cells["text_font"])
        return resolve(
            engine=engine,
            preset=preset,
            prompt=self._options.prompt,
            values=values,
            columns={k: v for k, v in cells.items() if k not in _OURS},
            style=cells.get("style", self._options.style),
            passes=self._row_passes(cells),
        )

    def _row_passes(self, cells: Mapping[str, str]) -> RowPasses:
        passes = _passes(cells)
        for one in passes:
            if one.get("mask"):
                one["mask"] = self._mask_location(str(one["mask"]))
        detail_mask = cells.get("detail_mask", "")
        return RowPasses(
            passes=passes,
            detail_mask=self._mask_location(detail_mask) if detail_mask else "",
            detail_prompt=cells.get("detail_prompt", ""),
        )


def _passes(cells: Mapping[str, str]) -> list[dict[str, Any]]:
    """The objects of the ``passes`` cell; raises ParameterError."""
    if "passes" not in cells:
        return []
    try:
        found = json.loads(cells["passes"])
    except (ValueError, RecursionError) as error:
        raise ParameterError(f"passes: not JSON: {error}") from error
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found) or not found:
        raise ParameterError('passes: write a list of objects: [{"prompt": ...}, {"mask": ...}]')
    if len(found) > MAX_PASSES:
        raise ParameterError(f"passes: {len(found)} are too many; use at most {MAX_PASSES}")
    return found


def _named_as(source: str, format: str) -> str:
    """The name with the format's suffix, unless it has one of that format already."""
    target = FORMATS.get(format.upper())
    if target is None or format_of(source) == target.name:
        return source
    bare = source.rpartition(".")[0] if format_of(source) else source
    return bare + target.suffixes[0]


def _wrong_cells(row: ManifestRow) -> list[str]:
    """What is wrong with each parameter cell by itself."""
    texts = []
    for column, value in row.cells.items():
        try:
            if column in _PARAMETERS:
                PARAMETERS[column].read(value)
        except InputError as error:
            texts.append(str(error))
    return texts


def _check_format(output: str) -> None:
    """A name without extension gets the image's own format; another one has to be ours."""
    if "." in output and format_of(output) is None:
        raise InputError(
            f"{output!r}: .{output.rpartition('.')[2]} is not a format that can be written; "
            f"use {SUFFIX_CHOICE}"
        )


def _problem(row: ManifestRow, text: str) -> Problem:
    return Problem(line=row.line, text=text)


def _new_job(row: ManifestRow, found: Mapping[str, object], params: str) -> NewJob:
    image, mask, output = (str(found[column]) for column in LOCATION_COLUMNS)
    engine = str(found["engine"])
    seed = found["seed"]
    given = None if seed is None else int(str(seed))
    key = content_key(
        image=image, mask=mask, output=output, engine=engine, params=params, seed=given
    )
    return NewJob(
        line=row.line,
        key=row.cells.get("key"),
        content_key=key,
        engine=engine,
        image=image,
        mask=mask,
        output=output,
        params=params,
        seed=derive_seed(key) if given is None else given,
        priority=int(str(found["priority"])),
    )
