"""Estimates the time of an engine from a GPU's data sheet: a roofline for each kernel.

    time = sum over kernels of  max(operations / (0.7 rate), bytes / bandwidth) + launch

The kernels are those of the plans that TensorRT-RTX 1.7 makes of the graphs, read with
:mod:`clipdeploy.engines.plan_text` (``tests/clipdeploy/engines/test_roofline.py`` compares their
number).  In a block with n rows (images times tokens) of width D, a Linear that is

    FP16     is one kernel with its bias, and with GELU or the residual addition; GELU rounds to FP8
             in it too, but not to INT8
    8 bits   is one kernel that writes its sums as FP16 (of qkv and fc1, on request, in 8 bits), and
             its bias, the residual addition or GELU are in a second kernel, which also computes the
             next LayerNorm and rounds the input of the next 8-bit Linear

and the other kernels of a block are a LayerNorm before each FP16 chain, one that splits Q, K and V,
and one for both products of attention with the softmax between them.  A kernel reads its inputs and
writes its outputs once, w bytes a value: 2 in FP16, 1 in 8 bits.

No product reaches the peak rate of the data sheet.  Of 1, 0.7 and 0.5 times the peak, 0.7 gives
the ratios of INT8 and FP8 to FP16 that are nearest to published ones (``docs/numbers.md``).  The
estimate is pessimistic where a tensor stays in the L2 cache, and it does not know what TensorRT
fuses, whose plans contain no text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from clipdeploy.core.errors import UsageError
from clipdeploy.core.passport import Passport
from clipdeploy.engines.gpus import Format, GpuSpec
from clipdeploy.models import cards
from clipdeploy.models.cards import ModelCard

__all__ = [
    "LAUNCH_SECONDS",
    "PRODUCT_SHARE",
    "Formats",
    "Geometry",
    "Kernel",
    "attention_name",
    "block_linears",
    "block_products",
    "check_formats",
    "engine_seconds",
    "every_linear",
    "geometry_of",
    "kernel_seconds",
    "kernels",
    "linear_outputs",
]

# From the end of a kernel to the start of the next one in a stream: 3.8 us a kernel less the 2.9 us
# that it runs, on a V100 (Gray 2019, "Getting Started with CUDA Graphs", NVIDIA's developer blog;
# 0.5 us in a CUDA graph).  No source has it for every GPU of the table.
LAUNCH_SECONDS = 0.9e-6

# The share of the peak rate that matrix products reach; see above.
PRODUCT_SHARE = 0.7

# TensorRT-RTX fuses INT8 attention of 197 tokens and not of 577 (docs/numbers.md); FP8 of both.
_MOST_FUSED_TOKENS = 197

# The Linears whose sums may be written in 8 bits; see calibration.policy.Scope.outputs.
_WITH_OUTPUTS = ("attn.qkv", "mlp.fc1")
_ROLES = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")

# Format by name: of Linears, such as ``blocks.3.mlp.fc1``, of attention's two products, such as
# ``blocks.3.attn``, and of the sums that 8-bit Linears write, such as ``blocks.3.mlp.fc1.output``.
# Names that are left out are FP16.
Formats = Mapping[str, Format]


@dataclass(frozen=True)
class Geometry:
    """What determines the sizes of a ViT's tensors; ``heads`` and ``classes`` hardly matter.

    ``hidden`` is the MLP's width, None for four times ``width``, as in a card.
    """

    image_size: int
    patch: int
    width: int
    depth: int
    heads: int
    classes: int
    hidden: int | None = None

    @property
    def mlp(self) -> int:
        """The width of the MLP's hidden layer."""
        return self.hidden or 4 * self.width

    @property
    def tokens(self) -> int:
        """Sequence length, including the class token."""
        return (self.image_size // self.patch) ** 2 + 1

    @classmethod
    def of_card(cls, card: ModelCard) -> Geometry:
        """The geometry of a card's model."""
        return cls(
            card.image_size,
            card.patch,
            card.width,
            card.depth,
            card.heads,
            card.classes,
            card.hidden,
        )


@dataclass(frozen=True)
class Kernel:
    """A kernel: what it computes, its block, its operations and the bytes that it moves.

    ``operations`` counts two for each multiply-accumulate of matrix products, 0 for other kernels;
    ``form`` is the format of the products' operands.  A kernel that ends one block and begins the
    next belongs to the next, as in :func:`clipdeploy.engines.plan_text.kernels_by_block`.
    """

    name: str
    block: str
    operations: float
    bytes: float
    form: Format = "fp16"


def geometry_of(passport: Passport, depth: int | None = None) -> Geometry:
    """The geometry of a graph; ``depth`` replaces the card's number of blocks.

    Raises:
        UsageError: the passport's model has no card.
    """
    card = cards.find(passport.model)
    return replace(
        Geometry.of_card(card),
        image_size=passport.preprocess.size,
        depth=card.depth if depth is None else depth,
        classes=passport.classes,
    )


def block_linears(block: int) -> tuple[str, ...]:
    """The names of a block's Linears, in network order."""
    return tuple(
        f"blocks.{block}.{role}" for role in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    )


def attention_name(block: int) -> str:
    """The name of a block's two products of activations, Q K^T and the one with V."""
    return f"blocks.{block}.attn"


def block_products(geometry: Geometry, block: int) -> tuple[str, ...]:
    """What may be in 8 bits in a block: its Linears and its attention, in network order.

    The last block's attention stays in FP16, as :func:`calibration.policy.place` decides.
    """
    qkv, *others = block_linears(block)
    attention = [attention_name(block)] if block < geometry.depth - 1 else []
    return (qkv, *attention, *others)


def linear_outputs(linears: Iterable[str]) -> tuple[str, ...]:
    """The names of the sums that may be in 8 bits, of the 8-bit Linears ``linears``."""
    return tuple(f"{name}.output" for name in linears if name.endswith(_WITH_OUTPUTS))


def every_linear(
    depth: int, form: Format, *, attention: bool = False, outputs: bool = False
) -> dict[str, Format]:
    """Formats with all Linears of the blocks in ``form``, and attention and outputs if asked.

    As :func:`calibration.policy.place` does, it leaves out the last block's attention.
    """
    names = [name for block in range(depth) for name in block_linears(block)]
    if outputs:
        names += linear_outputs(names)
    if attention:
        names += map(attention_name, range(depth - 1))
    return dict.fromkeys(names, form)


def check_formats(gpu: GpuSpec, formats: Formats) -> None:
    """Raise an error if a GPU has no rate for one of the formats.

    Raises:
        UsageError: the GPU's data sheet has no such rate.
    """
    for form in sorted(set(formats.values())):
        if gpu.rate(form) is None:
            raise UsageError(
                f"{gpu.name} has no {form.upper()} products",
                hint="choose a GPU of compute capability 8.9 or later",
            )


def kernel_seconds(kernel: Kernel, gpu: GpuSpec) -> float:
    """The time of one kernel with its launch; infinite if the GPU does not have its format."""
    rate = gpu.rate(kernel.form) if kernel.operations else 1.0
    computing = float("inf") if rate is None else kernel.operations / (PRODUCT_SHARE * rate)
    return max(computing, kernel.bytes / gpu.bandwidth) + LAUNCH_SECONDS


def engine_seconds(made: Iterable[Kernel], gpu: GpuSpec) -> float:
    """The time of all kernels, one after the other."""
    return sum(kernel_seconds(kernel, gpu) for kernel in made)


def kernels(geometry: Geometry, formats: Formats, batch: int) -> tuple[Kernel, ...]:
    """The kernels of an engine for ``batch`` images, in order.

    From the last block's attention on, only the class tokens are computed.
    """
    made = list(_stem(geometry, batch))
    follows: Format = "fp16"
    for number in range(geometry.depth):
        block = _Block(geometry, formats, batch, number)
        made += block.kernels(follows)
        follows = block.form("mlp.fc2")
    return (*made, *_head(geometry, formats, batch, follows))


def _width(form: Format) -> int:
    """Bytes of a value."""
    return 2 if form == "fp16" else 1


def _with_residual(form: Format) -> int:
    """Bytes for each output of a Linear; in FP16 it also reads the residual, which it adds."""
    return 4 if form == "fp16" else 2


def _stem(geometry: Geometry, batch: int) -> Iterator[Kernel]:
    """To FP16, the patch convolution, and the class token, positions and first LayerNorm."""
    pixels = 3 * geometry.patch**2
    patches, rows = batch * (geometry.tokens - 1), batch * geometry.tokens
    image, width = batch * 3 * geometry.image_size**2, geometry.width
    yield Kernel("to fp16", "image", 0, 6 * image)
    moved = 2 * (image + pixels * width + patches * width)
    yield Kernel("patch_embed", "patch_embed", 2 * patches * pixels * width, moved)
    yield Kernel("norm_pre", "vit", 0, 4 * rows * width)


def _head(geometry: Geometry, formats: Formats, batch: int, follows: Format) -> Iterator[Kernel]:
    width, classes, form = geometry.width, geometry.classes, formats.get("head", "fp16")
    yield _norm("norm", "norm", batch * width, follows, form)
    moved = _width(form) * (batch + classes) * width + 4 * batch * classes
    yield Kernel("head", "head", 2 * batch * width * classes, moved, form)


def _norm(name: str, block: str, values: int, follows: Format, form: Format) -> Kernel:
    """A LayerNorm; after an 8-bit Linear also its scales, its bias and the residual addition."""
    read, written = (2, 0) if follows == "fp16" else (4, 2)
    return Kernel(name, block, 0, (read + written + _width(form)) * values)


class _Block:
    """One block: n rows go in, and ``rows`` come out, which are fewer in the last block."""

    def __init__(self, geometry: Geometry, formats: Formats, batch: int, number: int) -> None:
        self._geometry, self._formats, self._batch = geometry, formats, batch
        self._name = f"blocks.{number}"
        self._attention = formats.get(attention_name(number), "fp16")
        self._n = batch * geometry.tokens
        self._queries = 1 if number == geometry.depth - 1 else geometry.tokens
        self._rows = batch * self._queries

    def form(self, role: str) -> Format:
        """The format of a Linear: ``attn.qkv``, ``attn.proj``, ``mlp.fc1`` or ``mlp.fc2``."""
        return self._formats.get(f"{self._name}.{role}", "fp16")

    def _sum_width(self, role: str) -> int:
        """Bytes of a sum that a Linear writes."""
        return _width(self.form(f"{role}.output"))

    def kernels(self, follows: Format) -> Iterator[Kernel]:
        """All kernels of the block; ``follows`` is the format of the Linear before it."""
        width, mlp = self._geometry.width, self._geometry.mlp
        qkv, proj, fc1, fc2 = map(self.form, _ROLES)
        yield _norm("norm1", self._name, self._n * width, follows, qkv)
        yield self._linear("attn.qkv", self._n, width, 3 * width)
        split = (self._sum_width("attn.qkv") + _width(self._attention)) * 3 * self._n * width
        yield Kernel("attn.split", self._name, 0, split)
        long = self._geometry.tokens > _MOST_FUSED_TOKENS
        if self._attention == "int8" and (proj == "fp16" or long):
            yield from self._separate_attention()
        else:
            yield from self._fused_attention(proj)
        yield self._linear("attn.proj", self._rows, width, width, written=_with_residual(proj))
        yield _norm("norm2", self._name, self._rows * width, proj, fc1)
        if fc1 == "fp16" and fc2 != "int8":
            yield self._linear("mlp.fc1", self._rows, width, mlp, written=_width(fc2))
        else:
            yield self._linear("mlp.fc1", self._rows, width, mlp)
            gelu = (self._sum_width("mlp.fc1") + _width(fc2)) * self._rows * mlp
            yield Kernel("mlp.gelu", self._name, 0, gelu)
        yield self._linear("mlp.fc2", self._rows, mlp, width, written=_with_residual(fc2))

    def _linear(
        self, role: str, rows: int, cin: int, cout: int, *, written: int | None = None
    ) -> Kernel:
        """A Linear that moves ``written`` bytes for each output, None for those of its sums."""
        form = self.form(role)
        written = self._sum_width(role) if written is None else written
        moved = _width(form) * (rows + cout) * cin + written * rows * cout
        return Kernel(role, self._name, 2 * rows * cin * cout, moved, form)

    @property
    def _product(self) -> float:
        """Operations of one of attention's products."""
        return 2.0 * self._rows * self._geometry.tokens * self._geometry.width

    def _fused_attention(self, proj: Format) -> Iterator[Kernel]:
        """One kernel for both products; INT8 output of FP16 products is transposed separately."""
        width, form = self._geometry.width, self._attention
        moved = _width(form) * (self._rows + 2 * self._n) + _width(proj) * self._rows
        yield Kernel("attn", self._name, 2 * self._product, moved * width, form)
        if form == "fp16" and proj == "int8":
            yield Kernel("attn.transpose", self._name, 0, 2 * self._rows * width)

    def _separate_attention(self) -> Iterator[Kernel]:
        """INT8 products are fused only for an INT8 proj, and for few tokens."""
        form, name = self._attention, self._name
        queries, keys = self._rows * self._geometry.width, self._n * self._geometry.width
        scores = self._rows * self._geometry.heads * self._geometry.tokens
        yield Kernel("attn.pad", name, 0, 2 * (queries + keys))
        yield Kernel("attn.scores", name, self._product, queries + keys + 2 * scores, form)
        yield Kernel("attn.softmax", name, 0, 3 * scores)
        yield Kernel("attn.pad scores", name, 0, 2 * scores)
        yield Kernel("attn.pad values", name, 0, 2 * keys)
        yield Kernel("attn.mix", name, self._product, scores + keys + 2 * queries, form)
        yield Kernel("attn.transpose", name, 0, 4 * queries)
