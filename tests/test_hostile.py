"""Bad and hostile input: each kind has a test that asserts its error code and message."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

# Kinds of input, by the file with their test.
COVERED = {
    "producer/test_manifest.py": {
        "empty manifest": "test_an_empty_file_is_refused",
        "missing or duplicate column": "test_every_wrong_column_is_named_at_once",
        "BOM, CRLF": "test_the_same_rows_come_out_of_every_format",
        "UTF-16": "test_another_encoding_is_refused_with_the_first_invalid_byte",
        "NUL": "test_a_row_with_nul_in_a_cell_is_a_problem",
        "unclosed quote, 64 KiB field": "test_broken_quoting_is_refused_with_its_line",
        "ragged row": "test_a_row_with_a_wrong_number_of_cells_is_a_problem",
        "embedded newlines": "test_a_row_with_line_breaks_has_the_number_of_its_first_line",
    },
    "producer/test_submit.py": {
        "header only": "test_a_file_that_is_not_a_manifest_is_one_line",
        "identical rows": "test_identical_rows_are_one_job",
        "two rows with one output": "test_outputs_that_collide_name_both_lines",
        "output equal to an input": "test_an_output_may_not_be_another_rows_image_or_mask",
    },
    "producer/test_hostile.py": {
        "another delimiter": "test_a_wrong_delimiter_is_named",
        "manifest changed while read": "test_a_manifest_that_changes_while_it_is_read_is_refused",
        "the same on S3": "test_a_manifest_on_s3_that_changes_while_it_is_read_is_refused",
        "control characters on a terminal": "test_control_characters_are_escaped_on_a_terminal",
        "secrets": "test_no_secret_is_printed_logged_or_recorded",
    },
    "shared/test_storage.py": {
        "..; http://; credentials": "test_an_invalid_reference_is_refused",
        "absolute path": "test_a_path_outside_the_roots_is_refused_by_every_method",
        "symlinks": "test_a_symlink_out_of_the_root_is_refused_for_files_and_folders",
        "folder swapped during a run": "test_a_folder_that_is_swapped_for_a_symlink_leaks_nothing",
        "planted output": "test_a_symlink_planted_as_the_output_is_not_written_through",
        "planted temporary": "test_a_symlink_planted_as_the_temporary_file_is_not_written_through",
        "credentials redacted": "test_credentials_are_redacted_and_keys_are_not",
        "bucket that is not allowed": "test_a_bucket_that_is_not_allowed_is_refused",
        "unusual keys": "test_unusual_keys_are_stored_on_s3_unchanged",
        "object denied": "test_each_error_of_s3_is_mapped_to_an_error_class",
    },
    "shared/test_params.py": {
        "ranges, NaN, prompts": "test_a_value_outside_its_range_is_refused_with_what_is_allowed",
        "unknown parameters": "test_an_unknown_parameter_suggests_the_most_similar",
    },
    "workers/test_job_runner.py": {
        "object missing, empty": "test_bad_input_fails_at_once_with_its_code",
        "over the byte cap": "test_an_object_over_the_cap_is_refused",
    },
    "shared/images/test_images.py": {
        "truncated": "test_truncated_files_are_refused",
        "HTML, SVG, PSD, animated": "test_a_file_that_cannot_be_read_is_refused_in_one_line",
    },
    "workers/test_hostile.py": {
        "a decompression bomb": "test_a_decompression_bomb_is_refused_before_it_is_decoded",
        "huge ICC or text chunk": "test_a_huge_chunk_of_metadata_costs_nothing",
        "1x1, 20000x1": "test_an_image_of_any_shape_is_inpainted",
        "changed between HEAD and GET": "test_the_version_recorded_is_that_of_the_bytes_read",
        "changed while read": "test_an_image_that_is_written_while_it_is_read_is_read_again",
    },
    "workers/engines/test_registry.py": {
        "pickle weights": "test_pickled_weights_are_refused",
        "corrupt safetensors": "test_damaged_files_are_refused",
        "custom code": "test_custom_pipeline_code_is_never_run",
    },
    "producer/cli/test_jobs.py": {
        "formulas": "test_a_csv_export_contains_no_spreadsheet_formula",
    },
}


@pytest.mark.parametrize("file", COVERED)
def test_every_kind_of_bad_input_has_its_test(file: str) -> None:
    tree = ast.parse((TESTS / file).read_text())
    tests = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert set(COVERED[file].values()) <= tests
