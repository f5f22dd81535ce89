"""The page and its pictures: whole, self-contained, escaped, and forgiving about what a run has not written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from sm_train.errors import UserError
from sm_train.scoring.fragments import difference, mistakes, score_table
from sm_train.scoring.language import Lexicon
from sm_train.scoring.pictures import Projection, curve_svg, project, projection_svg
from sm_train.scoring.report import Example, build_report
from sm_train.scoring.scores import Hypothesis, Result, score, write_hypotheses, write_results

EVIL = "<script>alert('x')</script> & \"<img src=http://evil.example/a.png onerror=x>"


class _Page(HTMLParser):
    """Every tag with its attributes, the text, and whether each opened tag was closed in order."""

    VOID = ("meta", "br", "link", "img", "input", "hr")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.open: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def _hypotheses(evil: str = EVIL) -> list[Hypothesis]:
    base = Hypothesis("topline", "asr", "en", "test", 0, "test-000000", "Repeat: {speech}", "a red cat", "a red cat")
    items = []
    for system, said in (("topline", "a red cat"), (f"stage 1 {evil}", f"a {evil} cat"), ("stage 2", "")):
        items.append(replace(base, system=system, hypothesis=said))
        items.append(replace(base, system=system, hypothesis=said, task="st", target_lang="fr", prompt=evil))
        items.append(replace(base, system=system, hypothesis=said, task="sqa", split="test_voices", id=f"v{evil}"))
    return items


def _picture(labels: tuple[str, ...] = ("\u2581cat", EVIL, "$x_1$", "<pad>\n")) -> Projection:
    table_MD = np.eye(4, 6, dtype=np.float32) * 3
    mapped_ND = table_MD[[0, 1, 2, 3, 3]] + 0.1
    return project(mapped_ND, table_MD, labels, pad_row=3)


def _run(folder: Path) -> list[Example]:
    hypotheses = _hypotheses()
    write_hypotheses(folder / "hypotheses.jsonl", hypotheses)
    write_results(folder / "results.json", score(hypotheses, "mms"))
    (folder / "config.yaml").write_text(f"prompt: {EVIL}\n")
    (folder / "one.flac").write_bytes(b"fLaC" + bytes(20))
    lines: list[object] = [
        {
            "attempt": 1 + (step > 50),
            "step": step,
            "loss": 9 / step,
            "loss_cos": -step,
            "lr": 1e-3,
            "peak_memory_mb": 812,
        }
        for step in range(10, 100, 10)
    ]
    lines += [{"step": 50, "valid_wer": 0.53}, {"attempt": 1, "step": 90, "valid_wer": 0.25, "valid_vocabulary": 612}]
    lines += [{"loss": 1.0}, {"step": 95, "loss": None, "odd": EVIL, "loss_word": float("nan")}, [1], "text"]
    (folder / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + '\n{"step": 97, "lo')
    rows = [(h.system, "st-fr" if h.task == "st" else h.task, h.prompt, h.reference, h.hypothesis) for h in hypotheses]
    return [
        Example(0, "test-000000", "test", EVIL, folder / "one.flac", rows),
        Example(1, EVIL, "test", "no sound here", None, []),
    ]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("run-7")
    examples = _run(folder)
    path = build_report(folder, examples, _picture(), folder)
    assert path == folder / "report.html"
    assert not list(folder.glob("*.aside"))
    first = path.read_bytes()
    assert build_report(folder, examples, _picture(), folder).read_bytes() == first
    return first.decode()


def test_nothing_outside_is_loaded_and_nothing_runs(page: str) -> None:
    for tag, attributes in _Page(page).tags:
        assert tag not in ("script", "img", "link", "iframe", "object")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "poster", "data", "action"):
                assert (value or "").startswith(("#", "data:")), (tag, name, value)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))
    assert "@import" not in page
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert set(re.findall(r"https?://[\w.]+", without_namespaces)) <= {"http://evil.example"}


def test_texts_are_shown_as_they_are(page: str) -> None:
    parsed = _Page(page)
    assert "<script>" not in page
    assert parsed.words.count(EVIL) >= 6  # text, ids, prompts, system names, configuration
    assert "(nothing)" in parsed.words


def test_all_sections_are_there(page: str) -> None:
    words = _Page(page).words
    for title in ("Scores", "Training", "Where speech lands", "Listen", "Mistakes", "Prompts", "Configuration"):
        assert f"<h2>{title}</h2>" in page
    for text in ("25.0%", "812 MB", "of them empty", "Share of topline", "normaliser:mms", "nrefs:1|", "test_voices"):
        assert text in words
    assert page.count("<svg") == 6  # loss, its signed term, WER, vocabulary, learning rate, projection
    assert "data:audio/flac;base64,ZkxhQ" in page
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(ids) == len(set(ids))


def test_a_bare_run_folder_makes_a_page_too(tmp_path: Path) -> None:
    write_hypotheses(tmp_path / "hypotheses.jsonl", [])
    write_results(tmp_path / "results.json", [])
    page = build_report(tmp_path, [], None, tmp_path).read_text()
    assert "<h2>" not in page
    _Page(page)


def test_what_was_named_must_be_readable(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"results\.json"):
        build_report(tmp_path, [], None)
    write_results(tmp_path / "results.json", [])
    with pytest.raises(UserError, match=r"hypotheses\.jsonl"):
        build_report(tmp_path, [], None)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("reference", "hypothesis", "shown", "same"),
    [
        ("The cat, sat.", "the cat sat", "the cat sat", True),
        ("a red dog", "a bed dog runs", "a <mark>bed</mark> <del>red</del> dog <mark>runs</mark>", False),
        ("it is", "it", "it <del>is</del>", False),
        ("it is", " ", '<span class="nothing">(nothing)</span> <del>it is</del>', False),
        ("it is", "...", "<mark>...</mark> <del>it is</del>", False),
        ("a b", "- a <b> b", "- a &lt;b&gt; b", True),
    ],
)
def test_differences_by_hand(reference: str, hypothesis: str, shown: str, same: bool) -> None:
    assert difference(reference, hypothesis) == (shown, same)


def test_table_marks_the_best_and_the_share() -> None:
    def result(system: str, metric: str, value: float) -> Result:
        return Result(system, "asr" if metric == "WER" else "sqa", metric, value, value, value, 9, "test", "s")

    rows = [("topline", 1.0, 0.8), ("stage 1", 20.0, 0.6), ("stage 2", 10.0, 0.4)]
    html = score_table([r for s, wer, acc in rows for r in (result(s, "WER", wer), result(s, "accuracy", acc))])
    assert re.findall(r'class="best">([^<]*)', html) == ["0.60", "10.0"]
    assert re.findall(r"<span>(\d+%)</span>", html) == ["75%", "50%"]
    alone = score_table([result("stage 1", "WER", 20.0), result("stage 1", "novel", 3.0)])
    assert "Share" not in alone
    assert "best" not in alone
    assert "novel" in alone


def test_the_share_in_the_language_stands_beside_chrf() -> None:
    items = [replace(h, reference="un chat") for h in _hypotheses("x") if h.task == "st"]
    items[0] = replace(items[0], hypothesis="un chat")
    html = score_table(score(items, "mms", Lexicon({"fr": ["un", "chat"], "en": ["a"]})))
    titles = re.findall(r'<th scope="col"[^>]*>([^<]*)&nbsp;(.)</th>', html)
    assert titles == [("chrF", "↑"), ("in language", "↑"), ("BLEU", "↑"), ("exact", "↑")]
    row = re.findall(r"<td[^>]*><span[^>]*>([^<]*)</span>.*?left:([\d.]+)%;width", html)
    assert row[1] == ("1.00", "97.0")  # a share of 1, drawn on a scale from 0 to 1
    assert row[5][0] == "0.00"


def test_groups_of_prompts_stand_apart(tmp_path: Path) -> None:
    items = [replace(h, group=group) for group in ("train", "held_out") for h in _hypotheses("x")]
    write_hypotheses(tmp_path / "hypotheses.jsonl", items)
    write_results(tmp_path / "results.json", score(items, "mms"))
    words = _Page(build_report(tmp_path, [], None).read_text()).words
    places = [f"{split}, {group} prompts" for split in ("test", "test_voices") for group in ("train", "held-out")]
    for place in places:
        assert f"{place} (up to 1 answers a cell)" in words
        assert f"{place}: 1 of 1 differ" in words
    assert "train prompts" not in mistakes(_hypotheses())


def test_mistakes_are_counted() -> None:
    words = _Page(mistakes(_hypotheses())).words
    assert "topline: 0 of 3 answers differ" in words
    assert "stage 2: 3 of 3 answers differ" in words


def test_projection_finds_the_nearest_and_the_axes() -> None:
    table_MD = np.array([[0, 0, 0], [10, 0, 0], [0, 4, 0], [99, 99, 99]], np.float32)
    picture = project(np.array([[9, 0, 0.5], [0, 3, 0], [1, 0, 0]], np.float32), table_MD, list("abcd"), pad_row=0)
    assert list(picture.labels) == ["b", "c", "a"]
    assert list(picture.is_pad) == [False, False, True]
    assert list(picture.token_labels) == ["a", "b", "c"]  # d does not occur, and does not bend the axes
    assert sum(picture.explained) == pytest.approx(1.0)
    between = np.linalg.norm(picture.tokens_M2[1] - picture.tokens_M2[0])
    assert between == pytest.approx(10.0, rel=1e-5)  # the tokens lie in a plane: distances in it are kept
    assert project(np.zeros((5, 3)), table_MD, list("abcd"), 0, max_positions=2).mapped_N2.shape == (2, 2)
    with pytest.raises(ValueError, match="do not fit"):
        project(np.zeros((2, 4)), table_MD, list("abcd"), 0)


def test_pictures_take_the_pages_colours_and_odd_labels() -> None:
    svg = projection_svg(_picture())
    assert "<script>" not in svg
    assert "var(--c1)" in svg
    assert not re.search(r"#0101[01]\d", svg)
    assert ">cat<" in svg
    assert "$x_1$" in svg
    one = project(np.zeros((1, 3), np.float32), np.zeros((1, 3), np.float32), ["only"], 0)
    assert "only" in projection_svg(one)
    steps = np.arange(5000, dtype=float)
    assert len(curve_svg("loss", "Loss", {"total": (steps, 1 + np.sin(steps) ** 2)}, [10.0], log=True)) < 40_000


def test_importing_the_report_costs_no_matplotlib_and_no_torch() -> None:
    code = "import sys, sm_train.scoring.report; print([m for m in ('matplotlib', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
