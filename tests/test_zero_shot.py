"""Ranks, intervals and recalls against their definitions in loops, and damage that must lower the score."""

from itertools import pairwise
from math import isclose, sqrt

import numpy as np
import pytest

from toolchain.errors import ClipkdError, UsageError
from toolchain.evaluation.eval_set import classes_set
from toolchain.evaluation.zero_shot import TIE, UNRANKED, class_embeddings, evaluate, nearest, ranks
from toolchain.significance import wilson

TEMPLATES = ("{}", "the character {}", "a drawing of {}")
NUM_CLASSES = 300  # more than one chunk of 256, and not a multiple of it
WIDTH = 16
NOISE = 1.5  # of the image features, relative to the text features: accuracy far from 0 and from 1
ROUNDING = 1e-12  # float64 against float64, a handful of operations
FLOAT32 = 1e-6  # one float32 division apart


class TableEncoders:
    """Image k carries k in its pixels and prompt "... nameK" names it: features are looked up."""

    def __init__(self, image_features_KD, text_features_PKD):
        self.image_features_KD = image_features_KD
        self.text_features_PKD = text_features_PKD
        self.largest_batch = 0

    def preprocess(self, image):
        return np.asarray(image, np.float32)

    def encode_pixels(self, images_BHWC):
        self.largest_batch = max(self.largest_batch, len(images_BHWC))
        index_B = images_BHWC[:, 0, 0, :2].astype(int) @ [1, 256]
        return self.image_features_KD[index_B]

    def encode_texts(self, texts):
        self.largest_batch = max(self.largest_batch, len(texts))
        prefixes = [template.format("") for template in TEMPLATES]
        rows = []
        for text in texts:
            prefix, _, index = text.partition("name")
            rows.append(self.text_features_PKD[prefixes.index(prefix), int(index)])
        return np.stack(rows)


def unit(features):
    return (features / np.linalg.norm(features, axis=-1, keepdims=True)).astype(np.float32)


def numbered_set(num_classes=NUM_CLASSES):
    images_KHWC = np.zeros((num_classes, 4, 4, 3), np.uint8)
    images_KHWC[:, 0, 0, 0] = np.arange(num_classes) % 256
    images_KHWC[:, 0, 0, 1] = np.arange(num_classes) // 256
    return images_KHWC, [f"name{k}" for k in range(num_classes)]


def made_set(name, num_classes=NUM_CLASSES):
    return classes_set(name, *numbered_set(num_classes), TEMPLATES)


@pytest.fixture
def encoders():
    rng = np.random.default_rng(0)
    concept_KD = rng.standard_normal((NUM_CLASSES, WIDTH))
    prompts_PKD = concept_KD + 0.3 * rng.standard_normal((len(TEMPLATES), NUM_CLASSES, WIDTH))
    return TableEncoders(unit(concept_KD + NOISE * rng.standard_normal(concept_KD.shape)), unit(prompts_PKD))


def rank_by_definition(query_D, candidates_KD, right):
    """How many other candidates do not score clearly below the right one."""
    own = float(query_D.astype(np.float64) @ candidates_KD[right].astype(np.float64))
    ahead = 0
    for k in range(len(candidates_KD)):
        score = float(query_D.astype(np.float64) @ candidates_KD[k].astype(np.float64))
        ahead += k != right and score >= own - TIE
    return ahead


def test_wilson_is_where_the_score_test_is_at_its_limit():
    z = 1.959963984540054
    for successes, n in [(1, 10), (5, 10), (61, 100), (2299, 2300)]:
        for limit in wilson(successes, n):
            assert isclose(abs(successes / n - limit), z * sqrt(limit * (1 - limit) / n), rel_tol=1e-9)


def test_wilson_by_hand():
    # n = 1, one success: p = 1, so the lower limit is 1 / (1 + z²)
    assert wilson(1, 1) == (pytest.approx(1 / (1 + 3.8414588206941236), rel=ROUNDING), 1.0)
    # the textbook value for half of 10
    assert wilson(5, 10) == (pytest.approx(0.2366, abs=5e-5), pytest.approx(0.7634, abs=5e-5))


def test_wilson_at_the_ends_holds_the_proportion_and_mirrors():
    for n in range(1, 60):
        for successes in range(n + 1):
            low, high = wilson(successes, n)
            assert 0 <= low <= successes / n <= high <= 1
            mirrored_low, mirrored_high = wilson(n - successes, n)
            assert (low, high) == (
                pytest.approx(1 - mirrored_high, abs=ROUNDING),
                pytest.approx(1 - mirrored_low, abs=ROUNDING),
            )
    assert wilson(0, 0) == (0, 1)


def test_wilson_narrows_as_one_over_root_n():
    widths = [high - low for low, high in (wilson(n // 2, n) for n in (100, 400, 1600, 6400))]
    assert [a / b for a, b in pairwise(widths)] == pytest.approx([2, 2, 2], rel=0.02)


def test_ranks_equal_the_definition(encoders):
    queries_KD, candidates_KD = encoders.image_features_KD, encoders.text_features_PKD[0]
    expected = [rank_by_definition(queries_KD[k], candidates_KD, k) for k in range(NUM_CLASSES)]
    rank_K = ranks(queries_KD, candidates_KD)
    assert rank_K.tolist() == expected
    assert rank_K.dtype == np.int32
    assert min(expected) == 0 < max(expected)  # the data exercises both


def test_ties_count_against_the_model():
    candidates_KD = unit(np.array([[1, 0], [1, 0], [0, 1]]))
    assert ranks(candidates_KD, candidates_KD).tolist() == [1, 1, 0]


def test_evaluation_equals_the_definition(encoders):
    evaluation, samples = evaluate(encoders, [made_set("made")], headline="made")
    class_features_KD = np.zeros((NUM_CLASSES, WIDTH))
    for k in range(NUM_CLASSES):
        mean_D = sum(encoders.text_features_PKD[p, k].astype(np.float64) for p in range(len(TEMPLATES)))
        class_features_KD[k] = mean_D / sqrt(mean_D @ mean_D)
    captions_KD, images_KD = encoders.text_features_PKD[0], encoders.image_features_KD
    zero_shot = [rank_by_definition(images_KD[k], class_features_KD, k) for k in range(NUM_CLASSES)]
    to_image = [rank_by_definition(captions_KD[k], images_KD, k) for k in range(NUM_CLASSES)]
    to_name = [rank_by_definition(images_KD[k], captions_KD, k) for k in range(NUM_CLASSES)]

    assert samples["made_rank"].tolist() == zero_shot
    made = evaluation["sets"]["made"]
    for k in (1, 5):
        hits = sum(rank < k for rank in zero_shot)
        assert 0 < hits < NUM_CLASSES
        assert made[f"top{k}"] == hits / NUM_CLASSES
        assert (made[f"top{k}_low"], made[f"top{k}_high"]) == wilson(hits, NUM_CLASSES)
    for k in (1, 5, 10):
        assert made["retrieval"][f"name_to_image_r{k}"] == sum(rank < k for rank in to_image) / NUM_CLASSES
        assert made["retrieval"][f"image_to_name_r{k}"] == sum(rank < k for rank in to_name) / NUM_CLASSES
    assert made["n"] == NUM_CLASSES
    assert evaluation["headline"] == "made"


def test_class_embeddings_are_unit_norm_and_average_the_templates(encoders):
    _, names = numbered_set()
    features_KD = class_embeddings(encoders, names, TEMPLATES)
    assert features_KD.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(features_KD, axis=1), 1, atol=FLOAT32)
    np.testing.assert_allclose(features_KD, unit(encoders.text_features_PKD.mean(0)), atol=FLOAT32)
    np.testing.assert_allclose(
        class_embeddings(encoders, names, TEMPLATES[:1]), encoders.text_features_PKD[0], atol=FLOAT32
    )


def test_the_order_of_the_classes_does_not_matter(encoders):
    images_KHWC, names = numbered_set()
    order = np.random.default_rng(1).permutation(NUM_CLASSES)
    first, first_samples = evaluate(encoders, [classes_set("a", images_KHWC, names, TEMPLATES)], headline="a")
    shuffled = classes_set("a", images_KHWC[order], [names[k] for k in order], TEMPLATES)
    second, second_samples = evaluate(encoders, [shuffled], headline="a")
    assert first == second
    assert first_samples["a_rank"][order].tolist() == second_samples["a_rank"].tolist()


def test_rotating_the_feature_space_does_not_matter(encoders):
    before, _ = evaluate(encoders, [made_set("a")], headline="a")
    rotation_DD, _ = np.linalg.qr(np.random.default_rng(2).standard_normal((WIDTH, WIDTH)))
    rotated = TableEncoders(
        (encoders.image_features_KD @ rotation_DD).astype(np.float32),
        (encoders.text_features_PKD @ rotation_DD).astype(np.float32),
    )
    assert evaluate(rotated, [made_set("a")], headline="a")[0] == before


def test_a_perfect_model_scores_one():
    features_KD = np.eye(12, dtype=np.float32)
    encoders = TableEncoders(features_KD, np.stack([features_KD] * 3))
    evaluation, samples = evaluate(encoders, [made_set("a", 12)], headline="a")
    assert evaluation["sets"]["a"]["top1"] == 1
    assert set(evaluation["sets"]["a"]["retrieval"].values()) == {1.0}
    assert not samples["a_rank"].any()


@pytest.mark.parametrize("width", [3, 16, 100])
def test_a_constant_model_scores_zero(width):
    constant_D = unit(np.random.default_rng(3).standard_normal(width))
    features_KD = np.tile(constant_D, (NUM_CLASSES, 1))
    encoders = TableEncoders(features_KD, np.stack([features_KD] * 3))
    made = evaluate(encoders, [made_set("a")], headline="a")[0]["sets"]["a"]
    assert made["top1"] == made["top5"] == 0
    assert set(made["retrieval"].values()) == {0.0}


@pytest.mark.parametrize("tower", ["image", "text", "both"])
def test_a_tower_of_zeros_scores_zero_even_among_few_classes(tower):
    features_KD = np.eye(4, dtype=np.float32)
    damaged_KD = np.zeros_like(features_KD)
    encoders = TableEncoders(
        damaged_KD if tower != "text" else features_KD,
        np.stack([damaged_KD if tower != "image" else features_KD] * 3),
    )
    made = evaluate(encoders, [made_set("a", 4)], headline="a")[0]["sets"]["a"]
    assert made["top1"] == 0
    assert made["retrieval"]["name_to_image_r1"] == made["retrieval"]["image_to_name_r1"] == 0


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_features_that_are_not_finite_are_never_scored(broken, tower):
    features_KD = np.eye(6, dtype=np.float32)
    damaged_KD = features_KD.copy()
    damaged_KD[4, 2] = broken
    encoders = TableEncoders(
        damaged_KD if tower == "image" else features_KD,
        np.stack([features_KD, features_KD, features_KD if tower == "image" else damaged_KD]),
    )
    if tower == "image":
        said = "the model's image features are NaN or infinite for 1 of 6 inputs, the first: a, "
    else:
        said = "the model's text features are NaN or infinite for 1 of 6 inputs, the first: '"
    with pytest.raises(ClipkdError) as caught:
        evaluate(encoders, [made_set("a", 6)], headline="a")
    assert str(caught.value).startswith(said)


def test_a_rank_of_scores_that_are_not_finite_is_last():
    features_KD = np.eye(4, dtype=np.float32)
    for broken in (np.nan, np.inf, -np.inf):
        damaged_KD = features_KD.copy()
        damaged_KD[1] = broken
        assert ranks(damaged_KD, features_KD).tolist() == [0, UNRANKED, 0, 0]
        assert (ranks(features_KD, damaged_KD) > 0).all(), "a candidate that is not finite is ahead of all"


def test_a_negated_tower_ranks_last():
    features_KD = np.eye(8, dtype=np.float32)
    encoders = TableEncoders(-features_KD, np.stack([features_KD] * 3))
    _, samples = evaluate(encoders, [made_set("a", 8)], headline="a")
    assert samples["a_rank"].tolist() == [7] * 8


def test_progress_reaches_the_total_and_batches_stay_small(encoders):
    calls = []
    evaluate(
        encoders,
        [made_set("a"), made_set("b", 40)],
        headline="b",
        progress=lambda what, done, total: calls.append((done, total)),
    )
    assert calls[-1] == ((NUM_CLASSES + 40) * 4, (NUM_CLASSES + 40) * 4)
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert encoders.largest_batch <= 256


def test_a_name_with_braces_is_a_name(encoders):
    texts = []
    encoders.encode_texts = lambda chunk: texts.extend(chunk) or np.ones((len(chunk), 2), np.float32)
    class_embeddings(encoders, ["left {curly} bracket"], ["a drawing of {}"])
    assert texts == ["a drawing of left {curly} bracket"]


IMAGES_KHWC, NAMES = numbered_set(3)


def test_an_unknown_headline_is_refused(encoders):
    with pytest.raises(UsageError) as raised:
        evaluate(encoders, [made_set("a")], headline="b")
    assert str(raised.value) == "evaluate: the headline set is 'b', the sets are: a"


@pytest.mark.parametrize(
    ("images_KHWC", "names", "templates", "message"),
    [
        (
            IMAGES_KHWC,
            NAMES,
            [],
            "evaluate: no prompt template; give at least one, with {} in place of the name, such as '{}'",
        ),
        (
            IMAGES_KHWC,
            NAMES,
            ["{}", "a drawing"],
            "evaluate: template 'a drawing' has no {} in place of the name",
        ),
        (
            IMAGES_KHWC,
            NAMES[:2],
            TEMPLATES,
            "evaluate: set 'a' has 3 images and 2 names, expected one image per name and at least one",
        ),
        (
            IMAGES_KHWC[:0],
            [],
            TEMPLATES,
            "evaluate: set 'a' has 0 images and 0 names, expected one image per name and at least one",
        ),
        (
            IMAGES_KHWC,
            ["x", "y", "x"],
            TEMPLATES,
            "evaluate: set 'a' has 2 classes named 'x', expected distinct names",
        ),
    ],
)
def test_what_cannot_be_scored_is_refused(images_KHWC, names, templates, message):
    with pytest.raises(UsageError) as raised:
        classes_set("a", images_KHWC, names, templates)
    assert str(raised.value) == message


def test_the_answer_kept_is_the_nearest_text_and_right_where_the_rank_says_so():
    random = np.random.default_rng(5)
    text_features_PKD = unit(random.standard_normal((len(TEMPLATES), NUM_CLASSES, WIDTH)))
    image_features_KD = unit(text_features_PKD[0] + NOISE * random.standard_normal((NUM_CLASSES, WIDTH)) / WIDTH**0.5)
    encoders = TableEncoders(image_features_KD, text_features_PKD)
    _, samples = evaluate(encoders, [made_set("a"), made_set("b", 12)], headline="a")
    class_features_KD = class_embeddings(encoders, [f"name{k}" for k in range(NUM_CLASSES)], TEMPLATES)
    expected = [
        max(range(NUM_CLASSES), key=lambda k: image_features_KD[n] @ class_features_KD[k]) for n in range(NUM_CLASSES)
    ]
    assert samples["a_top1"].dtype == np.int32
    assert samples["a_top1_cosine"].dtype == np.float32
    assert samples["a_top1"].tolist() == expected
    cosines = [image_features_KD[n] @ class_features_KD[k] for n, k in enumerate(expected)]
    np.testing.assert_allclose(samples["a_top1_cosine"], cosines, atol=FLOAT32)
    assert 0 < (samples["a_rank"] < 1).sum() < NUM_CLASSES
    np.testing.assert_array_equal(samples["a_rank"] < 1, samples["a_top1"] == np.arange(NUM_CLASSES))
    assert "b_top1" not in samples


def test_what_has_no_score_has_no_nearest():
    queries_QD = np.array([[1, 0], [np.nan, 0], [0, 1]], np.float32)
    best_Q, score_Q = nearest(queries_QD, np.array([[0, 1], [1, 0], [1, 0]], np.float32))
    assert best_Q.tolist() == [1, -1, 0], "the first of equals"
    assert np.isnan(score_Q).tolist() == [False, True, False]
