import dataclasses

import numpy as np
import pytest

from export.proof import parity
from export.proof.parity import EXACT_DB, check_parity, compare
from toolchain.errors import ArtifactError, GateError
from toolchain.precisions import PRECISIONS

CLOSE_DB = 0.01  # the features below are built in float32, which moves 40 dB by less


@pytest.fixture
def features_BD():
    features_BD = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    return features_BD / np.linalg.norm(features_BD, axis=-1, keepdims=True)


@pytest.fixture
def names():
    return [f"name {index}" for index in range(64)]


def test_equal_features_reach_the_cap(features_BD, names):
    result = compare(features_BD, features_BD, min_sqnr_db=EXACT_DB, names=names, what="x")
    assert result["min_sqnr_db"] == EXACT_DB
    assert result["min_cosine"] == pytest.approx(1.0, abs=1e-12)
    assert result["num_samples"] == 64


def test_sqnr_and_cosine_are_their_definitions(features_BD, names):
    across_D = np.roll(features_BD[9], 1) - features_BD[9] * (np.roll(features_BD[9], 1) @ features_BD[9])
    noisy_BD = features_BD.copy()
    noisy_BD[9] += 0.01 * across_D / np.linalg.norm(across_D)  # a hundredth of the signal, at a right angle
    result = compare(features_BD, noisy_BD, min_sqnr_db=30, names=names, what="x")
    assert result["worst_sample"] == 9
    assert result["min_sqnr_db"] == pytest.approx(40, abs=CLOSE_DB)
    assert result["min_cosine"] == pytest.approx(1 / np.sqrt(1 + 1e-4), abs=1e-7)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "damage", [np.negative, np.zeros_like, lambda x: x * np.nan, lambda x: x * np.inf, lambda x: np.roll(x, 1)]
)
def test_one_bad_sample_among_many_fails(features_BD, names, precision, damage):
    broken_BD = features_BD.copy()
    broken_BD[7] = damage(broken_BD[7])
    with pytest.raises(
        GateError, match=r"here: sample 7 of 64 \('name 7'\) differs .* expected at least \d+ dB"
    ) as caught:
        compare(features_BD, broken_BD, min_sqnr_db=PRECISIONS[precision].min_sqnr_db, names=names, what="here")
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_reference_that_is_not_finite_is_blamed_itself(features_BD, names, broken):
    reference_BD = features_BD.copy()
    reference_BD[7, 3] = broken
    for actual_BD in (features_BD, reference_BD):
        with pytest.raises(
            GateError, match=r"x: PyTorch's own features of 1 of 64 samples are NaN or infinite, the first"
        ):
            compare(reference_BD, actual_BD, min_sqnr_db=0, names=names, what="x")


def test_features_of_another_shape_fail(features_BD, names):
    with pytest.raises(GateError, match=r"expected features \[64, 32\], got \[64, 16\]"):
        compare(features_BD, features_BD[:, :16], min_sqnr_db=0, names=names, what="x")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_tf32_is_not_fp32_and_bfloat16_is_not_fp16(features_BD, names, precision):
    mantissa_bits = {"fp32": 10, "fp16": 4}[precision]  # bfloat16's 7 once and again over the layers of a network
    mantissa, exponent = np.frexp(features_BD)
    coarse_BD = np.ldexp(np.round(mantissa * 2**mantissa_bits) / 2**mantissa_bits, exponent)
    with pytest.raises(GateError):
        compare(features_BD, coarse_BD, min_sqnr_db=PRECISIONS[precision].min_sqnr_db, names=names, what="x")


@dataclasses.dataclass
class FakeEncoders:
    """Mean colour as the image feature, the first three ids as the text feature."""

    mean: float = 0.5
    eot: int = 3

    def preprocess(self, image):
        return (np.asarray(image, np.float32).transpose(2, 0, 1) / 255 - self.mean) / 0.5

    def tokenize(self, texts):
        return np.array([[2, *text.encode()[:4], self.eot] for text in texts], np.int64)

    def encode_pixels(self, pixel_values_BCHW):
        features_BD = pixel_values_BCHW.mean((2, 3)) + np.arange(1, 4, dtype=np.float32)
        return features_BD / np.linalg.norm(features_BD, axis=-1, keepdims=True)

    def encode_ids(self, input_ids_BT):
        first_BD = input_ids_BT[:, :3]
        return (first_BD / np.linalg.norm(first_BD, axis=-1, keepdims=True)).astype(np.float32)


@pytest.fixture
def folder(tmp_path):
    encoders = FakeEncoders()
    pixels_BHWC = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    captions = [f"{letter}bcd" for letter in "abcdef"]
    values_BCHW = np.stack([encoders.preprocess(pixels) for pixels in pixels_BHWC])
    input_ids_BT = encoders.tokenize(captions)
    np.savez(
        tmp_path / "parity.npz",
        names=np.array(captions),
        captions=np.array(captions),
        image_names=np.array(captions),
        pixels_BHWC=pixels_BHWC,
        pixel_values_FCHW=values_BCHW[:2],
        input_ids_BT=input_ids_BT,
        image_features_BD=encoders.encode_pixels(values_BCHW),
        text_features_BD=encoders.encode_ids(input_ids_BT),
    )
    return tmp_path


def test_the_same_encoders_pass(folder):
    result = check_parity(folder, precision="fp32", encoders=FakeEncoders())
    assert set(result) == {"image", "text"}
    assert result["text"]["num_samples"] == 6


@pytest.fixture
def many_prompts(folder):
    """Four spread prompts and 396 others, of the 500 that the set has."""
    encoders = FakeEncoders()
    captions = [f"{first}{second}cd" for first in "abcdefghijklmnopqrst" for second in "abcdefghijklmnopqrst"]
    with np.load(folder / "parity.npz") as saved:
        kept = {name: saved[name] for name in saved.files if name != "names"}
    input_ids_BT = encoders.tokenize(captions)
    kept |= {
        "captions": np.char.encode(captions, "utf-8"),
        "num_spread": 4,
        "num_prompts": 500,
        "input_ids_BT": input_ids_BT.astype(np.uint16),
        "text_features_BD": encoders.encode_ids(input_ids_BT),
    }
    np.savez(folder / "parity.npz", **kept)
    return folder, captions


def damage_prompts(monkeypatch, indices, damage):
    intact = FakeEncoders.encode_ids

    def encode(self, input_ids_BT):
        features_BD = intact(self, input_ids_BT)
        features_BD[indices] = damage(features_BD[indices])
        return features_BD

    monkeypatch.setattr(FakeEncoders, "encode_ids", encode)


def test_all_prompts_are_compared_and_the_worst_of_them_is_named(many_prompts, monkeypatch):
    folder, captions = many_prompts
    assert check_parity(folder, precision="fp32", encoders=FakeEncoders())["text"]["num_below"] == 0
    damage_prompts(monkeypatch, [399], lambda features_BD: features_BD * [[1, 1, 0.5]])
    text = check_parity(folder, precision="int8", encoders=FakeEncoders())["text"]
    assert (text["num_samples"], text["num_prompts"], text["num_below"]) == (400, 500, 1)
    assert (text["worst_sample"], text["worst_prompt"]) == (399, captions[399])
    assert text["min_cosine"] < 0.97
    with pytest.raises(GateError, match=r"text tower, fp16: sample 399 of 400 \('ttcd'\) differs"):
        check_parity(folder, precision="fp16", encoders=FakeEncoders())


@pytest.mark.parametrize(
    ("indices", "damage", "said"),
    [
        ([5, 6, 7, 8, 9], np.negative, "sample 5 of 400 .* 5 are below, at most 1% may be"),
        ([399], lambda features_BD: features_BD * np.nan, r"sample 399 of 400 \('ttcd'\) .* SQNR nan"),
        ([399], lambda features_BD: features_BD * np.inf, r"sample 399 of 400 \('ttcd'\) differs"),
    ],
    ids=["too many", "NaN", "infinity"],
)
def test_prompts_that_fail_although_a_share_may_differ(many_prompts, monkeypatch, indices, damage, said):
    damage_prompts(monkeypatch, indices, damage)
    with pytest.raises(GateError, match=said):
        check_parity(many_prompts[0], precision="int8", encoders=FakeEncoders())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_wrong_mean_fails_whatever_the_precision(folder, precision):
    with pytest.raises(GateError, match="preprocessing of sample"):
        check_parity(folder, precision=precision, encoders=FakeEncoders(mean=0.48))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_dropped_end_token_fails_whatever_the_precision(folder, precision):
    with pytest.raises(
        GateError, match=r"tokenizer.* sample 0 of 6 \('abcd'\): expected \[2, .*, 3\], got \[2, .*, 0\]"
    ):
        check_parity(folder, precision=precision, encoders=FakeEncoders(eot=0))


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_damaged_tower_is_named(folder, tower, monkeypatch):
    method = {"image": "encode_pixels", "text": "encode_ids"}[tower]
    intact = getattr(FakeEncoders, method)
    monkeypatch.setattr(FakeEncoders, method, lambda self, inputs: -intact(self, inputs))
    with pytest.raises(GateError, match=f"{tower} tower, int8: sample"):
        check_parity(folder, precision="int8", encoders=FakeEncoders())


def test_the_runtime_is_opened_when_no_encoders_are_given(folder, monkeypatch):
    monkeypatch.setattr(parity, "open_exported", lambda path: FakeEncoders() if path == folder else None)
    assert check_parity(folder, precision="fp32")["image"]["worst_sample"] < 6


def test_missing_and_damaged_samples_name_the_next_command(tmp_path):
    with pytest.raises(ArtifactError, match=r"parity\.npz: missing\. Export it again: clipkd export"):
        check_parity(tmp_path, precision="fp32", encoders=FakeEncoders())
    (tmp_path / "parity.npz").write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(ArtifactError, match=r"parity\.npz: corrupt"):
        check_parity(tmp_path, precision="fp32", encoders=FakeEncoders())
