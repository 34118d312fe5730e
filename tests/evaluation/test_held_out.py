"""Bits per byte of held-out text against a plain calculation, for a context that holds a text and one that does not."""

import math

import pytest
import torch
from helpers import SENTENCES, tiny_policy, tiny_tokenizer

from threefold.evaluation import held_out


@pytest.mark.parametrize("context", [400, 8])
def test_bits_per_byte_are_those_of_every_token_after_the_start(context):
    model, tokenizer, nats = tiny_policy(), tiny_tokenizer(), 0.0
    for text in SENTENCES:
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        for i in range(1, len(ids)):
            # windows of `context` tokens start at every half of one, and a token counts in the first that holds it
            start = max(0, -(-(i - context + 1) // (context // 2))) * (context // 2)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids[start:i]])).logits[0, -1]
            nats -= logits.log_softmax(-1)[ids[i]].item()
    expected = nats / math.log(2) / sum(len(text.encode()) for text in SENTENCES)
    found = held_out.text_bits_per_byte(model, tokenizer, SENTENCES, context)
    assert found == pytest.approx(expected, rel=1e-4)


def test_the_first_texts_hold_about_as_many_tokens_as_asked_for():
    tokenizer = tiny_tokenizer()
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in SENTENCES]
    assert held_out.first_texts(SENTENCES, tokenizer, 1) == SENTENCES[:1]
    assert held_out.first_texts(SENTENCES, tokenizer, sum(lengths[:3]) + 1) == SENTENCES[:3]
    assert held_out.first_texts(SENTENCES, tokenizer, 10**6) == SENTENCES
