"""Memory of one rank in training, by term and by placement of the LLM; nothing here was measured on a GPU.

P: parameters of the frozen LLM; N: of the mapper; W: ranks; s: bytes of a weight; T: tokens of a micro-batch, padding
included; D, F, H: width, feed-forward width and heads of the LLM; A: width of all heads together, D in most. Bytes on
one device, by term (:func:`memory_terms`):

    llm_weights     s P (replicated), s P / W (zero3), none (offload, which has s P / W in host memory)
    gathered        zero3 and offload: s (2 + 1 / W) min(P + N, max(largest tensor, reuse / 2) + prefetch)
    mapper          weights s N, fp32 masters 4 N, two moments 8 N, fp32 gradient 4 N; what is sharded, by engine
    bucket          deepspeed: fp32 room for gradients on their way, 5e7 elements whether they are needed or not
    llm_kept        T x layers x (8 D + 4 s A + 3 s F + 4 H + 8) + the last norm: see :func:`kept_bytes`
    mapper_kept     inputs, as all its weights are trained
    logits          (s + 12) bytes x answer places x V: s, fp32, those asked for, their log-softmax (in fp32 the
                    first two are one)
    context         CUDA, NCCL and workspaces: assumed
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sm_train.data.lengths import FRAMES_PER_POSITION
from sm_train.models.mapper import MapperConfig, SpeechMapper
from sm_train.train.engines.deepspeed import BUCKET, REUSE

GIB = 2**30
LOSS_BYTES = 12
"""That the regression keeps of one number of a position: the difference, and both vectors for the cosine, in fp32."""
FEATURE_BYTES = 2
PREFETCH = 5 * 10**7
"""Elements: DeepSpeed 0.19's stage3_prefetch_bucket_size."""
CONTEXT_BYTES = 1.5 * GIB
MARGIN = 0.95
"""Share of a device's memory that may be filled: the allocator's fragments take the rest. Assumed."""


@dataclass(frozen=True, slots=True)
class Llama:
    """The shape of a Llama, or of what is built like one."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    feed_forward: int
    vocabulary: int
    head_width: int = 0
    """Of one head; 0 for width / heads."""
    is_tied: bool = False
    """Whether the head is the input embedding."""

    @property
    def attention_width(self) -> int:
        """A: of all heads together."""
        return self.heads * (self.head_width or self.width // self.heads)

    @property
    def layer_parameters(self) -> int:
        """Those of all layers, without embedding and head."""
        attention = 2 * self.width * (self.attention_width + self.attention_width // self.heads * self.kv_heads)
        return self.layers * (attention + 3 * self.width * self.feed_forward + 2 * self.width)

    @property
    def parameters(self) -> int:
        """P."""
        return self.layer_parameters + (1 if self.is_tied else 2) * self.vocabulary * self.width + self.width


@dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch: every row has the same number of tokens."""

    items: int
    row_tokens: int
    positions: int
    answer: int

    @property
    def tokens(self) -> int:
        """T."""
        return self.items * self.row_tokens


LLAMA_31_8B = Llama(layers=32, width=4096, heads=32, kv_heads=8, feed_forward=14336, vocabulary=128_256)


class Mapper:
    """What of a mapper the formula needs."""

    def __init__(self, cfg: MapperConfig, output_width: int) -> None:
        with torch.device("meta"):
            module = SpeechMapper(cfg, cfg.widths[0], output_width)
        self.cfg, self.output_width, self.parameters = cfg, output_width, module.num_parameters
        first = sum(p.numel() for p in module.blocks[0].parameters())
        self.multiplications = self.parameters + first
        """Of one position: the first block sees two frames of it."""

    def mask_bytes(self, item_bytes: int, *, on_cpu: bool) -> int:
        """Bytes of an entry of a dropout mask: on a CPU it is a factor in the weights' own dtype."""
        return (item_bytes if on_cpu else 1) if self.cfg.dropout else 0

    def kept_bytes(self, item_bytes: int, mask_bytes: int) -> float:
        """Bytes that one position keeps for the backward; ``mask_bytes`` of an entry of a dropout mask."""
        first, second, last = self.cfg.widths
        feed_forward = self.cfg.feed_forward
        total = float(item_bytes * 3 * last)
        for frames, width in ((2, first), (1, second)):
            layer = item_bytes * (8 * width + 2 * feed_forward) + mask_bytes * (2 * width + feed_forward)
            total += frames * (self.cfg.layers * layer + item_bytes * 4 * width)
        return total


def kept_bytes(llm: Llama, row_tokens: int, item_bytes: int, *, keeps_inputs: bool) -> float:
    """Bytes that one token keeps in one layer of a frozen Llama under SDPA, for the backward.

    Frozen linears keep nothing but their weight. Two norms keep their input in fp32 (8 D) and a scale (8); attention
    keeps q, k, v and its output, k and v repeated for every head (4 s A), a row's scale (4 H) and its line of the mask
    (s L); the feed-forward keeps gate, silu(gate) and up (3 s F).

    Args:
        keeps_inputs: DeepSpeed's ZeRO-3 linear keeps its input though the weight is frozen: both norms' outputs (2 s D)
            and the product that goes down (s F); the input of o_proj is attention's output and there already.
    """
    norms, attention = 8 * llm.width + 8, item_bytes * (4 * llm.attention_width + row_tokens) + 4 * llm.heads
    inputs = item_bytes * (2 * llm.width + llm.feed_forward) if keeps_inputs else 0
    return norms + attention + 3 * item_bytes * llm.feed_forward + inputs


def llm_kept(llm: Llama, batch: Batch, item_bytes: int, *, keeps_inputs: bool, recomputed: bool) -> float:
    """Bytes that a micro-batch keeps in the LLM; recomputed: each layer's input, and one layer whole."""
    layer = kept_bytes(llm, batch.row_tokens, item_bytes, keeps_inputs=keeps_inputs)
    layers = llm.layers * item_bytes * llm.width + layer if recomputed else llm.layers * layer
    return batch.tokens * (layers + 4 * llm.width + 4 + (item_bytes * llm.width if keeps_inputs else 0))


def gathered_bytes(llm: Llama, mapper: Mapper, item_bytes: int, placement: str, ranks: int) -> float:
    """Bytes of whole weights that are there at once; what is used again within the reuse distance is not let go."""
    if placement == "replicated" or (placement == "zero3" and ranks == 1):  # one rank's part is the whole
        return 0.0
    window = max(llm.vocabulary * llm.width, REUSE // 2) + PREFETCH
    # A gather has the rank's parts in a row, everyone's parts in a row, and the weights copied out of these.
    return item_bytes * (2 + 1 / ranks) * min(llm.parameters + mapper.parameters, window)


def mapper_terms(
    mapper: Mapper, precision: str, ranks: int, zero_stage: int, *, is_here: bool = True, on_cpu: bool = False
) -> dict[str, float]:
    """Bytes of the mapper and its optimizer on one rank, by term.

    Args:
        zero_stage: 0 is plain torch, which shards nothing.
        is_here: False where weights wait in host memory.
    """
    item_bytes, trained = 4 if precision == "fp32" else 2, mapper.parameters
    shards = ranks if zero_stage else 1  # of masters and moments
    gradient = {0: 4 * trained, 1: 4 * trained * (1 + 1 / ranks), 2: 8 * trained / ranks, 3: 4 * trained / ranks}
    bucket = 4 * (min(trained, BUCKET) if on_cpu else BUCKET)
    return {
        "mapper_weights": item_bytes * trained / (ranks if zero_stage == 3 else 1) if is_here else 0.0,
        "mapper_masters": 4 * trained / shards,
        "mapper_moments": 8 * trained / shards,
        "mapper_gradient": gradient[zero_stage],
        "bucket": bucket if zero_stage else 0.0,
    }


def memory_terms(
    llm: Llama, mapper: Mapper, batch: Batch, placement: str, ranks: int, precision: str, *, recomputed: bool = False,
    on_cpu: bool = False, zero_stage: int | None = None,
) -> dict[str, float]:  # fmt: skip
    """Bytes of one rank of stage 2 at the turn from forward to backward, by term.

    Args:
        on_cpu: what was waiting in host memory is here; a replicated LLM in the bf16 of its file is mapped, each
            rank counts its share; a buffer counts where it is written; imports count apart.
        zero_stage: of the mapper where the LLM is replicated; None: ZeRO-1 in fp16, which needs it, else plain torch.
    """
    item_bytes, partitioned = 4 if precision == "fp32" else 2, placement != "replicated"
    stage = 3 if partitioned else zero_stage if zero_stage is not None else int(precision == "fp16")
    is_here = placement != "offload" or on_cpu
    llm_weights = item_bytes * llm.parameters / (ranks if partitioned or (on_cpu and precision == "bf16") else 1)
    return {
        "llm_weights": llm_weights if is_here else 0.0,
        "gathered": gathered_bytes(llm, mapper, item_bytes, placement, ranks),
        **mapper_terms(mapper, precision, ranks, stage, is_here=is_here, on_cpu=on_cpu),
        "llm_kept": llm_kept(llm, batch, item_bytes, keeps_inputs=partitioned, recomputed=recomputed),
        "mapper_kept": batch.items
        * batch.positions
        * mapper.kept_bytes(item_bytes, mapper.mask_bytes(item_bytes, on_cpu=on_cpu)),
        "logits": (12 if item_bytes == 4 else item_bytes + 12) * batch.items * batch.answer * llm.vocabulary,
        "context": 0.0 if on_cpu else CONTEXT_BYTES,
    }


def pretrain_terms(
    mapper: Mapper, frames: int, ranks: int, precision: str, zero_stage: int, *, on_cpu: bool = False
) -> dict[str, float]:
    """Bytes of one rank of stage 1 at the turn from forward to backward, by term.

    Args:
        frames: padded ones of a micro-batch.
    """
    positions, item_bytes = frames // FRAMES_PER_POSITION, 4 if precision == "fp32" else 2
    return {
        **mapper_terms(mapper, precision, ranks, zero_stage, on_cpu=on_cpu),
        "mapper_kept": positions * mapper.kept_bytes(item_bytes, mapper.mask_bytes(item_bytes, on_cpu=on_cpu)),
        "loss_kept": LOSS_BYTES * mapper.output_width * positions,
        "features": FEATURE_BYTES * frames * mapper.cfg.widths[0],
        "context": 0.0 if on_cpu else CONTEXT_BYTES,
    }
