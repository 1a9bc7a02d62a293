"""The walk over a block's groups of Linears, against the block and the model it takes apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import MistralConfig

from brise.model.blocks import MistralDecoderLayer
from brise.model.mistral import MistralForCausalLM
from brise.model.rope import MistralRotaryEmbedding
from brise.model.walk import STAGES, BlockWalk, walk_context


def tiny(window: int | None = 5) -> MistralConfig:
    return MistralConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        sliding_window=window,
        initializer_range=0.3,
    )


def built(implementation: str, window: int | None = 5) -> MistralForCausalLM:
    torch.manual_seed(0)
    return MistralForCausalLM._from_config(tiny(window), attn_implementation=implementation).eval()


def walked(layer: MistralDecoderLayer, walk: BlockWalk, hidden: Tensor) -> Tensor:
    hidden = walk.after_attention(hidden, walk.attend(walk.attention_input(hidden)))
    return walk.after_mlp(hidden, walk.mlp_hidden(walk.mlp_input(hidden)))


@pytest.mark.parametrize("window", [5, 40, None])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_walk_is_the_forward_to_the_bit(implementation: str, window: int | None) -> None:
    model = built(implementation, window)
    ids = torch.randint(0, 61, (2, 12))
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True).hidden_states
        context = walk_context(model.config, model.model.rotary_emb, 12, torch.float32)
        hidden = expected[0]
        for i, layer in enumerate(model.model.layers):
            hidden = walked(layer, BlockWalk(layer, context), hidden)
            if i < 2:
                assert torch.equal(hidden, expected[i + 1])
        assert torch.equal(model.model.norm(hidden), expected[-1])


def test_stages_are_the_linears_of_a_block_in_their_order_with_their_inputs() -> None:
    model = built("sdpa")
    layer = model.model.layers[0]
    called: list[tuple[str, Tensor]] = []
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: called.append((name, args[0])))
    walk = BlockWalk(layer, walk_context(model.config, model.model.rotary_emb, 9, torch.float32))
    hidden = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        normed = walk.attention_input(hidden)
        context = walk.attend(normed)
        after = walk.after_attention(hidden, context)
        mlp = walk.mlp_input(after)
        inner = walk.mlp_hidden(mlp)
        walk.after_mlp(after, inner)
    assert [name for name, _ in called] == [name for stage in STAGES for name in stage]
    inputs = dict(called)
    for stage, shared in zip(STAGES, (normed, context, mlp, inner)):
        assert all(inputs[name] is shared for name in stage)


def test_a_module_replaced_between_stages_is_the_one_that_runs() -> None:
    class Zero(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.new_zeros((*x.shape[:-1], 32))

    model = built("sdpa")
    layer = model.model.layers[0]
    walk = BlockWalk(layer, walk_context(model.config, model.model.rotary_emb, 4, torch.float32))
    hidden = torch.randn(1, 4, 32)
    context = walk.attend(walk.attention_input(hidden))
    layer.self_attn.o_proj = Zero()
    assert torch.equal(walk.after_attention(hidden, context), hidden)


def test_a_block_alone_needs_no_model() -> None:
    """The way of a checkpoint larger than memory: one block, one rotary embedding."""
    model = built("sdpa")
    config = model.config
    layer = MistralDecoderLayer(config, 1).eval()
    layer.load_state_dict(model.model.layers[1].state_dict())
    context = walk_context(config, MistralRotaryEmbedding(config), 7, torch.float32)
    hidden = torch.randn(1, 7, 32)
    with torch.no_grad():
        expected = model.model.layers[1](
            hidden, attention_mask=context.attention_mask, position_embeddings=context.position_embeddings
        )
        assert torch.equal(walked(layer, BlockWalk(layer, context), hidden), expected)


def test_no_mask_is_made_where_none_is_needed() -> None:
    model = built("sdpa")
    assert walk_context(model.config, model.model.rotary_emb, 4, torch.float32).attention_mask is None
    mask = walk_context(model.config, model.model.rotary_emb, 7, torch.float32).attention_mask
    query, key = torch.arange(7)[:, None], torch.arange(7)[None]
    assert torch.equal(mask[0, 0], (key > query - 5) & (key <= query))


def test_refusals() -> None:
    model = built("sdpa")
    rotary = model.model.rotary_emb
    with pytest.raises(ValueError, match="length is 0, expected at least 1"):
        walk_context(model.config, rotary, 0, torch.float32)
    with pytest.raises(ValueError, match="names no attention implementation"):
        walk_context(tiny(), rotary, 4, torch.float32)
    walk = BlockWalk(model.model.layers[0], walk_context(model.config, rotary, 4, torch.float32))
    with pytest.raises(ValueError, match=r"hidden states are \(1, 5, 32\), expected \[batch, 4, width\]"):
        walk.attention_input(torch.zeros(1, 5, 32))
    with pytest.raises(ValueError, match="needs position_embeddings"):
        model.model.layers[0](torch.zeros(1, 5, 32))
