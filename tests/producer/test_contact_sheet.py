"""The contact sheet: which jobs it shows, how, and that hostile text has no effect."""

from __future__ import annotations

import io
import json
import re
from base64 import b64decode, b64encode
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from producer import reports
from producer.contact_sheet.cards import SIDE_PX, build_cards, close_up_box, usual_params
from shared import jobs, settings
from shared.errors import GateBlack, InpaintError, ObjectMissing
from shared.geometry.box import Box
from shared.jobs import AttemptRecord
from shared.params import Params, PassSpec
from shared.storage import Object, Storage
from tests.conftest import Bucket
from tests.job_table import RETRY_AT_ONCE, JobTable
from tests.producer.workspace import CommandResult, Workspace, png

SIZE, MARK = (320, 200), (150, 100, 190, 120)
GREY, RED = (90, 120, 150), (200, 30, 30)


class Page(HTMLParser):
    """A page's elements, and the text of each card in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.cards: list[str] = []
        self._depth = 0
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "article":
            self.cards.append("")
            self._depth = 1

    def handle_endtag(self, tag: str) -> None:
        if tag == "article":
            self._depth = 0

    def handle_data(self, data: str) -> None:
        if self._depth:
            self.cards[-1] += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]

    def masks(self) -> list[NDArray[np.bool_]]:
        """(H, W) bool of each mask, True = tinted."""
        uris = [str(attrs["src"]) for attrs in self.of("img") if attrs.get("class") == "mask"]
        files = (io.BytesIO(b64decode(uri.partition(",")[2])) for uri in uris)
        return [np.asarray(Image.open(file)) > 0 for file in files]

    def images(self, kind: str = "") -> list[Image.Image]:
        """The images whose alternative text begins with ``kind``; masks have none."""
        images = []
        for attrs in self.of("img"):
            head, _, data = str(attrs["src"]).partition(",")
            assert re.fullmatch(r"data:image/(webp|png);base64", head)
            if str(attrs["alt"]).startswith(kind) and attrs["alt"]:
                images.append(Image.open(io.BytesIO(b64decode(data))))
        return images


class SheetScenario:
    """Jobs with real images: each grey, inpainted red inside a box."""

    def __init__(self, workspace: Workspace, table: JobTable) -> None:
        self.workspace, self.table = workspace, table
        self.submission = table.submission(manifest=str(workspace.folder / "m.csv"))
        self.mask = workspace.mask("mask.png", MARK, size=SIZE)

    def add(self, name: str = "a.png", **changes: Any) -> int:
        self.workspace.image(f"in/{name}", size=SIZE)
        places = {
            "image": str(self.workspace.folder / "in" / name),
            "mask": str(self.mask),
            "output": str(self.workspace.folder / "out" / name),
        }
        return self.table.add_one(submission=self.submission, **{**places, **changes})

    def done(self, name: str = "a.png", score: float = 0.9, **changes: Any) -> int:
        recorded = {key: changes.pop(key) for key in ("review", "scores") if key in changes}
        job = self.add(name, **changes)
        after = Image.new("RGB", SIZE, GREY)
        after.paste(RED, MARK)
        path = self.workspace.write(f"out/{name}", png(after))
        record = AttemptRecord(score=score, **recorded)
        version = f"{path.stat().st_size}-{path.stat().st_mtime_ns}"
        jobs.succeed(self.table.db, self.table.run(job), record, output_version=version)
        return job

    def failed(self, error: InpaintError, name: str = "a.png", **changes: Any) -> int:
        job = self.add(name, **changes)
        jobs.fail(self.table.db, self.table.run(job), AttemptRecord(), error, RETRY_AT_ONCE)
        return job

    def sheet(self, *args: object) -> Page:
        result = self.workspace.jobs("sheet", self.submission, "--output", "s.html", *args)
        assert result.status == 0, result.err
        return Page((self.workspace.folder / "s.html").read_text())


@pytest.fixture
def scenario(workspace: Workspace, table: JobTable) -> SheetScenario:
    return SheetScenario(workspace, table)


def shown_jobs(page: Page) -> list[int]:
    return [int(str(attrs["id"]).removeprefix("job-")) for attrs in page.of("article")]


# --- which jobs ------------------------------------------------------------------------------


def test_failed_jobs_come_first_then_reviews_then_the_lowest_scores(
    scenario: SheetScenario,
) -> None:
    best, worst = scenario.done("a.png", 0.9), scenario.done("b.png", 0.2)
    review = scenario.done("c.png", 0.6, review="gate_seam")
    missing = scenario.failed(ObjectMissing("gone"), "d.png")
    black = scenario.failed(GateBlack("all black"), "e.png")
    scenario.add("waits.png")
    assert shown_jobs(scenario.sheet()) == [black, missing, review, worst, best]


def test_jobs_beyond_the_limit_are_counted(scenario: SheetScenario) -> None:
    jobs_by_score = [scenario.done(f"{n}.png", n / 10) for n in range(4)]
    page = scenario.sheet("--limit", 3)
    assert shown_jobs(page) == jobs_by_score[:3]
    assert "3 jobs, the worst first; 1 more are left out" in page.html


def test_failed_jobs_take_at_most_a_quarter_where_results_can_fill_the_rest(
    scenario: SheetScenario,
) -> None:
    broken = [scenario.failed(ObjectMissing("gone"), f"f{n}.png") for n in range(6)]
    results = [scenario.done(f"r{n}.png", n / 10) for n in range(6)]
    assert shown_jobs(scenario.sheet("--limit", 4)) == [broken[0], *results[:3]]
    assert shown_jobs(scenario.sheet("--limit", 9)) == [*broken[:3], *results]


def test_the_ranking_counts_scores_in_twentieths_and_gives_the_seed_that_was_used(
    scenario: SheetScenario,
) -> None:
    for number, score in enumerate((0.0, 0.049, 0.5, 1.0)):
        scenario.done(f"{number}.png", score)
    job = scenario.add("reseeded.png")
    record = AttemptRecord(score=0.5, seed=77, scores={"seam": 1.5})
    jobs.succeed(scenario.table.db, scenario.table.run(job), record)
    ranked = reports.rank_jobs(scenario.table.db, scenario.submission, limit=10)
    assert ranked is not None
    assert {n: count for n, count in enumerate(ranked.scores) if count} == {0: 2, 10: 2, 19: 1}
    reseeded = next(ranked_job for ranked_job in ranked.jobs if ranked_job.job == job)
    assert (reseeded.seed, json.loads(reseeded.scores or "")) == (77, {"seam": 1.5})


# --- what is shown of them -------------------------------------------------------------------


def test_a_result_is_shown_before_and_after_whole_and_close_up(scenario: SheetScenario) -> None:
    scenario.done(scores={"seam": 1.25, "score": 0.9, "black": 0.0})
    page = scenario.sheet()
    assert len(page.images()) == 4
    before, after = (np.asarray(page.images(f"{side}, whole")[0]) for side in ("before", "after"))
    assert np.abs(before[110, 170].astype(int) - GREY).max() < 12
    assert np.abs(after[110, 170].astype(int) - RED).max() < 12
    close = np.asarray(page.images("after, close-up")[0]).astype(int)
    share = (np.abs(close - RED).max(axis=2) < 40).mean()
    assert share == pytest.approx(40 * 20 / (96 * 60), rel=0.2)
    assert "seam 1.25" in page.cards[0]
    assert "black" not in page.cards[0]


def test_large_images_are_reduced(scenario: SheetScenario) -> None:
    large = png(Image.new("RGB", (1600, 1000), GREY))
    for name in ("in/large.png", "out/large.png"):
        scenario.workspace.write(name, large)
    places = {name: str(scenario.workspace.folder / name / "large.png") for name in ("in", "out")}
    scenario.done(image=places["in"], output=places["out"], mask="box:500,500,900,700")
    assert {image.size for image in scenario.sheet().images()} == {(SIDE_PX, SIDE_PX * 5 // 8)}


def test_a_failed_job_shows_its_image_its_code_and_its_message(scenario: SheetScenario) -> None:
    job = scenario.failed(GateBlack("all black here"))
    scenario.workspace.image("out/a.png")  # an older result, which is not this job's
    page = scenario.sheet()
    assert "failed: gate_black all black here" in page.cards[0]
    assert [attrs["class"] for attrs in page.of("article")] == ["card failed"]
    assert len(page.images("before")) == 2
    assert page.images("after") == []
    assert shown_jobs(page) == [job]


def test_a_result_for_review_is_labelled(scenario: SheetScenario) -> None:
    scenario.done(score=0.4, review="gate_colour")
    page = scenario.sheet()
    assert "to be reviewed: gate_colour" in page.cards[0]
    assert page.of("article")[0]["class"] == "card review"


def test_missing_files_are_noted_and_the_rest_is_shown(scenario: SheetScenario) -> None:
    scenario.done("a.png", 0.1)
    scenario.done("b.png", 0.2, mask="/elsewhere/mask.png")
    scenario.done("c.png", 0.3)
    (scenario.workspace.folder / "in/a.png").unlink()
    (scenario.workspace.folder / "out/c.png").write_bytes(b"not an image")
    page = scenario.sheet()
    first, second, third = page.cards
    assert "no image: " in first
    assert "in/a.png' does not exist" in first
    assert "no mask: '/elsewhere/mask.png' is outside the allowed folders" in second
    assert "no result: " in third
    assert len(page.images("before")) == 1 + 2
    assert len(page.images("after")) == 1 + 1


def test_the_mask_is_the_union_of_all_passes(scenario: SheetScenario) -> None:
    eyes = PassSpec(mask="box:10,10,30,20")
    scenario.done(params=Params(passes=(eyes, PassSpec(mask="/elsewhere/nose.png"))))
    page = scenario.sheet()
    expected = np.zeros((SIZE[1], SIZE[0]), np.bool_)
    expected[10:20, 10:30] = expected[MARK[1] : MARK[3], MARK[0] : MARK[2]] = True
    assert np.array_equal(page.masks()[0], expected)
    assert "no mask: '/elsewhere/nose.png' is outside the allowed folders" in page.cards[0]


def test_a_job_without_any_files_still_has_a_card(scenario: SheetScenario) -> None:
    scenario.done()
    for folder in ("in", "out"):
        (scenario.workspace.folder / folder / "a.png").unlink()
    page = scenario.sheet()
    assert "no image" in page.cards[0]
    assert page.images() == []


def test_files_that_changed_since_the_job_are_noted(scenario: SheetScenario) -> None:
    scenario.done()
    scenario.workspace.image("out/a.png", size=(160, 100))
    page = scenario.sheet()
    assert "the output was overwritten after this job wrote it" in page.cards[0]
    assert "image 320x200, result 160x100" in page.cards[0]
    before, after = page.images("before, whole")[0], page.images("after, whole")[0]
    assert before.size == after.size


def test_a_result_written_over_its_image_is_noted(scenario: SheetScenario) -> None:
    scenario.done(output=str(scenario.workspace.folder / "in/a.png"))
    path = scenario.workspace.folder / "in/a.png"
    version = f"{path.stat().st_size}-{path.stat().st_mtime_ns}"
    scenario.table.set(1, output_version=version)
    assert "the result was written over its image" in scenario.sheet().cards[0]


def test_only_parameters_that_differ_from_the_usual_ones_are_shown(scenario: SheetScenario) -> None:
    for number in range(3):
        scenario.done(f"{number}.png", params=Params(strength=0.5, prompt=f"cup {number}"))
    scenario.done("odd.png", params=Params(strength=0.75, prompt="cup 3"))
    page = scenario.sheet()
    head = page.html[: page.html.index("<main")]
    assert "<dt>strength</dt><dd>0.5</dd>" in head
    assert "prompt" not in re.findall(r"<dt>(\w+)</dt>", head)
    assert ["strength" in card for card in page.cards] == [False, False, False, True]
    assert all(f"cup {number}" in card for number, card in enumerate(page.cards))


def test_a_usual_value_is_one_that_more_than_half_of_the_jobs_have() -> None:
    assert usual_params(['{"a": 1, "b": 1}', '{"a": 1, "b": 2}', '{"a": 2}']) == {"a": 1}
    assert usual_params([]) == {}


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "CMYK", "I;16", "1"])
def test_images_of_every_mode_are_shown(scenario: SheetScenario, mode: str) -> None:
    scenario.done("a.tif")
    image = Image.new("RGB", SIZE, GREY).convert(mode.replace("I;16", "L"))
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.linear_gradient("L").resize(SIZE))
    if mode == "I;16":
        image = Image.fromarray(np.full((200, 320), 30_000, np.uint16))
    for folder in ("in", "out"):
        image.save(scenario.workspace.folder / folder / "a.tif")
    modes = {image.mode for image in scenario.sheet().images()}
    assert modes == {"RGBA" if mode in ("LA", "RGBA") else "RGB"}


def test_an_image_keeps_its_colour_profile(scenario: SheetScenario) -> None:
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    scenario.done()
    image = Image.new("RGB", SIZE, "red")
    image.save(scenario.workspace.folder / "in/a.png", icc_profile=profile)
    (image,) = scenario.sheet().images("before, whole")
    assert image.info["icc_profile"] == profile


def test_images_in_s3_are_read(scenario: SheetScenario, s3: Bucket) -> None:
    for key in ("in.png", "out.png"):
        s3.client.put_object(Bucket=s3.name, Key=key, Body=png(Image.new("RGB", (64, 48), GREY)))
    scenario.done(
        image=f"s3://{s3.name}/in.png",
        mask="box:10,10,20,20",
        output=f"s3://{s3.name}/out.png",
    )
    page = scenario.sheet()
    assert len(page.images("before")) == 1
    assert [attrs for attrs in page.of("a") if "s3" in str(attrs)] == []


def test_a_folder_can_be_allowed_for_reading(scenario: SheetScenario, tmp_path: Path) -> None:
    other_folder = tmp_path / "elsewhere"
    other_folder.mkdir()
    Image.new("RGB", SIZE).save(other_folder / "a.png")
    scenario.done(image=str(other_folder / "a.png"))
    assert "is outside the allowed folders" in scenario.sheet().cards[0]
    assert "no image" not in scenario.sheet("--root", other_folder).cards[0]


# --- where to look ---------------------------------------------------------------------------


def mask_with(*boxes: Box, size: tuple[int, int] = (1200, 900)) -> np.ndarray[Any, Any]:
    mask = np.zeros((size[1], size[0]), np.bool_)
    for box in boxes:
        mask[box.top : box.bottom, box.left : box.right] = True
    return mask


def test_a_close_up_holds_the_mark_with_a_margin_in_the_image_s_aspect() -> None:
    mark = Box(900, 700, 1100, 750)
    place = close_up_box(mask_with(mark))
    assert place is not None
    assert place.width / place.height == pytest.approx(1200 / 900, rel=0.01)
    assert place.left < mark.left
    assert place.right > mark.right
    assert 1.5 < place.width / mark.width < 2


def test_a_close_up_stays_inside_the_image() -> None:
    place = close_up_box(mask_with(Box(1190, 0, 1200, 10)))
    assert place is not None
    assert place == place.clipped((1200, 900))
    assert place.right == 1200
    assert place.width >= 96


def test_a_close_up_of_scattered_marks_shows_the_densest_part() -> None:
    dense = Box(800, 600, 1000, 800)
    place = close_up_box(mask_with(Box(0, 0, 20, 20), Box(0, 880, 20, 900), dense))
    assert place is not None
    assert place.left <= 820
    assert place.right >= 980
    assert place.width == 400


def test_a_small_image_or_an_empty_mask_has_no_close_up() -> None:
    assert close_up_box(mask_with()) is None
    assert close_up_box(mask_with(Box(10, 10, 20, 20), size=(120, 90))) is None


# --- harmless --------------------------------------------------------------------------------

HOSTILE = "\"><script>alert(1)</script><img src=//evil.example onerror=alert(2)>\u202e\x1b[31m'"


def test_text_from_outside_never_becomes_markup(scenario: SheetScenario) -> None:
    scenario.done("<b>.png", 0.3, key=HOSTILE, params=Params(prompt=HOSTILE))
    scenario.failed(InpaintError(HOSTILE), "b.png", mask=f"/x/{HOSTILE}")
    page = scenario.sheet()
    assert len(page.of("script")) == 1
    assert page.images("before")
    for _, attrs in page.elements:
        assert [name for name in attrs if name.startswith("on") or name == "style"] == []
    assert "alert(1)" in page.cards[1]
    assert "\u202e" not in page.html
    assert "\x1b" not in page.html


def test_the_page_allows_its_own_script_and_style_and_nothing_else(scenario: SheetScenario) -> None:
    scenario.done()
    page = scenario.sheet()
    policy = next(str(a["content"]) for a in page.of("meta") if "http-equiv" in a)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["img-src"] == "data:"
    for tag in ("script", "style"):
        (source,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page.html, re.DOTALL)
        digest = b64encode(sha256(source.encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest}'"
    places = [str(a.get(name)) for _, a in page.elements for name in ("src", "href") if name in a]
    assert {place.partition(":")[0] for place in places} == {"data", "file"}


def test_the_page_can_be_used_without_a_mouse_and_without_scripts(scenario: SheetScenario) -> None:
    scenario.done()
    page = scenario.sheet()
    sliders = [attrs for attrs in page.of("input") if attrs["type"] == "range"]
    assert len(sliders) == 2
    for slider in sliders:
        assert "hidden" in slider  # until the script runs; images are shown side by side
        assert str(slider["aria-label"]).endswith("before to after: sku-2")
    assert all("alt" in attrs for attrs in page.of("img"))


# --- the command -----------------------------------------------------------------------------


def test_the_page_is_named_after_the_submission_and_a_png_can_be_written_too(
    scenario: SheetScenario,
) -> None:
    for number in range(3):
        scenario.done(f"{number}.png", number / 4)
    result = scenario.workspace.jobs("sheet", scenario.submission, "--png", "s.png")
    assert (result.status, result.err) == (0, "")
    assert (
        result.out == "3 jobs in sheet-1.html; 0 left out (--limit)\nthe worst of them in s.png\n"
    )
    assert (scenario.workspace.folder / "sheet-1.html").is_file()
    with Image.open(scenario.workspace.folder / "s.png") as image:
        assert image.mode == "RGB"
        colours = np.asarray(image).reshape(-1, 3).astype(int)
    red = np.abs(colours - RED).max(axis=1) < 10
    grey = np.abs(colours - GREY).max(axis=1) < 10
    assert red.sum() > 3000
    assert grey.sum() > 100_000


def assert_refused(result: CommandResult, message: str) -> None:
    assert (result.status, result.out) == (2, "")
    assert result.err == f"inpaint-jobs: {message}\n"


def test_a_submission_without_finished_jobs_has_no_sheet(scenario: SheetScenario) -> None:
    scenario.add()
    assert_refused(
        scenario.workspace.jobs("sheet", 9), "submission 9 does not exist; see inpaint-jobs status"
    )
    assert_refused(
        scenario.workspace.jobs("sheet", 1), "no job of submission 1 has succeeded or failed yet"
    )


def test_a_file_that_cannot_be_written_is_named(scenario: SheetScenario) -> None:
    scenario.done()
    result = scenario.workspace.jobs("sheet", 1, "--output", "nowhere/s.html")
    assert_refused(
        result, "cannot write 'nowhere/s.html': No such file or directory; name another file"
    )


def test_a_page_is_written_completely_or_not_at_all(
    scenario: SheetScenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario.done()
    old = scenario.workspace.write("s.html", "the old page")
    monkeypatch.setattr("producer.contact_sheet.html._image_uri", lambda image: 1 / 0)
    with pytest.raises(AssertionError, match="traceback"):
        scenario.sheet()
    assert old.read_text() == "the old page"
    assert [path.name for path in scenario.workspace.folder.glob(".*.tmp")] == []


def test_images_are_read_while_the_page_is_written(
    scenario: SheetScenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    get = Storage.get

    def counted(self: Storage, uri: str, *, max_bytes: int) -> Object:
        read.append(uri)
        return get(self, uri, max_bytes=max_bytes)

    monkeypatch.setattr(Storage, "get", counted)
    for number in range(12):
        scenario.done(f"{number}.png", number / 20)
    ranked = reports.rank_jobs(scenario.table.db, scenario.submission, limit=20)
    assert ranked is not None
    storage = Storage(roots=[scenario.workspace.folder], buckets=())
    built = build_cards(ranked.jobs, {}, storage, settings.load())
    next(built)
    assert str(scenario.workspace.folder / "in/11.png") not in read
    assert len(list(built)) == 11
    assert (
        read.count(str(scenario.mask)) <= 4
    )  # a mask shared by all rows is read at most once per thread
