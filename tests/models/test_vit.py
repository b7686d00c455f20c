"""Vision transformer: against PyTorch's own encoder layer, and separate operations in the traced graph."""

from __future__ import annotations

import operator
from pathlib import Path

import pytest
import torch
import torch.fx
from imagenet_accuracy import count_correct
from torch import nn

from ttaq.models.vit import Block, PatchEmbed, VisionTransformer


def test_block_is_the_encoder_layer_of_pytorch() -> None:
    torch.manual_seed(0)
    own = Block(24, 3).double().eval()
    layer = nn.TransformerEncoderLayer(24, 3, 96, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True).double().eval()
    with torch.no_grad():
        for norm in (own.norm1, own.norm2):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.5, 0.5)
    state = own.state_dict()
    names = {"attn.qkv.weight": "self_attn.in_proj_weight", "attn.qkv.bias": "self_attn.in_proj_bias"}
    for kind in ("weight", "bias"):
        names |= {f"attn.proj.{kind}": f"self_attn.out_proj.{kind}"}
        names |= {f"mlp.fc{i}.{kind}": f"linear{i}.{kind}" for i in (1, 2)}
        names |= {f"norm{i}.{kind}": f"norm{i}.{kind}" for i in (1, 2)}
    layer.load_state_dict({names[key]: value for key, value in state.items()})
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    torch.testing.assert_close(own(x), layer(x), rtol=1e-10, atol=1e-10)


def test_patches_go_row_by_row() -> None:
    embed = PatchEmbed(2, 1)
    with torch.no_grad():
        embed.proj.weight.fill_(1 / 12)
        embed.proj.bias.zero_()
    rows = torch.arange(2).repeat_interleave(2).view(4, 1)
    image = (10.0 * rows + torch.arange(3).repeat_interleave(2)).expand(1, 3, 4, 6)
    torch.testing.assert_close(embed(image), torch.tensor([0.0, 1, 2, 10, 11, 12]).view(1, 6, 1))


def test_logits_come_from_the_class_token() -> None:
    model = VisionTransformer(12, 1, 3, num_classes=12, image_size=8, patch_size=4).eval()
    with torch.no_grad():
        model.blocks[0].attn.proj.weight.zero_()  # no exchange between tokens
        model.head.weight.copy_(torch.eye(12))
        model.head.bias.zero_()
    a, b = torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8)
    assert torch.equal(model(a), model(b))
    tokens = model.cls_token[0] + model.pos_embed[0, :1] + model.blocks[0].attn.proj.bias
    torch.testing.assert_close(model(a), model.norm(tokens + model.blocks[0].mlp(model.blocks[0].norm2(tokens))))


def test_linears_softmax_and_matrix_products_are_nodes_of_their_own() -> None:
    depth = 2
    model = VisionTransformer(12, depth, 3, image_size=8, patch_size=4)
    nodes = torch.fx.symbolic_trace(model).graph.nodes
    kinds = [type(model.get_submodule(str(node.target))) for node in nodes if node.op == "call_module"]
    assert kinds.count(nn.Linear) == 4 * depth + 1
    assert kinds.count(nn.Softmax) == depth
    products = [node for node in nodes if node.op == "call_function" and node.target in (torch.matmul, operator.matmul)]
    assert len(products) == 2 * depth


# 80.62 % of the 1,300 are 1,048; the 100 are every 13th.
@pytest.mark.parametrize(
    ("step", "expected"), [pytest.param(13, 73, id="100"), pytest.param(1, 1048, id="1300", marks=pytest.mark.slow)]
)
def test_deit_tiny_on_real_images(data_folder: Path, step: int, expected: int) -> None:
    assert abs(count_correct(data_folder, "deit_tiny", "imagenet_deit_tiny", step) - expected) <= 1
