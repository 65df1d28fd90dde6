"""Every kind of manifest is read, and every kind of damage is named in one line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from producer.manifest import FIELD_LIMIT, LINE_LIMIT, ManifestRow, Problem, read, stem
from shared.errors import InputError, ManifestError, ObjectMissing, UnavailableError
from shared.storage import Storage
from tests.conftest import Bucket

HEADER = b"image,mask\n"


def read_manifest(
    folder: Path,
    data: bytes | str,
    *,
    name: str = "m.csv",
    placeholders: frozenset[str] = frozenset(),
    has_mask: bool = False,
) -> list[ManifestRow | Problem]:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    store = Storage(roots=[folder], buckets=())
    return list(read(store, str(path), placeholders=placeholders, has_mask=has_mask))


def manifest_error(folder: Path, data: bytes | str, **given: object) -> str:
    with pytest.raises(ManifestError) as caught:
        read_manifest(folder, data, **given)  # type: ignore[arg-type]
    message = str(caught.value)
    assert message.startswith(str(folder))
    assert "\n" not in message
    return message


def cells(line: int, image: str, mask: str = "b.png", **others: str) -> ManifestRow:
    return ManifestRow(line=line, cells={"image": image, "mask": mask, **others})


# --- what is read ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("m.csv", "image,mask,seed\na.png,b.png,7\nc.png,d.png,\n"),
        ("m.CSV", "image,mask,seed\r\na.png,b.png,7\r\nc.png,d.png,\r\n"),
        ("m.txt", "\ufeffimage , mask, seed\n a.png ,b.png, 7 \nc.png,d.png,"),
        ("m.tsv", "image\tmask\tseed\na.png\tb.png\t7\nc.png\td.png\t\n"),
        ("m.csv", 'seed,"mask",image\n7,"b.png","a.png"\n,d.png,c.png\n'),
        (
            "m.jsonl",
            '{"image": "a.png", "mask": "b.png", "seed": 7}\n'
            '{"image": " c.png", "mask": "d.png", "seed": null}\n',
        ),
        (
            "m.ndjson",
            '\ufeff{"image": "a.png", "mask": "b.png", "seed": "7"}\r\n'
            '{"image": "c.png", "mask": "d.png", "seed": ""}',
        ),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_the_same_rows_come_out_of_every_format(
    tmp_path: Path, name: str, data: str, packed: bool
) -> None:
    raw = gzip.compress(data.encode()) if packed else data.encode()
    expected = [cells(2, "a.png", seed="7"), cells(3, "c.png", "d.png")]
    if "json" in name:
        expected = [ManifestRow(line=row.line - 1, cells=row.cells) for row in expected]
    assert read_manifest(tmp_path, raw, name=f"{name}.gz" if packed else name) == expected


def test_gzip_is_recognised_by_content_not_by_name(tmp_path: Path) -> None:
    assert read_manifest(tmp_path, gzip.compress(HEADER + b"a.png,b.png\n")) == [cells(2, "a.png")]
    assert read_manifest(tmp_path, HEADER + b"a.png,b.png\n", name="m.csv.gz") == [
        cells(2, "a.png")
    ]


def test_a_row_with_line_breaks_has_the_number_of_its_first_line(tmp_path: Path) -> None:
    data = 'image,mask,key\na.png,b.png,"one\ntwo"\n\nc.png,b.png,"x, ""y"""\n'
    assert read_manifest(tmp_path, data) == [
        cells(2, "a.png", key="one\ntwo"),
        cells(5, "c.png", key='x, "y"'),
    ]


def test_unicode_is_kept(tmp_path: Path) -> None:
    assert read_manifest(tmp_path, "image,mask\nä 画像.png,b.png\n") == [cells(2, "ä 画像.png")]


def test_placeholders_may_be_columns(tmp_path: Path) -> None:
    read_rows = read_manifest(
        tmp_path, "image,mask,product\na.png,b.png,cup\n", placeholders=frozenset({"product"})
    )
    assert read_rows == [cells(2, "a.png", product="cup")]


def test_a_mask_for_all_rows_makes_its_column_optional(tmp_path: Path) -> None:
    (row,) = read_manifest(tmp_path, "image\na.png\n", has_mask=True)
    assert row == ManifestRow(line=2, cells={"image": "a.png"})


def test_json_numbers_become_their_text(tmp_path: Path) -> None:
    data = '{"image": 1, "mask": "b.png", "seed": 9007199254740993, "eta": 0.25}\n'
    assert read_manifest(tmp_path, data, name="m.jsonl") == [
        cells(1, "1", seed="9007199254740993", eta="0.25")
    ]


def test_a_manifest_on_s3_is_streamed(s3: Bucket) -> None:
    count = 50_000
    body = "".join(f"{n}.png,b.png\n" for n in range(count))
    s3.client.put_object(Bucket=s3.name, Key="m.csv.gz", Body=gzip.compress(HEADER + body.encode()))
    store = Storage(roots=(), buckets=(s3.name,))
    read_rows = read(store, s3.uri("m.csv.gz"), placeholders=frozenset(), has_mask=False)
    assert next(read_rows) == cells(2, "0.png")
    assert sum(1 for _ in read_rows) == count - 1


@pytest.mark.parametrize(
    ("manifest", "expected"),
    [
        ("/data/may.csv", "may"),
        ("/data/may.jsonl.gz", "may"),
        ("s3://bucket/deep/may.2026.tsv", "may.2026"),
        ("/data/.csv", ".csv"),
    ],
)
def test_the_stem_is_the_name_without_its_endings(manifest: str, expected: str) -> None:
    assert stem(manifest) == expected


# --- what makes the whole file unusable ------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("m.XLSX", "a .xlsx file"),
        ("m.json", "a .json file"),
        (".passwd", "a .passwd file"),
        ("passwd", "a file without an extension"),
        ("csv", "a file without an extension"),
        ("m.gz", "a file without an extension"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, name: str, kind: str) -> None:
    assert manifest_error(tmp_path, HEADER, name=name).endswith(
        f"{name}: {kind} is not a manifest; use .csv, .tsv or .jsonl, optionally .gz"
    )


@pytest.mark.parametrize("data", [b"", b"\n", b" , \n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused(tmp_path: Path, data: bytes) -> None:
    assert "empty; the first line must name the columns" in manifest_error(tmp_path, data)


def test_every_wrong_column_is_named_at_once(tmp_path: Path) -> None:
    message = manifest_error(tmp_path, "imge,seed,seed,promt,zzz\na,1,2,x,y\n")
    assert message.split("line 1: ")[1].split("; ") == [
        "column 'image' is missing",
        "column 'mask' is missing",
        "duplicate column 'seed'",
        "column 'imge' is not known and fills no {placeholder}",
        "did you mean 'image'?",
        "column 'promt' is not known and fills no {placeholder}",
        "did you mean 'prompt'?",
        "column 'zzz' is not known and fills no {placeholder}",
        message.split("; ")[-1],
    ]
    assert message.split("; ")[-1].startswith("known: ")


def test_a_column_without_a_name_is_refused(tmp_path: Path) -> None:
    assert "column '' is not known" in manifest_error(tmp_path, "image,mask,\na,b,\n")


@pytest.mark.parametrize(
    ("data", "byte"),
    [
        ("image,mask\na.png,b.png\n".encode("utf-16"), "0xff"),
        ("image,mask\nä.png,b.png\n".encode("latin-1"), "0xe4"),
        (HEADER + b"a.png,b.png\n" * 20_000 + b"\xff.png,b.png\n", "0xff"),
    ],
    ids=["utf-16", "latin-1", "late"],
)
def test_another_encoding_is_refused_with_the_first_invalid_byte(
    tmp_path: Path, data: bytes, byte: str
) -> None:
    message = manifest_error(tmp_path, data)
    assert f"not UTF-8 (byte {byte}: " in message
    assert message.endswith("save it as UTF-8")


def test_utf_16_without_a_byte_order_mark_is_refused(tmp_path: Path) -> None:
    assert "is not known" in manifest_error(tmp_path, "image,mask\na,b\n".encode("utf-16-le"))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            'a.png,"b.png\nc.png,d.png\n',
            "line 2: a quote that opens here is not closed properly, up to line 3: "
            "unexpected end of data",
        ),
        ('a.png,"b"x.png\n', "line 2: ',' expected after '\"'"),
        (f"a.png,{'x' * (FIELD_LIMIT + 1)}\n", "line 2: field larger than field limit (65536)"),
    ],
    ids=["unclosed", "after a quote", "too long"],
)
def test_broken_quoting_is_refused_with_its_line(tmp_path: Path, body: str, reason: str) -> None:
    message = manifest_error(tmp_path, HEADER + body.encode())
    assert message.endswith(f"{reason}; fix the quoting")


def test_a_field_of_exactly_the_limit_is_read(tmp_path: Path) -> None:
    (row,) = read_manifest(tmp_path, HEADER + b"a.png," + b"x" * FIELD_LIMIT + b"\n")
    assert isinstance(row, ManifestRow)


def test_damaged_gzip_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress(HEADER + b"".join(b"%d.png,b.png\n" % n for n in range(5000)))
    checksum = whole[:-8] + bytes(4) + whole[-4:]
    for data in (whole[:-20], whole[: len(whole) // 2], checksum, b"\x1f\x8b nonsense", whole[:2]):
        assert "the gzip data is damaged" in manifest_error(tmp_path, data, name="m.csv.gz")
    flipped = whole[:200] + b"\xff\xff\xff\xff" + whole[204:]
    with pytest.raises(ManifestError):
        read_manifest(tmp_path, flipped, name="m.csv.gz")


def test_a_missing_manifest_is_named(tmp_path: Path) -> None:
    store = Storage(roots=[tmp_path], buckets=())
    with pytest.raises(ObjectMissing, match=r"m\.csv' does not exist"):
        list(read(store, f"{tmp_path}/m.csv", placeholders=frozenset(), has_mask=False))


def test_a_folder_is_not_a_manifest(tmp_path: Path) -> None:
    (tmp_path / "m.csv").mkdir()
    store = Storage(roots=[tmp_path], buckets=())
    with pytest.raises((InputError, UnavailableError), match=r"m\.csv"):
        list(read(store, f"{tmp_path}/m.csv", placeholders=frozenset(), has_mask=False))


def test_an_endless_json_line_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    message = manifest_error(tmp_path, '{"image": "' + "x" * LINE_LIMIT, name="m.jsonl")
    assert "line 1: longer than 1,048,576 characters" in message


# --- what makes one row invalid --------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "count"), [("a.png", 1), ("a.png,b.png,c.png", 3), ("a,b.png,b.png", 3)]
)
def test_a_row_with_a_wrong_number_of_cells_is_a_problem(
    tmp_path: Path, line: str, count: int
) -> None:
    read_rows = read_manifest(tmp_path, f"image,mask\n{line}\nd.png,b.png\n")
    assert read_rows == [
        Problem(
            line=2,
            text=f"{count} cells under 2 columns; quote cells that hold the delimiter",
        ),
        cells(3, "d.png"),
    ]


@pytest.mark.parametrize("name", ["m.csv", "m.jsonl"])
def test_a_row_with_nul_in_a_cell_is_a_problem(tmp_path: Path, name: str) -> None:
    data = "image,mask,key\na.png,b.png,x\x00y\n"
    if name == "m.jsonl":
        data = json.dumps({"image": "a.png", "mask": "b.png", "key": "x\x00y"})
    (problem,) = read_manifest(tmp_path, data, name=name)
    assert isinstance(problem, Problem)
    assert problem.text == "key: 'x\\x00y' holds NUL or half a character"


def test_a_list_of_passes_and_a_flag_are_read_from_json(tmp_path: Path) -> None:
    row = {"image": "a.png", "mask": "b.png", "mask_invert": True, "passes": [{"strength": 1}]}
    (read_row,) = read_manifest(tmp_path, json.dumps(row), name="m.jsonl")
    assert isinstance(read_row, ManifestRow)
    assert read_row.cells["mask_invert"] == "True"
    assert json.loads(read_row.cells["passes"]) == [{"strength": 1}]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON: Expecting property name"),
        ("nonsense", "not JSON: Expecting value"),
        ('{"image": "a", "image": "b"}', "not JSON: duplicate key"),
        ("[" * 100_000, "not JSON: "),
        ('{"image": ' + "9" * 5000 + "}", "not JSON: "),
        ('["a.png", "b.png"]', "not a JSON object; write {"),
        ("null", "not a JSON object"),
        ('{"imge": "a.png"}', "imge: not a known column and fills no {placeholder}; did you mean"),
        ('{"image": ["a.png"]}', "image: ['a.png'] is not text or a number"),
        ('{"image": true}', "image: True is not text or a number"),
        ('{"image": "\\ud800.png"}', "image: '\\ud800.png' holds NUL or half a character"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_bad_json_line_is_a_problem(tmp_path: Path, line: str, reason: str) -> None:
    good = '{"image": "c.png", "mask": "b.png"}'
    read_rows = read_manifest(tmp_path, f"{line}\n\n{good}\n", name="m.jsonl")
    assert isinstance(read_rows[0], Problem)
    assert read_rows[0].line == 1
    assert read_rows[0].text.startswith(reason)
    assert read_rows[1:] == [cells(3, "c.png")]


# --- a column's old name ---------------------------------------------------------------------

OLD_NAME = "column 'id' is now called 'key'; the next version refuses the old name"


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("m.csv", "image,mask,id\na.png,b.png,sku-1\na.png,b.png,sku-1\n"),
        ("m.jsonl", '{"image": "a.png", "mask": "b.png", "id": "sku-1"}\n' * 2),
    ],
)
def test_an_old_column_name_is_read_with_one_warning(
    tmp_path: Path, name: str, data: str, caplog: pytest.LogCaptureFixture
) -> None:
    read_rows = read_manifest(tmp_path, data, name=name)
    assert [row.cells["key"] for row in read_rows if isinstance(row, ManifestRow)] == ["sku-1"] * 2
    assert caplog.messages == [f"{tmp_path}/{name}: {OLD_NAME}"]


def test_the_new_column_name_gives_no_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert read_manifest(tmp_path, "image,mask,key\na.png,b.png,1\n") == [
        cells(2, "a.png", key="1")
    ]
    assert caplog.messages == []


def test_a_column_under_both_names_is_refused(tmp_path: Path) -> None:
    both = "columns 'id' and 'key' are the same, 'id' is the old name; remove one of them"
    assert manifest_error(tmp_path, "image,id,mask,key\n").endswith(f"line 1: {both}")
    data = '{"image": "a.png", "mask": "b.png", "key": "x", "id": "x"}'
    assert read_manifest(tmp_path, data, name="m.jsonl") == [Problem(line=1, text=both)]
