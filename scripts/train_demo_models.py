"""Makes LLaMA folders in Hugging Face format: the demo models, or random weights of any shape.

train    three models on the text that ships inside CPython, with a tokenizer of their own
random   any shape, from 27 million parameters to LLaMA 65B, one shard in memory at a time
"""

import json
import math
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from demo_corpus import SYSTEM_PROMPTS, Corpus, Entry, load_corpus
from llama_folder import (
    PRESETS,
    VOCAB_SIZE,
    WEIGHTS,
    Dtype,
    Shape,
    ShapeError,
    classic,
    progress_bar,
    save_weights,
    write_configs,
    write_json,
    write_random_weights,
)
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

DEMO_MODELS = Path(__file__).parent.parent / "configs" / "demo_models"
ROLES = ("system", "user", "assistant")
BEGIN, END_OF_TEXT, END = "<|begin_of_text|>", "<|end_of_text|>", "<|end|>"
SPECIAL_TOKENS = [BEGIN, END_OF_TEXT, *(f"<|{role}|>" for role in ROLES), END]
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant'] -%}
{{- raise_exception('unknown role: ' + message['role']) -}}
{%- endif -%}
{{- '<|' + message['role'] + '|>' + message['content'] | trim + TURN_END -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""

BATCH_TOKENS, WIDTH_STEP = 2_048, 32
SYSTEM_SHARE = 0.1
TURNS, TURNS_WEIGHTS = (1, 2, 4), (85, 10, 5)
LOG_STEPS = 200
MUON_LR, ADAM_LR, WARMUP, FINAL_FACTOR = 0.02, 4e-3, 0.03, 0.03
UNLABELLED = -100  # what torch's cross entropy leaves out


@dataclass(frozen=True, slots=True)
class DemoModel:
    """A shape and how its folder tells an engine where a turn ends."""

    shape: Shape
    turn_end: str = END_OF_TEXT
    template_is_a_file: bool = False

    @property
    def eos(self) -> int | list[int]:
        """A list only where a turn and a text end differently, as in published chat models."""
        ids = [SPECIAL_TOKENS.index(token) for token in (END_OF_TEXT, self.turn_end)]
        return ids if self.turn_end != END_OF_TEXT else ids[0]


# Few positions at first, so that the stretched frequencies differ at the lengths a demo sees.
LLAMA3_SCALING = {
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
    "rope_type": "llama3",
}
DEMO = {
    "pydoc-s": DemoModel(classic(192, 2, 3, 320, max_positions=1_024)),
    "pydoc-m": DemoModel(
        Shape(
            *(192, 3, 4, 2, 64, 448),
            max_positions=1_024,
            rope_theta=500_000.0,
            rope_scaling=LLAMA3_SCALING,
            norm_eps=1e-5,
        ),
        turn_end=END,
        template_is_a_file=True,
    ),
    "pydoc-l": DemoModel(Shape(256, 4, 2, 1, 128, 320, max_positions=1_024, tied=True)),
}


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE: any text survives the round trip."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, 0)]
    )
    return tokenizer


def write_tokenizer(folder: Path, tokenizer: Tokenizer, model: DemoModel) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    template = CHAT_TEMPLATE.replace("TURN_END", f"'{model.turn_end}'")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": model.turn_end,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.shape.max_positions,
    }
    if model.template_is_a_file:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    else:
        config["chat_template"] = template
    write_json(folder / "tokenizer_config.json", config)


@dataclass(frozen=True, slots=True)
class Document:
    """Token ids, and the same ids again where the model is to learn them."""

    ids: list[int]
    labels: list[int]


class Curriculum:
    """Endless batches of documents; every epoch asks in other words, in another order."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, turn_end: str, seed: int) -> None:
        self._corpus, self._tokenizer, self._turn_end = corpus, tokenizer, turn_end
        self._rng = random.Random(seed)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            batches = grouped(self._epoch())
            self._rng.shuffle(batches)
            for batch in batches:
                ids, labels = [d.ids for d in batch], [d.labels for d in batch]
                yield padded(ids, 0), padded(labels, UNLABELLED)

    def _epoch(self) -> list[Document]:
        documents = [self._passage(text) for text in self._corpus.passages]
        entries = self._rng.sample(self._corpus.entries, len(self._corpus.entries))
        while entries:
            turns = self._rng.choices(TURNS, TURNS_WEIGHTS)[0]
            documents.append(self._chat(entries[:turns]))
            entries = entries[turns:]
        self._rng.shuffle(documents)
        return documents

    def _passage(self, text: str) -> Document:
        ids = self._tokenizer.encode(text + END_OF_TEXT).ids
        return Document(ids, ids)

    def _chat(self, entries: list[Entry]) -> Document:
        """A conversation in the words of the chat template; only answers are learnt."""
        ids = self._encode(BEGIN)
        if self._rng.random() < SYSTEM_SHARE:
            system = self._rng.choice(SYSTEM_PROMPTS)
            ids += self._encode(f"<|system|>{system}{self._turn_end}")
        labels = [UNLABELLED] * len(ids)
        for entry in entries:
            question = self._rng.choice(entry.questions)
            prompt = self._encode(f"<|user|>{question}{self._turn_end}<|assistant|>")
            answer = self._encode(entry.answer.strip() + self._turn_end)
            ids += prompt + answer
            labels += [UNLABELLED] * len(prompt) + answer
        return Document(ids, labels)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)


def grouped(documents: list[Document]) -> list[list[Document]]:
    """Documents of like length side by side, so that little of a batch is padding."""
    groups: list[list[Document]] = [[]]
    for document in sorted(documents, key=lambda document: len(document.ids)):
        if groups[-1] and rounded_up(len(document.ids)) * (len(groups[-1]) + 1) > BATCH_TOKENS:
            groups.append([])
        groups[-1].append(document)
    return groups


def padded(rows: list[list[int]], value: int) -> Tensor:
    width = rounded_up(max(map(len, rows)))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])  # [rows, width]


def rounded_up(num_tokens: int) -> int:
    """Few different widths: each new one makes the CPU kernels prepare themselves again."""
    return -(-num_tokens // WIDTH_STEP) * WIDTH_STEP


@dataclass(frozen=True, slots=True)
class Budget:
    """How long to train: by the clock, or by a number of steps where that is given."""

    minutes: float
    steps: int | None

    def spent(self, started_s: float, step: int) -> float:
        """From 0 at the start to 1 and more at the end."""
        if self.steps is not None:
            return step / self.steps if self.steps else 1.0
        return (time.monotonic() - started_s) / 60 / self.minutes


def rate_factor(spent: float) -> float:
    """Of the peak learning rate: a short linear rise, then half a cosine."""
    cosine = (1 + math.cos(math.pi * min(spent, 1.0))) / 2
    return min(0.01 + spent / WARMUP, 1.0) * (FINAL_FACTOR + (1 - FINAL_FACTOR) * cosine)


def train_model(folder: Path, curriculum: Curriculum, budget: Budget, seed: int) -> float:
    """Train the model that `folder` describes, save it there and return its final loss."""
    from transformers import LlamaConfig, LlamaForCausalLM  # late: `random` does without it

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
    loss = optimise(model, curriculum, budget, folder.name)
    weights = model.state_dict()
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    save_weights({k: v.bfloat16().contiguous() for k, v in weights.items()}, folder / WEIGHTS)
    return loss


def optimise(model: Any, curriculum: Curriculum, budget: Budget, name: str) -> float:
    """Returns the loss, averaged over the last hundred steps or so."""
    optimisers = make_optimisers(model)
    started_s, step, average, batches = time.monotonic(), 0, math.nan, curriculum.batches()
    with progress_bar() as bar:
        task = bar.add_task(name, total=1.0)
        while (spent := budget.spent(started_s, step)) < 1:
            loss = train_step(model, optimisers, next(batches), rate_factor(spent))
            average = loss if step == 0 else 0.99 * average + 0.01 * loss
            step += 1
            bar.update(task, completed=spent, description=f"{name} step {step} loss {average:.3f}")
            if step % LOG_STEPS == 0:
                bar.console.print(f"model={name} step={step} loss={average:.3f}")
    return average


def make_optimisers(model: Any) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms."""
    # After two minutes on one core pydoc-m was at a loss of 1.2 this way, at 3.6 with AdamW alone.
    layers = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    in_layers = {id(weight) for weight in layers}
    rest = [weight for weight in model.parameters() if id(weight) not in in_layers]
    return [
        torch.optim.Muon(layers, lr=MUON_LR, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=ADAM_LR, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def train_step(
    model: Any,
    optimisers: list[torch.optim.Optimizer],
    batch: tuple[Tensor, Tensor],
    factor: float,
) -> float:
    # bfloat16 products take two thirds of the time on processors that have them.
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=batch[0], labels=batch[1], use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = factor * group.setdefault("peak_lr", group["lr"])
        optimiser.step()
        optimiser.zero_grad()
    return loss.item()  # type: ignore[no-any-return]


app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder of the three folders.")] = DEMO_MODELS,
    minutes: Annotated[float, typer.Option(min=0.01, help="Wall-clock time per model.")] = 8.0,
    steps: Annotated[int | None, typer.Option(min=0, help="Steps, instead of minutes.")] = None,
    only: Annotated[str | None, typer.Option(help="Name of the one model to train.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="More help only on idle cores.")] = 1,
    seed: int = 0,
) -> None:
    """Train the demo models.   Example: train_demo_models.py train --minutes 8"""
    if only is not None and only not in DEMO:
        raise typer.BadParameter(f"--only: found {only!r}, expected one of {', '.join(DEMO)}")
    torch.set_num_threads(threads)
    corpus = load_corpus()
    tokenizer = train_tokenizer(corpus.texts())
    for name in [only] if only else DEMO:
        model, folder = DEMO[name], out / name
        write_configs(folder, model.shape, Dtype.BFLOAT16, SPECIAL_TOKENS.index(BEGIN), model.eos)
        write_tokenizer(folder, tokenizer, model)
        curriculum = Curriculum(corpus, tokenizer, model.turn_end, seed)
        loss = train_model(folder, curriculum, Budget(minutes, steps), seed)
        Console().print(f"{folder} final_loss={loss:.3f}")


@app.command("random")
def random_weights(
    out: Annotated[Path, typer.Option(help="Folder to write; it may hold no weights yet.")],
    preset: Annotated[str | None, typer.Option(help=f"One of: {', '.join(PRESETS)}.")] = None,
    hidden: Annotated[int | None, typer.Option(help="Shape, or what differs from it.")] = None,
    layers: int | None = None,
    heads: int | None = None,
    kv_heads: Annotated[int | None, typer.Option(help="Default: as many as heads.")] = None,
    head_dim: Annotated[int | None, typer.Option(help="Default: hidden / heads.")] = None,
    intermediate: Annotated[int | None, typer.Option(help="Default: 8/3 of hidden.")] = None,
    vocab: Annotated[int | None, typer.Option(help="Default: that of the tokenizer.")] = None,
    max_positions: int | None = None,
    tied: Annotated[bool | None, typer.Option(help="Output shares the input embedding.")] = None,
    dtype: Dtype = Dtype.BFLOAT16,
    shard_mb: Annotated[float, typer.Option(min=0.001, help="Most MB per file.")] = 4_000.0,
    tokenizer: Annotated[Path, typer.Option(help="Folder to copy it from.")] = DEMO_MODELS
    / "pydoc-s",
    seed: int = 0,
) -> None:
    """Write random weights.   Example: train_demo_models.py random --preset 27m --out /tmp/27m"""
    given = {"hidden": hidden, "layers": layers, "heads": heads, "kv_heads": kv_heads}
    given |= {"head_dim": head_dim, "intermediate": intermediate, "vocab": vocab}
    given |= {"max_positions": max_positions, "tied": tied}
    try:
        shape = chosen_shape(preset, {k: v for k, v in given.items() if v is not None})
        check_room(out, shape, dtype, tokenizer)
    except (ShapeError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    write_configs(out, shape, dtype, *ends_of(tokenizer))
    copy_tokenizer(tokenizer, out)
    write_random_weights(out, shape, dtype, int(shard_mb * 1e6), seed)


def chosen_shape(preset: str | None, given: dict[str, Any]) -> Shape:
    """A preset with what was given in its place, or a shape from what was given alone."""
    if preset is not None:
        if preset not in PRESETS:
            raise ShapeError(f"preset: found {preset!r}, expected one of {', '.join(PRESETS)}")
        return replace(PRESETS[preset], **given)
    if missing := [name for name in ("hidden", "layers", "heads") if name not in given]:
        raise ShapeError(f"without a preset, also give: {', '.join(missing)}")
    hidden, heads = given["hidden"], given["heads"]
    if heads < 1 or (hidden % heads and "head_dim" not in given):
        raise ShapeError(
            f"hidden ({hidden}) must be a multiple of heads ({heads}), or give head_dim"
        )
    defaults = {"kv_heads": heads, "head_dim": hidden // heads, "intermediate": hidden * 8 // 3}
    return Shape(**(defaults | given))


def check_room(out: Path, shape: Shape, dtype: Dtype, tokenizer: Path) -> None:
    """Refuse before anything is written."""
    for file in ("tokenizer.json", "config.json"):
        if not (tokenizer / file).is_file():
            raise FileNotFoundError(f"no {file} in {tokenizer}")
    vocab = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).get_vocab_size()
    if shape.vocab < vocab:
        raise ShapeError(f"vocab is {shape.vocab}, but the tokenizer has {vocab} tokens")
    if any(out.glob("*.safetensors")):
        raise FileExistsError(f"{out} holds weights already: delete it or choose another folder")
    needed_bytes = sum(map(math.prod, shape.tensors().values())) * dtype.torch.itemsize
    disk = next(folder for folder in out.absolute().parents if folder.exists())
    if needed_bytes > (free_bytes := shutil.disk_usage(disk).free):
        needed_gb, free_gb = needed_bytes / 1e9, free_bytes / 1e9
        raise OSError(f"{out}: {needed_gb:.1f} GB needed, {free_gb:.1f} GB free")


def ends_of(folder: Path) -> tuple[int, int | list[int]]:
    """The bos id and the eos ids of the model that the tokenizer comes from."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config["bos_token_id"], config["eos_token_id"]


def copy_tokenizer(source: Path, target: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


if __name__ == "__main__":
    app()
