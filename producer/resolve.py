"""Turns a manifest's row into a job: absolute locations and resolved parameters."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from producer.manifest import COLUMNS, PASS_COLUMNS, ManifestRow, Problem
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
# The seed is stored in a column of its own: rows that differ only in it share their params.
_PARAMETERS = frozenset(PARAMETERS) - {"seed"}
_COLUMNS = frozenset(COLUMNS)
_PARAMS_COLUMNS = _PARAMETERS | {"style", *PASS_COLUMNS}

_Value = TypeVar("_Value")


@dataclass(frozen=True, kw_only=True)
class RowDefaults:
    """What the command line gives for every row; a row's own cell wins.

    output: folder or prefix; has_output: it was given, and not derived from the manifest's name.
    values: parameters from ``--set``, parsed and checked.
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
        """Return the columns that may fill a prompt template.

        Those of all presets' templates count, since a row may choose any preset.
        """
        templates = [self.prompt or ""] + [preset.prompt for preset in presets().values()]
        templates += [preset.detail.prompt for preset in presets().values() if preset.detail]
        names = {name for template in templates for name in placeholders(template)}
        return frozenset(names - _COLUMNS)


class RowResolver:
    """Resolves rows to jobs. Resolved parameters are cached: most rows share theirs."""

    def __init__(self, defaults: RowDefaults, storage: Storage) -> None:
        self._defaults = defaults
        self._storage = storage
        self._manifest_folder = parent(defaults.manifest)
        self._params_cache: dict[tuple[object, ...], str] = {}

    def resolve(self, row: ManifestRow) -> NewJob | list[Problem]:
        """Return the job, or everything that is wrong with the row."""
        cells = row.cells
        errors = _RowErrors(row)
        image = errors.collect("image", lambda: self._image(cells))
        mask = errors.collect("mask", lambda: self._mask(cells))
        output = errors.collect("output", lambda: self._output(cells, image=image, mask=mask))
        engine = errors.collect("engine", lambda: self._engine(cells))
        priority = errors.collect("priority", lambda: self._priority(cells))
        seed = errors.collect("seed", lambda: self._seed(cells))
        params = errors.collect_params(lambda: self._params(cells, engine or self._defaults.engine))
        # A value is None only if it has a problem; the seed may be None without one.
        if image is None or mask is None or output is None or engine is None:
            return errors.problems
        if priority is None or params is None or errors.problems:
            return errors.problems
        key = content_key(
            image=image, mask=mask, output=output, engine=engine, params=params, seed=seed
        )
        return NewJob(
            line=row.line,
            key=cells.get("key"),
            content_key=key,
            engine=engine,
            image=image,
            mask=mask,
            output=output,
            params=params,
            seed=derive_seed(key) if seed is None else seed,
            priority=priority,
        )

    # --- locations ---

    def _image(self, cells: Mapping[str, str]) -> str:
        if "image" not in cells:
            raise InputError("empty; name the image")
        return self._location(cells["image"])

    def _mask(self, cells: Mapping[str, str]) -> str:
        try:
            first_pass = _parse_passes(cells)[:1]
        except ParameterError:
            return ""  # reported once, where the parameters are read
        text = (first_pass and first_pass[0].get("mask")) or cells.get("mask")
        text = text or self._defaults.mask
        if not text:
            raise InputError("empty; name the mask, or alpha, or box:left,top,right,bottom")
        return self._mask_location(str(text))

    def _mask_location(self, text: str) -> str:
        if text.startswith("box:"):
            masks.parse_boxes(text)
        return self._location(text) if is_file(text) else text

    def _output(self, cells: Mapping[str, str], *, image: str | None, mask: str | None) -> str:
        expected = str(cells.get("format") or self._defaults.values.get("format") or "")
        if "output" in cells:
            base = self._defaults.output if self._defaults.has_output else self._manifest_folder
            location = self._location(cells["output"], base=base)
            _check_writable_format(name(location))
        elif image is None:
            return ""  # the name follows from the image, whose problem is reported already
        else:
            file_name = _with_suffix(name(cells["image"]), expected)
            location = self._location(f"{self._defaults.output.rstrip('/')}/{file_name}")
        actual = format_of(location)
        if expected and actual and actual.lower() != expected:
            raise InputError(f"{name(location)!r} contradicts format {expected}; drop one of them")
        if location in (image, mask):
            raise InputError(f"{location!r} is also an input; choose another output")
        return location

    def _location(self, reference: str, *, base: str | None = None) -> str:
        if reference.endswith("/"):
            raise InputError(f"{reference!r} is a folder; name the file")
        return self._storage.check(absolute(reference, base=base or self._manifest_folder))

    # --- other cells ---

    def _engine(self, cells: Mapping[str, str]) -> str:
        return engine_name(cells["engine"]) if "engine" in cells else self._defaults.engine

    def _priority(self, cells: Mapping[str, str]) -> int:
        if "priority" not in cells:
            return self._defaults.priority
        return int(PRIORITY.read(cells["priority"]))

    def _seed(self, cells: Mapping[str, str]) -> int | None:
        if "seed" in cells:
            return int(PARAMETERS["seed"].read(cells["seed"]))
        default = self._defaults.values.get("seed")
        return None if default is None else int(str(default))

    # --- parameters ---

    def _params(self, cells: Mapping[str, str], engine: str) -> str:
        """Return the row's parameters without the seed, as canonical JSON."""
        preset = cells.get("preset", self._defaults.preset)
        # A column that is not ours fills a placeholder of the prompt.
        deciding_cells = tuple(
            (column, text)
            for column, text in cells.items()
            if column in _PARAMS_COLUMNS or column not in _COLUMNS
        )
        cache_key = (engine, preset, deciding_cells)
        if cache_key not in self._params_cache:
            # Emptied and not evicted one by one: rows with distinct prompts never repeat.
            if len(self._params_cache) >= RESOLVED_CACHE:
                self._params_cache.clear()
            self._params_cache[cache_key] = self._resolve_params(cells, engine, preset).to_json()
        return self._params_cache[cache_key]

    def _resolve_params(self, cells: Mapping[str, str], engine: str, preset: str | None) -> Params:
        values = {k: v for k, v in self._defaults.values.items() if k != "seed"}
        values.update((k, v) for k, v in cells.items() if k in _PARAMETERS)
        if "text_font" in cells:
            values["text_font"] = self._location(cells["text_font"])
        return resolve(
            engine=engine,
            preset=preset,
            prompt=self._defaults.prompt,
            values=values,
            columns={k: v for k, v in cells.items() if k not in _COLUMNS},
            style=cells.get("style", self._defaults.style),
            passes=self._row_passes(cells),
        )

    def _row_passes(self, cells: Mapping[str, str]) -> RowPasses:
        passes = _parse_passes(cells)
        for values in passes:
            if values.get("mask"):
                values["mask"] = self._mask_location(str(values["mask"]))
        detail_mask = cells.get("detail_mask", "")
        return RowPasses(
            passes=passes,
            detail_mask=self._mask_location(detail_mask) if detail_mask else "",
            detail_prompt=cells.get("detail_prompt", ""),
        )


class _RowErrors:
    """Collects the problems of one row, so that all are reported together."""

    def __init__(self, row: ManifestRow) -> None:
        self._row = row
        self.problems: list[Problem] = []

    def collect(self, column: str, read: Callable[[], _Value]) -> _Value | None:
        """Return what ``read`` returns; None, and a problem added, if it raises InputError."""
        try:
            return read()
        except InputError as error:
            text = str(error)
            self._add(text if text.startswith(column) else f"{column}: {text}")
            return None

    def collect_params(self, read: Callable[[], str]) -> str | None:
        try:
            return read()
        except InputError as error:
            # Resolving stops at the first bad cell; each cell is read again to name them all.
            for text in _bad_parameters(self._row.cells) or [str(error)]:
                self._add(text)
            return None

    def _add(self, text: str) -> None:
        self.problems.append(Problem(line=self._row.line, text=text))


def _bad_parameters(cells: Mapping[str, str]) -> list[str]:
    """Return what is wrong with each parameter's cell by itself."""
    texts = []
    for column, value in cells.items():
        try:
            if column in _PARAMETERS:
                PARAMETERS[column].read(value)
        except InputError as error:
            texts.append(str(error))
    return texts


def _parse_passes(cells: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the objects of the ``passes`` cell. Raises ParameterError."""
    if "passes" not in cells:
        return []
    try:
        passes = json.loads(cells["passes"])
    except (ValueError, RecursionError) as error:
        raise ParameterError(f"passes: not JSON: {error}") from error
    if not passes or not isinstance(passes, list):
        raise ParameterError(_PASSES_FORMAT)
    if not all(isinstance(values, dict) for values in passes):
        raise ParameterError(_PASSES_FORMAT)
    if len(passes) > MAX_PASSES:
        raise ParameterError(f"passes: {len(passes)} are too many; use at most {MAX_PASSES}")
    return passes


_PASSES_FORMAT = 'passes: write a list of objects: [{"prompt": ...}, {"mask": ...}]'


def _with_suffix(file_name: str, format: str) -> str:
    """Return the name with the format's suffix, unless it has one of that format already."""
    target = FORMATS.get(format.upper())
    if target is None or format_of(file_name) == target.name:
        return file_name
    stem = file_name.rpartition(".")[0] if format_of(file_name) else file_name
    return stem + target.suffixes[0]


def _check_writable_format(file_name: str) -> None:
    """Raise InputError for a suffix that no format has; without one the image's format is kept."""
    if "." in file_name and format_of(file_name) is None:
        raise InputError(
            f"{file_name!r}: .{file_name.rpartition('.')[2]} is not a format that can be written; "
            f"use {SUFFIX_CHOICE}"
        )
