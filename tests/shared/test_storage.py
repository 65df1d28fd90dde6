"""Storage: the same tests for local files and S3 wherever both promise the same."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from shared.errors import (
    InpaintError,
    LocationError,
    ObjectDenied,
    ObjectMissing,
    ObjectTooLarge,
    OutputConflict,
    OutputRefused,
    SettingsError,
    StorageUnavailable,
)
from shared.storage import Stat, Storage, error_mapping, files
from shared.storage.locations import absolute, is_s3, redacted, split_s3
from tests.conftest import Bucket

MEGABYTE = 2**20
UNUSUAL_NAMES = (
    "a+b.png",
    "100%2F.png",
    "%41.png",
    "ä 画像.png",
    "a&b=c?.png",
    "a@b:c#.png",
    "*[x].png",
)


@dataclass(frozen=True, kw_only=True)
class Location:
    """A storage, and the folder or prefix that a test may write to."""

    storage: Storage
    base: str

    def uri(self, name: str = "a.png") -> str:
        return absolute(name, base=self.base)

    def put(self, name: str, data: bytes) -> str:
        return self.storage.put(self.uri(name), data, if_version=None, token="1-1")

    def read(self, name: str) -> bytes:
        return self.storage.get(self.uri(name), max_bytes=MEGABYTE).data


@pytest.fixture(params=["local", "s3"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    if request.param == "local":
        return Location(storage=Storage(roots=[tmp_path], buckets=()), base=str(tmp_path))
    bucket: Bucket = request.getfixturevalue("s3")
    return Location(storage=Storage(roots=(), buckets=(bucket.name,)), base=bucket.uri("folder"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A root; its parent folder contains a secret file."""
    (tmp_path / "secret.png").write_bytes(b"secret")
    root = tmp_path / "root"
    root.mkdir()
    return root


# --- reading and writing ---------------------------------------------------------------------


def test_a_written_object_is_read_back_with_its_version(location: Location) -> None:
    version = location.put("deep/down/a.png", b"data")
    uri = location.uri("deep/down/a.png")
    stored = location.storage.get(uri, max_bytes=4)
    assert (stored.data, stored.version) == (b"data", version)
    assert location.storage.stat(uri) == Stat(version=version, size=4)


def test_a_missing_object_has_no_stat_and_cannot_be_read(location: Location) -> None:
    uri = location.uri("missing.png")
    assert location.storage.stat(uri) is None
    for read in (
        lambda: location.storage.get(uri, max_bytes=1),
        lambda: location.storage.head(uri, max_bytes=1),
        lambda: location.storage.open(uri).__enter__(),
    ):
        with pytest.raises(ObjectMissing, match=r"missing\.png' does not exist") as caught:
            read()
        assert caught.value.code == "object_missing"


def test_head_reads_the_first_bytes_or_all_there_are(location: Location) -> None:
    location.put("a.png", b"0123456789")
    location.put("empty.png", b"")
    assert location.storage.head(location.uri("a.png"), max_bytes=4) == b"0123"
    assert location.storage.head(location.uri("a.png"), max_bytes=40) == b"0123456789"
    assert location.storage.head(location.uri("empty.png"), max_bytes=4) == b""


def test_open_streams_the_whole_object(location: Location) -> None:
    data = os.urandom(3 * MEGABYTE + 17)
    location.put("big.bin", data)
    with location.storage.open(location.uri("big.bin")) as stream:
        assert stream.read(10) == data[:10]
        assert stream.read() == data[10:]


def test_an_object_above_the_size_limit_is_refused_with_both_sizes(location: Location) -> None:
    location.put("a.png", b"x" * 2000)
    with pytest.raises(ObjectTooLarge, match=r"is 2,000 bytes; the cap is 1,999") as caught:
        location.storage.get(location.uri("a.png"), max_bytes=1999)
    assert caught.value.code == "object_too_large"
    assert len(location.storage.get(location.uri("a.png"), max_bytes=2000).data) == 2000


@pytest.mark.parametrize("name", UNUSUAL_NAMES)
def test_unusual_names_are_kept_byte_for_byte(location: Location, name: str) -> None:
    location.put(name, name.encode())
    location.put("a b.png", b"another")
    location.put("a%2Bb.png", b"another")
    assert location.read(name) == name.encode()
    assert location.storage.stat(location.uri(name)) is not None


def test_unusual_keys_are_stored_on_s3_unchanged(s3: Bucket) -> None:
    storage = Storage(roots=(), buckets=())
    for name in (*UNUSUAL_NAMES, "a//b.png", "/leading.png", "c//d@e.png"):
        storage.put(absolute(s3.uri(name), base="/"), b"", if_version=None, token="1-1")
    listed = s3.client.list_objects_v2(Bucket=s3.name)["Contents"]
    assert {entry["Key"] for entry in listed} == {
        *UNUSUAL_NAMES,
        "a//b.png",
        "/leading.png",
        "c//d@e.png",
    }


def test_a_relative_name_on_s3_drops_its_dots(s3: Bucket) -> None:
    assert absolute("./in/./a.png", base=s3.uri("jobs")) == s3.uri("jobs/in/a.png")


def test_the_content_type_follows_the_name(s3: Bucket) -> None:
    storage = Storage(roots=(), buckets=())
    storage.put(s3.uri("a.JPG"), b"", if_version=None, token="1-1")
    assert s3.client.head_object(Bucket=s3.name, Key="a.JPG")["ContentType"] == "image/jpeg"


# --- conditional writes ----------------------------------------------------------------------


def test_creating_an_object_that_exists_is_a_conflict(location: Location) -> None:
    location.put("a.png", b"first")
    with pytest.raises(OutputConflict, match="written by another process meanwhile"):
        location.put("a.png", b"second")
    assert location.read("a.png") == b"first"


def test_an_object_is_replaced_only_if_it_has_the_expected_version(location: Location) -> None:
    uri, first = location.uri(), location.put("a.png", b"first")
    second = location.storage.put(uri, b"second!", if_version=first, token="1-2")
    assert second != first
    with pytest.raises(OutputConflict):
        location.storage.put(uri, b"third", if_version=first, token="1-3")
    assert location.read("a.png") == b"second!"


def test_replacing_a_deleted_object_is_a_conflict(location: Location) -> None:
    uri, version = location.uri(), location.put("a.png", b"first")
    if is_s3(uri):
        import boto3

        bucket, key = split_s3(uri)
        boto3.client("s3").delete_object(Bucket=bucket, Key=key)
    else:
        Path(uri).unlink()
    with pytest.raises(OutputConflict):
        location.storage.put(uri, b"second", if_version=version, token="1-2")


def test_writing_the_same_bytes_again_succeeds(location: Location) -> None:
    version = location.put("a.png", b"data")
    again = location.storage.put(location.uri(), b"data", if_version=version, token="1-2")
    assert location.storage.stat(location.uri()) == Stat(version=again, size=4)


def test_no_temporary_file_is_left_after_a_write_or_a_conflict(folder: Path) -> None:
    storage = Storage(roots=[folder], buckets=())
    version = storage.put(f"{folder}/a.png", b"first", if_version=None, token="1-1")
    for token in ("1-2", "1-3"):
        with pytest.raises(OutputConflict):
            storage.put(f"{folder}/a.png", b"late", if_version=None, token=token)
    storage.put(f"{folder}/a.png", b"second", if_version=version, token="1-4")
    assert [path.name for path in folder.iterdir()] == ["a.png"]


def test_an_open_reader_still_reads_the_old_version_after_a_write(folder: Path) -> None:
    storage, uri = Storage(roots=[folder], buckets=()), f"{folder}/a.png"
    version = storage.put(uri, b"first", if_version=None, token="1-1")
    with storage.open(uri) as reader:
        storage.put(uri, b"second", if_version=version, token="1-2")
        assert reader.read() == b"first"
    assert storage.get(uri, max_bytes=10).data == b"second"


def test_a_name_of_255_bytes_can_be_written(folder: Path) -> None:
    storage = Storage(roots=[folder], buckets=())
    name = "画" * 83 + "ab.png"
    storage.put(f"{folder}/{name}", b"data", if_version=None, token="12345-6")
    assert [path.name for path in folder.iterdir()] == [name]


def test_a_name_too_long_for_the_file_system_is_refused_without_retry(folder: Path) -> None:
    storage = Storage(roots=[folder], buckets=())
    with pytest.raises(LocationError, match="File name too long"):
        storage.get(f"{folder}/{'x' * 300}.png", max_bytes=1)


def test_temporary_files_of_killed_attempts_are_removed(folder: Path) -> None:
    uri = f"{folder}/{'画' * 83}.png"
    other = folder / "kept.png"
    other.touch()
    for token in ("7-1", "7-2"):
        (folder / files.temporary_name(Path(uri).name, token)).touch()
    storage = Storage(roots=[folder], buckets=())
    storage.remove_temporary_files(uri, ["7-1", "7-2", "7-3"])
    storage.remove_temporary_files("s3://bucket/a.png", ["7-1"])
    assert list(folder.iterdir()) == [other]


# --- refused locations -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("http://host/a.png", "http:// is not supported; use s3:// or a path"),
        ("https://user:hush@host/a.png", "https:// is not supported"),
        ("gs://bucket/a.png", "gs:// is not supported"),
        ("S3://bucket/a.png", "S3:// is not supported"),
        ("s3://key:secret@bucket/a.png", "credentials do not belong in a URI"),
        ("s3://key:sec/ret@bucket/a.png", "credentials do not belong in a URI"),
        ("s3://key@bucket/a.png", "credentials do not belong in a URI"),
        ("../a.png", "'..' is refused"),
        ("in/../../a.png", "'..' is refused"),
        ("/root/../etc/passwd", "'..' is refused"),
        ("s3://bucket/../a.png", "'..' is refused"),
        ("file:///a/../b", "'..' is refused"),
        ("a\x00b.png", "a name cannot contain NUL"),
        ("s3://bucket", "the key is missing; use s3://bucket/key"),
        ("s3://bucket/", "the key is missing"),
        ("s3:///a.png", "'' is not a bucket name"),
        ("s3://Bucket_1/a.png", "'Bucket_1' is not a bucket name"),
    ],
)
@pytest.mark.parametrize("base", ["/data", "s3://bucket/jobs"])
def test_an_invalid_reference_is_refused(reference: str, reason: str, base: str) -> None:
    with pytest.raises(LocationError) as caught:
        absolute(reference, base=base)
    assert reason in str(caught.value)
    assert caught.value.code == "location_refused"
    assert not any(secret in str(caught.value) for secret in ("secret", "sec/ret", "hush", "key:"))


@pytest.mark.parametrize(
    ("reference", "base", "expected"),
    [
        ("a.png", "/data", "/data/a.png"),
        ("./in//a.png", "/data", "/data/in/a.png"),
        ("/abs/a.png", "/data", "/abs/a.png"),
        ("file:///abs/a.png", "/data", "/abs/a.png"),
        ("a..b.png", "/data", "/data/a..b.png"),
        ("a.png", "s3://bucket/jobs", "s3://bucket/jobs/a.png"),
        ("a.png", "s3://bucket", "s3://bucket/a.png"),
        ("/abs/a.png", "s3://bucket/jobs", "/abs/a.png"),
        ("s3://other/a.png", "/data", "s3://other/a.png"),
        ("s3://other/a:b@c.png", "/data", "s3://other/a:b@c.png"),
    ],
)
def test_a_reference_resolves_against_its_base(reference: str, base: str, expected: str) -> None:
    assert absolute(reference, base=base) == expected


def test_credentials_are_redacted_and_keys_are_not() -> None:
    assert redacted("redis://:pass@host/0") == "redis://***@host/0"
    assert redacted("s3://key:a/b+c@bucket/k") == "s3://***@bucket/k"
    assert redacted("s3://bucket/dir//a@b.png") == "s3://bucket/dir//a@b.png"


def assert_refused_by_every_method(storage: Storage, uri: str) -> None:
    for call in (
        lambda: storage.check(uri),
        lambda: storage.stat(uri),
        lambda: storage.get(uri, max_bytes=MEGABYTE),
        lambda: storage.head(uri, max_bytes=10),
        lambda: storage.open(uri).__enter__(),
        lambda: storage.put(uri, b"x", if_version=None, token="1-1"),
    ):
        with pytest.raises(LocationError, match=r"outside the allowed folders|is not allowed"):
            call()


def test_a_path_outside_the_roots_is_refused_by_every_method(folder: Path) -> None:
    storage = Storage(roots=[folder], buckets=())
    assert_refused_by_every_method(storage, str(folder.parent / "secret.png"))
    assert_refused_by_every_method(storage, "/etc/passwd")
    assert_refused_by_every_method(storage, f"{folder}-beside/a.png")
    assert (folder.parent / "secret.png").read_bytes() == b"secret"


def test_a_symlink_out_of_the_root_is_refused_for_files_and_folders(folder: Path) -> None:
    storage = Storage(roots=[folder], buckets=())
    (folder / "leaf.png").symlink_to(folder.parent / "secret.png")
    (folder / "dangling.png").symlink_to(folder.parent / "new.png")
    (folder / "up").symlink_to(folder.parent)
    (folder / "deep").mkdir()
    (folder / "deep" / "up").symlink_to("../..")
    for name in ("leaf.png", "dangling.png", "up/secret.png", "deep/up/secret.png"):
        assert_refused_by_every_method(storage, f"{folder}/{name}")
    assert not (folder.parent / "new.png").exists()


def test_a_symlink_inside_its_root_is_followed(folder: Path) -> None:
    (folder / "a.png").write_bytes(b"data")
    (folder / "link.png").symlink_to("a.png")
    storage = Storage(roots=[folder], buckets=())
    assert storage.get(f"{folder}/link.png", max_bytes=10).data == b"data"


def test_a_symlink_planted_as_the_output_is_not_written_through(folder: Path) -> None:
    (folder / "precious.png").write_bytes(b"precious")
    (folder / "out").mkdir()
    (folder / "out" / "a.png").symlink_to("../precious.png")
    storage, uri = Storage(roots=[folder], buckets=()), f"{folder}/out/a.png"
    found = storage.stat(uri)
    assert found is not None
    for version in (found.version, None):
        with pytest.raises(OutputConflict):
            storage.put(uri, b"late", if_version=version, token="1-1")
    assert (folder / "precious.png").read_bytes() == b"precious"


def test_a_symlink_planted_as_the_temporary_file_is_not_written_through(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody can guess the name; one who does gains nothing."""
    names = [files.temporary_name("a.png", "1-1") for _ in range(2)]
    assert names[0] != names[1]
    (folder / names[0]).symlink_to(folder.parent / "secret.png")
    monkeypatch.setattr(files, "temporary_name", lambda _name, _token: names[0])
    storage = Storage(roots=[folder], buckets=())
    with pytest.raises(StorageUnavailable, match="File exists"):
        storage.put(f"{folder}/a.png", b"data", if_version=None, token="1-1")
    assert (folder.parent / "secret.png").read_bytes() == b"secret"


SWAP_FOR_EVER = """
import ctypes, sys
folder, link = (path.encode() for path in sys.argv[1:])
libc = ctypes.CDLL(None)
AT_FDCWD, RENAME_EXCHANGE = -100, 2
while True:
    libc.renameat2(AT_FDCWD, folder, AT_FDCWD, link, RENAME_EXCHANGE)
"""
SWAPPED_TRIALS = 1500


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 exists only on Linux")
def test_a_folder_that_is_swapped_for_a_symlink_leaks_nothing(folder: Path) -> None:
    storage, outside = Storage(roots=[folder], buckets=()), folder.parent / "outside"
    for place, content in ((folder / "a", b"allowed"), (outside, b"secret")):
        place.mkdir()
        (place / "read.png").write_bytes(content)
    (folder / "link").symlink_to(outside)
    swapping = subprocess.Popen(
        [sys.executable, "-c", SWAP_FOR_EVER, str(folder / "a"), str(folder / "link")]
    )
    read, written, refused = [], 0, 0
    try:
        for number in range(SWAPPED_TRIALS):
            try:
                read.append(storage.get(f"{folder}/a/read.png", max_bytes=10).data)
                uri = f"{folder}/a/new/{number}.png"
                storage.put(uri, b"data", if_version=None, token="1-1")
                written += 1
            except InpaintError:
                refused += 1
    finally:
        swapping.kill()
        swapping.wait()
    assert set(read) == {b"allowed"}
    assert [path.name for path in outside.iterdir()] == ["read.png"]
    assert written > 0
    assert refused > 0


def test_folders_below_a_missing_root_are_created(folder: Path) -> None:
    root = folder / "later"
    storage = Storage(roots=[root], buckets=())
    storage.put(f"{root}/b/c/a.png", b"data", if_version=None, token="1-1")
    assert (root / "b" / "c" / "a.png").read_bytes() == b"data"


def test_a_single_file_may_be_a_root(folder: Path) -> None:
    secret = folder.parent / "secret.png"
    storage = Storage(roots=[secret], buckets=())
    assert storage.get(str(secret), max_bytes=10).data == b"secret"
    with pytest.raises(LocationError):
        storage.check(f"{secret}s")


def test_the_root_of_the_disk_allows_everything(folder: Path) -> None:
    Storage(roots=[Path("/")], buckets=()).check(str(folder / "a.png"))


def test_a_bucket_that_is_not_allowed_is_refused(s3: Bucket) -> None:
    assert_refused_by_every_method(Storage(roots=[Path("/")], buckets=("others",)), s3.uri("a.png"))
    assert Storage(roots=(), buckets=()).stat(s3.uri("a.png")) is None


def test_a_pipe_is_refused_without_opening_it(folder: Path) -> None:
    os.mkfifo(folder / "pipe.png")
    storage = Storage(roots=[folder], buckets=())
    for read in (
        lambda: storage.get(f"{folder}/pipe.png", max_bytes=1),
        lambda: storage.head(f"{folder}/pipe.png", max_bytes=1),
        lambda: storage.open(f"{folder}/pipe.png").__enter__(),
    ):
        with pytest.raises(ObjectDenied, match="is not a regular file"):
            read()


def test_a_folder_is_neither_read_nor_replaced(folder: Path) -> None:
    (folder / "a.png").mkdir()
    storage = Storage(roots=[folder], buckets=())
    with pytest.raises(ObjectDenied, match="is not a regular file"):
        storage.get(f"{folder}/a.png", max_bytes=1)
    with pytest.raises(InpaintError):
        storage.put(f"{folder}/a.png", b"x", if_version=None, token="1-1")
    assert [path.name for path in folder.iterdir()] == ["a.png"]


def test_a_file_where_a_folder_is_expected_is_an_error_that_names_it(folder: Path) -> None:
    (folder / "a").write_bytes(b"")
    storage = Storage(roots=[folder], buckets=())
    with pytest.raises(InpaintError, match=r"a/b\.png"):
        storage.put(f"{folder}/a/b.png", b"x", if_version=None, token="1-1")
    with pytest.raises(InpaintError, match=r"a/b\.png"):
        storage.get(f"{folder}/a/b.png", max_bytes=1)


# --- services that fail ----------------------------------------------------------------------


def test_an_s3_that_does_not_answer_is_a_retryable_error(
    s3: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(StorageUnavailable, match="Could not connect") as caught:
        Storage(roots=(), buckets=()).stat(s3.uri("a.png"))
    assert caught.value.retryable


def test_missing_credentials_are_named(s3: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    with pytest.raises(ObjectDenied, match="no S3 credentials; set them the AWS way") as caught:
        Storage(roots=(), buckets=()).stat(s3.uri("a.png"))
    assert caught.value.code == "object_denied"


def test_an_unknown_profile_is_a_one_line_error(
    s3: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(ObjectDenied, match="no S3 credentials"):
        Storage(roots=(), buckets=()).stat(s3.uri("a.png"))


def test_an_invalid_endpoint_is_a_one_line_error(
    s3: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "nonsense")
    with pytest.raises(SettingsError, match="Invalid endpoint: nonsense; see AWS_ENDPOINT_URL"):
        Storage(roots=(), buckets=()).stat(s3.uri("a.png"))


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (403, "AccessDenied", ObjectDenied),
        (401, "Unauthorized", ObjectDenied),
        (404, "NoSuchBucket", ObjectMissing),
        (409, "ConditionalRequestConflict", OutputConflict),
        (412, "PreconditionFailed", OutputConflict),
        (503, "SlowDown", StorageUnavailable),
    ],
)
def test_each_error_of_s3_is_mapped_to_an_error_class(
    status: int, code: str, expected: type[InpaintError]
) -> None:
    from botocore.exceptions import ClientError

    answer = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    with pytest.raises(expected), error_mapping.mapped_errors("s3://bucket/a.png"):
        raise ClientError(answer, "PutObject")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.EACCES, ObjectDenied),
        (errno.EISDIR, ObjectDenied),
        (errno.ENOENT, ObjectMissing),
        (errno.ELOOP, LocationError),
        (errno.ENOSPC, StorageUnavailable),
        (errno.EIO, StorageUnavailable),
    ],
)
def test_each_error_of_the_file_system_is_mapped_to_an_error_class(
    number: int, expected: type[InpaintError]
) -> None:
    with pytest.raises(expected, match=r"'/a\.png'"), error_mapping.mapped_errors("/a.png"):
        raise OSError(number, os.strerror(number))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_full_or_read_only_disk_refuses_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fsync(_descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    storage, target = Storage(roots=[tmp_path], buckets=()), tmp_path / "out" / "a.png"
    with pytest.raises(OutputRefused, match=os.strerror(number)):
        storage.put(str(target), b"data", if_version=None, token="1-1")
    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_fsync_takes_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fsync(_descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    storage, target = Storage(roots=[tmp_path], buckets=()), tmp_path / "out" / "a.png"
    storage.put(str(target), b"data", if_version=None, token="1-1")
    assert target.read_bytes() == b"data"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open every folder")
def test_a_folder_that_may_be_written_and_not_read_takes_the_output(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir(mode=0o300)
    storage = Storage(roots=[tmp_path], buckets=())
    storage.put(str(folder / "a.png"), b"data", if_version=None, token="1-1")
    folder.chmod(0o700)
    assert (folder / "a.png").read_bytes() == b"data"


@pytest.mark.parametrize(("status", "code"), [(403, "AccessDenied"), (507, "XMinioStorageFull")])
def test_a_bucket_that_denies_writes_refuses_the_output(status: int, code: str) -> None:
    from botocore.exceptions import ClientError

    answer = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    with (
        pytest.raises(OutputRefused, match=code),
        error_mapping.mapped_write_errors(),
        error_mapping.mapped_errors("s3://b"),
    ):
        raise ClientError(answer, "PutObject")  # type: ignore[arg-type]


def test_an_output_that_is_a_folder_is_not_a_refused_output(tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    with pytest.raises(InpaintError) as caught:
        Storage(roots=[tmp_path], buckets=()).put(
            str(tmp_path / "a.png"), b"data", if_version=None, token="1-1"
        )
    assert caught.value.code in ("object_denied", "output_conflict")


def test_check_bucket_raises_if_the_bucket_does_not_exist(s3: Bucket) -> None:
    storage = Storage(roots=(), buckets=())
    storage.check_bucket(s3.name)
    with pytest.raises(ObjectMissing, match=r"'s3://no-such-bucket' does not exist"):
        storage.check_bucket("no-such-bucket")
