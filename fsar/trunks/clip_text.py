"""CLIP's text side (Radford et al. 2021): text -> token numbers -> a vector like a frame's."""

from __future__ import annotations

import gzip
import html
import unicodedata
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from fsar.trunks.clip import Transformer
from shards_spec.errors import ConfigError

HEAD_WIDTH = 64  # channels of a head, in every published CLIP
NAMES = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")
LENGTH = 77  # tokens that CLIP's text tower reads
# The words of CLIP's tokenizer.
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
MERGES = 49_152 - 256 - 2  # lines of the file that CLIP uses, after the first
NAME = "bpe_simple_vocab_16e6.txt.gz"
END = "</w>"  # marks the last piece of a word


class ClipText(nn.Module):
    """A causal transformer, read at the end-of-text token, which has the largest number."""

    def __init__(self, *, tokens: int, length: int, width: int, depth: int, channels: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(tokens, width)
        self.positional_embedding = nn.Parameter(torch.zeros(length, width))
        self.transformer = Transformer(width, depth=depth, heads=width // HEAD_WIDTH, causal=True)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.zeros(width, channels))

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor]) -> Self:
        """Make the tower of a CLIP model's whole state dict, whose shapes give its sizes.

        Raises:
            ConfigError: there is no text tower in it.
        """
        own = {name: value.float() for name, value in state.items() if name.startswith(NAMES)}
        if not {"token_embedding.weight", "positional_embedding", "text_projection"} <= own.keys():
            raise ConfigError("the weights hold no CLIP text tower; give the whole published file, such as ViT-B-16.pt")
        (tokens, width), (length, _) = own["token_embedding.weight"].shape, own["positional_embedding"].shape
        depth = len({name.split(".")[2] for name in own if name.startswith("transformer.resblocks.")})
        channels = own["text_projection"].shape[1]
        tower = cls(tokens=tokens, length=length, width=width, depth=depth, channels=channels)
        try:
            tower.load_state_dict(own)
        except RuntimeError as error:
            last = str(error).splitlines()[-1].strip()
            raise ConfigError(f"the weights are of no CLIP text tower: {last}") from error
        return tower.eval()

    def forward(self, tokens: Tensor) -> Tensor:
        """[n, length] int64 -> [n, C], not normalised."""
        x = self.token_embedding(tokens) + self.positional_embedding
        x = self.ln_final(self.transformer(x))
        ends = tokens.argmax(dim=1)  # [n]
        out: Tensor = x[torch.arange(len(tokens), device=tokens.device), ends] @ self.text_projection
        return out


class ClipTokenizer:
    """Byte-pair encoding of lower-cased text by `bpe_simple_vocab_16e6.txt.gz`.

    OpenAI's own also repairs text (ftfy), for example curled quotes and ligatures; here they stay
    as they are.

    Raises:
        ConfigError: the package tokenizers is missing, or the file is not that vocabulary.
    """

    def __init__(self, vocabulary: Path) -> None:
        try:
            from tokenizers import Regex, Tokenizer, models, pre_tokenizers  # noqa: PLC0415 -- an extra
        except ImportError as error:
            raise ConfigError('CLIP\'s texts need the package tokenizers: pip install "fsar[clip]"') from error
        merges = read_merges(vocabulary)
        pieces = [*byte_symbols(), *(symbol + END for symbol in byte_symbols()), *map("".join, merges)]
        self.start, self.end = len(pieces), len(pieces) + 1
        self.size = len(pieces) + 2
        numbers = {piece: number for number, piece in enumerate(pieces)}
        try:
            model = models.BPE(vocab=numbers, merges=merges, end_of_word_suffix=END)
        except Exception as error:  # the package raises no narrower kind
            raise ConfigError(f"{vocabulary} is not CLIP's vocabulary: {error}") from error
        self._tokenizer = Tokenizer(model)
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Texts -> token numbers [n, 77] int64: start, pieces, end, zeros; long texts are cut."""
        rows = torch.zeros(len(texts), LENGTH, dtype=torch.int64)
        for row, text in zip(rows, texts, strict=True):
            whole = unicodedata.normalize("NFC", html.unescape(html.unescape(text)))
            clean = " ".join(whole.split()).lower()
            pieces = self._tokenizer.encode(clean).ids[: LENGTH - 2]
            row[: len(pieces) + 2] = torch.tensor([self.start, *pieces, self.end])
        return rows


def byte_symbols() -> list[str]:
    """List a printable character for each of the 256 bytes, in the order of CLIP's vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in chain(printable, range(256, 512 - len(printable)))]


def read_merges(path: Path) -> list[tuple[str, str]]:
    """Read the pairs of pieces to join, in order; ConfigError if it is not CLIP's vocabulary."""
    try:
        lines = gzip.decompress(path.read_bytes()).decode().split("\n")[1 : MERGES + 1]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as CLIP's vocabulary ({error}); give {NAME}") from error
    pairs = [tuple(line.split()) for line in lines]
    if len(pairs) != MERGES or any(len(pair) != 2 for pair in pairs):
        raise ConfigError(f"{path} holds {len(pairs)} merges, not {MERGES} pairs; give {NAME} of the CLIP repository")
    return [(first, second) for first, second in pairs]
