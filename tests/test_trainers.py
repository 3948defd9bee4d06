"""Trainers read what ``--format`` writes: FlagEmbedding's own dataset classes, sentence-transformers' own trainers.

Their parts are the real ones, at the versions that the development environment pins; students are tiny and random.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import read_rows, run, write_rows
from tiny_models import make_tiny_model, make_tokenizer

ROWS: list[dict[str, Any]] = [
    {
        "query": f"where does the river run, number {index}",
        "answers": [answer],
        "pos": [f"The river runs through {answer}.", "It runs through a town."][: 1 + index % 2],
        "neg": ["42 houses", "naïve café", f"About {index} people live there."],
        "task": "qa",
    }
    for index, answer in enumerate(["the old town", "Ελληνικά", "1990 people", "café"])
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    return make_tiny_model(tmp_path_factory.mktemp("models") / "teacher")


@pytest.fixture
def score(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def score(name: str, *arguments: str) -> Path:
        given = write_rows(tmp_path / "rows.jsonl", ROWS)
        out = tmp_path / name
        status, err = run(capsys, "score", given, "-m", model, "--dtype", "fp32", "-o", out, "-q", *arguments)
        assert (status, err) == (0, "")
        return out

    return score


@pytest.mark.parametrize("ending", [".jsonl", ".parquet", ".arrow"])
@pytest.mark.parametrize("layout", ["teacher", "pairs"])
def test_datasets_reads_what_is_written(layout: str, ending: str, score: Any, tmp_path: Path) -> None:
    """Hugging Face's datasets, from which LLM-Embedder's trainer, too, takes the teacher's scores."""
    from datasets import load_dataset

    readers = {".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow"}
    expected = [row["teacher_scores"] for row in read_rows(score("teacher.jsonl"))]
    out = score(f"scored{ending}", "--format", layout)
    found = load_dataset(
        readers[ending], data_files=str(out), split="train", cache_dir=str(tmp_path / "cache")
    ).to_list()
    if layout == "pairs":
        assert [row["score"] for row in found] == pytest.approx([value for row in expected for value in row], abs=1e-6)
        assert {"logprob", "num_tokens", "num_bytes"} <= found[0].keys()
        return
    assert [row["query"] for row in found] == [row["query"] for row in ROWS]
    assert [row["pos"] + row["neg"] for row in found] == [row["pos"] + row["neg"] for row in ROWS]
    for row, values in zip(found, expected, strict=True):
        assert row["teacher_scores"] == pytest.approx(values, abs=1e-6)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random BERT with a tokenizer, as a folder."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("models") / "student"
    tokenizer = make_tokenizer(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["embedder", "reranker"])
def test_flagembedding_reads_bge(kind: str, score: Any, student: Path, tmp_path: Path) -> None:
    """Every group it draws has the teacher's scores of just the passages that were drawn."""
    from transformers import AutoTokenizer

    out = score("train.jsonl", "--format", "bge")
    tokenizer = AutoTokenizer.from_pretrained(student)
    options: dict[str, Any] = {
        "train_data": [str(out)],
        "cache_path": str(tmp_path / "cache"),
        "train_group_size": 3,
        "knowledge_distillation": True,
    }
    if kind == "embedder":
        from FlagEmbedding.abc.finetune.embedder import AbsEmbedderDataArguments, AbsEmbedderTrainDataset

        dataset = AbsEmbedderTrainDataset(AbsEmbedderDataArguments(**options), tokenizer)
    else:
        from FlagEmbedding.abc.finetune.reranker import AbsRerankerDataArguments, AbsRerankerTrainDataset

        dataset = AbsRerankerTrainDataset(AbsRerankerDataArguments(**options), tokenizer)
    rows = read_rows(out)
    assert len(dataset) == len(rows)
    random.seed(0)
    for _ in range(5):
        for index, row in enumerate(rows):
            scores = dict(zip(row["pos"] + row["neg"], row["pos_scores"] + row["neg_scores"], strict=True))
            if kind == "embedder":
                query, passages, teacher = dataset[index]
                assert query == row["query"]
                assert teacher == [scores[passage] for passage in passages]
            else:
                inputs, teacher = dataset[index]
                expected = {
                    tuple(dataset.create_one_example(row["query"], passage)["input_ids"]): score
                    for passage, score in scores.items()
                }
                assert teacher == [expected[tuple(item["input_ids"])] for item in inputs]
            assert len(teacher) == 3
            assert teacher[0] in row["pos_scores"]


def test_flagembedding_trains_on_it(score: Any, student: Path, tmp_path: Path) -> None:
    """Its collator and its loss: the KL divergence from the softmax of the teacher's scores."""
    from FlagEmbedding.abc.finetune.embedder import (
        AbsEmbedderCollator,
        AbsEmbedderDataArguments,
        AbsEmbedderModel,
        AbsEmbedderTrainDataset,
    )
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(student)
    arguments = AbsEmbedderDataArguments(
        train_data=[str(score("train.jsonl", "--format", "bge"))],
        cache_path=str(tmp_path / "cache"),
        train_group_size=4,
        knowledge_distillation=True,
    )
    dataset = AbsEmbedderTrainDataset(arguments, tokenizer)
    batch = AbsEmbedderCollator(tokenizer)([dataset[index] for index in range(len(dataset))])
    teacher = torch.tensor(batch["teacher_scores"]).view(len(ROWS), 4)
    student_scores = torch.randn(len(ROWS), 4, generator=torch.Generator().manual_seed(0))
    loss = AbsEmbedderModel.distill_loss("kl_div", teacher.softmax(-1), student_scores, 4)
    expected = -(teacher.softmax(-1) * student_scores.log_softmax(-1)).sum(-1).mean()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)


def load(path: Path, cache: Path) -> Any:
    import datasets

    builder = {".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow"}[path.suffix]
    return datasets.load_dataset(builder, data_files=str(path), split="train", cache_dir=str(cache))


def without_dropout(model: Any) -> Any:
    """So that a step sees the student that was seen before."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def one_step(trainer: Any, parameter: torch.nn.Parameter) -> float:
    """Train for one step; the loss that it began with. The step must have changed the student."""
    before = parameter.detach().clone()
    done = trainer.train()
    assert not torch.equal(before, parameter)
    assert math.isfinite(done.training_loss)
    return float(done.training_loss)


def training_options(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "run"),
        "max_steps": 1,
        "per_device_train_batch_size": 64,  # all rows
        "learning_rate": 1e-3,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }


@pytest.mark.parametrize(
    ("name", "loss_name", "suffix"),
    [
        ("sentence-transformers", "DistillKLDivLoss", "jsonl"),
        ("sentence-transformers", "DistillKLDivLoss", "arrow"),
        ("sentence-transformers", "MarginMSELoss", "parquet"),
        ("sentence-transformers-triplets", "DistillKLDivLoss", "parquet"),
        ("sentence-transformers-triplets", "MarginMSELoss", "parquet"),
    ],
)
def test_sentence_transformers_distills(
    name: str, loss_name: str, suffix: str, score: Any, student: Path, tmp_path: Path
) -> None:
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
        losses,
    )

    table = load(score(f"train.{suffix}", "--format", name), tmp_path / "cache")
    embedder = without_dropout(SentenceTransformer(str(student), device="cpu"))
    texts = [column for column in table.column_names if column != "label"]
    with torch.no_grad():
        vectors = [torch.tensor(embedder.encode(table[column][:])) for column in texts]
    similarity = torch.stack([(vectors[0] * other).sum(-1) for other in vectors[1:]], dim=1)
    labels = torch.tensor(table["label"][:])
    if loss_name == "MarginMSELoss":
        margin = (similarity[:, :1] - similarity[:, 1:]) - (labels[:, :1] - labels[:, 1:])
        expected = margin.square().mean()
    else:
        expected = (labels.softmax(1) * (labels.log_softmax(1) - similarity.log_softmax(1))).sum(1).mean()
    trainer = SentenceTransformerTrainer(
        model=embedder,
        args=SentenceTransformerTrainingArguments(**training_options(tmp_path)),
        train_dataset=table,
        loss=getattr(losses, loss_name)(embedder),
    )
    weight = next(embedder.parameters())
    assert one_step(trainer, weight) == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "loss_name"),
    [
        ("sentence-transformers", "MarginMSELoss"),
        ("sentence-transformers-lists", "ListNetLoss"),
        ("sentence-transformers-lists", "RankNetLoss"),
    ],
)
def test_a_reranker_distills(name: str, loss_name: str, score: Any, student: Path, tmp_path: Path) -> None:
    from sentence_transformers.cross_encoder import (
        CrossEncoder,
        CrossEncoderTrainer,
        CrossEncoderTrainingArguments,
        losses,
    )

    table = load(score("train.parquet", "--format", name), tmp_path / "cache")
    reranker = without_dropout(CrossEncoder(str(student), num_labels=1, device="cpu"))
    expected: list[torch.Tensor] = []
    for row in table:
        docs = row["docs"] if "docs" in row else [row["positive"], *(row[f"negative_{n}"] for n in (1, 2, 3))]
        pairs = [(row["query"], doc) for doc in docs]
        logits = torch.tensor(reranker.predict(pairs, activation_fn=torch.nn.Identity()))
        labels = torch.tensor(row["labels"] if "docs" in row else row["label"])
        assert len(logits) == len(labels)
        if loss_name == "MarginMSELoss":
            expected += ((logits[0] - logits[1:]) - (labels[0] - labels[1:])).square()
        elif loss_name == "ListNetLoss":
            expected.append(-(labels.softmax(0) * logits.log_softmax(0)).sum())
        else:
            better = labels[:, None] > labels[None, :]
            expected += -torch.log2(torch.sigmoid(logits[:, None] - logits[None, :])[better])
    trainer = CrossEncoderTrainer(
        model=reranker,
        args=CrossEncoderTrainingArguments(**training_options(tmp_path)),
        train_dataset=table,
        loss=getattr(losses, loss_name)(reranker),
    )
    weight = next(parameter for parameter in reranker.parameters() if parameter.dim() == 2)
    assert one_step(trainer, weight) == pytest.approx(torch.stack(expected).mean().item(), rel=1e-4)
