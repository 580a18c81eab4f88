"""Quality against diversity on open prompts: PowerFlow with alpha < 1, and a higher temperature.

Both start from SmolLM2-135M-Instruct, an aligned model. A temperature flattens every token's
distribution alone; PowerFlow moves whole completions towards p^alpha (arXiv 2603.18363, section on
creative writing). It is trained on the prompts of the train split and sampled at T = 1 on the
held-out ones.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from typing import Any

import powerflow_fast
from benchmarks.evidence import Run, language, texts
from benchmarks.markdown import table
from powerflow_fast.data.prompts import OPEN_PROMPTS, Question, read_questions
from powerflow_fast.evaluation.scores import distinct_word_ngrams
from powerflow_fast.models.sampling import end_tokens
from powerflow_fast.models.smollm2 import chat_prompt
from powerflow_fast.training.health import distinct_token_ngrams as distinct_within

TITLE = "Quality against semantic diversity: PowerFlow with alpha < 1, and temperature"
SEEDS = (0, 1)
TEMPERATURES = (1.0, 1.15, 1.3, 1.5)
ALPHAS = (0.5, 0.75)
TRAINING = dict(steps=8, learning_rate=5e-4, max_new_tokens=20, prompts_per_step=4, completions=4)
SAMPLES = 4  # completions of each held-out prompt
EXAMPLES = 6  # kept in the results file
QUALITIES = {  # figure -> label
    "log_likelihood": "log-likelihood of a word, nats",
    "all_rules": "share that passes every rule",
}


def plan(done: dict[str, Any]) -> list[Run]:
    """Temperatures first, they are cheap; then every alpha before the next seed."""
    sampled = [
        Run(f"T = {temperature:g}, seed {seed}", {"seed": seed, "temperature": temperature})
        for temperature in TEMPERATURES
        for seed in SEEDS
    ]
    trained = [
        Run(f"alpha = {alpha:g}, seed {seed}", {"seed": seed, "alpha": alpha})
        for seed in SEEDS
        for alpha in ALPHAS
    ]
    return [*sampled, *trained]


def run(seed: int, temperature: float = 1.0, alpha: float | None = None) -> dict[str, Any]:
    """Figures of completions of the held-out prompts, by the base or by a policy trained here."""
    if alpha is None:
        model, _ = language.base_model()
        return measured(model, seed, temperature)
    questions = [Question(chat_prompt(q.prompt)) for q in read_questions(OPEN_PROMPTS, "train")]
    powerflow = {"alpha": alpha}
    with language.trained(questions, seed=seed, powerflow=powerflow, **TRAINING) as result:
        logs = [
            {name: line[name] for name in ("loss", "residual/std", "kl")} for line in result.logs
        ]
        figures = measured(result.model, seed, temperature)
        return {**figures, "steps": result.steps, "logs": logs, "train_seconds": result.seconds}


def measured(model, seed: int, temperature: float) -> dict[str, Any]:
    """Sample `SAMPLES` completions of every held-out prompt and measure them."""
    prompts = [q.prompt for q in read_questions(OPEN_PROMPTS, "heldout")]
    _, tokenizer = language.base_model()
    completions = sample(model, tokenizer, prompts, seed, temperature)
    return {**figures(prompts, completions), "examples": _examples(completions)}


def sample(
    model, tokenizer, prompts: Sequence[str], seed: int, temperature: float
) -> list[tuple[str, list[int], bool]]:
    """(text, token ids, whether it ended by itself) of `SAMPLES` completions of each prompt."""
    import torch

    inputs = tokenizer([chat_prompt(p) for p in prompts], return_tensors="pt", padding=True)
    ends = end_tokens(model, tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        drawn = powerflow_fast.sample(
            model,
            inputs["input_ids"],
            inputs["attention_mask"],
            temperature=temperature,
            num_return_sequences=SAMPLES,
            max_new_tokens=TRAINING["max_new_tokens"],
            end_token_ids=ends,
        )
    completions = []
    for row, counted in zip(*drawn.completion(inputs["input_ids"].shape[1]), strict=True):
        ids = row[counted].tolist()
        ended = ids[-1] in ends
        kept = ids[:-1] if ended else ids
        completions.append((tokenizer.decode(kept, skip_special_tokens=True), kept, ended))
    return completions


def figures(
    prompts: Sequence[str], completions: Sequence[tuple[str, list[int], bool]]
) -> dict[str, Any]:
    """Means over completions, `len(completions) / len(prompts)` consecutive ones of each prompt."""
    samples = len(completions) // len(prompts)
    written = [text for text, _, _ in completions]
    ids = [kept for _, kept, _ in completions]
    asked = texts.embed(prompts).repeat_interleave(samples, 0)
    vectors = texts.embed(written)
    cosines = (asked * vectors).sum(-1).tolist()
    passed = {
        name: [
            rule(text, ended, cosine)
            for (text, _, ended), cosine in zip(completions, cosines, strict=True)
        ]
        for name, rule in texts.RULES.items()
    }
    return {
        "diversity": statistics.fmean(texts.diversity(vectors, samples).tolist()),
        "log_likelihood": statistics.fmean(map(texts.log_likelihood, written)),
        "all_rules": statistics.fmean(map(all, zip(*passed.values(), strict=True))),
        "rules": {name: statistics.fmean(oks) for name, oks in passed.items()},
        "distinct_bigrams": distinct_word_ngrams(written),
        "distinct_4grams_within": distinct_within(ids),
        "length": statistics.fmean(map(len, ids)),
    }


def summarise(done: dict[str, Any]) -> dict[str, Any]:
    """The lead of each trained policy over a temperature of equal diversity, per seed."""
    curve = sorted(
        (mean(done, label, "diversity"), {q: mean(done, label, q) for q in QUALITIES})
        for label in settings(done)
        if label.startswith("T")
    )
    leads: dict[str, Any] = {}
    for label in settings(done):
        if label.startswith("alpha"):
            leads[label] = {
                quality: [
                    lead(result[quality], result["diversity"], [(x, y[quality]) for x, y in curve])
                    for result in _of(done, label)
                ]
                for quality in QUALITIES
            }
    return {"lead": leads}


def lead(quality: float, diversity: float, curve: Sequence[tuple[float, float]]) -> float | None:
    """Quality less that of `curve`, points (diversity, quality), there; None outside its range."""
    for (x0, y0), (x1, y1) in zip(curve, curve[1:], strict=False):
        if x0 <= diversity <= x1 and x0 < x1:
            return round(quality - (y0 + (y1 - y0) * (diversity - x0) / (x1 - x0)), 4)
    return None


def draw(figure, results: dict[str, Any]) -> None:
    """A point for every setting, mean of seeds with their range; upwards and right is better."""
    done = {name: entry["result"] for name, entry in results["runs"].items()}
    labels = settings(done)
    tempered = [label for label in labels if label.startswith("T")]
    for axes, (quality, name) in zip(figure.subplots(1, 2), QUALITIES.items(), strict=True):
        line = [(mean(done, s, "diversity"), mean(done, s, quality)) for s in tempered]
        axes.plot(*zip(*line, strict=True), "-", color="tab:gray", linewidth=1)
        for label in labels:
            x, y = ([r[key] for r in _of(done, label)] for key in ("diversity", quality))
            color, marker = ("tab:gray", "o") if label in tempered else ("tab:blue", "s")
            center = statistics.fmean(x), statistics.fmean(y)
            axes.plot(x, y, "-", color=color, linewidth=0.5, alpha=0.6)
            axes.plot(x, y, ".", color=color, markersize=3)
            axes.plot(*center, marker, color=color)
            axes.annotate(label, center, xytext=(4, 4), textcoords="offset points", fontsize=8)
        axes.set(xlabel="semantic diversity (cosine distance)", ylabel=name)
        axes.margins(0.15)


def tables(results: dict[str, Any]) -> str:
    """One row a setting: means over seeds; then the leads."""
    done = {name: entry["result"] for name, entry in results["runs"].items()}
    shown = {
        "diversity": ("diversity", "{:.3f}"),
        "log_likelihood": ("nats a word", "{:.2f}"),
        "all_rules": ("all rules", "{:.0%}"),
        "distinct_bigrams": ("distinct word pairs", "{:.0%}"),
        "distinct_4grams_within": ("distinct 4-grams within", "{:.0%}"),
        "length": ("tokens", "{:.1f}"),
    }
    heads = [title for title, _ in shown.values()]
    lines = []
    for label in settings(done):
        cells = [form.format(mean(done, label, key)) for key, (_, form) in shown.items()]
        for rule in texts.RULES:
            share = statistics.fmean(result["rules"][rule] for result in _of(done, label))
            cells.append(f"{share:.0%}")
        lines.append([label, *cells])
    return table(["", *heads, *texts.RULES], lines) + "\n\n" + _leads(results["summary"]["lead"])


def _leads(leads: dict[str, Any]) -> str:
    head = ("at equal diversity, over temperature, per seed", "nats a word", "all rules")
    lines = []
    for label, qualities in leads.items():
        cells = []
        for quality, form in (("log_likelihood", "{:+.2f}"), ("all_rules", "{:+.1%}")):
            values = qualities[quality]
            cells.append(", ".join("outside" if v is None else form.format(v) for v in values))
        lines.append([label, *cells])
    return table(head, lines)


def settings(done: dict[str, Any]) -> list[str]:
    """Labels without their seeds of what is done, in the plan's order."""
    return list(dict.fromkeys(r.name.partition(",")[0] for r in plan(done) if r.name in done))


def mean(done: dict[str, Any], label: str, key: str) -> float:
    return statistics.fmean(result[key] for result in _of(done, label))


def _of(done: dict[str, Any], label: str) -> list[dict[str, Any]]:
    """Results of a setting, one per seed that is done."""
    return [done[name] for seed in SEEDS if (name := f"{label}, seed {seed}") in done]


def _examples(completions: Sequence[tuple[str, list[int], bool]]) -> list[str]:
    chosen = random.Random(0).sample(range(len(completions)), EXAMPLES)
    return [completions[i][0] for i in chosen]
