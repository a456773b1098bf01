"""The evaluation: the hand-written set, judged answers, batches against single prompts, accepted drafts against real drafting."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bundled_model.docqa import document as docqa_document
from bundled_model.evaluation import __main__ as command
from bundled_model.evaluation import drafter, generated, handwritten, measures, text
from bundled_model.evaluation.answering import Answerer
from bundled_model.evaluation.measures import REFUSAL, Mark

ROOT = Path(__file__).parents[3]
HANDWRITTEN = Path(__file__).parent / "handwritten"
PROMPTS = ["Hello!", "The road to the village runs along the river and", "One", "What is the price of the kettle?"]

MakeModel = Callable[..., Path]


@pytest.fixture(scope="module")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """`make_model(seed, noise)`: the folder of a tiny random Llama with the bundled tokenizer; `noise` is added to the weights."""

    def make(seed: int, noise: float = 0.0) -> Path:
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=4096,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=16,
                initializer_range=0.3,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=2,
                tie_word_embeddings=False,
            )
        )
        with torch.no_grad():
            for weight in model.parameters():
                weight += noise * torch.randn_like(weight)
        folder = tmp_path_factory.mktemp("model")
        model.save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(ROOT / "storage" / "bundled" / name, folder)
        return folder

    return make


@pytest.fixture(scope="module")
def target(make_model: MakeModel) -> Answerer:
    return Answerer(make_model(0))


@pytest.fixture(scope="module")
def prompts(target: Answerer) -> list[list[int]]:
    return [target.encode(prompt) for prompt in PROMPTS]


def test_the_handwritten_set_is_consistent() -> None:
    questions = handwritten.read_questions(HANDWRITTEN)
    asked = [question for question in questions if question.values]
    unknown = [question for question in questions if not question.values]
    names = {path.name for path in HANDWRITTEN.glob("*.txt")}
    assert (len(names), len(asked), len(unknown)) == (12, 60, 20)
    assert all(sum(question.document == name for question in asked) == 5 for name in names)
    assert {question.document for question in unknown} <= names
    assert len({(question.document, question.text) for question in questions}) == len(questions)
    assert sum(question.values[0] in ("yes", "no") for question in asked) <= 6
    for name in names:
        pages = handwritten.read_pages(HANDWRITTEN / name)
        assert 1 <= len(pages) <= 3 and 500 <= sum(map(len, pages)) <= 1800, name
        for question in asked:
            if question.document == name and question.values[0] not in ("yes", "no"):
                assert measures.contains(question.values[0], pages[question.page - 1]), question
            if question.document == name:
                assert 1 <= question.page <= len(pages), question


def test_a_handwritten_document_reads_as_in_training() -> None:
    pages = handwritten.read_pages(HANDWRITTEN / "rowing-newsletter.txt")
    message = handwritten.document_message("rowing-newsletter.txt", pages)
    assert message == {
        "role": "system",
        "content": docqa_document.document_message("rowing-newsletter.txt", pages),
    }
    assert len(pages) == 3 and "\n\n[p. 3]\nOdds and ends\n" in message["content"]


def test_a_pdf_is_read_page_by_page() -> None:
    pages = handwritten.read_pages(ROOT / "storage" / "bundled" / "sample.pdf")
    assert len(pages) > 1 and all(page and "\r" not in page for page in pages)


def test_a_drafter_with_another_tokenizer_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    other = shutil.copytree(make_model(1), tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][-1] | {"id": 4096, "content": "<|extra|>"})
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(SystemExit, match="the model's own tokenizer"):
        command.main([str(make_model(0)), "--splits", "--open", "0", "--drafter", str(other)])


def test_handwritten_answers_are_judged() -> None:
    question = handwritten.Question("a.txt", "How heavy?", ("412 g", "412 grams"), 2)
    assert handwritten.judge(question, "412 grams [p. 2].") == Mark(None, True, True, False)
    assert handwritten.judge(question, "412 grams [p. 1] [p. 2].") == Mark(None, True, False, False)
    assert handwritten.judge(question, REFUSAL) == Mark(None, False, False, True)
    assert handwritten.judge(handwritten.Question("a.txt", "Why?"), REFUSAL) == Mark(refused=True)


def message(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def test_each_generated_question_has_its_true_history() -> None:
    messages = [
        message("system", "text"),
        message("user", "How long?"),
        message("assistant", "It is 4 m long [p. 1].", kind="fact", focus="4 m", page=1),
        message("user", "And why?"),
        message("assistant", REFUSAL, kind="unanswerable"),
        message("user", "Thanks"),
        message("assistant", "You are welcome.", kind="chat"),
    ]
    questions = generated.questions_of([{"messages": messages}])
    assert [len(question.chat) for question in questions] == [2, 4, 6]
    assert [question.groups for question in questions] == [("answerable", "fact"), ("unanswerable",), ("chat",)]
    first, second, third = questions
    assert generated.judge(first, "It is  4 m long [p. 1].") == Mark(True, True, True, False)
    assert generated.judge(first, "It measures 4 m [p. 2].") == Mark(False, True, False, False)
    assert generated.judge(first, REFUSAL) == Mark(False, False, False, True)
    assert generated.judge(second, REFUSAL) == Mark(exact=True, refused=True)
    assert generated.judge(third, "You are welcome.") == Mark(exact=True, refused=False)


def test_a_comparison_is_right_only_if_it_concludes_so() -> None:
    said = "The document says: pit A 9 m [p. 1], pit B 4 m [p. 1]"
    gold = {"role": "assistant", "content": f"{said}, so pit A.", "kind": "comparison", "focus": "so pit A"}
    question = generated.Question([], gold)
    assert generated.judge(question, f"{said}, so pit A.").value is True
    assert generated.judge(question, f"{said}, so pit B.").value is False
    assert generated.judge(question, f"{said}.").value is False


@pytest.mark.parametrize("split", generated.HELD_OUT)
def test_the_generator_yields_questions_that_its_own_answers_pass(split: str) -> None:
    questions = generated.sample(generated.draw_conversations(split, 40, 200, 600, 4), 80)
    assert len(questions) == 80
    assert {"answerable", "unanswerable"} <= {group for question in questions for group in question.groups}
    for question in questions:
        mark = generated.judge(question, question.gold["content"])
        assert mark.exact and mark.value is not False and mark.page is not False, question.gold
        assert mark.refused is question.unanswerable
        assert (mark.value is None) is ("answerable" not in question.groups)


def test_a_batch_answers_like_single_prompts(target: Answerer, prompts: list[list[int]]) -> None:
    together = target.generate(prompts, 12)
    assert together == [target.generate([prompt], 12)[0] for prompt in prompts]
    assert together == target.generate(prompts, 12, rows=2)
    assert target.choices(prompts, together) == together


def test_generation_ends_with_the_end_token(target: Answerer, prompts: list[list[int]]) -> None:
    free = target.generate(prompts, 12)
    ending = Answerer.__new__(Answerer)
    ending.tokenizer, ending.model, ending.pad_id = target.tokenizer, target.model, target.pad_id
    ending.end_id = free[0][5]
    first = free[0].index(ending.end_id)
    assert ending.generate(prompts, 12)[0] == free[0][: first + 1]


def test_steps_count_accepted_drafts() -> None:
    agreed = [bool(int(digit)) for digit in "1110111110"]
    assert drafter.accepted_at(agreed, 1, 4) == 2 and drafter.accepted_at(agreed, 4, 4) == 4
    assert drafter.accepted_at(agreed, 9, 4) == 0
    assert drafter.accepted_per_step(agreed, 4) == [2, 4]  # steps at 1 and 4; at 9 fewer than 4 tokens are left
    assert drafter.accepted_per_step([True, False, False, False], 2) == [0, 0]
    row = drafter.acceptance([agreed, [True]], 4)
    assert row == pytest.approx(
        {"outputs": 2, "steps": 2, "accepted": 3, "accepted_everywhere": 14 / 6, "agreement": 7 / 9}
    )
    assert drafter.acceptance([], 4)["accepted"] == 0


def test_a_model_accepts_its_own_drafts_and_not_those_of_a_stranger(
    target: Answerer, prompts: list[list[int]], make_model: MakeModel
) -> None:
    own = drafter.measure(target, target, prompts, 24)
    assert own["accepted"] == 4 and own["accepted_everywhere"] == 4 and own["agreement"] == 1 and own["steps"] > 8
    other = drafter.measure(target, Answerer(make_model(1)), prompts, 24)
    assert other["accepted"] < 0.2 and other["agreement"] < 0.1


def test_one_forward_counts_what_rolling_out_the_drafter_would(
    target: Answerer, prompts: list[list[int]], make_model: MakeModel
) -> None:
    near = Answerer(make_model(0, noise=0.01))
    outputs = target.generate(prompts, 24)
    counts = set()
    for prompt, output, choice in zip(prompts, outputs, near.choices(prompts, outputs), strict=True):
        agreed = [a == b for a, b in zip(output, choice, strict=True)]
        positions = range(len(output) - 4)
        drafts = near.generate([[*prompt, *output[:position]] for position in positions], 4)
        for position, draft in zip(positions, drafts, strict=True):
            same = [a == b for a, b in zip(draft, output[position:], strict=False)]
            counts.add(drafter.accepted_at(agreed, position, 4))
            assert drafter.accepted_at(agreed, position, 4) == drafter.accepted_at(same, 0, 4)
    assert {0, 4} < counts  # the pair agrees in part


def test_perplexity_of_a_model_that_knows_nothing_is_its_vocabulary(make_model: MakeModel, tmp_path: Path) -> None:
    model = Answerer(make_model(0))
    torch.nn.init.zeros_(model.model.lm_head.weight)
    path = tmp_path / "plain.txt"
    path.write_text("The road to the village runs along the river. " * 100)
    row = text.perplexity(model, path, 2)
    assert row["perplexity"] == pytest.approx(4096, rel=1e-4)
    per_token = len(path.read_text()) / len(model.encode(path.read_text()))
    assert row["tokens"] == 2 * text.SCORED
    assert row["bits_per_byte"] == pytest.approx(math.log2(4096) / per_token, rel=0.02)
    path.write_text("Short.")
    assert text.perplexity(model, path)["tokens"] == len(model.encode("Short.")) - 2


def test_open_prompts_are_a_hundred_different_ones(target: Answerer) -> None:
    assert len({tuple(prompt) for prompt in text.open_prompts(target, 100)}) == 100
    looping, plain = [7] * 40, [*range(40)]
    row = text.judge([looping, plain])
    assert row["loops"] == 1 and row["tokens"] == 40 and row["own_distinct_1"] == (1 / 40 + 1) / 2


def test_the_command_prints_tables_and_one_json_line(
    target: Answerer,
    make_model: MakeModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(text, "OPEN_TOKENS", 6)
    (tmp_path / "plain.txt").write_text("The road to the village runs along the river. " * 20)
    qas = [{"question": "Where?", "answers": [{"text": "by the river"}]}, {"question": "Why?", "answers": []}]
    paragraphs = [{"context": "The road is by the river.", "qas": qas}]
    (tmp_path / "squad.json").write_text(json.dumps({"data": [{"title": "Roads", "paragraphs": paragraphs}]}))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.txt").write_text("The mast is 9 m high.\f\nIt is red.\n")
    asked = [{"document": "a.txt", "question": "How high?", "answer": "9 m"}]
    (tmp_path / "set" / "questions.json").write_text(json.dumps(asked))
    (tmp_path / "sample.json").write_text(json.dumps([{"question": "What is red?", "answer": "mast", "page": 1}]))
    command.main(
        f"{make_model(0)} --drafter {make_model(1)} --number 3 --open 4 --splits values --handwritten {tmp_path}/set "
        f"--sample {tmp_path}/set/a.txt {tmp_path}/sample.json --squad {tmp_path}/squad.json "
        f"--text {tmp_path}/plain.txt".split()
    )
    *table, last = capsys.readouterr().out.splitlines()
    report = json.loads(last)
    sections = {"generated", "handwritten", "sample", "squad", "text", "open", "drafter"}
    assert set(report) == sections | {"model", "parameters", "seconds"} and set(report["seconds"]) == sections
    assert report["handwritten"]["answerable"]["questions"] == 1 and "page" not in report["handwritten"]["answerable"]
    assert report["squad"]["squad.json"]["questions"] == 1
    assert set(report["drafter"]) == {"values", "handwritten", "plain.txt"}
    assert any(line.startswith("values: ") for line in table) and str(tmp_path) not in last
    command.main([str(make_model(0)), "--number", "0", "--open", "0", "--json"])
    assert set(json.loads(capsys.readouterr().out)) == {"model", "parameters", "seconds"}
