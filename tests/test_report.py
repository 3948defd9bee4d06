"""The report's figures are those of the file: every one is computed again here, by other means."""

from __future__ import annotations

import gzip
import json
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from report_pages import META, Page, plain, random_rows, report_on, write_rows

ROWS = random_rows()
Scored = list[tuple[float, str, bool]]


def candidates(row: dict[str, Any]) -> Scored:
    """(score, text, is positive) of a row."""
    texts = [(text, True) for text in row["pos"]] + [(text, False) for text in row["neg"]]
    return [(score, *text) for score, text in zip(row["teacher_scores"], texts, strict=True)]


def best(row: dict[str, Any], positive: bool) -> float:
    return max(score for score, _, is_positive in candidates(row) if is_positive == positive)


def margin(row: dict[str, Any]) -> float:
    return best(row, True) - best(row, False)


ALL: Scored = [candidate for row in ROWS for candidate in candidates(row)]
POSITIVES = [score for score, _, positive in ALL if positive]
NEGATIVES = [score for score, _, positive in ALL if not positive]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return report_on(write_rows(tmp_path_factory.mktemp("report") / "scored.jsonl", ROWS, META))


def test_the_headline_figures(page: Page) -> None:
    won = sum(margin(row) >= 0 for row in ROWS)
    level = sum(margin(row) == 0 for row in ROWS)
    lost = [row for row in ROWS if margin(row) < 0]
    assert lost
    assert level
    top = page.sections[""]
    assert f"A positive has the best score in {won} of 40 rows ({won / 40:.1%}), {level} of them level" in top.words
    assert f"In {len(lost)} a negative is ahead, by {-min(map(margin, lost)):.2f} nats at most." in top.words
    tiles = {name.strip(): said.split(maxsplit=0)[0].strip() for name, said in top.facts}
    assert tiles["positive is best"].startswith(f"{won / 40:.1%}")
    assert plain(tiles["median margin, nats"].partition("best")[0]) == round(statistics.median(map(margin, ROWS)), 2)
    assert tiles["scores"] == f"{len(ALL)}of 40 rows"
    assert tiles["tokens saved"] == "50.0%60,000 of 120,000, against padded batches of four"
    assert tiles["tokens a second"] == "1,500cuda:0, bfloat16"


def test_the_distribution_counts_every_score_once(page: Page) -> None:
    section = page.sections["scores"]
    [table] = section.tables
    assert table[0] == ["score", "positives", "share", "negatives", "share"]
    bins, summaries = table[1:-4], table[-4:]
    edges = [[plain(edge) for edge in row[0].split(" to ")] for row in bins]
    assert all(low < high for low, high in edges)
    assert all(before[1] == after[0] for before, after in pairwise(edges))
    for column, scores in ((1, POSITIVES), (3, NEGATIVES)):
        for (low, high), row in zip(edges, bins, strict=True):
            inside = sum(low < score <= high for score in scores)
            assert plain(row[column]) == inside, row
            assert plain(row[column + 1]) == pytest.approx(100 * inside / len(scores), abs=0.051)
        assert sum(plain(row[column]) for row in bins) == len(scores)
        found = {row[0]: plain(row[column]) for row in summaries}
        assert found == {
            "mean": pytest.approx(statistics.fmean(scores), abs=5.1e-4),
            "median": pytest.approx(statistics.median(scores), abs=5.1e-4),
            "lowest": min(scores),
            "highest": max(scores),
        }
    # The chart says of each bin what the table says.
    assert [mark.partition(":")[0] for mark in section.marks] == 2 * [row[0] for row in bins]
    for mark, row in zip(section.marks, 2 * bins, strict=True):
        assert f" {row[1]} positive" in mark
        assert f" {row[3]} negative" in mark


def test_the_margin_of_every_row_in_order(page: Page) -> None:
    section = page.sections["margin"]
    ordered = sorted(((margin(row), -line) for line, row in enumerate(ROWS, 1)), reverse=True)
    [table] = section.tables
    assert [(plain(row[2]), -plain(row[1])) for row in table[1:]] == [
        (pytest.approx(value, abs=5.1e-4), line) for value, line in ordered
    ]
    signs = [sum(value > 0 for value, _ in ordered), sum(value < 0 for value, _ in ordered)]
    assert f"positive ahead in {signs[0]}" in section.words
    assert f"negative ahead in {signs[1]}" in section.words
    assert f"level in {40 - sum(signs)}" in section.words
    assert section.labels[0].endswith(f"; {signs[1]} below zero.")
    assert section.marks[0] == f"row 1 of 40, line {-ordered[0][1]}: {ordered[0][0]:.3f}"


def test_upsets_the_worst_first_with_their_texts(page: Page) -> None:
    section = page.sections["upsets"]
    worst = sorted((margin(row), line) for line, row in enumerate(ROWS, 1) if margin(row) < 0)
    assert len(section.articles) == len(worst) <= 20
    for article, (value, line) in zip(section.articles, worst, strict=True):
        row, words = ROWS[line - 1], " ".join(article.split())
        assert words.startswith(f"−{-value:.3f} line {line} · query_id {row['query_id']} · ")
        above = sum(score > best(row, True) for score, _, positive in candidates(row) if not positive)
        assert f"{above} of {len(row['neg'])} negative" in words
        assert row["query"] in words
        assert f"answer {row['answers'][0]} not scored another" in words
        for field, positive in (("pos", True), ("neg", False)):
            offset = 0 if positive else len(row["pos"])
            index = row["teacher_scores"].index(best(row, positive), offset) - offset
            score = f"{best(row, positive):.3f}".replace("-", "−")
            assert f"{field}[{index}] {score} {row[field][index]}" in words


def test_the_worst_are_kept_and_the_rest_counted(tmp_path: Path) -> None:
    rows = [
        {"query": str(i), "answers": ["a"], "pos": ["p"], "neg": ["n"], "teacher_scores": [-1 - (i * 7 % 10), -1]}
        for i in range(30)
    ]
    page = report_on(write_rows(tmp_path / "scored.jsonl", rows), max_upsets=4)
    section = page.sections["upsets"]
    assert "27 rows of 30; the 4 worst" in section.words
    # i * 7 % 10 is 9 for i in 7, 17 and 27, and 8 first for i = 4: the earlier line comes first.
    assert [" ".join(text.split()).partition(" ·")[0] for text in section.articles] == [
        f"−{value}.000 line {line}" for value, line in ((9, 8), (9, 18), (9, 28), (8, 5))
    ]
    assert "the 0 worst" in report_on(tmp_path / "scored.jsonl", max_upsets=0).sections["upsets"].words


def test_ties_how_many_and_where(page: Page) -> None:
    section = page.sections["ties"]
    groups = []
    for line, row in enumerate(ROWS, 1):
        for score in sorted(set(row["teacher_scores"])):
            tied = [candidate for candidate in candidates(row) if candidate[0] == score]
            if len(tied) > 1:
                decides = {positive for *_, positive in tied} == {True, False} and score == max(row["teacher_scores"])
                groups.append((line, score, len(tied), len({text for _, text, _ in tied}) == 1, decides))
    same = sum(group[3] for group in groups)
    assert same
    rows = len({group[0] for group in groups})
    said = f"{sum(group[2] for group in groups)} candidates of {rows} rows share a score with another of their row"
    assert f"{said}: {len(groups)} groups, {same} of them with the very same text." in section.words
    [table] = section.tables
    found = [
        (int(row[0]), plain(row[1]), len(row[2].split(", ")), row[3] == "the same", row[4] == "yes")
        for row in table[1:]
    ]
    ordered = sorted(groups, key=lambda group: not group[4])[:20]
    assert sorted(found) == sorted(ordered)
    assert [row[4] for row in found] == [group[4] for group in ordered]


def test_lengths_against_scores(page: Page) -> None:
    section = page.sections["lengths"]
    [table] = section.tables
    seen = 0
    for row in table[2:]:
        low, high = (plain(part) for part in row[0].split(" to "))
        for column, positive in ((1, True), (5, False)):
            scores = [score for score, text, is_pos in ALL if is_pos == positive and low <= len(text) <= high]
            seen += len(scores)
            assert plain(row[column]) == len(scores)
            quartiles = statistics.quantiles(scores, n=4, method="inclusive")
            assert [plain(cell) for cell in row[column + 1 : column + 4]] == pytest.approx(quartiles, abs=5.1e-4)
    assert seen == len(ALL)
    lengths, scores = [len(text) for _, text, _ in ALL], [score for score, *_ in ALL]
    rho = statistics.correlation(mean_ranks(lengths), mean_ranks(scores))
    assert f"rank correlation is {rho:.2f}".replace("-", "−") in section.words


def mean_ranks(values: list[Any]) -> list[float]:
    return [sum(other < value for other in values) + (values.count(value) - 1) / 2 for value in values]


def test_what_was_run_on_what(page: Page) -> None:
    cost = dict(page.sections["cost"].facts)
    assert cost == {
        "time in the model": "40 s",
        "from start to end": "1 min 30 s",
        "tokens computed": "60,000, 1,500 tokens/s",
        "answer tokens": "800, 20 a second",
        "pairs computed": "240, 6 a second",
        "packs": "5, filled to 75.0%",
    }
    [table] = page.sections["cost"].tables
    assert table[1:] == [
        ["computed", "60,000"],
        ["each pair by itself", "90,000"],
        ["padded batches of four", "120,000"],
    ]
    run = page.sections["run"]
    facts = run.facts
    for fact in [
        ("model", "tiny/model"),
        ("loaded from", "/models/tiny"),
        ("commit", "abc123"),
        ("device", "cuda:0"),
        ("batches", "padded (neighbours change each other)"),
        ("attention", "flash-attn-2"),
        ("versions", "fastscore 0.1.0, torch 2.11.0, transformers 5.17.0"),
        ("started", "2026-03-01 10:00:00 UTC"),
        ("input", "train.jsonl"),
        ("options.quiet", "false"),
        ("task.key_max_length", "512"),
        ("scorer.adapter", "null"),
    ]:
        assert fact in facts
    assert "changed after the run" not in run.words


def scored_as(**definition: Any) -> dict[str, Any]:
    return {**META, "task": {**META["task"], "score": definition}}


DEFINITIONS: dict[str, tuple[dict[str, Any], str, str]] = {
    "none-told": (
        {},
        "nats",
        "mean log-probabilities of the answer in nats: at most 0 unless answers were combined by",
    ),
    "sum": (
        {"reduce": "sum", "append_eos": True},
        "nats",
        "log-probabilities of the answer and its EOS token in nats: ",
    ),
    "byte": (
        {"reduce": "byte", "target": "query"},
        "nats per byte",
        "log-probabilities of the query in nats per byte: at ",
    ),
    "gain": (
        {"reduce": "char", "baseline": "no-context"},
        "nats per character",
        "gains over the same answer without a passage, differences of log-probabilities of the answer in nats per "
        "character, and higher is better.",
    ),
    "shares": (
        {"normalize": "softmax", "temperature": 0.5},
        "",
        "shares of a row's candidates (they add up to 1), softmax at temperature 0.5 of mean log-probabilities of the "
        "answer in nats, and higher is better.",
    ),
}


@pytest.mark.parametrize("case", DEFINITIONS)
def test_the_page_says_what_its_scores_are(tmp_path: Path, case: str) -> None:
    definition, unit, said = DEFINITIONS[case]
    page = report_on(write_rows(tmp_path / "scored.jsonl", ROWS, scored_as(**definition)))
    words = " ".join(section.words for section in page.sections.values())
    assert f" Scores are {said}" in words
    assert (f" {unit} at most." if unit else " at most.") in page.sections[""].words
    assert " nats at most" not in page.sections[""].words or unit == "nats"
    tile = next(name for name, _ in page.sections[""].facts if name.startswith("median margin"))
    assert tile == (f"median margin, {unit}" if unit else "median margin")
    for axis in ("score", "margin"):
        assert f">{axis}, {unit}</text>" in page.html if unit else f">{axis}</text>" in page.html
    fact = next(value for name, value in page.sections["run"].facts if name == "scores")
    assert said.startswith(fact)


def test_files_of_different_definitions_are_not_compared(tmp_path: Path) -> None:
    one = write_rows(tmp_path / "one.jsonl", ROWS, scored_as(reduce="sum"))
    two = write_rows(tmp_path / "two.jsonl", ROWS, META)
    words = " ".join(section.words for section in report_on(one, two).sections.values())
    assert "In one.jsonl, scores are log-probabilities of the answer in nats: at most 0" in words
    assert "In two.jsonl, scores are mean log-probabilities of the answer in nats: at most 0" in words
    assert "Scores of different kinds cannot be compared by their size." in words


def test_a_file_without_its_description(tmp_path: Path) -> None:
    page = report_on(write_rows(tmp_path / "scored.jsonl", ROWS))
    said = "there is no scored.jsonl.meta.json beside the file."
    assert said in page.sections["cost"].words
    assert said in page.sections["run"].words
    assert any(
        "Scores are taken to be mean log-probabilities of the answer" in part.words for part in page.sections.values()
    )
    assert [name for name, _ in page.sections[""].facts] == ["positive is best", "median margin, nats", "scores"]


def test_a_description_of_another_file(tmp_path: Path) -> None:
    page = report_on(write_rows(tmp_path / "scored.jsonl", ROWS[:3], META))
    assert "The file was changed after the run: it has 3 rows, and scored.jsonl.meta.json tells of 40." in (
        page.sections["run"].words
    )
    more = {**META, "stats": {**META["stats"], "tokens_computed": 150_000}}
    tiles = dict(report_on(write_rows(tmp_path / "scored.jsonl", ROWS, more)).sections[""].facts)
    assert tiles["tokens saved"] == "0.0%30,000 more than padded batches of four"


@pytest.mark.parametrize("name", ["packed.gz", "array.json"])
def test_gzip_and_arrays_give_the_same_page(tmp_path: Path, name: str) -> None:
    plain_path = write_rows(tmp_path / "lines.jsonl", ROWS, META)
    truth = report_on(plain_path).html
    data = plain_path.read_bytes()
    other = tmp_path / name
    array = b"[" + b",\n".join(data.splitlines()) + b"]"
    other.write_bytes(gzip.compress(data) if name.endswith(".gz") else array)
    (tmp_path / f"{name}.meta.json").write_text(json.dumps(META), encoding="utf-8")
    assert report_on(other).html.replace(name, "lines.jsonl") == truth


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "pairs": ({"context": "a b", "continuation": "c", "task": "pairs", "teacher_scores": [-1.5]}, "one score"),
    "choices": ({"context": "a", "choices": ["x", "yy"], "task": "choices", "teacher_scores": [-1, -3.5]}, "choices"),
    "chat": ({"query": "q", "answers": ["a"], "history": ["h", "i", "j"], "teacher_scores": [-4, -2, -1]}, "history"),
    "lrlm": ({"query": "q", "task": "lrlm", "teacher_scores": [-1, -1.25]}, "candidates without texts"),
    "pos": ({"query": "q", "answers": ["a"], "pos": ["p"], "teacher_scores": [-1]}, "positives or negatives alone"),
}


@pytest.mark.parametrize("task", OTHERS)
def test_rows_without_positives_and_negatives(tmp_path: Path, task: str) -> None:
    row, kind = OTHERS[task]
    page = report_on(write_rows(tmp_path / "scored.jsonl", [row, row]))
    assert f"The file has 2 rows of {kind}." in page.sections["scores"].words
    assert "No row has both positives and negatives" in page.sections[""].words
    for section in ("margin", "upsets"):
        assert "Does not apply: no row has both positives and negatives." in page.sections[section].words
    [table] = page.sections["scores"].tables
    assert sum(plain(cells[1]) for cells in table[1:-4]) == 2 * len(row["teacher_scores"])
    leads = page.sections["margin"].tables
    if len(row["teacher_scores"]) > 1:
        second, first = sorted(row["teacher_scores"])[-2:]
        assert [plain(cells[2]) for cells in leads[0][1:]] == [first - second] * 2
    else:
        assert leads == []
    applies = "the file does not hold the candidates' texts" not in page.sections["lengths"].words
    assert applies == (task != "lrlm")


def test_a_file_of_all_kinds(tmp_path: Path) -> None:
    rows = [*ROWS[:5], *(row for row, _ in OTHERS.values())]
    page = report_on(write_rows(tmp_path / "scored.jsonl", rows))
    assert (
        "The file has 5 rows of positives and negatives, 1 row of positives or negatives alone, 1 row of history"
        in (page.sections["scores"].words)
    )
    assert "in the 5 rows that have both" in page.sections["margin"].words
    scores = sum(len(row["teacher_scores"]) for row in rows)
    assert ("scores", f"{scores}of 10 rows") in page.sections[""].facts


def test_a_template_without_candidates_scores_the_row(tmp_path: Path) -> None:
    row = {"query": "q", "answers": ["a"], "pos": ["p"], "neg": ["n"], "teacher_scores": [-1]}
    meta = {**META, "task": {"task": None, "template": "Q: {query} A: {answer}"}}
    page = report_on(write_rows(tmp_path / "scored.jsonl", [row], meta))
    assert "The file has 1 row of one score." in page.sections["scores"].words


def test_several_files_on_one_page(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    paths = [
        write_rows(tmp_path / "scored.jsonl", ROWS[:7], META),
        write_rows(tmp_path / "other" / "scored.jsonl", ROWS[7:10]),
    ]
    page = report_on(*paths)
    [table] = page.sections[""].tables
    assert [row[:4] for row in table[1:]] == [
        [str(paths[0]), "tiny/model", "7", str(sum(len(row["teacher_scores"]) for row in ROWS[:7]))],
        [str(paths[1]), "not known", "3", str(sum(len(row["teacher_scores"]) for row in ROWS[7:10]))],
    ]
    assert len(page.sections["file-1-margin"].tables[0]) == 1 + 7
    assert len(page.sections["file-2-margin"].tables[0]) == 1 + 3


def test_many_rows_are_drawn_in_groups_and_far_scores_do_not_squeeze_the_rest(tmp_path: Path) -> None:
    rows = random_rows(2000, seed=1)
    rows[5]["teacher_scores"][0] = -4000.0
    page = report_on(write_rows(tmp_path / "scored.jsonl", rows))
    table = page.sections["margin"].tables[0][1:]
    assert len(table) == len(page.sections["margin"].marks) / 2 == 150
    ordered = sorted(map(margin, rows), reverse=True)
    for row in table:
        first, last = (int(plain(part)) for part in row[0].split(" to "))
        assert [plain(part) for part in row[2].split(" to ")] == pytest.approx(
            [ordered[first - 1], ordered[last - 1]], abs=5.1e-4
        )
    assert [int(plain(row[0].split(" to ")[0])) for row in table[1:]] == [
        int(plain(row[0].split(" to ")[1])) + 1 for row in table[:-1]
    ]
    bins = page.sections["scores"].tables[0][1:-4]
    assert sum(plain(row[1]) + plain(row[3]) for row in bins) == sum(len(row["teacher_scores"]) for row in rows)
    assert plain(bins[0][0].split(" to ")[0]) > -20
    assert len(bins) > 15


@pytest.mark.parametrize(
    "scores", [[-1.0, -1.0], [0, 0], [-1e12, 1e12], [-1e-300, -2e-300], [-7.1234567891234, -7.1234567891235]]
)
def test_odd_scores_have_a_page(tmp_path: Path, scores: list[float]) -> None:
    row = {"query": "q", "answers": ["a"], "pos": [""], "neg": [""], "teacher_scores": scores}
    page = report_on(write_rows(tmp_path / "scored.jsonl", [row]))
    bins = page.sections["scores"].tables[0][1:-4]
    assert sum(plain(cells[1]) + plain(cells[3]) for cells in bins) == 2
    assert "NaN" not in page.html
