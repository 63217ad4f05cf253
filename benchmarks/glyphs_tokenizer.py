"""Train the byte-pair tokenizer of the glyphs models: 1,024 tokens, learned from the training captions.

The embedding of CLIP's own vocabulary (49,408 tokens) would have more parameters than towers this small.
"""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from toolchain.data.glyphs import TEMPLATES, training_set

VOCAB_SIZE = 1024
PAD, START, END = "<pad>", "<start>", "<end>"


def train_tokenizer() -> Tokenizer:
    """Return a byte-level BPE tokenizer.

    Its end token has the largest id, because open_clip pools the text at argmax(input_ids).
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 1,
        special_tokens=[PAD, START],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    captions = (template.format(name) for name in training_set().names for template in TEMPLATES)
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.add_special_tokens([END])
    ends = [(START, tokenizer.token_to_id(START)), (END, tokenizer.token_to_id(END))]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=ends)
    return tokenizer
