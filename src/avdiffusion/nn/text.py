"""Texts as sequences of vectors, to be attended to. B texts, N tokens, D width, h heads."""

import logging
from collections import OrderedDict
from collections.abc import Sequence
from functools import cache, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avdiffusion.nn.blocks import full_precision

END = 256  # the token after a text's bytes
KEPT = 1024  # texts whose embeddings are kept: 400 MB of t5-base at 128 tokens
log = logging.getLogger(__name__)


class ByteEncoder(nn.Module):
    """A pre-norm transformer over the UTF-8 bytes of texts, trained with the model.

    `forward(texts, device)` gives [B, N, D] and a mask [B, N], True at a text's bytes and at the
    token that ends it; elsewhere the vectors are zero. N is always `max_length`, and what is no
    text is not attended to, so a text's vectors do not depend on its neighbours. A longer text is
    cut.
    """

    def __init__(
        self,
        *,
        width: int = 256,
        layers: int = 4,
        heads: int = 4,
        max_length: int = 128,
        dropout: float = 0.0,
    ):
        super().__init__()
        if width % heads:
            raise ValueError(f"a width of {width} does not split into {heads} heads")
        self.width, self.max_length = width, max_length
        self.token = nn.Embedding(END + 1, width)
        self.position = nn.Embedding(max_length, width)
        self.blocks = nn.ModuleList(_Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, texts: Sequence[str], device: torch.device | str) -> tuple[Tensor, Tensor]:
        rows, lengths = [], []
        for text in texts:
            found = [*text.encode(), END]
            if len(found) > self.max_length:
                say_cut(self.max_length)
                found = [*found[: self.max_length - 1], END]
            lengths.append(len(found))
            rows.append(found + [END] * (self.max_length - len(found)))
        tokens = moved(torch.tensor(rows, device="cpu"), device)
        places = torch.arange(self.max_length, device=device)
        mask = places < moved(torch.tensor(lengths, device="cpu"), device)[:, None]
        x = self.token(tokens) + self.position.weight
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x) * mask[..., None], mask


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, h, N, D / h]
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        x = x + self.dropout(self.out(found.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm(x)))))


class T5Encoder(nn.Module):
    """The frozen encoder of a T5 (Raffel et al. 2020, https://arxiv.org/abs/1910.10683) or mT5.

    `forward(texts, device)` gives its last hidden states, float32 [B, N, D], N = `max_length`, and
    where `mask_padding` a mask [B, N] of the tokens that are text, else None: in the published
    models (Schneider et al. 2023, https://arxiv.org/abs/2301.11757) padding is attended to.

    `name` is that of a model on the Hugging Face hub, of a `revision`, or a local folder as
    `save_pretrained` writes it. It is read when it is first needed, and is no part of this module:
    checkpoints, averages and optimisers hold nothing of it. Only tables of tensors
    (.safetensors) are read and only architectures of the package transformers built, so a name
    from a stranger's checkpoint runs no code. Embeddings of the last texts are kept.
    """

    def __init__(
        self,
        name: str = "t5-base",
        *,
        width: int = 768,
        max_length: int = 128,
        mask_padding: bool = False,
        revision: str | None = None,
    ):
        super().__init__()
        self.name, self.revision = name, revision
        self.width, self.max_length, self.mask_padding = width, max_length, mask_padding

    def forward(
        self, texts: Sequence[str], device: torch.device | str
    ) -> tuple[Tensor, Tensor | None]:
        device = torch.device(device)
        if device.type == "meta":  # where only shapes are asked for
            shape = (len(texts), self.max_length)
            mask = torch.ones(shape, dtype=torch.bool, device=device)
            return torch.empty(*shape, self.width, device=device), self._mask(mask)
        model = _pretrained(self.name, self.revision, self.max_length)
        if model.width != self.width:
            raise ValueError(
                f"the text encoder {self.name} is {model.width} wide, not {self.width}: "
                f"set its width={model.width}"
            )
        embedding, mask = model(texts, device)
        return embedding, self._mask(mask)

    def _mask(self, mask):
        return mask if self.mask_padding else None


class _Pretrained:
    """A T5 with its tokeniser, and the embeddings of the last `KEPT` texts, in main memory."""

    def __init__(self, name: str, revision: str | None, max_length: int):
        try:
            import transformers
        except ImportError:
            raise ValueError(
                f"the text encoder {name} needs the package transformers, which is not installed. "
                'Run: pip install -e ".[text]" -c constraints.txt'
            ) from None
        given = {"revision": revision, "trust_remote_code": False}
        try:
            config = transformers.AutoConfig.from_pretrained(name, **given)
            if config.model_type not in ("t5", "mt5"):
                raise ValueError(
                    f"the text encoder {name} is no T5 but a {config.model_type}: name one of the "
                    "families T5, T5 v1.1, ByT5, mT5"
                )
            family = {"t5": transformers.T5EncoderModel, "mt5": transformers.MT5EncoderModel}
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(name, **given)
            self.model = family[config.model_type].from_pretrained(
                name, config=config, revision=revision, use_safetensors=True, dtype=torch.float32
            )
        except OSError as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"the text encoder {name} cannot be had: {reason} It is fetched once from the "
                "Hugging Face hub and then lies in its cache; elsewhere set its name to a local "
                "folder, as save_pretrained writes it (model.safetensors and the tokeniser's files)"
            ) from error
        self.model.eval().requires_grad_(False)
        self.width, self.max_length = config.d_model, max_length
        self.kept = OrderedDict()

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """Embeddings [B, N, D] and mask [B, N]."""
        new = [text for text in dict.fromkeys(texts) if text not in self.kept]
        # one by one: side by side each would depend, to rounding, on the others
        fresh = {text: self._embedded([text], device)[0] for text in new}
        for text in texts:  # the last used are last
            self.kept[text] = fresh[text] if text in fresh else self.kept.pop(text)
        pairs = [self.kept[text] for text in texts]
        while len(self.kept) > KEPT:
            self.kept.popitem(last=False)
        return tuple(moved(torch.stack(part), device) for part in zip(*pairs, strict=True))

    def _embedded(self, texts, device):
        """(embedding [N, D], mask [N]) of each, in main memory."""
        if max(len(ids) for ids in self.tokenizer(texts)["input_ids"]) > self.max_length:
            say_cut(self.max_length)
        shape = {"padding": "max_length", "truncation": True, "max_length": self.max_length}
        found = self.tokenizer(texts, return_tensors="pt", **shape).to(device)
        with full_precision(device.type):  # kept for calls in whatever precision
            states = self.model.to(device)(found["input_ids"], found["attention_mask"])[0]
        return list(zip(states.float().cpu(), found["attention_mask"].bool().cpu(), strict=True))


@lru_cache(maxsize=2)
def _pretrained(name: str, revision: str | None, max_length: int) -> _Pretrained:
    """The one that all modules of this process share."""
    return _Pretrained(name, revision, max_length)


def moved(x: Tensor, device: torch.device | str) -> Tensor:
    """On the device, for whose work nobody waits."""
    if torch.device(device).type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


@cache
def say_cut(most: int) -> None:
    """Once for every length."""
    log.warning("texts of more than %d tokens are cut there: max_length allows more", most)
