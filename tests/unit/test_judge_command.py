"""``python -m sm_train.judge``: from a file of hypotheses to judged.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sm_train.errors import UserError
from sm_train.judge import main
from sm_train.scoring.scores import Hypothesis, read_results, write_hypotheses
from tests.families import family


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family(tmp_path_factory.mktemp("judges") / "llama3", "llama3")


@pytest.fixture
def evaluated(tmp_path: Path) -> Path:
    """Hypotheses of two systems, which agree on one of three answers; the instructions beside them."""
    answers = {"mapped": ["boat", "the house", "two"], "topline": ["boat", "a house", "a bird"]}
    rows = [
        Hypothesis(system, "sqa", "en", "test", n, f"u{n}", "{speech}\n{question}", reference, text)
        for system, texts in answers.items()
        for n, (reference, text) in enumerate(zip(["the boat", "a house", "two birds"], texts, strict=True))
    ]
    asr = Hypothesis("mapped", "asr", "en", "test", 0, "u0", "{speech}", "the boat runs", "the boat runs")
    write_hypotheses(tmp_path / "hypotheses.jsonl", [asr, *rows])
    tasks = [
        {"utterance_id": f"u{n}", "task": "sqa", "variables": {"question": "who"}, "answer": answer}
        for n, answer in enumerate(["the boat", "a house", "two birds"])
    ]
    (tmp_path / "instructions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tasks))
    return tmp_path


def test_judged_once_and_for_all(evaluated: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"judge.path={model}", f"instructions={evaluated / 'instructions.jsonl'}", "judge.device=cpu", "threads=1"]
    main([str(evaluated / "hypotheses.jsonl"), *words, "batch_size=2"])
    told = capsys.readouterr()
    assert "judged.json: 6 answers, 5 asked, 0 exact" in told.out
    assert "warning: " in told.out  # a random judge would rather say something else
    assert "5 of 5 questions" in told.err
    results = read_results(evaluated / "judged.json")
    assert {(r.system, r.count) for r in results} == {("mapped", 3), ("topline", 3)}
    assert f"judge:{model}|revision:None|hash:" in results[0].signature
    written = (evaluated / "judged.json").read_bytes()

    main([str(evaluated / "hypotheses.jsonl"), *words])
    told = capsys.readouterr()
    assert "6 answers, 0 asked" in told.out
    assert "questions" not in told.err
    assert (evaluated / "judged.json").read_bytes() == written
    assert sorted(path.name for path in evaluated.iterdir()) == [
        "hypotheses.jsonl", "instructions.jsonl", "judged.json", "verdicts.jsonl",
    ]  # fmt: skip


def test_an_exact_answer_is_right_unasked_only_where_it_is_trusted(
    evaluated: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"judge.path={model}", f"instructions={evaluated / 'instructions.jsonl'}", "judge.device=cpu", "threads=1"]
    main([str(evaluated / "hypotheses.jsonl"), *words, "trust_exact=true"])
    assert "6 answers, 4 asked, 1 exact" in capsys.readouterr().out
    assert all("trust_exact:True" in result.signature for result in read_results(evaluated / "judged.json"))


def test_a_prompt_file_is_another_judge(evaluated: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (evaluated / "prompt.txt").write_text("Is {answer} the same as {reference}?\n")
    words = [f"judge.path={model}", f"instructions={evaluated / 'instructions.jsonl'}", "judge.device=cpu", "threads=1"]
    for prompt in ([], [f"prompt={evaluated / 'prompt.txt'}"], [f"prompt={evaluated / 'prompt.txt'}"]):
        main([str(evaluated / "hypotheses.jsonl"), *words, *prompt])
    out = capsys.readouterr().out
    assert [line.split(", ")[1] for line in out.splitlines() if " exact, " in line] == ["5 asked", "5 asked", "0 asked"]


def test_mistakes_are_one_line(evaluated: Path, model: Path) -> None:
    hypotheses = evaluated / "hypotheses.jsonl"
    with pytest.raises(UserError, match="no file of hypotheses given; usage: "):
        main([f"judge.path={model}"])
    with pytest.raises(UserError, match=r"required key 'judge\.path' is not set"):
        main([str(hypotheses), f"instructions={evaluated / 'instructions.jsonl'}"])
    with pytest.raises(UserError, match=r"nowhere\.jsonl: no readable hypotheses"):
        main(["nowhere.jsonl", f"judge.path={model}", "instructions=x"])
    with pytest.raises(UserError, match=r"prompt nowhere\.txt cannot be read"):
        main([str(hypotheses), f"judge.path={model}", "instructions=x", "prompt=nowhere.txt"])
    write_hypotheses(hypotheses, [Hypothesis("s", "asr", "en", "test", 0, "u0", "{speech}", "a", "a")])
    with pytest.raises(UserError, match="holds no answer to a question"):
        main([str(hypotheses), f"judge.path={model}", "instructions=x"])


def test_help_names_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("judge.path", "judge.revision", "instructions", "trust_exact", "cache"))
