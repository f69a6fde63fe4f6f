"""The training loop against AdamW, clipping and the schedule written out."""

import pytest
import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from hf_peft_ext.training_loop import train_steps


def linear():
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def test_steps_are_those_written_out():
    batches = list(torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(1)))
    model, naive, losses = linear(), linear(), []
    optimizer = torch.optim.AdamW(naive.parameters(), 0.1, weight_decay=0.2)
    schedule = get_cosine_schedule_with_warmup(optimizer, 2, 5)
    for batch in batches:
        optimizer.zero_grad()
        loss = 10 * naive(batch).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(naive.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    steps = train_steps(
        list(model.parameters()), lambda x: 10 * model(x).square().mean(), batches, 5, 0.1, 2, "cosine", 0.2, 0.5
    )
    assert [loss.item() for loss in steps] == pytest.approx(losses)
    for found, wanted in zip(model.parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(found, wanted)
        assert found.grad is None


def test_it_stops_after_the_steps_or_the_batches():
    model, batches = linear(), [torch.ones(1, 3)] * 4
    for steps in (2, 9):
        ran = list(train_steps(list(model.parameters()), lambda x: model(x).sum(), iter(batches), steps, 0.1, 0))
        assert len(ran) == min(steps, 4)
        assert not any(loss.requires_grad for loss in ran)
