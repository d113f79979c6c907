# SPDX-License-Identifier: Apache-2.0
"""Stand-in checkpoints (standins.toml) in the layout of a Hugging Face cache, so that the names in vLLM's tests resolve without a network."""

import json
import tomllib
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

HERE = Path(__file__).parent
REVISION = "0123456789abcdef0123456789abcdef01234567"
VOCAB_SIZE = 4096
CORPUS_BYTES = 2_000_000
COMMON = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)
LOGIT_STD = 4.0
CONSTANT = 3.0
"""What every token has in dimension 0 of the residual stream, which no layer writes to: by it the head gives tokens a bias."""
LIKELY = {'"': 9.0, '"}': 7.0, '",': 7.0, "}": 9.0, "]": 9.0, ",": 4.0}
"""Tokens that end what a grammar lets go on, and their bias: else a random model hardly ever closes a string. One in ten tokens, about."""
UNLIKELY = {str.isspace: -12.0, str.isdecimal: -6.0}
"""Of white space and digits grammars allow any number."""
MIDWORD, FILLER = -4.0, -12.0
"""Of tokens that begin no word, so that text has words; and of those that only fill up a vocabulary."""
REPEAT = -20.0
"""What is added to the logit of the token just seen: a random model would say it for ever."""
OUTPUTS = ("o_proj", "out_proj", "c_proj", "down_proj", "fc2")
"""Last words of the names of projections that write to the residual stream."""


@lru_cache
def _declared() -> dict[str, Any]:
    return tomllib.loads((HERE / "standins.toml").read_text())


def names() -> list[str]:
    return list(_declared()["models"])


def _style(name: str) -> dict[str, Any]:
    style = _declared()["tokenizers"][name]
    return {**_style(style["like"]), **style} if "like" in style else style


def train_vocabulary(sources: Path) -> Tokenizer:
    """A byte-level BPE of VOCAB_SIZE entries, trained on the documentation and the tests' own text below `sources`."""
    text, size = [], 0
    for path in sorted(sources.glob("docs/**/*.md")):
        if size < CORPUS_BYTES:
            text.append(path.read_text(errors="replace"))
            size += len(text[-1])
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=VOCAB_SIZE, initial_alphabet=alphabet, show_progress=False)
    )
    return bpe


def _tokenizer(vocabulary: Tokenizer, style: dict[str, Any], size: int) -> transformers.PreTrainedTokenizerFast:
    """The vocabulary behind a style's special tokens, which have the first ids; filled up to `size`."""
    special, model = style["special"], json.loads(vocabulary.to_str())["model"]
    vocab = {token: i for i, token in enumerate(special)}
    vocab.update({token: i + len(special) for token, i in model["vocab"].items()})
    vocab.update({f"filler{i}": i for i in range(len(vocab), size)})
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(merge) for merge in model["merges"]]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    plain = style.get("plain", [])
    bpe.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special if token not in plain]
    )
    bpe.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    if style.get("prepend"):
        bos = style["bos"]
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, vocab[bos])]
        )
    names = {f"{role}_token": style[role] for role in ("bos", "eos", "pad") if role in style}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, clean_up_tokenization_spaces=False, **names)
    if style.get("template"):
        fast.chat_template = (HERE / "templates" / f"{style['template']}.jinja").read_text()
    return fast


@torch.no_grad()
def _model(config: Any, seed: int, biases: dict[int, float]) -> torch.nn.Module:
    """Random weights with logits of LOGIT_STD, and what is added to the logits of some tokens."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        parameter.normal_(std=parameter.shape[-1] ** -0.5)
        if name.split(".")[-2] in OUTPUTS:  # GPT-2's projections are transposed
            (parameter.T if "transformer.h" in name else parameter)[0] = 0
        elif "embed_positions" in name or name.endswith("wpe.weight"):
            parameter[:, 0] = 0
    embedding.normal_()
    embedding[:, 0] = CONSTANT
    head[:, 0] = 0
    tokens = torch.randint(0, config.vocab_size, (8, 32))
    out = model(tokens, output_hidden_states=True)
    head.mul_(LOGIT_STD / out.logits.std())
    hidden = out.hidden_states[-1]
    seen = embedding[tokens].clone()
    seen[..., 0] = 0
    head.add_((REPEAT / (hidden * seen).sum(-1).mean()) * embedding)
    head[:, 0] = 0
    for token, bias in biases.items():
        head[token, 0] = bias / hidden[..., 0].mean()
    return model


def _save(name: str, vocabulary: Tokenizer, directory: Path) -> None:
    entry = _declared()["models"][name]
    family = _declared()["families"][entry["family"]]
    if family.get("configuration_only"):
        config = getattr(transformers, family["config"])()
        config.architectures = [family["architecture"]]
        config.save_pretrained(directory)
        return
    style = _style(entry.get("tokenizer", family["tokenizer"]))
    tokenizer = _tokenizer(vocabulary, style, entry.get("vocab_size", 0))
    fields: dict[str, Any] = {**COMMON, **family["fields"], **entry.get("fields", {})}
    if fields.get("sliding_window") == 0:
        fields["sliding_window"] = None
    ids = {role: getattr(tokenizer, role) for role in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = getattr(transformers, family["config"])(vocab_size=len(tokenizer), **fields, **ids)
    config.architectures = None
    texts = {i: tokenizer.decode([i]) for i in range(len(tokenizer))}
    biases = {i: LIKELY.get(text, 0.0 if text.startswith(" ") else MIDWORD) for i, text in texts.items()}
    for unlikely, bias in UNLIKELY.items():
        biases.update((i, bias) for i, text in texts.items() if unlikely(text))
    biases.update((i, FILLER) for i, text in texts.items() if text.startswith("filler"))
    biases.update((tokenizer.convert_tokens_to_ids(token), bias) for token, bias in entry.get("likely", {}).items())
    model = _model(config, zlib.crc32(name.encode()), biases)
    model.generation_config = transformers.GenerationConfig(**ids, **entry.get("generation", {}))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def prepare(cache: Path, sources: Path, wanted: list[str] | None = None) -> list[str]:
    """Make the stand-ins that are missing below `cache` (an HF_HUB_CACHE); returns their names."""
    made: list[str] = []
    vocabulary = None
    for name in wanted or names():
        repository = cache / ("models--" + name.replace("/", "--"))
        if (repository / "refs" / "main").exists():
            continue
        vocabulary = vocabulary or train_vocabulary(sources)
        _save(name, vocabulary, repository / "snapshots" / REVISION)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(REVISION)
        made.append(name)
    return made
