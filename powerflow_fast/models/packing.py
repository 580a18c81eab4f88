"""The rows in which a model computes a micro-batch of prompts and completions.

Padded: a sequence a row. Packed: all real tokens in one row, each sequence a segment of its own.
Packed with shared prompts: a prompt of several completions lies there once, and each of them is a
segment that sees it. The states are the same, within rounding; what differs is how many tokens pass
through the model.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from powerflow_fast.models.lm_head import backbone_states
from powerflow_fast.models.packed_attention import PACKED, Block, Segments, check_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Layout = Literal["padded", "packed", "shared"]
PADDED = 2  # times the tokens of a shorter segment, that a block may pad it to


@dataclass(frozen=True)
class Rows:
    """A micro-batch of B sequences, given as [B, W], laid out in rows [R, L].

    Indices count through all R * L places. Where a token is not real, or has none before it, they
    are 0.
    """

    inputs: dict[str, Any]  # keywords of the backbone: input_ids [R, L] and what goes with them
    segments: Segments | None  # of a packed row, R = 1
    index: Tensor  # [B, W] where each token lies
    predictors: Tensor  # [B, W] where the token before it lies, whose state predicts it
    saved: int  # real tokens that are not computed, as they are of a shared prompt

    @property
    def input_ids(self) -> Tensor:
        """[R, L]"""
        return self.inputs["input_ids"]

    def hidden_states(self, model: PreTrainedModel) -> Tensor:
        """[R * L, H] final hidden states of the backbone; the head is not run.

        Raises:
            ValueError: where a layer did not take part in sharing a prompt.
        """
        if self.segments is not None:
            self.segments.windows.clear()
        hidden = backbone_states(model, self.inputs)
        if self.segments is not None and self.segments.keys is not None:
            check_layers(model, self.segments)
        return hidden.flatten(0, 1)

    def predicting(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """[N, H]: the states that predict the tokens where mask [B, T] is true.

        `hidden` is what `hidden_states` gave; the mask is of the last T columns.
        """
        predictors = self.predictors[:, self.predictors.shape[1] - mask.shape[1] :]
        return hidden.index_select(0, predictors[mask].to(hidden.device))

    def first_states(self, hidden: Tensor, count: int) -> Tensor:
        """[B, count, H]: the states of the first columns; anything where a token is not real."""
        return hidden[self.index[:, :count].to(hidden.device)]


class _Sequence(NamedTuple):
    """The real tokens of one sequence, on the host."""

    tokens: Tensor  # [tokens]
    columns: Tensor  # [tokens]
    prompt: int  # how many of them are its prompt

    @property
    def completion(self) -> Tensor:
        return self.tokens[self.prompt :]


def lay_out(ids: Tensor, mask: Tensor, prompt_lengths: Tensor, layout: Layout = "padded") -> Rows:
    """The rows of a micro-batch.

    Args:
        ids, mask: [B, W] token ids, prompt and completion, real where the mask is 1; padding may be
            anywhere.
        prompt_lengths: [B] real tokens of each prompt.
        layout: "padded"; "packed": every sequence by itself; "shared": equal prompts once. Where no
            two prompts are equal, "shared" is "packed". Both wait for the tokens on the host.
    """
    if layout == "padded":
        index = torch.arange(ids.numel(), device=ids.device).view_as(ids)
        inputs = {"input_ids": ids, "attention_mask": mask}
        return Rows(inputs, None, index, _places_before(index, mask), 0)
    sequences = []
    for row, real, prompt in zip(ids.cpu(), mask.cpu(), prompt_lengths.tolist(), strict=True):
        columns = real.nonzero()[:, 0]
        sequences.append(_Sequence(row[columns].long(), columns, prompt))
    return _Packing(sequences, share=layout == "shared").rows(ids)


def _places_before(index: Tensor, mask: Tensor) -> Tensor:
    """[B, W] the index of the real token before each; 0 where there is none."""
    last = index.where(mask.bool(), -1).cummax(1).values
    return torch.nn.functional.pad(last[:, :-1], (1, 0), value=0).clamp(min=0)


class _Packing:
    """One row: segments without a prefix first, then the completions of each shared prompt."""

    def __init__(self, sequences: list[_Sequence], share: bool) -> None:
        self.sequences = sequences
        self.ids: list[Tensor] = []
        self.positions: list[Tensor] = []
        self.length = 0
        self.blocks: list[Block] = []
        self.prompts = [0] * len(sequences)  # where each one's prompt begins
        self.completions = [0] * len(sequences)  # and its completion
        groups: dict[Any, list[int]] = defaultdict(list)  # numbers of sequences with one prompt
        for number, sequence in enumerate(sequences):
            prompt = sequence.tokens[: sequence.prompt].numpy().tobytes()
            groups[prompt if share else number].append(number)
        for numbers in sorted(groups.values(), key=self._whole_length, reverse=True):
            self._add_whole(numbers)
        for numbers in groups.values():
            if len(numbers) > 1:
                self._add_completions(numbers)

    def _whole(self, numbers: list[int]) -> Tensor:
        """The segment without a prefix: a prompt of several, or a sequence to its end."""
        first = self.sequences[numbers[0]]
        return first.tokens if len(numbers) == 1 else first.tokens[: first.prompt]

    def _whole_length(self, numbers: list[int]) -> int:
        return len(self._whole(numbers))

    def _add(self, tokens: Tensor, start: int) -> None:
        self.ids.append(tokens)
        self.positions.append(torch.arange(start, start + len(tokens)))
        self.length += len(tokens)

    def _add_whole(self, numbers: list[int]) -> None:
        tokens, begin = self._whole(numbers), self.length
        if not len(tokens):
            return
        if not self.blocks or PADDED * len(tokens) < self.blocks[-1].lengths[0]:
            self.blocks.append(Block(begin, ()))
        self.blocks[-1] = self.blocks[-1]._replace(lengths=(*self.blocks[-1].lengths, len(tokens)))
        for number in numbers:
            self.prompts[number] = begin
            self.completions[number] = begin + self.sequences[number].prompt
        self._add(tokens, 0)

    def _add_completions(self, numbers: list[int]) -> None:
        prompt, begin = self.sequences[numbers[0]].prompt, self.length
        for number in numbers:
            self.completions[number] = self.length
            self._add(self.sequences[number].completion, prompt)
        lengths = [len(self.sequences[number].completion) for number in numbers]
        if any(lengths):
            filled = tuple(length for length in lengths if length)
            self.blocks.append(Block(begin, filled, self.prompts[numbers[0]], prompt))

    def rows(self, given: Tensor) -> Rows:
        """For a batch [B, W], whose shape and device the indices take."""
        index, predictors = torch.zeros(2, *given.shape, dtype=torch.long)
        for number, sequence in enumerate(self.sequences):
            begin, prompt = self.prompts[number], sequence.prompt
            after = self.completions[number]
            end = after + len(sequence.completion)
            places = torch.cat([torch.arange(begin, begin + prompt), torch.arange(after, end)])
            index[number, sequence.columns] = places
            predictors[number, sequence.columns[1:]] = places[:-1]
        device = given.device
        segments = Segments.of(tuple(self.blocks), device)
        inputs: dict[str, Any] = {
            "input_ids": torch.cat(self.ids)[None].to(device),
            "position_ids": torch.cat(self.positions)[None].to(device),
            # A mask that is there already: transformers makes none of [L, L].
            "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
            PACKED: segments,
        }
        if segments.keys is None:  # recurrent layers begin anew at these
            inputs |= segments.offsets
        return Rows(
            inputs,
            segments,
            index.to(device),
            predictors.to(device),
            sum(len(sequence.tokens) for sequence in self.sequences) - self.length,
        )
