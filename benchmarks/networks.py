"""The networks that benchmarks draw their shapes from: what flows through them, and what they multiply with."""

from dataclasses import dataclass, replace

__all__ = ["NETWORKS", "Network"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Network:
    """activations: per image, [C, H, W] or [tokens, C]. joined: those that a residual was added to. weights: of
    convolutions or linear layers. linears: rows per image, inputs and outputs of linear layers and 1x1 convolutions.
    norms: how many tensors of norm parameters, and how long they are on average. classes: of the logits. What is empty
    or None is not timed.
    """

    name: str
    batch: int
    activations: tuple[Shape, ...] = ()
    joined: tuple[Shape, ...] = ()
    weights: tuple[Shape, ...] = ()
    linears: tuple[tuple[int, int, int], ...] = ()
    norms: Shape | None = None
    classes: int | None = None

    @property
    def label(self) -> str:
        return f"{self.name} b{self.batch}"

    def at(self, batch: int) -> "Network":
        """The same with another batch."""
        return replace(self, batch=batch)

    def tensors(self, dims: int | None = None) -> list[Shape]:
        """The activations of a batch; only those with `dims` dimensions if it is given."""
        shapes = [(self.batch, *shape) for shape in self.activations]
        return [shape for shape in shapes if dims in (None, len(shape))]


_RESNET50 = Network(
    "ResNet-50",
    64,
    activations=((64, 112, 112), (256, 56, 56), (512, 28, 28), (64, 56, 56), (1024, 14, 14), (2048, 7, 7)),
    joined=((256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)),
    weights=((512, 512, 3, 3), (2048, 512, 1, 1)),
    linears=((3136, 64, 256), (3136, 256, 64), (784, 512, 128), (196, 1024, 256), (49, 512, 2048)),
    norms=(106, 501),
    classes=1000,
)
_WRN28 = Network(
    "WRN-28-10",
    200,
    activations=((160, 32, 32), (320, 16, 16), (640, 8, 8)),
    weights=((640, 640, 3, 3),),
    norms=(50, 359),
    classes=10,
)
_RESNEXT29 = Network(
    "ResNeXt-29",
    200,
    activations=((256, 32, 32), (512, 16, 16), (1024, 8, 8)),
    joined=((256, 32, 32), (512, 16, 16), (1024, 8, 8)),
    weights=((1024, 512, 1, 1),),
    linears=((1024, 64, 256), (1024, 256, 128), (256, 512, 256), (64, 1024, 512)),
    classes=100,
)
_VIT_B = Network(
    "ViT-B",
    64,
    activations=((197, 3072), (197, 768)),
    weights=((3072, 768),),
    linears=((197, 768, 3072), (197, 3072, 768), (197, 768, 2304), (197, 768, 768)),
    norms=(50, 768),
    classes=1000,
)
_RESNET20 = Network(
    "ResNet-20",
    200,
    activations=((16, 32, 32), (32, 16, 16), (64, 8, 8)),
    joined=((16, 32, 32), (64, 8, 8)),
    weights=((64, 64, 3, 3), (16, 16, 3, 3)),
    classes=10,
)
_VIT_S = Network("ViT-S", 8, linears=((197, 384, 1536), (197, 1536, 384)), norms=(50, 384), classes=1000)
_TINY = Network(
    "tiny",
    4,
    activations=((3, 6, 5), (4, 5, 3)),
    joined=((3, 6, 5),),
    weights=((5, 3, 3, 3),),
    linears=((6, 128, 16),),
    norms=(3, 8),
    classes=10,
)

# Seconds of smoke test; small networks on a CPU; the networks of the papers at their batches on a GPU.
NETWORKS: dict[str, tuple[Network, ...]] = {
    "tiny": (_TINY,),
    "cpu": (_RESNET20, _VIT_S),
    "cuda": (_RESNET50, _WRN28, _RESNEXT29, _VIT_B),
}
