"""Vision transformers (Dosovitskiy et al., 2010.11929; DeiT: Touvron et al., 2012.12877) with timm's weight names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ttaq.errors import InputError
from ttaq.models.normalize import Normalize

__all__ = ["VisionTransformer"]

_EPS = 1e-6


class PatchEmbed(nn.Module):
    """Images (N, 3, H, W) to one token per patch, row by row: (N, H W / patch^2, width)."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


class Attention(nn.Module):
    """`proj(softmax(q k^T / sqrt(d)) v)` per head of d channels, on tokens (N, T, width).

    Linear layers, softmax and the two matrix products stay separate operations, so that a traced graph can quantize
    each of them.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.softmax = nn.Softmax(dim=-1)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        # (N, T, 3 width) -> (3, N, heads, T, d)
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, self.head_width)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv[0], qkv[1], qkv[2]
        attention = self.softmax(torch.matmul(query * self.head_width**-0.5, key.transpose(-2, -1)))
        return self.proj(torch.matmul(attention, value).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """`fc2(gelu(fc1(x)))` with the exact (erf) GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """`x + attn(norm1(x))`, then `x + mlp(norm2(x))`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=_EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=_EPS)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class VisionTransformer(nn.Module):
    """Patches, a class token, `depth` pre-norm blocks of self-attention and MLP, one linear layer on the class token.

    Input (N, 3, image_size, image_size) in [0, 1]; `mean` and `std` normalise it as the first step. Output: logits
    (N, num_classes). Differentiable everywhere and traceable by torch.fx. Weight names: `cls_token pos_embed
    patch_embed.proj blocks.i.{norm1,attn.qkv,attn.proj,norm2,mlp.fc1,mlp.fc2} norm head`. Without dropout and
    stochastic depth: for weights that are trained already. Fresh weights are PyTorch's defaults, tokens and positions
    normal with deviation 0.02.

    Raises InputError for sizes below 1, an image that is not whole patches, or a width that is not whole heads.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        num_classes: int = 1000,
        image_size: int = 224,
        patch_size: int = 16,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
    ) -> None:
        super().__init__()
        if min(width, depth, heads, num_classes, image_size, patch_size) < 1:
            raise InputError(
                f"VisionTransformer: width is {width}, depth {depth}, heads {heads}, num_classes {num_classes}, "
                f"image_size {image_size} and patch_size {patch_size}, expected all at least 1"
            )
        if width % heads:
            raise InputError(f"VisionTransformer: width is {width}, expected a multiple of the {heads} heads")
        if image_size % patch_size:
            raise InputError(
                f"VisionTransformer: image_size is {image_size}, expected a multiple of patch_size {patch_size}"
            )
        self.normalize = Normalize(mean, std)
        self.patch_embed = PatchEmbed(patch_size, width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + (image_size // patch_size) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=_EPS)
        self.head = nn.Linear(width, num_classes)
        for tokens in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(tokens, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(self.normalize(x))
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])  # type: ignore[no-any-return]
