"""Distillation: sampling in batches, the three methods on a tiny pair, answers in the teacher's words."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pitlane.training import distill as distilling
from pitlane.training import teacher as teaching
from pitlane.training.corpus import Weighting
from pitlane.training.distill import Method, OnPolicyLoss, distill, sample
from pitlane.training.errors import TrainingError
from pitlane.training.loop import Settings, use_fast_attention
from pitlane.training.losses import Batch, divergence
from pitlane.training.models import read_model, write_model
from pitlane.training.train import DTYPES, Data, Output, train

END = 1
MakeModel = Callable[..., PreTrainedModel]
Write = Callable[..., Path]
SETTINGS = Settings(steps=25, rows=4, lr=5e-3, warmup=0.0, eval_every=100, save_every=100)


@pytest.fixture(scope="module")
def text(make_text: Callable[[int], str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "harbour.txt"
    path.write_text(make_text(6000))
    return path


@pytest.fixture(scope="module")
def teacher(tiny: MakeModel, tokenizer_folder: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model that was trained on the text for a few steps."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("teacher")
    write_model(tiny(1), tokenizer_folder, folder / "start", DTYPES["float32"])
    settings = replace(SETTINGS, steps=60)
    train(Data([text], 48), settings, Output(folder / "out", "float32"), lambda _: None, folder / "start")
    return folder / "out"


def spread(model: PreTrainedModel, scale: float = 10) -> PreTrainedModel:
    """Sharpen the distributions of random weights, by context; at a large scale, a single token has probability 1."""
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(scale)
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.mul_(20)
            layer.self_attn.o_proj.weight.mul_(20)
    return model.eval()


# ---- sampling


PROMPTS = [[0, 50, 60], [0, 70], [0, *range(80, 120)], [99]]


def greedy(model: PreTrainedModel, prompt: Sequence[int], number: int) -> list[int]:
    ids = list(prompt)
    for _ in range(number):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == END:
            break
    return ids[len(prompt) :]


def test_prompts_of_all_lengths_go_on_as_each_alone(tiny: MakeModel) -> None:
    model = spread(tiny(3), 1e4)
    assert sample(model, PROMPTS, END, 12) == [greedy(model, prompt, 12) for prompt in PROMPTS]


def test_rows_that_all_end_early_keep_nothing_of_their_prompts(tiny: MakeModel) -> None:
    model = tiny(3)
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
        model.get_input_embeddings().weight[:, 0] = 1e4
        model.get_input_embeddings().weight[END, 0] = 2e4  # every next token is the end token
    assert sample(model, PROMPTS, END, 12) == [[END]] * 4


def test_sampling_leaves_the_model_as_it_was(tiny: MakeModel) -> None:
    model = tiny(3).train()
    use_fast_attention(model)
    before = model.config._attn_implementation
    sample(model, PROMPTS, END, 2)
    assert model.training and model.config._attn_implementation == before


def test_samples_follow_the_distribution(tiny: MakeModel) -> None:
    """The generation settings of the model do not matter."""
    model = tiny(3)
    model.generation_config.repetition_penalty = 5.0
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(20)
        p = model.eval()(torch.tensor([[0, 50]])).logits[0, -1].softmax(-1)
    torch.manual_seed(0)
    drawn = torch.tensor([row[0] for row in sample(model, [[0, 50]] * 4000, END, 1)])
    shares = drawn.bincount(minlength=len(p)) / 4000
    assert (shares - p).abs().max() < 5 * (p * (1 - p) / 4000).sqrt().max()


# ---- on-policy


def test_on_policy_rows_are_cut_at_the_end_token(tiny: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is the mean divergence over the sampled tokens, including the end token; rows do not affect each other."""
    student, teacher = spread(tiny(1)), spread(tiny(2))
    answers = [[7, 8, END], [9, 10, 11, 12], [END]]
    monkeypatch.setattr(distilling, "sample", lambda *args, **kwargs: answers)
    batch = Batch(torch.randint(6, 300, (3, 10)), torch.zeros(3, 10))
    batch.weights[0, 4:7], batch.weights[1, 8:] = 1.0, 1.0  # the third row has no answer: it is cut in the middle
    loss = OnPolicyLoss(teacher, Method("on-policy", hard=0.0, beta=0.5), END)(student, batch, step=0)
    parts = []
    for row, cut, answer in zip(batch.ids.tolist(), (4, 8, 5), answers, strict=True):
        ids = torch.tensor([row[:cut] + answer])
        with torch.no_grad():
            teacher_logits, student_logits = (model(ids).logits[0, cut - 1 : -1] for model in (teacher, student))
        parts.append(divergence(teacher_logits, student_logits, 0.5))
    assert [len(part) for part in parts] == [3, 4, 1]
    assert loss.item() == pytest.approx(torch.cat(parts).mean().item(), rel=1e-4)


def test_prompts_end_where_answers_begin_or_in_the_middle() -> None:
    ids = torch.arange(12)
    chat = torch.tensor([0, 0, 0, 1, 1, 0, 0, 0.2, 4, 1, 1, 0])
    assert [len(distilling._prompt(ids, chat, step)) for step in range(3)] == [3, 8, 3]
    text = torch.tensor([0, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1])  # two texts with their BOS
    assert [distilling._prompt(ids, text, step) for step in range(2)] == [[0, 1, 2, 3, 4, 5]] * 2


def test_on_policy_samples_are_those_of_the_step(tiny: MakeModel) -> None:
    student, teacher = tiny(1), tiny(2)
    batch = Batch(torch.randint(6, 300, (2, 10)), torch.ones(2, 10))
    loss = OnPolicyLoss(teacher, Method("on-policy", sampled_tokens=4), END)
    first, again, later = (loss(student, batch, step).item() for step in (3, 3, 4))
    assert first == again != later


# ---- methods


def mean_divergence(
    teacher: PreTrainedModel, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str
) -> float:
    ids = torch.tensor([[0, *tokenizer(text)["input_ids"][:200]]])
    with torch.no_grad():
        logits = [model.eval()(ids).logits[0] for model in (teacher, student)]
    return divergence(logits[0], logits[1], 0.5).mean().item()


@pytest.mark.parametrize(
    "method",
    [
        Method("kd"),
        Method("sequence"),
        Method("on-policy", sampled_tokens=8, hard=0.0),
        Method("on-policy", sampled_tokens=8, hard=0.0, beta=0.5),
    ],
    ids=["kd", "sequence", "reverse kl", "jsd"],
)
def test_each_method_brings_the_student_nearer(
    method: Method, teacher: Path, tiny: MakeModel, written: Write, text: Path, tokenizer: PreTrainedTokenizerBase,
    make_text: Callable[..., str], tmp_path: Path,
) -> None:  # fmt: skip
    student = written(tiny(8, num_layers=1), "student")
    data = Data([text], 48)
    last = distill(teacher, student, data, method, SETTINGS, Output(tmp_path / "out", "float32"), lambda _: None)
    assert last.step == SETTINGS.steps
    unseen = make_text(2000, 5)
    before, after = (
        mean_divergence(read_model(teacher), read_model(folder), tokenizer, unseen)
        for folder in (student, tmp_path / "out")
    )
    assert after < 0.8 * before
    assert (tmp_path / "out" / distilling.TEACHER_FILE).exists() == (method.name == "sequence")


def test_a_student_of_all_layers_is_the_teacher(teacher: Path, text: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=1, lr=1e-12)
    out = Output(tmp_path / "out", "float32")
    distill(teacher, (0, 1), Data([text], 48), Method("kd"), settings, out, lambda _: None)
    weights, expected = read_model(tmp_path / "out").state_dict(), read_model(teacher).state_dict()
    assert all(torch.allclose(weights[name], tensor, atol=1e-6) for name, tensor in expected.items())


def test_an_unknown_method_lists_the_known() -> None:
    with pytest.raises(TrainingError, match="no method 'hint'; choose kd, sequence, on-policy"):
        Method("hint")


# ---- the teacher's answers


def whole(text: str) -> str:
    """The text of the tokens without an incomplete character at its end, like the text of an answer."""
    return text.rstrip("\ufffd")


def test_every_answer_of_a_chat_is_the_teachers_after_its_own(
    tiny: MakeModel, written: Write, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teaching, "MAX_ANSWER", 6)
    model = spread(tiny(4))
    folder = written(model, "teacher")

    def user(text: str) -> dict[str, str]:
        return {"role": "user", "content": text}

    def chat(*questions: str) -> dict[str, Any]:
        return {
            "messages": [
                message for text in questions for message in (user(text), {"role": "assistant", "content": "?"})
            ]
        }

    records = [
        chat("the harbour"),
        {"text": "x" * 800 + "y" * 100},
        chat("ice", "ships from north", "lay"),
        {"messages": [user("spring")]},
    ]
    threads = torch.get_num_threads()
    answered = list(teaching.teacher_answers(folder, "cpu", records))
    assert torch.get_num_threads() == threads
    assert ["messages" in record for record in answered] == [True, False, False, True, True], "in their order"
    chats = [record["messages"] for record in answered if "messages" in record]
    assert [len(messages) for messages in chats] == [2, 6, 1]
    for messages in chats:
        for place, message in enumerate(messages):
            if message["role"] == "user":
                continue
            ids = tokenizer.apply_chat_template(messages[:place], add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]
            assert message["content"] == whole(tokenizer.decode(greedy(model, ids, 6), skip_special_tokens=True))
    for text, piece in zip(
        [record["text"] for record in answered if "text" in record], ["x" * 400, "y" * 100], strict=True
    ):
        ids = tokenizer(piece)["input_ids"]
        assert text == piece + whole(tokenizer.decode(greedy(model, ids, 6), skip_special_tokens=True))


def test_a_prompt_longer_than_the_context_is_cut_in_front(
    tiny: MakeModel, written: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(2)
    folder = written(model, "teacher")
    monkeypatch.setattr(teaching, "PIECE", 100_000)
    (record,) = teaching.teacher_answers(folder, "cpu", [{"text": "ice " * 5000}])
    assert record["text"].startswith("ice ice") and len(record["text"]) >= 20_000


def test_answers_are_kept_for_a_run_that_goes_on_and_made_anew_for_another(
    teacher: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teaching, "MAX_ANSWER", 2)
    data = Data([text])
    path = tmp_path / distilling.TEACHER_FILE
    path.write_text('{"text": "of another run"}\n')
    kept = distilling.write_teacher_answers(teacher, data, Output(tmp_path, resume=True))
    assert kept.files == [path] and "another run" in path.read_text()
    distilling.write_teacher_answers(teacher, data, Output(tmp_path))
    assert "another run" not in path.read_text()
    assert all(json.loads(line)["text"] for line in path.read_text().splitlines())
    assert replace(data, files=[path]) == kept


def test_tokenizers_must_be_one(teacher: Path, tiny: MakeModel, written: Write, text: Path, tmp_path: Path) -> None:
    student = written(tiny(2), "student")
    document = json.loads((student / "tokenizer.json").read_text())
    document["model"]["vocab"]["a"], document["model"]["vocab"]["b"] = 72, 71
    (student / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(TrainingError, match="different tokenizers"):
        distill(teacher, student, Data([text]), Method(), SETTINGS, Output(tmp_path / "out"), lambda _: None)
    assert not (tmp_path / "out").exists()


def test_answers_only_reaches_the_loss(teacher: Path, tmp_path: Path) -> None:
    """A corpus of questions alone has no token to learn from if only answers count."""
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "When?"}]}) + "\n")
    with pytest.raises(TrainingError, match="corpus is empty"):
        distill(
            teacher,
            (0,),
            Data([path], 8, Weighting(prompt=0.0)),
            Method(),
            SETTINGS,
            Output(tmp_path / "out"),
            lambda _: None,
        )
