"""The parts of sampling that go before and behind the kernel, on the device, without waiting."""

import numpy as np
import torch
from torch import Tensor

from muxrt.worker.device_storage import upload
from muxrt.worker.sampler import Edits


def edit_row(row: Tensor, edits: Edits, tokens: Tensor, prompt_tokens: int) -> None:
    """Change one row of logits in place, as `muxrt.worker.sampler.apply_edits` does.

    row [vocab] float32; tokens: all of the sequence so far.
    """
    if edits.repetition != 1.0:
        changed = torch.where(row > 0, row / edits.repetition, row * edits.repetition)
        row.copy_(torch.where(_counts(row, tokens) > 0, changed, row))
    outputs = tokens[prompt_tokens:]
    if (edits.frequency or edits.presence) and len(outputs):
        counts = _counts(row, outputs)
        penalty = edits.frequency * counts.double() + edits.presence
        row.sub_(torch.where(counts > 0, penalty, 0.0).float())
    if len(edits.bias_ids):
        row.index_add_(
            0, upload(edits.bias_ids, row.device), upload(edits.bias.astype(np.float32), row.device)
        )
    if len(outputs) < edits.min_tokens and len(edits.stop_ids):
        row.index_fill_(0, upload(edits.stop_ids, row.device), -torch.inf)


def _counts(row: Tensor, tokens: Tensor) -> Tensor:
    """How often each token of the vocabulary is there. [vocab] int32"""
    counts = torch.zeros(row.shape, dtype=torch.int32, device=row.device)
    ones = torch.ones(1, dtype=torch.int32, device=row.device).expand(len(tokens))
    return counts.index_add_(0, tokens, ones)
