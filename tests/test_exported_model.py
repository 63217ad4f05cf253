"""Preprocessing and tokenisation against open_clip's own, on awkward pictures and captions; damage to a folder."""

import ast
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import open_clip
import pytest
from onnx import TensorProto, helper
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from export.device_programs import runner
from export.graphs.tokenizer_json import text_spec, write_tokenizer
from export.runtime.exported_model import open_exported
from toolchain.errors import ArtifactError, UsageError
from toolchain.filesystem import file_sha256
from toolchain.models.stock_tokenizer import stock_tokenizer_json
from toolchain.stage import folder_fingerprint

REPOSITORY = Path(__file__).parents[1]
STUDENT = REPOSITORY / "recipes" / "glyphs_tiny"
MAX_PIXEL_ERROR = 1e-6  # the same float32 operations in the same order: what remains is a compiler's choice
IMAGE_SPEC = {
    "size": [32, 32],
    "mode": "RGB",
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": 0,
}
MODES = ["RGB", "L", "LA", "P", "RGBA", "CMYK", "1", "I;16", "I", "YCbCr"]
SIZES = [(32, 32), (47, 31), (5, 90), (1, 3), (71, 50)]

CAPTIONS = [
    "",
    " ",
    "a photo of a cat",
    "A PHOTO of the Cat's whiskers, they'll SHE'D I've don't 're '\u017f",
    "  runs \t of\n\r\n whitespace\u00a0\u2003and\u3000more\x1c\x85  ",
    "\u201ctypographic\u201d \u2018quotes\u2019 \u2013 dashes \u2014 and\u2026 ellipsis",
    "ligatures \ufb01 \ufb02 \ufb03 \u0133 \u017ft",
    "entities &amp; &amp;amp; &lt;b&gt; &quot;x&quot; &#233; &eacute; &nbsp; &notanentity;",
    "mojibake: caf\u00c3\u00a9 \u00e2\u20ac\u0153quoted\u00e2\u20ac\u009d",
    "emoji 👍🏽 👩‍👩‍👧 🇩🇪 ☕️",
    "naïve café Ångström ÀÉÎÕÜ ß İstanbul Ǆ",
    "e\u0301 decomposed, a\u0345 iota below",
    "日本語の見出し 中文 한국어 עברית العربية ไทย हिन्दी",
    "12 345 6.78 9½ Ⅷ ² ①",
    "control \x00 \x01 \x07 \x1b[31m \x7f \u200b \ufeff \ufffe",
    "new letters \ua7ce \U00010d50 \U000105c0 and digits \U00010d40",
    "<start_of_text> !<end_of_text> <START_OF_TEXT> <start_of_ <start> <end> <pad>",
    "no_spaces_but_underscores #hashtag @name https://example.org/?a=b&c=d",
    "latin capital letter a with circumflex " * 40,
    "x" * 3000,
    "!?" * 500,
    "half surrogate \ud83d alone",
]


def write_graphs(folder: Path, context_length: int) -> None:
    """Two towers without weights: the mean of every colour, and the token ids, each scaled to unit norm."""

    def write(name, inputs, outputs, *nodes):
        graph = helper.make_graph(list(nodes), name, inputs, outputs)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        onnx.save(model, folder / f"{name}.onnx")

    tensor = helper.make_tensor_value_info
    write(
        "image",
        [tensor("pixel_values", TensorProto.FLOAT, ["batch", 3, 32, 32])],
        [tensor("image_features", TensorProto.FLOAT, ["batch", 3])],
        helper.make_node("GlobalAveragePool", ["pixel_values"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("LpNormalization", ["flat"], ["image_features"]),
    )
    write(
        "text",
        [tensor("input_ids", TensorProto.INT64, ["batch", context_length])],
        [tensor("text_features", TensorProto.FLOAT, ["batch", context_length])],
        helper.make_node("Cast", ["input_ids"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("LpNormalization", ["floats"], ["text_features"]),
    )


def clip_model(tokenizer, context_length):
    return SimpleNamespace(name="a-model", tokenize=tokenizer, context_length=context_length)


def export_to(folder: Path, tokenizer, context_length: int, image_spec=IMAGE_SPEC) -> Path:
    folder.mkdir(exist_ok=True)
    write_graphs(folder, context_length)
    spec = {"image": image_spec, "text": write_tokenizer(clip_model(tokenizer, context_length), folder)}
    (folder / "preprocess.json").write_text(json.dumps(spec))
    return folder


@pytest.fixture(scope="module")
def student_tokenizer():
    return open_clip.get_tokenizer(f"local-dir:{STUDENT}")


@pytest.fixture(scope="module")
def student_folder(tmp_path_factory, student_tokenizer):
    return export_to(tmp_path_factory.mktemp("exported") / "student", student_tokenizer, 20)


@pytest.fixture(scope="module")
def stock_folder(tmp_path_factory):
    return export_to(tmp_path_factory.mktemp("exported") / "stock", SimpleTokenizer(), 77)


@cache
def picture(mode: str, size: tuple[int, int]) -> Image.Image:
    random = np.random.default_rng(size[0] * 1000 + size[1])
    height, width = size[1], size[0]
    if mode == "I;16":
        return Image.fromarray(random.integers(0, 65536, (height, width), dtype=np.uint16))
    if mode == "I":
        return Image.fromarray(random.integers(0, 300, (height, width), dtype=np.int32))
    colours = Image.fromarray(random.integers(0, 256, (height, width, 4), dtype=np.uint8), "RGBA")
    if mode == "P":
        indexed = colours.convert("RGB").quantize(7)
        indexed.info["transparency"] = 3
        return indexed
    return colours.convert("RGB").convert(mode) if mode in ("CMYK", "YCbCr", "1") else colours.convert(mode)


@pytest.mark.parametrize(
    ("target", "interpolation"),
    [(32, "bicubic"), ([32, 32], "bilinear"), ([24, 40], "bilinear"), ([40, 24], "bicubic")],
    ids=str,
)
@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
def test_preprocessing_equals_open_clips(target, interpolation, resize_mode):
    spec = IMAGE_SPEC | {"size": target, "interpolation": interpolation, "resize_mode": resize_mode, "fill_color": 7}
    transform = image_transform_v2(PreprocessCfg(**spec), is_train=False)
    compared = 0
    for mode in MODES:
        for size in SIZES:
            expected, refused = attempt(lambda image: transform(image).numpy(), picture(mode, size))
            values, ours_refused = attempt(lambda image: runner.preprocess_image(image, spec), picture(mode, size))
            assert refused == ours_refused, (mode, size)
            if not refused:
                assert values.dtype == np.float32
                assert values.shape == expected.shape
                assert np.abs(values - expected).max() <= MAX_PIXEL_ERROR, (mode, size)
                compared += 1
    assert compared >= 0.8 * len(MODES) * len(SIZES)  # the rest is what Pillow refuses to both


def attempt(function, image):
    try:
        return function(image), None
    except Exception as error:
        return None, type(error)


def test_a_fill_colour_shows(student_tokenizer, tmp_path):
    spec = IMAGE_SPEC | {"resize_mode": "longest", "fill_color": 255}
    encoders = open_exported(export_to(tmp_path / "m", student_tokenizer, 20, spec), threads=1)
    values_CHW = encoders.preprocess(Image.new("RGB", (64, 8)))
    assert values_CHW[:, 0].min() > 0 > values_CHW[:, 16].max()


def test_pixels_and_pictures_are_encoded_alike(student_folder):
    encoders = open_exported(student_folder, threads=1)
    pixels_BHWC = np.random.default_rng(0).integers(0, 256, (300, 32, 32, 3), dtype=np.uint8)  # more than one chunk
    features_BD = encoders.encode_images(pixels_BHWC)
    assert features_BD.shape == (300, 3)
    assert features_BD.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(features_BD, axis=1), 1, rtol=1e-5)  # float32 sums
    np.testing.assert_array_equal(features_BD, encoders.encode_images([Image.fromarray(p) for p in pixels_BHWC]))
    assert encoders.encode_images([]).shape == (0, 3)
    assert encoders.encode_texts([]).shape == (0, 20)
    assert (encoders.image_size, encoders.context_length, encoders.precision) == (32, 20, None)


def test_precision_is_the_manifests(student_tokenizer, tmp_path):
    folder = export_to(tmp_path / "m", student_tokenizer, 20)
    digest = folder_fingerprint(folder)
    files = {path.name: file_sha256(path) for path in folder.iterdir()}
    manifest = {"summary": {"precision": "int8"}, "files": files, "digest": digest, "key": ""}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert open_exported(folder, threads=1).precision == "int8"


def test_student_tokenization_equals_open_clips(student_tokenizer, student_folder):
    check_tokenization(student_tokenizer, student_folder)


def test_stock_tokenization_equals_open_clips(stock_folder):
    check_tokenization(SimpleTokenizer(), stock_folder)


def check_tokenization(tokenizer, folder):
    encoders = open_exported(folder, threads=1)
    input_ids_BT = encoders.tokenize(CAPTIONS)
    assert input_ids_BT.dtype == np.int64
    for caption, got, expected in zip(CAPTIONS, input_ids_BT, tokenizer(CAPTIONS).numpy(), strict=True):
        assert got.tolist() == expected.tolist(), repr(caption[:60])
    eot_id = encoders.text_spec["eot_id"]
    assert (input_ids_BT[CAPTIONS.index("x" * 3000)][-1]) == eot_id  # truncation keeps the end
    assert (input_ids_BT == eot_id).any(axis=1).all()


@pytest.mark.parametrize("clean", ["lower", "canonicalize"])
def test_every_cleaning_equals_open_clips(clean, tmp_path):
    tokenizer = HFTokenizer(str(STUDENT), context_length=20, clean=clean)
    check_tokenization(tokenizer, export_to(tmp_path / "m", tokenizer, 20))


def test_the_habits_of_hf_tokenizer_are_kept(tmp_path):
    """Two of which the library knows nothing: a separator overwritten by 0, and a token behind the padding."""
    specials = {"sep_token": "<end>", "cls_token": "<pad>"}
    strips = HFTokenizer(str(STUDENT), context_length=20, strip_sep_token=True, **specials)
    appends = HFTokenizer(str(STUDENT), context_length=20, tokenizer_mode="clips", **specials)
    for index, tokenizer in enumerate((strips, appends)):
        encoders = open_exported(export_to(tmp_path / str(index), tokenizer, 20), threads=1)
        assert encoders.tokenize(CAPTIONS).tolist() == tokenizer(CAPTIONS).tolist()


def test_stock_tokenizer_agrees_on_every_kind_of_character():
    from tokenizers import Tokenizer

    ours, theirs = Tokenizer.from_str(stock_tokenizer_json()), SimpleTokenizer(clean="lower")
    theirs.clean_fn = lambda text: " ".join(text.split()).lower()  # ftfy is the same on both sides, and slow
    points = [*range(0x400), *range(0x400, 0x3000, 13), *range(0xE000, 0x110000, 2999), 0xA7CE, 0x10D40, 0x1F600]
    texts = [f"a{chr(point)}b 1{chr(point)}'s" for point in points]
    for text, encoding, expected in zip(
        texts, ours.encode_batch([theirs.clean_fn(text) for text in texts]), theirs(texts).tolist(), strict=True
    ):
        assert encoding.ids == expected, repr(text)


def test_a_tokenizer_that_cannot_be_reproduced_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"a-model: its tokenizer drops tokens at random \(reduction_mask\)"):
        write_tokenizer(clip_model(SimpleTokenizer(reduction_mask="random"), 77), tmp_path)
    with pytest.raises(UsageError, match="a-model: its tokenizer is function; an export reproduces"):
        write_tokenizer(clip_model(check_tokenization, 77), tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()


FILES = ["preprocess.json", "tokenizer.json", "image.onnx", "text.onnx"]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named_with_the_command(name, student_tokenizer, tmp_path):
    folder = export_to(tmp_path / "m", student_tokenizer, 20)
    (folder / name).unlink()
    with pytest.raises(ArtifactError) as caught:
        open_exported(folder, threads=1)
    assert str(caught.value).startswith(f"{folder / name}: missing;")
    assert "clipkd export RUN --onnx" in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"not what it should be", b"\x08\x0a\xff\xfe"], ids=["empty", "text", "binary"]
)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_with_the_command(name, content, student_tokenizer, tmp_path):
    folder = export_to(tmp_path / "m", student_tokenizer, 20)
    (folder / name).write_bytes(content)
    with pytest.raises(ArtifactError) as caught:
        open_exported(folder, threads=1)
    assert str(caught.value).startswith(f"{folder / name}: ")
    assert "clipkd export RUN --onnx" in str(caught.value)


def test_a_graph_with_other_inputs_is_refused(student_tokenizer, tmp_path):
    folder = export_to(tmp_path / "m", student_tokenizer, 20)
    (folder / "image.onnx").write_bytes((folder / "text.onnx").read_bytes())
    with pytest.raises(ArtifactError, match="expected one input, pixel_values; got input_ids"):
        open_exported(folder, threads=1)


def test_a_section_missing_from_preprocess_is_named(student_tokenizer, tmp_path):
    folder = export_to(tmp_path / "m", student_tokenizer, 20)
    spec = json.loads((folder / "preprocess.json").read_text())
    (folder / "preprocess.json").write_text(json.dumps({"image": spec["image"]}))
    with pytest.raises(ArtifactError, match=r"preprocess.json: expected sections 'image' and 'text', missing 'text'"):
        open_exported(folder, threads=1)


WITHOUT_TORCH = """
import sys
FORBIDDEN = {"torch", "torchvision", "open_clip", "transformers", "timm", "onnx", "regex"}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in FORBIDDEN:
            raise ImportError(f"{name} is not on a device")
sys.meta_path.insert(0, Refuse())
import json
from pathlib import Path
import numpy as np
from PIL import Image
from export.runtime.exported_model import open_exported
encoders = open_exported(Path(sys.argv[1]), threads=1)
captions = json.loads(sys.stdin.read())
pixels = np.arange(2 * 32 * 32 * 3, dtype=np.uint32).reshape(2, 32, 32, 3).astype(np.uint8)
print(json.dumps([encoders.tokenize(captions).tolist(), encoders.encode_images(pixels).shape,
                  encoders.encode_texts(captions).shape, sorted(FORBIDDEN & set(sys.modules))]))
"""


def test_a_folder_opens_without_torch_and_stdout_stays_clean(stock_folder):
    captions = [caption for caption in CAPTIONS if "surrogate" not in caption]  # JSON in UTF-8 cannot carry it
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(stock_folder)],
        input=json.dumps(captions),
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    ids, image_shape, text_shape, imported = json.loads(done.stdout)  # nothing else was printed
    assert ids == SimpleTokenizer()(captions).tolist()
    assert image_shape == [2, 3]
    assert text_shape == [len(captions), 77]
    assert imported == []


def test_text_spec_documents_every_key_it_returns():
    spec = text_spec(context_length=20, pad_id=0, eot_id=1, clean="lower")
    for key in spec:
        assert f"`{key}`" in text_spec.__doc__


def test_runner_is_python_3_8_and_imports_nothing_of_clipkd():
    source = Path(runner.__file__).read_text()
    tree = ast.parse(source, feature_version=(3, 8))
    modules = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    of_checkpoints = {"torch", "open_clip"}  # which are timed where they were trained
    assert modules - sys.stdlib_module_names == {"PIL", "cuda", "numpy", "onnxruntime", "tensorrt"} | of_checkpoints
