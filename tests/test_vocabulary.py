"""A cut vocabulary keeps every covered text's tokens and features, in PyTorch and in the exported model."""

import copy
import json
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL, Ended
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from export.documents import PlannedExport
from export.graphs.export_onnx import export_onnx
from export.runtime.exported_model import open_exported
from toolchain.data.glyphs import TEMPLATES, training_set
from toolchain.errors import UsageError
from toolchain.evaluation.eval_set import classes_set
from toolchain.models.build import build_model
from toolchain.models.clip_model import ClipModel
from toolchain.models.cut_tokenizer import _applied_merges, _merge, cut_tokenizer
from toolchain.models.vocabulary import cut_vocabulary
from toolchain.pipeline.corpus import Corpus
from toolchain.pipeline.train import adopt_spec
from toolchain.recipe.data import CsvSpec
from toolchain.recipe.evaluate import EvaluateSpec
from toolchain.recipe.model import ModelSpec
from toolchain.stage import StageSpec, run_stage

pytestmark = pytest.mark.usefixtures("one_thread")

CAPTIONS = [
    "a photo of a cat",
    "Two DOGS, 12 km away! They don't bark;",
    "zwölf Boxkämpfer jagen Viktor 猫 🐈",
    "wooden boats near the harbour <b>bold</b> &amp; quiet",
    "!!! ... ???",
    "",
]
UNCOVERED = ["an antidisestablishmentarian giraffe", "ÀÉÎÕÜ नमस्ते", "<start_of_text> <end_of_text>"]

# Unit features in float32.  The towers differ by the table of tokens alone, so no sum is in another order.
MAX_FEATURE_ERROR = 1e-6


@pytest.fixture(scope="module")
def whole() -> ClipModel:
    return build_model(ModelSpec(model="ViT-B-16", model_cfg=copy.deepcopy(SMALL)), seed=0)


@pytest.fixture(scope="module")
def cut(whole: ClipModel) -> ClipModel:
    return cut_vocabulary(whole, CAPTIONS)[0]


def covered_texts(number: int) -> list[str]:
    """Return texts of the words of CAPTIONS in another order."""
    words = [word for caption in CAPTIONS for word in caption.split() if word.isalpha()]
    draw = random.Random(0)
    return [" ".join(draw.choices(words, k=draw.randint(1, 90))) for _ in range(number)]


def text_features(model: ClipModel, texts: list[str]) -> torch.Tensor:
    with torch.no_grad():
        features_BD: torch.Tensor = model.net.encode_text(model.tokenize(texts), normalize=True)  # type: ignore
    return features_BD


def test_covered_texts_keep_their_features(whole: ClipModel, cut: ClipModel) -> None:
    texts = CAPTIONS + covered_texts(20)
    assert (text_features(cut, texts) - text_features(whole, texts)).abs().max() <= MAX_FEATURE_ERROR
    before, after = (sum(p.numel() for p in model.net.token_embedding.parameters()) for model in (whole, cut))  # type: ignore
    assert after < before / 50


def test_embedding_rows_are_kept_exactly_and_in_order(whole: ClipModel) -> None:
    table_VW = whole.net.token_embedding.weight  # type: ignore[union-attr]
    found = cut_tokenizer(whole.tokenize, {}, len(table_VW), CAPTIONS)  # type: ignore[arg-type]
    made, recorded = cut_vocabulary(whole, CAPTIONS)
    assert torch.equal(made.net.token_embedding.weight, table_VW[found.source_ids])  # type: ignore[union-attr, index]
    assert found.source_ids[1:] == sorted(set(found.source_ids))
    tokenizer = SimpleTokenizer()
    assert found.source_ids[-2:] == [tokenizer.sot_token_id, tokenizer.eot_token_id]  # argmax finds the end token
    assert recorded["tokens"] == len(found.source_ids)
    assert recorded["of"] == len(table_VW)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", UNCOVERED)
def test_other_texts_have_smaller_tokens_that_spell_the_same(cut: ClipModel, text: str) -> None:
    ids = [number for number in cut.tokenize([text])[0].tolist() if number]
    tokens = cut.tokenize.tokenizer.convert_ids_to_tokens(ids)  # type: ignore[attr-defined]
    stock = SimpleTokenizer()
    spelled = "".join(tokens[1:-1])
    assert tokens[0], tokens[-1] == ("<start_of_text>", "<end_of_text>")
    assert spelled == "".join(stock.decoder[number] for number in stock.encode(text))


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="abcd", min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_applied_merges_suffice(word: str, draw: random.Random) -> None:
    """For any list of merges, in any order, the applied ones alone split a word as all of them do."""
    merges: list[tuple[str, str]] = []
    symbols = list("abcd") + [f"{letter}</w>" for letter in "abcd"]
    for _ in range(40):
        pair = (draw.choice(symbols), draw.choice(symbols))
        if not pair[0].endswith("</w>") and pair not in merges:
            merges.append(pair)
            symbols.append("".join(pair))
    draw.shuffle(merges)
    model = {"type": "BPE", "vocab": {}, "merges": merges, "end_of_word_suffix": "</w>"}
    applied = _applied_merges(model, [word])
    kept = {**model, "merges": [pair for pair in merges if pair in applied]}
    assert _applied_merges(kept, [word]) == applied
    assert split(word, kept["merges"]) == split(word, merges)


def split(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """BPE by its definition: again and again, the first merge in the list that applies."""
    symbols = [*word[:-1], word[-1] + "</w>"]
    while True:
        pairs = list(pairwise(symbols))
        first = next((merge for merge in merges if merge in pairs), None)
        if first is None:
            return symbols
        symbols = _merge(symbols, first)


# Other tokenizers.


def train_tokenizer(kind: str) -> Tokenizer:
    """Return a small tokenizer of a kind, with start, end and padding, trained on glyph names."""
    special = ["<pad>", "<unk>", "<s>", "</s>"]
    names = training_set().names[:400]
    made: dict[str, tuple[Any, Any, Any]] = {
        "Unigram": (
            models.Unigram(),
            trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False),
            pre_tokenizers.Metaspace(),
        ),
        "WordPiece": (
            models.WordPiece(unk_token="<unk>"),
            trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False),
            pre_tokenizers.Whitespace(),
        ),
        "WordLevel": (
            models.WordLevel(unk_token="<unk>"),
            trainers.WordLevelTrainer(special_tokens=special, show_progress=False),
            pre_tokenizers.Whitespace(),
        ),
        "BPE": (
            models.BPE(),
            trainers.BpeTrainer(
                vocab_size=500,
                special_tokens=special,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=True),
        ),
    }
    model, trainer, split_words = made[kind]
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = split_words
    tokenizer.train_from_iterator([template.format(name) for name in names for template in TEMPLATES], trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return tokenizer


def hf_tokenizer(folder: Path, files: dict[str, bytes]) -> HFTokenizer:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return HFTokenizer(str(folder), context_length=24)


@pytest.mark.parametrize("kind", ["BPE", "Unigram", "WordPiece", "WordLevel"])
def test_every_kind_of_tokenizer_is_cut_exactly(kind: str, tmp_path: Path) -> None:
    trained = train_tokenizer(kind)
    roles = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    described = {"tokenizer_class": "PreTrainedTokenizerFast", **roles}
    files = {"tokenizer.json": trained.to_str().encode(), "tokenizer_config.json": json.dumps(described).encode()}
    whole = hf_tokenizer(tmp_path / "whole", files)
    texts = [template.format(name) for name in training_set().names[:40] for template in TEMPLATES]
    found = cut_tokenizer(whole, {"pool_type": "eos", "eos_id": 3, "pad_id": 0}, trained.get_vocab_size(), texts)
    cut = hf_tokenizer(tmp_path / "cut", found.files)
    source_ids = torch.tensor(found.source_ids)
    assert found.settings["vocab_size"] == len(source_ids) < trained.get_vocab_size()
    assert source_ids[found.settings["eos_id"]] == 3
    assert torch.equal(source_ids[cut(texts)], whole(texts))
    assert int(cut(["größte 猫 0x7f"]).max()) < len(source_ids)  # other texts are split into what was kept


def test_what_cannot_be_cut_is_refused(whole: ClipModel) -> None:
    with pytest.raises(UsageError, match="its texts have no words"):
        cut_vocabulary(whole, [" "])
    with pytest.raises(UsageError, match="cannot be cut; expected open_clip's own"):
        cut_tokenizer(SimpleTokenizer(reduction_mask="simple"), {}, 49408, CAPTIONS)


# In a run.


def test_the_exported_model_keeps_the_features_and_is_smaller(whole: ClipModel, cut: ClipModel, tmp_path: Path) -> None:
    images = np.zeros((2, 32, 32, 3), np.uint8)
    headline = classes_set("made", images, ["cat", "dogs"], ("a photo of a {}",))

    def export(model: ClipModel, name: str) -> Any:
        planned = PlannedExport("adopted", "fp32")
        made = run_stage(
            StageSpec(tmp_path / name, "export", 1), lambda folder: {**export_onnx(model, folder, planned, headline)}
        )
        return open_exported(made.path), made.manifest["summary"]

    (small, small_summary), (large, large_summary) = export(cut, "cut"), export(whole, "whole")
    texts = CAPTIONS + covered_texts(5)
    found_BD, wanted_BD = small.encode_texts(texts), text_features(whole, texts).numpy()
    assert np.abs(found_BD - large.encode_texts(texts)).max() <= MAX_FEATURE_ERROR
    assert np.abs(found_BD - wanted_BD).max() <= MAX_FEATURE_ERROR
    assert small_summary["params_text"] < large_summary["params_text"] / 10
    assert small_summary["size_bytes"] < large_summary["size_bytes"] / 5


def test_adopting_with_a_vocabulary(clipkd: Callable[..., Ended], tmp_path: Path) -> None:
    texts = tmp_path / "labels.txt"
    texts.write_text("latin small letter a\nplus sign\n", encoding="utf-8")
    run = tmp_path / "run"
    ended = clipkd("adopt", "glyphs_teacher", "--vocabulary", texts, "--out", run)
    assert ended.code == 0, ended.err
    recorded = json.loads((run / "adopted" / "manifest.json").read_text())["summary"]["vocabulary"]
    config = json.loads((run / "adopted" / "open_clip_config.json").read_text())
    assert recorded["tokens"] == config["model_cfg"]["text_cfg"]["vocab_size"] < recorded["of"] == 1024
    key = json.loads((run / "adopted" / "manifest.json").read_text())["key"]
    texts.write_text("digit nine\n", encoding="utf-8")
    assert clipkd("adopt", "glyphs_teacher", "--vocabulary", texts, "--out", run).code == 0
    assert json.loads((run / "adopted" / "manifest.json").read_text())["key"] != key
    missing = clipkd("adopt", "glyphs_teacher", "--vocabulary", tmp_path / "none.txt", "--out", run)
    assert missing.code == 2
    assert "no file at" in missing.err


def test_a_student_with_its_data_s_vocabulary_learns_from_a_whole_teacher(
    tiny_recipe: Callable[..., Path], clipkd: Callable[..., Ended], tmp_path: Path
) -> None:
    student = {"model": "glyphs_tiny", "vocabulary": ["data", "evaluate"], "inherit": "teacher"}
    evaluate = {"headline": "novel", "sets": ["novel"]}
    recipe = tiny_recipe(student=student, evaluate=evaluate, baseline=True)
    assert "# student: vocabulary cut to the tokens of data, evaluate" in clipkd("show", recipe).out
    run = tmp_path / "run"
    ended = clipkd("distill", recipe, "--out", run)
    assert ended.code == 0, ended.err
    for name in ("student", "baseline"):
        recorded = json.loads((run / name / "manifest.json").read_text())["summary"]["vocabulary"]
        assert recorded["tokens"] < recorded["of"]


def test_a_corpus_section_must_exist(tiny_recipe: Callable[..., Path], clipkd: Callable[..., Ended]) -> None:
    recipe = tiny_recipe(student={"model": "glyphs_tiny", "vocabulary": "evaluate"})
    ended = clipkd("show", recipe)
    assert ended.code == 2
    assert "student.vocabulary: evaluate needs the section `evaluate`" in ended.err


def test_the_prompts_of_evaluation_sets_are_in_the_key() -> None:
    def found(*sets: str) -> dict[str, str]:
        return Corpus(("evaluate",), None, EvaluateSpec(headline=sets[0], sets=sets), 0).fingerprints()

    assert found("novel") == found("novel")
    assert found("novel") != found("serif")


def test_the_caption_column_of_an_adopted_vocabulary_is_in_the_key(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("filepath,en,de\na.png,a cat,eine Katze\n")

    def key(column: str) -> str:
        columns = {"image_column": "filepath", "caption_column": column}
        data = CsvSpec.model_validate({"kind": "csv", "paths": str(tmp_path / "x.csv"), "delimiter": ",", **columns})
        model = ModelSpec(model="glyphs_teacher", init="weights")
        return adopt_spec(model, 0, tmp_path, Corpus(("data",), data, None, 0)).key

    assert key("en") != key("de")
