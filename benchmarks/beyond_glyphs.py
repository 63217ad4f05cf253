"""Measure, on glyphs, each way of making a student that CLIP-KD leaves out, against its control.

    python benchmarks/beyond_glyphs.py [--out runs/beyond] [--seeds 0 1 2] [--steps 150] [--only start] [--write]

Every student is that of recipes/glyphs.yaml, for smaller images and with a schedule of its own (PLAIN), and with a few
changes (ARMS).  The table COMPARISONS pairs it with its control.  Both have the same batches, steps and seed, and the
same initial weights unless the start is what is compared:

    start      the student inherits the teacher's weights, or starts at random
    relations  the task loss with affinity mimicking, or with CRD
    teachers   two teachers, or the better one, with CLIP-KD's combination, because FD and ICL alone would train only
               the projections to several teachers.  The second teacher has the first one's architecture at half of its
               image size; the script trains it with the recipe's objectives from the first, because half an hour of
               training from scratch would not make it worth listening to
    sigmoid    sigmoid task and sigmoid distillation, or softmax task and CRD.  The sigmoid teacher is the included one
               with a scale and a bias fitted to its features of the training pairs, so both arms see the same features
    captions   images alone into the teacher's space, with the teacher's text tower, or the full student

The students of `captions`, and one of `start`, start at random.  The others inherit the teacher's weights and have a
lower learning rate, because relations alone teach a random start next to nothing in these few steps.  Top-1 is over the
images of the three glyph sets together; each image is classified among the names of its own set.  The seconds are those
of training, without the teachers' passes, which are made once for each seed and teacher.

Two students are trained at the same time, with one thread each.  After an interruption the same command continues: it
repeats no finished student, except one whose recipe, student or teacher has changed since.  `--write` puts the table
into docs/method.md and benchmarks/results/.  The last line of stdout is one JSON document; the exit code is 5 if a
claim does not hold.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from claims import claim, finish
from glyphs_students import (
    interval,
    mean_and_spread,
    means_by_set,
    score_teacher,
    store_features,
    train_and_score,
    train_two_at_a_time,
    write_result,
)

if TYPE_CHECKING:
    from toolchain.data.batch import TrainingData
    from toolchain.distillation.distill import Training
    from toolchain.distillation.teacher_cache import TeacherCache, TeacherCaches
    from toolchain.recipe.recipe import Recipe

BEGIN, END = "<!-- beyond: written by benchmarks/beyond_glyphs.py -->", "<!-- end of beyond -->"
STATED_AS_ADVANTAGES = ("start", "sigmoid", "captions")
"""The comparisons that docs/method.md states as advantages; each is a claim: the gain's 95 % interval is above 0."""

VIEWS = 1  # of each drawing: a pass of every teacher for each
FITTED_BATCHES = 16  # for the two numbers of the sigmoid teacher
TEACHER_SEED = 100  # none of the students'
SECOND_IMAGE_SIZE = 0.5  # of the first teacher's
SECOND_LENGTH = 2  # training steps of the second teacher, as a multiple of the students'
STEPS, BATCH, WARMUP = 150, 128, 10  # WARMUP: one step in so many
IMAGE_SIZE = 32  # of the students
PLAIN = (
    "baseline=false",
    "student.inherit=null",
    "student.text_tower=null",
    f"student.model_cfg.vision_cfg.image_size={IMAGE_SIZE}",
    f"student.preprocess_cfg.size=[{IMAGE_SIZE}, {IMAGE_SIZE}]",
    f"data.views={VIEWS}",
    f"distill.batch_size={BATCH}",
    "distill.lr=3e-3",
    "distill.teacher_cache={dtype: float32}",
)


class Arm(NamedTuple):
    """One student: what is changed in the recipe."""

    changes: tuple[str, ...] = ()
    weights: Mapping[str, float] | None = None
    """Loss weights; those that are absent are 0.  None: the recipe's."""

    two_teachers: bool = False


class Comparison(NamedTuple):
    """Two arms, and what to call them in the table."""

    arm: str
    control: str
    arm_text: str
    control_text: str


INHERITED = ("student.inherit=teacher", "distill.lr=1e-3")
COMBINATION = {"task": 1.0, "crd": 1.0, "fd": 15.625, "icl": 1.0}  # CLIP-KD's
ARMS = {
    "recipe": Arm(),
    "inherited": Arm(INHERITED),
    "crd": Arm(INHERITED, weights={"task": 1, "crd": 1}),
    "affinity": Arm(INHERITED, weights={"task": 1, "affinity": 1}),
    "combination": Arm(INHERITED, weights=COMBINATION),
    "two_teachers": Arm(INHERITED, weights=COMBINATION, two_teachers=True),
    "sigmoid": Arm(  # scale and bias start as in SigLIP (arXiv:2303.15343, section 3.2)
        (*INHERITED, "student.model_cfg.init_logit_bias=-10", "student.model_cfg.init_logit_scale=2.302585"),
        weights={"task": 1, "sigmoid_kd": 1},
    ),
    "image_only": Arm(("student.text_tower=teacher", "student.vocabulary=[]"), weights={"fd": 1}),
}
COMPARISONS = {
    "start": Comparison("inherited", "recipe", "inherited start", "random start"),
    "relations": Comparison("affinity", "crd", "task + affinity mimicking", "task + CRD"),
    "teachers": Comparison("two_teachers", "combination", "two teachers", "the better teacher"),
    "sigmoid": Comparison("sigmoid", "crd", "sigmoid task + sigmoid distillation", "softmax task + CRD"),
    "captions": Comparison("image_only", "recipe", "images alone, the teacher's text tower", "images and captions"),
}


class Settings(NamedTuple):
    out: Path
    steps: int

    second_teacher: Path | None
    """Folder of the second teacher, once it is trained."""


# Students -------------------------------------------------------------------------------------------------------------


def load_arm(name: str, seed: int, settings: Settings) -> "Recipe":
    """Return the recipe of one arm: the quickstart's, with the arm's changes."""
    arm = ARMS[name]
    changes = [*PLAIN, f"seed={seed}", *arm.changes]
    if arm.two_teachers:
        assert settings.second_teacher is not None
        changes.append("more_teachers=" + json.dumps([{"model": str(settings.second_teacher.absolute())}]))
    return load_changed(changes, settings.steps, arm.weights)


def load_second_teacher(steps: int) -> "Recipe":
    """Return the recipe of the second teacher: the first one's architecture for smaller images, distilled from it."""
    from toolchain.recipe.model_config import read_model_cfg

    first = load_changed(PLAIN, steps).teacher
    assert first is not None
    config = read_model_cfg(first)
    assert config is not None
    size = round(SECOND_IMAGE_SIZE * config["vision_cfg"]["image_size"])
    changes = [*PLAIN, f"seed={TEACHER_SEED}", "student=" + json.dumps({"model": first.model, "init": "random"})]
    changes += [f"student.model_cfg.vision_cfg.image_size={size}", f"student.preprocess_cfg.size=[{size}, {size}]"]
    return load_changed(changes, steps)


def load_changed(changes: Sequence[str], steps: int, weights: Mapping[str, float] | None = None) -> "Recipe":
    """Return the quickstart's recipe with changes, for so many steps; the warm-up is the same share of them."""
    from toolchain.recipe.distill import LossWeights
    from toolchain.recipe.load import load_recipe, recipe_path

    schedule = [f"distill.steps={steps}", f"distill.warmup={steps // WARMUP}"]
    if weights is not None:
        every = dict.fromkeys(LossWeights.model_fields, 0.0) | weights
        schedule.append("distill.loss_weights=" + json.dumps(every))
    return load_recipe(recipe_path("glyphs"), [*changes, *schedule])


def identify(recipe: "Recipe") -> str:
    """Return a short hash of everything in a recipe that decides the trained weights."""
    from toolchain.recipe.model_names import fingerprint

    assert recipe.distill is not None
    assert recipe.data is not None
    depends = {
        "seed": recipe.seed,
        "data": recipe.data.model_dump(mode="json"),
        "distill": recipe.distill.key_fields(),
        "student": fingerprint(recipe.student),
        "teachers": [fingerprint(spec) for spec in recipe.teachers.values()],
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:12]


def train_second_teacher(out: Path, steps: int) -> Path:
    """Return the folder of the second teacher; train it if it does not exist."""
    recipe = load_second_teacher(SECOND_LENGTH * steps)
    folder = out / f"second-teacher-{identify(recipe)}"
    train_and_score(folder, lambda: make_training(recipe, out), threads=2)
    return folder


def train_student(name: str, seed: int, settings: Settings) -> dict[str, Any]:
    """Train and score one student, or read the result that an earlier call wrote."""
    recipe = load_arm(name, seed, settings)
    folder = settings.out / f"{name}-seed{seed}-{identify(recipe)}"
    scores = train_and_score(folder, lambda: make_training(recipe, settings.out))
    return scores | {"arm": name, "seed": seed, "label": f"{name} seed {seed}"}


def make_training(recipe: "Recipe", out: Path) -> "Training":
    """Return the student of a recipe before its first step, with its teachers' stored features."""
    from toolchain.distillation.distill import Training
    from toolchain.models.student import build_student
    from toolchain.pipeline.corpus import Corpus
    from toolchain.recipe.model_names import model_folder

    assert recipe.distill is not None
    assert recipe.teacher is not None
    texts = Corpus(recipe.student.vocabulary, recipe.data, recipe.evaluate, recipe.seed).read()
    student, _ = build_student(recipe.student, seed=recipe.seed, texts=texts, teacher=model_folder(recipe.teacher))
    return Training(recipe.distill, student, open_teachers(recipe, out), open_data(recipe), seed=recipe.seed)


def open_data(recipe: "Recipe") -> "TrainingData":
    from toolchain.data.open import training_data

    assert recipe.data is not None
    assert recipe.distill is not None
    return training_data(recipe.data, seed=recipe.seed, batch_size=recipe.distill.batch_size)


# Teachers -------------------------------------------------------------------------------------------------------------


def open_teachers(recipe: "Recipe", out: Path) -> "TeacherCache | TeacherCaches":
    """Return the stored features of a recipe's teachers; compute those that are missing."""
    from toolchain.distillation.teacher_cache import TeacherCaches
    from toolchain.recipe.model_names import fingerprint

    assert recipe.distill is not None
    data, steps = open_data(recipe), recipe.distill.num_steps(0)
    caches = []
    for spec in recipe.teachers.values():
        folder = out / f"features-{fingerprint(spec)[:12]}-{VIEWS}-views-seed{recipe.seed}"
        caches.append(store_features(spec, data, folder, seed=recipe.seed, steps=steps))
    if recipe.distill.loss_weights.sigmoid_kd:
        caches = [fit_sigmoid(cache, data) for cache in caches]
    return caches[0] if len(caches) == 1 else TeacherCaches(tuple(caches))


def fit_sigmoid(cache: "TeacherCache", data: "TrainingData") -> "TeacherCache":
    """Return a teacher's features with the scale and the bias that minimize the sigmoid loss of training pairs.

        min over s, b of the mean over batches of sigmoid_loss(u, w, s, b)

    This is convex in s and b.  The batches are training's, so the share of pairs among all similarities is too.
    """
    import torch

    from toolchain.distillation.losses import sigmoid_loss

    batches = []
    for step in range(FITTED_BATCHES):
        batch = data.batch(step, slice(0, data.batch_size), [])
        image_BE, text_BE = cache.features(batch.sample_B, batch.pick_B, batch.view % VIEWS)
        batches.append((image_BE.double(), text_BE.double()))
    scale, bias = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (10.0, -10.0))
    optimizer = torch.optim.LBFGS([scale, bias], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.stack([sigmoid_loss(*features, scale, bias) for features in batches]).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return replace(cache, about={**cache.about, "logit_scale": scale.item(), "logit_bias": bias.item()})


# The result -----------------------------------------------------------------------------------------------------------


Results = Mapping[str, Mapping[int, Mapping[str, Any]]]
"""By arm and seed, as `train_student` returns them."""


def choose_arms(comparisons: Sequence[str]) -> list[str]:
    """Return the arms of these comparisons, each once, in the order of ARMS."""
    wanted = {arm for name in comparisons for arm in COMPARISONS[name][:2]}
    return [name for name in ARMS if name in wanted]


def paired_gain(found: Results, name: str, seeds: Sequence[int]) -> tuple[float, float]:
    """Return a comparison's mean gain over the seeds, and half of its 95 % interval."""
    arm, control = COMPARISONS[name][:2]
    return interval([found[arm][seed]["pooled"] - found[control][seed]["pooled"] for seed in seeds])


def make_table(found: Results, teachers: Mapping[str, Any], comparisons: Sequence[str], seeds: Sequence[int]) -> str:
    """Return the table in Markdown: of each comparison the control and the arm; then the teachers by name."""
    lines = [
        "| comparison | student | top-1 %, mean ± sd | gain, points, 95 % interval | stix / serif / novel % "
        "| train s |",
        "|---|---|---|---|---|---|",
    ]
    for name in comparisons:
        chosen = COMPARISONS[name]
        gain, half = paired_gain(found, name, seeds)
        points = f"{100 * gain:+.2f} ± {100 * half:.2f}"
        rows = [(chosen.control, chosen.control_text, "-"), (chosen.arm, chosen.arm_text, points)]
        for arm, text, cell in rows:
            runs = [found[arm][seed] for seed in seeds]
            top1 = mean_and_spread([run["pooled"] for run in runs])
            train_s, _ = interval([run["train_s"] for run in runs])
            lines.append(f"| {name} | {text} | {top1} | {cell} | {means_by_set(runs)} | {train_s:.0f} |")
    for text, teacher in teachers.items():
        lines.append(f"| - | {text} | {100 * teacher['pooled']:.2f} | - | {means_by_set([teacher])} | - |")
    lines += ["", f"Seeds {', '.join(map(str, seeds))}; each interval is that of the mean over seeds, by Student's t."]
    return "\n".join(lines)


def make_claims(found: Results, comparisons: Sequence[str], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Return the claims: the comparisons that docs/method.md states as advantages."""
    claims = []
    for name in comparisons:
        if name in STATED_AS_ADVANTAGES:
            gain, half = paired_gain(found, name, seeds)
            what = f"{COMPARISONS[name].arm_text}: lower end of the gain's 95 % interval"
            claims.append(claim(what, gain - half, "top-1", ">", 0))
    return claims


def score_teachers(recipe: "Recipe", out: Path) -> dict[str, Any]:
    """Return the scores of the teachers of the two-teacher student by what the table calls them.

    Raises:
        SystemExit: the first teacher, which the control has, is not the better one.
    """
    from toolchain.recipe.model_names import fingerprint

    texts = ("the included teacher", "the second teacher")
    found = {
        text: score_teacher(spec, out / f"teacher-{fingerprint(spec)[:12]}.json")
        for text, spec in zip(texts, recipe.teachers.values(), strict=False)
    }
    included, *second = (each["pooled"] for each in found.values())
    if second and second[0] >= included:
        raise SystemExit("the second teacher is better than the included one: the control has the worse teacher")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/beyond"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps of each student")
    parser.add_argument("--only", nargs="+", choices=COMPARISONS, default=list(COMPARISONS), metavar="COMPARISON")
    parser.add_argument("--write", action="store_true", help="put the table into docs/method.md")
    arguments = parser.parse_args()
    started = time.monotonic()
    steps = arguments.steps
    arms = choose_arms(arguments.only)
    widest = "two_teachers" if "two_teachers" in arms else "recipe"  # the arm that reads the features of all teachers
    second = train_second_teacher(arguments.out, steps) if ARMS[widest].two_teachers else None
    settings = Settings(arguments.out, steps, second)
    recipes = [load_arm(widest, seed, settings) for seed in arguments.seeds]
    teachers = score_teachers(recipes[0], arguments.out)
    for recipe in recipes:  # before two processes need the same features
        open_teachers(recipe, arguments.out)
    jobs = [(name, seed, settings) for seed in arguments.seeds for name in arms]
    found: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in arms}
    for result in train_two_at_a_time(train_student, jobs):
        found[result["arm"]][result["seed"]] = result
    table = make_table(found, teachers, arguments.only, arguments.seeds)
    claims = make_claims(found, arguments.only, arguments.seeds)
    print(table)
    if arguments.write:
        described = f"{steps} steps of {BATCH}, students for {IMAGE_SIZE} pixels"
        write_result("beyond_glyphs", (BEGIN, END), table, described, claims)
    minutes = round((time.monotonic() - started) / 60, 1)  # of this call alone
    gains = {name: paired_gain(found, name, arguments.seeds) for name in arguments.only}
    finish("beyond_glyphs", claims, minutes=minutes, steps=steps, batch=BATCH, views=VIEWS, gains=gains)


if __name__ == "__main__":
    main()
