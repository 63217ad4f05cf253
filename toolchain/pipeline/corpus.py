"""Collect the texts that a student's vocabulary is cut to: lines of files, training captions, evaluation prompts."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from toolchain.data.listing import read_text
from toolchain.data.open import fingerprint as fingerprint_data
from toolchain.errors import UsageError
from toolchain.evaluation.open_sets import open_set
from toolchain.recipe.data import DataSpec
from toolchain.recipe.evaluate import EvaluateSpec
from toolchain.recipe.model import CORPUS_SECTIONS

_CAPTIONS_AT_ONCE = 4096


@dataclass(frozen=True)
class Corpus:
    """The texts named by `student.vocabulary`: the words `data` and `evaluate`, and resolved paths of files."""

    names: tuple[str, ...]
    data: DataSpec | None
    evaluate: EvaluateSpec | None
    seed: int

    def fingerprints(self) -> dict[str, str]:
        """Return hashes of the sections that are read; a student's own fingerprint has those of the files."""
        found = {}
        if "data" in self.names and self.data is not None:
            found["vocabulary: data"] = fingerprint_data(self.data)
        if "evaluate" in self.names and self.evaluate is not None:
            prompts = "\0".join(self._read_prompts()).encode("utf-8", "surrogateescape")
            found["vocabulary: evaluate"] = hashlib.sha256(prompts).hexdigest()
        return found

    def read(self) -> Iterator[str]:
        """Yield every text; a text may come more than once.

        Raises:
            UsageError: a file has no text or is not UTF-8.
        """
        for name in self.names:
            if name not in CORPUS_SECTIONS:
                lines = [line for line in read_text(Path(name), "student.vocabulary: ").splitlines() if line.strip()]
                if not lines:
                    raise UsageError(f"student.vocabulary: {name} has no text; expected one text per line")
                yield from lines
        if "data" in self.names:
            yield from self._read_captions()
        if "evaluate" in self.names and self.evaluate is not None:
            yield from self._read_prompts()

    def _read_prompts(self) -> Iterator[str]:
        assert self.evaluate is not None
        for spec in self.evaluate.sets:
            found = open_set(spec)
            yield from (template.format(text) for template in found.templates for text in found.texts)

    def _read_captions(self) -> Iterator[str]:
        import numpy as np

        from toolchain.data.open import training_data

        assert self.data is not None
        data = training_data(self.data, seed=self.seed, batch_size=1)
        for start in range(0, data.num_samples, _CAPTIONS_AT_ONCE):
            sample_B = np.arange(start, min(start + _CAPTIONS_AT_ONCE, data.num_samples))
            for captions in data.list_captions(sample_B):
                yield from captions
